"""Rollouts that serve several reward updates: when a new one is due, and what a checkpoint keeps of them."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from ..configs.prfl import PRFLTrainingConfig
from ..rollout.buffer import RolloutBuffer
from ..runtime.distributed import any_rank
from .run import Run


logger = get_logger(__name__)

# A change of one of these options makes stored rollouts useless.
OPTIONS = {
    "pretrained_model_name_or_path", "revision", "variant", "prompt_dataset", "num_inference_steps", "sampler_flow_shift",
    "step_range", "num_chained_steps", "rollout_states",
}  # fmt: skip


class ReusedRollouts:
    """
    Keeps the last rollouts, and decides when a new one is due, the same on all ranks.

    A new one is due after `rollout_interval` updates, or once the generator's velocity at the stored states has changed by
    more than `max_rollout_staleness`.

    Args:
        config (`PRFLTrainingConfig`):
            Options of the run.
        run (`Run`):
            Its accelerator and replica.
    """

    def __init__(self, config: PRFLTrainingConfig, run: Run) -> None:
        self.config = config
        self.run = run
        self.buffer = RolloutBuffer(config.rollout_buffer_size)
        self.age = 0
        self.is_due = True
        self.are_stale = False
        # Batches of prompts taken so far; an update without a rollout takes none.
        self.num_batches = 0

    def begin_update(self) -> None:
        """Decide whether this update walks new chains."""
        if self.are_stale:
            self.buffer.clear()
        self.is_due = len(self.buffer) == 0 or self.age >= self.config.rollout_interval
        self.age = 1 if self.is_due else self.age + 1

    def end_update(self, changes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Check the staleness of the states that the update started from.

        Args:
            changes (`Sequence[torch.Tensor]`):
                Relative change of the velocity at each state, see [`~hy_prfl.rollout.buffer.relative_change`].

        Returns:
            Their mean, as a metric to log.
        """
        staleness = torch.stack(list(changes)).mean()
        limit = self.config.max_rollout_staleness
        self.are_stale = limit is not None and any_rank(self.run.accelerator, bool(staleness > limit))
        return {"rollout_staleness": staleness}

    def state(self) -> dict[str, Any]:
        """State for the JSON of a checkpoint."""
        return {
            "rollout_age": self.age,
            "rollouts_are_stale": self.are_stale,
            "num_reward_batches": self.num_batches,
            "num_rollouts": len(self.buffer),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. If there is nothing, every update so far took its batches of prompts."""
        self.age = state.get("rollout_age", 0)
        self.are_stale = state.get("rollouts_are_stale", False)
        default = state["global_step"] * self.config.gradient_accumulation_steps
        self.num_batches = state.get("num_reward_batches", default)

    def save(self, directory: Path) -> None:
        """Write the rollouts of this rank."""
        self.buffer.save(self._file(directory))

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """
        Read the rollouts of this rank.

        If there are none, or they are of another number of processes, the next update rolls out.
        """
        before = state["num_processes"], state["num_replicas"], state["train_batch_size"]
        now = self.run.accelerator.num_processes, self.run.num_replicas, self.config.train_batch_size
        if not state.get("num_rollouts"):
            return
        if before == now:
            self.buffer.load(self._file(directory))
        else:
            logger.warning(
                "%s: its rollouts are of other processes or batches; the next update walks new chains.", directory
            )

    def forget_outdated(self, changed: Collection[str]) -> None:
        """Drop the stored rollouts if a changed option changes the chains, or if their prompts are no longer those of the run."""
        # Without `prompt_dataset` the prompts are those of the clips.
        prompts = {"train_dataset"} if self.config.prompt_dataset is None else set()
        if (OPTIONS | prompts) & set(changed):
            self.buffer.clear()

    def _file(self, directory: Path) -> Path:
        return directory / f"rollouts-{self.run.accelerator.process_index}.safetensors"
