"""Reconstruction, encoding and decoding of whole volumes: in one pass or streamed in slabs, over many files, from
exported networks; and samples of a generator.
"""

from scripts.inference.exported_networks import ExportedNetwork, refuse_latents
from scripts.inference.inferers import ReconstructionInferer
from scripts.inference.samples import DrawStartd, SampleInferer, SaveSampled, plan_samples
from scripts.inference.streaming import StreamingInferer
from scripts.inference.volume_runs import VolumeDataset, VolumeEvaluator, find_share, join_processes

__all__ = [
    "DrawStartd",
    "ExportedNetwork",
    "ReconstructionInferer",
    "SampleInferer",
    "SaveSampled",
    "StreamingInferer",
    "VolumeDataset",
    "VolumeEvaluator",
    "find_share",
    "join_processes",
    "plan_samples",
    "refuse_latents",
]
