"""What a run cost, by its record."""

import pytest

from hy_prfl.pages.report_cost import cost_rows


def test_measured_memory_is_that_of_the_fullest_gpu() -> None:
    record = {"started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:10:00+00:00", "finished_step": 100}
    rows, note = cost_rows([], [{**record, "peak_gpu_memory": [57_100_000_000, 58_250_000_000]}], None)
    assert ["GB of GPU memory", "-", "58.2"] in rows
    assert "that of tensors on the fullest GPU" in note
    rows, note = cost_rows([], [{**record, "peak_gpu_memory": []}], None)
    assert "GB of GPU memory" not in [row[0] for row in rows]
    assert "tensors" not in note
    with pytest.raises(ValueError, match="`peak_gpu_memory` must be a list of bytes, got 'much'"):
        cost_rows([], [{**record, "peak_gpu_memory": "much"}], None)


def test_a_resumed_run_costs_what_its_last_start_did() -> None:
    record = {"started": "2026-01-01T10:00:00+00:00", "finished": "2026-01-01T10:10:00+00:00", "num_processes": 1}
    rows, _ = cost_rows([], [{}, {**record, "resumed_step": 40, "finished_step": 100}], None)
    assert ["seconds per step", "-", "10"] in rows
    # One that goes on, or an old record.
    assert cost_rows([], [{"started": record["started"]}], None) == ([], "")
