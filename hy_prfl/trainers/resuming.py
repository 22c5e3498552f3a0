"""Continues a run from a checkpoint, and says what is not as if it had never stopped."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from accelerate.logging import get_logger

from ..checkpointing import load_checkpoint, read_schedule, read_state
from ..provenance import CONFIG_FILE


if TYPE_CHECKING:
    from .base import Trainer

logger = get_logger(__name__)


def resume(trainer: "Trainer", checkpoint: Path) -> None:
    """
    Continue from a checkpoint, and say what is not as if the run had never stopped.

    The states of DeepSpeed's optimizers belong to one number of processes. With another one, or another engine, the
    optimizer starts anew from the saved weights.
    """
    state = read_state(checkpoint)
    trainer.load_state(state)
    num_processes = trainer.accelerator.num_processes
    is_same = (state["engine"], state["num_processes"]) == (trainer.engine, num_processes)
    if is_same or state["engine"] == trainer.engine == "whole":
        load_checkpoint(trainer.accelerator, checkpoint)
    else:
        _load_weights(trainer, checkpoint)
        logger.warning(
            "%s was written by %d processes with %s, this run has %d with %s: the moments of AdamW start from zero.",
            checkpoint,
            state["num_processes"],
            state["engine"],
            num_processes,
            trainer.engine,
        )
    trainer.load_average(checkpoint)
    if not is_same:
        logger.warning("The number of processes or the engine has changed: dropout draws other numbers.")
    before = state["num_replicas"], state["train_batch_size"]
    now = trainer.num_replicas, trainer.config.train_batch_size
    if before[0] * before[1] != now[0] * now[1]:
        logger.warning(
            "A global micro-batch was %d x %d clips and is %d x %d: the epoch goes on with other clips, some of "
            "them seen already, and noise of its own.",
            *before,
            *now,
        )
    logger.info("Continuing from %s.", checkpoint)
    _warn_of_changes(trainer, checkpoint / CONFIG_FILE)


def _load_weights(trainer: "Trainer", checkpoint: Path) -> None:
    """Load weights and schedule, and leave the optimizer as it is."""
    trainer.masters.write(trainer.masters.share_of(trainer.read_model(checkpoint)))
    schedule = trainer.lr_scheduler
    schedule.load_state_dict(read_schedule(checkpoint))
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate


def _warn_of_changes(trainer: "Trainer", saved: Path) -> None:
    before = yaml.safe_load(saved.read_text(encoding="utf-8"))
    for name, value in dataclasses.asdict(trainer.config).items():
        if before.get(name) != value and name != "resume_from_checkpoint":
            logger.warning("`%s` was %r before the checkpoint and is %r now.", name, before.get(name), value)
