"""One optimizer update: its backward passes, clipping, and what happens if a loss is not finite."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..runtime.distributed import all_finite, gather_records
from ..runtime.sharding import fill_gradients, forget_gradients


logger = get_logger(__name__)


class Updates:
    """
    Accumulates gradients and applies them, the same way on every rank.

    If a loss or the gradient is not finite on any rank, the update is left out on all ranks, and reported with the rows
    concerned. A parameter that no backward pass of an update reaches, such as one of an unused expert, has a gradient of
    zero under every engine: AdamW's averages of it are still updated.

    Args:
        accelerator (`Accelerator`):
            Knows when the backward passes of an update are complete.
        optimizer (`torch.optim.Optimizer`):
            The prepared optimizer.
        parameters (`list[torch.Tensor]`):
            The trained parameters.
        max_grad_norm (`float`):
            Gradients are clipped to this norm. DeepSpeed clips by its own configuration.
        max_skipped_updates (`int`):
            Updates that may be left out before the run stops.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        parameters: list[torch.Tensor],
        *,
        max_grad_norm: float,
        max_skipped_updates: int,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.parameters = parameters
        self.max_grad_norm = max_grad_norm
        self.max_skipped_updates = max_skipped_updates
        self.num_skipped = 0
        self.grad_norm = torch.zeros(())
        self._micro_batches: list[tuple[torch.Tensor, list[str]]] = []

    def begin(self) -> None:
        """Start from gradients of zero."""
        forget_gradients(self.optimizer)

    def backward(self, loss: torch.Tensor, sample_ids: Iterable[str], value: torch.Tensor | None = None) -> None:
        """
        Add the gradient of `loss`. If it is not finite on some rank, the gradient becomes NaN on all of them.

        Args:
            loss (`torch.Tensor`):
                Scalar to differentiate.
            sample_ids (`Iterable[str]`):
                Rows of the micro-batch, for the report.
            value (`torch.Tensor`, *optional*):
                The loss to check and report, if `loss` is only a surrogate with the same gradient.
        """
        value = loss if value is None else value
        both = torch.stack([value.detach().float(), loss.detach().float()])
        is_finite = all_finite(self.accelerator, both)
        self._micro_batches.append((both.sum(), list(sample_ids)))
        # Every engine leaves out an update whose gradient norm is NaN: the backward passes stay the same everywhere.
        self.accelerator.backward(loss if is_finite else loss * torch.nan)

    def step(self, global_step: int) -> None:
        """
        Clip and update if this backward pass was the last of its update; otherwise keep accumulating.

        Raises:
            FloatingPointError: On every rank, if more than `max_skipped_updates` updates had to be left out.
        """
        if self.accelerator.sync_gradients:
            fill_gradients(self.parameters)
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
            self.grad_norm = torch.as_tensor(norm, device=self.accelerator.device)
            if torch.isfinite(self.grad_norm):
                self.optimizer.step()
            else:
                self._report(global_step)
            self._micro_batches.clear()
        self.optimizer.zero_grad()

    def _report(self, global_step: int) -> None:
        """Report the ranks and rows that made the update non-finite. A collective."""
        self.num_skipped += 1
        rank = self.accelerator.process_index
        records = gather_records([(rank, float(value), ", ".join(ids)) for value, ids in self._micro_batches])
        spoilt = [record for record in records if not math.isfinite(record[1])]
        reason = "; ".join(f"rank {rank}: loss {value}, rows {ids}" for rank, value, ids in spoilt or records)
        what = "a loss is not finite" if spoilt else "the gradient is not finite"
        message = f"Step {global_step}: {what}, update left out, number {self.num_skipped} of this run ({reason})."
        if self.num_skipped > self.max_skipped_updates:
            raise FloatingPointError(f"{message} `max_skipped_updates` is {self.max_skipped_updates}.")
        logger.warning(message)
