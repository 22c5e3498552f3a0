"""The meter of the simulation counts memory and FLOPs."""

from pathlib import Path
from typing import Any

import torch

from hy_prfl.planning.simulation import MemoryMeter


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
