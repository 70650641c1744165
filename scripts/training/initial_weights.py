"""The weights that a training run starts with: of a checkpoint, of a file of any origin, of a fitted linear shortcut."""

from __future__ import annotations

import itertools
import logging
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch.optim.swa_utils import AveragedModel

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.progress import ProgressBar
from scripts.bundle.weights import autoencoder_in, named_as_here, read_weights, what_differs
from scripts.layers.linear_shortcut import LinearShortcut
from scripts.training.checkpoints import TrainingSaver
from scripts.training.repeatable_batches import RepeatableBatchSampler, training_patches
from scripts.training.trainer import ResumableTrainer

CODE_PATCHES, NEIGHBOUR_PATCHES = 64, 128  # that the code is fitted to, and then its decoder with neighbours
MONAI = {"initial_downsample_factor": 1, "downsample_factors": None, "initial_mode": "conv", "linear_shortcut": False}
LAYER = re.compile(r"(?:encoder|decoder)\.blocks\.\d+|decoder\.refine|quant_conv\w+|post_quant_conv|shortcut")
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class InitialWeights:
    """
    Trainer handler that sets the network's weights before the first step: those of the newest checkpoint, with ``resume``
    and if there is one. Otherwise it loads ``pretrained``, fits the linear shortcut to the training data, and sets the
    average to the result.

    Args:
        saver: checkpoints of the run.
        resume: whether to continue from the newest of them.
        average: average of the network's weights, or None.
        pretrained: path of weights; empty for none.
        load: function of network and path that loads ``pretrained``; by default :py:func:`load_pretrained`.
        fit_shortcut: whether to fit a shortcut that is as it was built.

    Raises:
        ValueError: when training starts, for checkpoints or weights that cannot be used.
        FileNotFoundError: when training starts and there is no ``pretrained``.
    """

    saver: TrainingSaver
    resume: bool = False
    average: AveragedModel | None = None
    pretrained: str | None = None
    load: Callable[[Any, str], None] | None = None
    fit_shortcut: bool = False

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: ResumableTrainer) -> None:
        if self.resume and self.saver.resume(engine):
            return
        network = self.saver.network
        if self.pretrained:
            (self.load or load_pretrained)(network, self.pretrained)
        if self.fit_shortcut:
            loader: Any = engine.state.dataloader
            fit_shortcut(network.shortcut, loader.dataset, loader.batch_sampler)
        if self.average is not None:
            self.average.module.load_state_dict(network.state_dict())


def fit_shortcut(shortcut: LinearShortcut | None, dataset: Any, sampler: RepeatableBatchSampler) -> None:
    """
    Fit a network's linear shortcut to training patches, the same in all processes. Nothing happens if there is no shortcut,
    or if it is not as it was built: fitted already, trained, or loaded.

    Args:
        shortcut: shortcut of a :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        dataset: the trainer's :py:class:`scripts.training.RepeatableDataset`.
        sampler: batch sampler of its loader.
    """
    if shortcut is None or not shortcut.is_as_built():
        return
    total = CODE_PATCHES + NEIGHBOUR_PATCHES
    patches = itertools.islice(training_patches(dataset, sampler), total)
    bar = iter(ProgressBar(patches, "fitting the shortcut", total, leave=False, unit="patch"))
    with torch.random.fork_rng():  # the same code in one process and in many
        torch.manual_seed(sampler.seed)
        number = shortcut.fit(itertools.islice(bar, CODE_PATCHES))
        shortcut.fit_neighbours(bar)
    if idist.get_world_size() > 1:
        for tensor in shortcut.state_dict().values():
            idist.broadcast(tensor, src=0)
    logger.info(f"linear shortcut: {len(shortcut.outer.analysis)} principal components of {number} blocks")


def load_pretrained(network: AutoencoderKL, path: str | Path) -> None:
    """
    Take over weights, layer by layer: where the networks have a layer in common, in the same order, with the same factor and
    shapes. The others are logged.

    Without a description beside them, weights are taken as those of MONAI's network with the same arguments and a factor of
    2 at every step, with the names of MONAI, GenerativeModels or MAISI, which enlarges trilinearly. They may be one value of
    a checkpoint's dictionary, under any key, and in float16.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, holds code, is not what its arguments say, or has no layer in common.
    """
    content, arguments = read_weights(path)
    state = autoencoder_in(content, path)
    arguments = arguments or content.get("arguments")  # of a checkpoint of this bundle
    if arguments is None:
        state, theirs = named_as_here(state)
        arguments = {**network.arguments, **MONAI, **theirs}
        logger.info(f"{path} has no JSON file beside it: it is taken for MONAI's network, with the other arguments as here")
    with torch.device("meta"):
        source = AutoencoderKL(**arguments)
    if differing := what_differs(source.arguments, network.arguments):
        logger.info(f"{path} was made for another network: {differing}")
    try:
        source.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold what its network has: {textwrap.shorten(str(error), 400)}") from None
    there, here = _layers(source), _layers(network)
    blocks = SequenceMatcher(None, list(there.values()), list(here.values()), autojunk=False).get_matching_blocks()
    pairs = {list(here)[b + i]: list(there)[a + i] for a, b, size in blocks for i in range(size)}
    if network.shortcut is not None and source.shortcut is None:  # they compute a small correction of the shortcut here
        encoder, decoder = list(network.encoder.blocks), list(network.decoder.blocks)  # type: ignore[arg-type]
        ends = (encoder[-2], decoder[-2], decoder[-1])  # norms, and a convolution
        corrections = (*ends, network.quant_conv_mu, network.quant_conv_log_sigma)
        pairs = {name: pairs[name] for name in pairs if network.get_submodule(name) not in corrections}
    if not pairs:
        raise ValueError(f"nothing in {path} fits this network: {differing}.")
    for name, name_there in pairs.items():
        network.get_submodule(name).load_state_dict(source.get_submodule(name_there).state_dict())
    left_out = ", ".join(name for name in here if name not in pairs)
    logger.info(f"training starts from {path}: {len(pairs)} of {len(here)} layers taken over")
    if left_out:
        logger.info(f"not taken over: {left_out}")


def _layers(network: AutoencoderKL) -> dict[str, str]:
    """The layers by name, in their order, and what they compute: their kind, shapes, factors and way of enlarging."""
    twice = [2] * network.arguments["spatial_dims"]  # MONAI's layers, which do not say it
    found = {}
    for name, layer in network.named_modules():
        if LAYER.fullmatch(name):
            is_enlargement = type(layer).__name__.lower() == "upsample"
            kind = "Upsample" if is_enlargement else repr(layer).replace("AEKLDownsample", "Downsample")
            shapes = {key: list(value.shape) for key, value in layer.state_dict().items()}
            enlarges = getattr(layer, "factors", twice), getattr(layer, "interpolation", "")
            found[name] = f"{name.partition('.')[0]} {kind} {shapes} {enlarges}"
    return found
