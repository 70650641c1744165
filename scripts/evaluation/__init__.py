"""The quality of reconstructions: metrics that MONAI lacks, pictures, and the report of an evaluation."""

from scripts.evaluation.evaluation_saver import EvaluationSaver
from scripts.evaluation.metrics import (
    ForegroundPSNRMetric,
    GridEnergyMetric,
    LargeVolumeMSSSIMMetric,
    LargeVolumeSSIMMetric,
    SharpnessMetric,
    in_file_units,
    shrunk_and_image,
)
from scripts.evaluation.pictures import ReconstructionPicture

__all__ = [
    "EvaluationSaver",
    "ForegroundPSNRMetric",
    "GridEnergyMetric",
    "LargeVolumeMSSSIMMetric",
    "LargeVolumeSSIMMetric",
    "ReconstructionPicture",
    "SharpnessMetric",
    "in_file_units",
    "shrunk_and_image",
]
