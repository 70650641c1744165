"""The weights that a run starts with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ignite.engine import Events
from monai.engines import Evaluator
from torch.optim.swa_utils import AveragedModel

from scripts.training.pretrained import load_pretrained
from scripts.training.resumable_trainer import ResumableTrainer
from scripts.training.resume import resume_run
from scripts.training.shortcut_fit import fit_shortcut

__all__ = ["InitialWeights"]


class InitialWeights:
    """
    Trainer handler that sets the network's weights before the first step. It loads the newest checkpoint, if ``resume`` is
    set and there is one. Otherwise it loads ``pretrained``, if that is given; fits the linear shortcut to the training data,
    if ``fit_shortcut`` is set and the shortcut is as it was built; and sets the average to the result.

    Args:
        network: the network, not wrapped.
        average: of its weights, or None.
        ckpt_dir: folder of the checkpoints to resume.
        resume: whether to continue from the newest of them.
        to_load: what a checkpoint holds besides the network, by name, as :py:class:`scripts.training.TrainingSaver` has it.
        evaluator: the validation engine, which gets back its best metric when a run is resumed.
        pretrained: path of weights; empty for none.
        load: gets network and path, and loads ``pretrained``; by default for an
            :py:class:`scripts.autoencoderkl.AutoencoderKL`.
        fit_shortcut: whether to fit the shortcut of such a network.

    Raises:
        ValueError: when training starts, for checkpoints or weights that cannot be used.
        FileNotFoundError: when training starts and there is no ``pretrained``.
    """

    def __init__(
        self,
        network: Any,
        average: AveragedModel | None = None,
        *,
        ckpt_dir: str,
        resume: bool,
        to_load: dict[str, Any],
        evaluator: Evaluator,
        pretrained: str | None = None,
        load: Callable[[Any, str], None] = load_pretrained,
        fit_shortcut: bool = False,
    ) -> None:
        self.network = network
        self.average = average
        self.ckpt_dir = ckpt_dir
        self.resume = resume
        self.to_load = to_load
        self.evaluator = evaluator
        self.pretrained = pretrained
        self.load = load
        self.fit_shortcut = fit_shortcut

    def attach(self, engine: ResumableTrainer) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: ResumableTrainer) -> None:
        if self.resume and resume_run(engine, self.ckpt_dir, self.network, self.to_load, self.evaluator):
            return
        if self.pretrained:
            self.load(self.network, self.pretrained)
        if self.fit_shortcut:
            loader: Any = engine.state.dataloader
            fit_shortcut(self.network.shortcut, loader.dataset, loader.batch_sampler)
        if self.average is not None:
            self.average.module.load_state_dict(self.network.state_dict())
