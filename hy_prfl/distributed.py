"""What the ranks have to agree on."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def all_finite(accelerator: Accelerator, value: torch.Tensor) -> bool:
    """Whether `value` is finite on every rank; the same answer on all of them. A collective."""
    finite = torch.isfinite(value.detach()).all().to(torch.float32)
    return bool(accelerator.reduce(finite, reduction="sum") == accelerator.num_processes)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on at least one rank; the same answer on all of them. A collective."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum") > 0)


def mean_over_ranks(accelerator: Accelerator, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean of each scalar over the ranks, as Python floats. A collective; every rank passes the same keys."""
    if not metrics:
        return {}
    stacked = torch.stack([value.detach().float() for value in metrics.values()])
    reduced = accelerator.reduce(stacked, reduction="mean").tolist()
    return dict(zip(metrics, reduced, strict=True))


def gather_records(records: list[Any]) -> list[Any]:
    """Concatenation of every rank's list, in rank order. A collective."""
    return gather_object(records)
