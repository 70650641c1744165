"""Reconstruction, encoding and decoding of whole volumes: in one pass or streamed in slabs, over many files, from
exported networks, and from codecs of any origin.
"""

from scripts.inference.codecs import read_codecs
from scripts.inference.exported_networks import ExportedNetwork, refuse_latents
from scripts.inference.inferers import ReconstructionInferer
from scripts.inference.streaming import StreamingInferer
from scripts.inference.volume_runs import VolumeDataset, VolumeEvaluator, find_share, join_processes

__all__ = [
    "ExportedNetwork",
    "ReconstructionInferer",
    "StreamingInferer",
    "VolumeDataset",
    "VolumeEvaluator",
    "find_share",
    "join_processes",
    "read_codecs",
    "refuse_latents",
]
