"""The quality of reconstructions.

- ``metrics`` are the numbers that MONAI lacks: a new column of the report begins there.
- ``evaluation_saver`` writes CSV, JSON and the report; ``html_report`` has labels and meanings of its columns.
- ``viewer`` packs volumes into a page, for ``viewer.js``; ``worst_volumes`` keeps those that are shown.
- ``pictures`` draws planes and errors, ``html_pages`` renders any report as one file.
"""

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
