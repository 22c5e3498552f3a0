"""The meter of the simulation counts memory and FLOPs."""

from pathlib import Path
from typing import Any

import torch

from hy_prfl.planning.simulation import MemoryMeter, Phase


def test_meter_counts_what_lives(tmp_path: Path) -> None:
    """Known sizes: views take no memory, and freed tensors are subtracted."""
    known = torch.zeros(100)
    with MemoryMeter([known], on_gpu=False) as meter:
        with meter.phase("first"):
            kept: Any = known + 1
            assert meter.live == 400
            _ = kept[:50] + 1
            view = kept.view(10, 10)
        del _
        assert meter.live == 400
        with meter.phase("second"):
            product = view @ view
        del kept, view
        assert meter.live == 400
        del product
    assert meter.live == 0
    assert meter.phases["first"].peak == 600
    assert meter.phases["second"].flops == 2 * 10**3


def test_a_phase_around_another_counts_what_follows_it() -> None:
    known = torch.zeros(10, 10)
    with MemoryMeter([known], on_gpu=False) as meter, meter.phase("outer"):
        before: Any = known @ known.repeat(1, 100)
        del before
        with meter.phase("inner"):
            kept = known @ known
            large: Any = kept.repeat(2, 1)
            del large
        _ = (kept + 1) @ known.repeat(1, 2)
    assert meter.phases["inner"] == Phase(peak=1200, kept=400, flops=2 * 10**3)
    assert meter.phases["outer"] == Phase(peak=400 + 400 + 800 + 800, kept=400 + 800, flops=4 * 10**3)
