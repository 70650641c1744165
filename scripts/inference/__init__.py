"""Reconstruction, encoding and decoding of whole volumes: in one pass or streamed in slabs, over many files, from
exported networks; and samples of a generator.
"""

from scripts.inference.exported_networks import ExportedNetwork, refuse_latents
from scripts.inference.generator_inferers import SampleInferer, SpatialEncoder
from scripts.inference.inferers import ReconstructionInferer, StreamingInferer
from scripts.inference.samples import Samples
from scripts.inference.volume_runs import VolumeDataset, VolumeEvaluator, find_share, join_processes
