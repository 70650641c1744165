"""Resumes a run from its newest checkpoint that is not damaged."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import Evaluator

from scripts.bundle.json_files import problem_of_content
from scripts.bundle.weights import check_arguments, what_differs, what_is_wrong
from scripts.training.checkpoints import find_checkpoints, set_random_states
from scripts.training.resumable_trainer import ResumableTrainer

__all__ = ["resume_run"]

RENAMED = {"psnr_before": "metric_before"}  # in checkpoints of earlier versions
_POSITION = {"type": "integer", "minimum": 0, "description": "an integer from 0 on"}
CONTENT = {  # schema of a checkpoint, as far as it is not tensors; the arguments are compared with those of the network
    "type": "object",
    "required": ["arguments", "network", "scaler", "trainer", "evaluator", "random"],
    "properties": {
        "trainer": {
            "type": "object",
            "required": ["iteration", "epoch", "epoch_length"],
            "properties": {"iteration": _POSITION, "epoch": _POSITION, "epoch_length": {**_POSITION, "minimum": 1}},
        },
        **{
            name: {"type": "object", "description": "a dictionary"}
            for name in ("arguments", "network", "scaler", "evaluator", "random")
        },
    },
    "description": "a dictionary",
}
SCHEDULE_LENGTH = ("warmup_steps", "t_total")  # of MONAI's schedules: the config of a resumed run may have more epochs
logger = logging.getLogger(__name__)


def resume_run(
    trainer: ResumableTrainer, ckpt_dir: str | Path, network: Any, to_load: dict[str, Any], evaluator: Evaluator
) -> bool:
    """
    Load the newest checkpoint that is not damaged, if there is one. For the arguments see
    :py:class:`scripts.training.InitialWeights`.

    Raises:
        ValueError: when all checkpoints are damaged, when it is of another network or other settings that must stay, or when
            processes find different ones.
    """
    found = _newest_whole(Path(ckpt_dir))
    iterations = idist.all_gather(found[1]["trainer"]["iteration"] if found else 0)
    if isinstance(iterations, list) and len(set(iterations)) > 1:
        raise ValueError(
            f"the processes found checkpoints of different iterations in {ckpt_dir}: {sorted(set(iterations))}. "
            "All machines must see the same `ckpt_dir`."
        )
    if found is None:
        logger.info(f"nothing to resume in {ckpt_dir}: training starts from the beginning")
        return False
    path, content = found
    _refuse_other_settings(to_load, content, path)
    check_arguments(content["arguments"], network.arguments, path)
    network.load_state_dict(content["network"])
    _load_items(to_load, content, path)
    if content["scaler"]:  # empty when the run so far had no scaler
        trainer.scaler.load_state_dict(content["scaler"])
    for name, value in content["evaluator"].items():
        setattr(evaluator.state, RENAMED.get(name, name), value)
    _set_position(trainer, **content["trainer"])
    set_random_states(content["random"])
    logger.info(f"resumed {path} after iteration {trainer.state.iteration}, epoch {trainer.state.epoch} complete")
    if trainer.state.epoch >= trainer.state.max_epochs:
        logger.info(f"all {trainer.state.max_epochs} epochs are done; set `epochs` higher to train on")
    return True


def _newest_whole(ckpt_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    paths = find_checkpoints(ckpt_dir)
    for path in paths:
        try:
            return path, _read(path)
        except Exception as error:  # damaged archives raise errors of any type
            reason = what_is_wrong(error)
        logger.warning(f"{path} {reason}. Trying the one before.")
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoints in {ckpt_dir} can be used; {paths[-1]} {reason}. "
            "Remove them to start again, or choose another `ckpt_dir`."
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # the format of torch, which does not check the checksums in it
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} in it has changed")
    checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    problem = problem_of_content(checkpoint, CONTENT)
    if problem is not None:
        raise ValueError(problem)
    return checkpoint


def _refuse_other_settings(to_load: dict[str, Any], content: dict[str, Any], path: Path) -> None:
    """Items with ``lasting`` say which settings in their state cannot change between two parts of a run."""
    for name, item in to_load.items():
        if name not in content or not hasattr(item, "lasting"):
            continue
        saved = item.lasting(content[name])
        here = {key: value for key, value in item.lasting(item.state_dict()).items() if key in saved}
        details = what_differs(saved, here)
        if details:
            raise ValueError(
                f"{path} cannot be resumed: {details}. Go on with what was there, or start a run in another `output_dir` "
                "(from these weights, with `pretrained`)."
            )


def _load_items(to_load: dict[str, Any], content: dict[str, Any], path: Path) -> None:
    for name, item in to_load.items():
        if item is None:
            continue
        if name not in content:
            logger.warning(f"{path} has no `{name}`, which this run has: the run starts with a new one")
            continue
        length = {key: value for key, value in item.state_dict().items() if key in SCHEDULE_LENGTH}
        item.load_state_dict({**content[name], **length})


def _set_position(trainer: ResumableTrainer, iteration: int, epoch: int, epoch_length: int) -> None:
    complete = iteration // epoch_length
    if epoch_length != trainer.state.epoch_length:
        logger.warning(
            f"an epoch has {trainer.state.epoch_length} batches and had {epoch_length}: going on after epoch {complete}"
        )
        iteration = complete * trainer.state.epoch_length
    trainer.state.iteration, trainer.state.epoch = iteration, complete
