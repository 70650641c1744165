"""What every run needs: checks of its config, readable errors, files that are written atomically, weights with a
description of their network, precision, the machine and its processes, progress bars and signals.
"""

from scripts.bundle.config import check_config, executed_config
from scripts.bundle.errors import short_messages
from scripts.bundle.files import item_hash
from scripts.bundle.precision import Precision, autocast_dtype, choose_precision
from scripts.bundle.progress import ProgressBar, VolumeProgress
from scripts.bundle.signals import end_on_signals, leave_signals_to_main
from scripts.bundle.weights import WeightsLoader, load_weights, save_weights
