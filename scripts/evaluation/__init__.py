"""The quality of reconstructions, and in ``samples`` that of generated volumes.

- ``metrics``: the numbers that MONAI lacks.
- ``evaluation_saver`` writes what an evaluation found, ``comparison_saver`` what a comparison of codecs did; ``results`` is
  what they share, ``html_pages`` the reports, with labels and meanings of their columns.
- ``codecs`` reads codecs of any origin, ``comparison`` runs several on the same volumes, ``block_dct`` is the code that
  every codec is compared with.
- ``pictures`` draws planes and errors, ``viewer`` packs whole volumes into a page, ``worst_volumes`` keeps what is shown.
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
