"""Which volumes a run uses, how they are checked and preprocessed, and how results are restored to files: lists and splits,
checks, the intensity window, conditions, restored volumes, latents, sample and clinical volumes.
"""

from scripts.data.intensity_window import ScaleIntensityWindowd
from scripts.data.latents import LoadLatentd, SaveLatentd, find_latents, save_latent_scale, without_whole_latents
from scripts.data.restored_volumes import DescribeSourced, RestoreVolumed, SaveImageOfRecordd
from scripts.data.sample_volumes import prepare_demonstration_heads, prepare_sample_volumes
from scripts.data.spatial_conditions import LoadSpatiald, learn_kinds
from scripts.data.spatial_files import find_spatial_items
from scripts.data.synthetic_patches import HeadPatchd, ProceduralVolumed
from scripts.data.volume_checks import RefuseLabelMapd, usable_volumes
from scripts.data.volume_lists import affordable_cache_rate, find_images, guesses_labels, training_and_validation
from scripts.data.volume_reader import VolumeReader
