"""Tracking of a training run by MLflow."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.engines import Evaluator
from monai.handlers import MLFlowHandler

from scripts.bundle.files import write_atomically
from scripts.bundle.precision import dtype_name
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["MLflowRun"]

FILE = "mlflow_run.txt"  # in the run's folder: the id of its run


class MLflowRun(MLFlowHandler):
    """
    Trainer handler: MONAI's, with a run of MLflow for each run of training. A resumed run goes on with its own, also when
    that was finished; MONAI's joins any run of the experiment that is not.

    Losses and metrics are means over epochs, because the database is too slow for values of every step. Parameters are the
    plain values at the top of the config, and precision; what another part of the run changed is a tag. The whole config is
    an artifact.

    Args:
        evaluator: validation engine, whose metrics are tracked.
        run_dir: folder of the run, which keeps the id of its run of MLflow.
        config: config of the run, as JSON has it.
        kwargs: arguments of ``MLFlowHandler``.
    """

    def __init__(self, evaluator: Evaluator, run_dir: str, config: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(iteration_log=False, close_on_complete=True, **kwargs)
        self.evaluator: Any = evaluator
        self.file = Path(run_dir) / FILE
        self.config = config

    def attach(self, engine: ResumableTrainer) -> None:  # type: ignore[override]
        super().attach(engine)
        self.evaluator.add_event_handler(Events.COMPLETED, self._log_validation, engine)

    def _log_validation(self, evaluator: Evaluator, trainer: ResumableTrainer) -> None:
        if self.cur_run is None:  # before the first step
            self.start(trainer)
        self._default_epoch_log(evaluator)

    def start(self, engine: ResumableTrainer) -> None:  # type: ignore[override]
        """Make the run, or go on with it, and log parameters and config."""
        if self.cur_run is not None:
            return
        self._set_experiment()
        run = self.cur_run = self._own_run(resumed=engine.state.iteration > 0)
        run_id, known = run.info.run_id, run.data.params
        autocast = engine.autocast
        precision = {"amp": autocast["enabled"], "amp_dtype": dtype_name(autocast["dtype"])}
        wanted = {key: str(value) for key, value in {**_plain(self.config), **precision}.items()}
        self._log_params({key: value for key, value in wanted.items() if key not in known})
        for key, value in wanted.items():
            if known.get(key, value) != value:
                self.client.set_tag(run_id, key, value)
        self.client.log_dict(run_id, self.config, f"config_{engine.state.iteration:08d}.json")

    def _own_run(self, resumed: bool) -> Any:
        if resumed and self.file.is_file():
            run_id = self.file.read_text().strip()
            with contextlib.suppress(Exception):  # errors of any type where another server or database does not know it
                self.client.update_run(run_id, status="RUNNING")
                return self.client.get_run(run_id)
        assert self.experiment is not None
        run = self.client.create_run(experiment_id=self.experiment.experiment_id, run_name=self.run_name)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run.info.run_id.encode(), self.file)
        return run


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The values at the top of a config that are neither expressions nor objects."""
    texts = {key: json.dumps(value) for key, value in config.items()}
    return {key: config[key] for key, text in texts.items() if not any(mark in text for mark in ("{", '"$', '"@', '"%'))}
