"""The quality of reconstructions, and in ``samples`` that of generated volumes."""

from scripts.evaluation.codec_evaluation import CodecEvaluator, EvaluationSaver
from scripts.evaluation.codecs import Codec, read_codecs, with_block_dcts
from scripts.evaluation.metrics import (
    EdgePSNRMetric,
    ForegroundPSNRMetric,
    GridEnergyMetric,
    LargeVolumeMSSSIMMetric,
    LargeVolumeSSIMMetric,
    SharpnessMetric,
    in_file_units,
    shrunk_and_image,
)
from scripts.evaluation.pictures import ReconstructionPicture
from scripts.evaluation.samples.sample_evaluation import SampleEvaluation
