"""The curves of a run's page have the numbers of the run's files."""

import json
from pathlib import Path

import numpy as np
import pytest

from hy_prfl.pages.report_figures import calibration, sigma_figures, training_figures
from hy_prfl.scripts.report import main
from tests.pages.html import Page


def test_the_curves_are_those_of_the_run(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = training_figures(lines)
    assert list(figures) == ["flow loss", "reward"]
    train, validation = figures["reward"].axes[0].lines
    np.testing.assert_allclose(train.get_xydata(), [[step, 0.3 + step / 2000] for step in (200, 400, 600, 800)])
    np.testing.assert_allclose(validation.get_ydata(), [0.2, 0.4, 0.6, 0.8])
    first, last = sigma_figures(lines)["reward by noise level"].axes[0].lines
    np.testing.assert_allclose(first.get_xydata(), [[0.2, 0.2], [0.6, 0.2], [1.0, 0.2]])
    assert (first.get_label(), last.get_label()) == ("step 200", "step 800")


def test_calibration(run_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    # Of rewards in [0.2, 0.3) one of four is good, of those in [0.8, 0.9) three of four.
    rows = [(0.25, 1), (0.25, 0), (0.25, 0), (0.25, 0), (0.85, 1), (0.85, 1), (0.85, 1), (0.85, 0)]
    lines = ["id,label,reward,reward_t200", *(f"{index},{good},{r},{r}" for index, (r, good) in enumerate(rows))]
    table.write_text("\n".join([*lines, "x,,0.5,0.5"]))
    figures, cells, note = calibration(table)
    curve = next(iter(figures.values())).axes[0].lines[0]
    np.testing.assert_allclose(curve.get_xydata(), [[0.25, 0.25], [0.85, 0.75]])
    brier = np.mean([(reward - good) ** 2 for reward, good in rows])
    assert cells == [["sigma 0.2", "8", "0.55", "0.5", f"{brier:.3g}"]]
    assert "8 labelled clips" in note
    main([str(run_dir), "--scores", str(table)])
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    assert "Share of good clips by reward" in {image["alt"] for image in page.all("img")}
    table.write_text("id,reward,reward_t200\nx,0.5,0.5\n")
    with pytest.raises(ValueError, match="no clips with a label"):
        calibration(table)
