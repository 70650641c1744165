"""The quality of reconstructions, and in ``samples`` that of generated volumes.

- ``metrics`` are the numbers that MONAI lacks: a new column of the report begins there.
- ``evaluation_saver`` writes CSV, JSON and the report; ``html_report`` has labels and meanings of its columns.
- ``codecs`` reads codecs of any origin, ``comparison`` runs several on the same volumes, ``comparison_saver`` and
  ``comparison_page`` write what it found;
  ``block_dct`` is the code that every codec is compared with.
- ``viewer`` packs volumes into a page, for ``viewer.js``; ``worst_volumes`` keeps those that are shown.
- ``pictures`` draws planes and errors, ``html_pages`` renders any report as one file.
"""

from scripts.evaluation.codecs import read_codecs
from scripts.evaluation.comparison import Codec, ComparisonEvaluator
from scripts.evaluation.comparison_saver import ComparisonSaver
from scripts.evaluation.evaluation_saver import EvaluationSaver
from scripts.evaluation.metrics import (
    EdgePSNRMetric,
    ForegroundPSNRMetric,
    GridEnergyByFactorsMetric,
    GridEnergyMetric,
    LargeVolumeMSSSIMMetric,
    LargeVolumeSSIMMetric,
    SharpnessMetric,
    in_file_units,
    shrunk_and_image,
)
from scripts.evaluation.pictures import ReconstructionPicture
from scripts.evaluation.samples.sample_evaluation import SampleEvaluation

__all__ = [
    "Codec",
    "ComparisonEvaluator",
    "ComparisonSaver",
    "EdgePSNRMetric",
    "EvaluationSaver",
    "ForegroundPSNRMetric",
    "GridEnergyByFactorsMetric",
    "GridEnergyMetric",
    "LargeVolumeMSSSIMMetric",
    "LargeVolumeSSIMMetric",
    "ReconstructionPicture",
    "SampleEvaluation",
    "SharpnessMetric",
    "in_file_units",
    "read_codecs",
    "shrunk_and_image",
]
