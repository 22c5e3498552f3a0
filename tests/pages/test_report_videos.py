"""Which videos a run's page shows."""

from pathlib import Path

from hy_prfl.pages.report_videos import samples_to_show


def test_too_many_videos_are_left_out_and_counted(run_dir: Path) -> None:
    size = sum(path.stat().st_size for path in (run_dir / "validation").glob("*/0000.mp4"))
    shown, note = samples_to_show(run_dir / "validation", 6, budget=size)
    assert [name for name, _ in shown] == ["0000"]
    assert note.startswith("1 of 3 samples at 4 of 4 validations")
    shown, note = samples_to_show(run_dir / "validation", 2, budget=1e9, num_steps=2)
    assert [[step for step, _ in videos] for _, videos in shown] == [[200, 800]] * 2
    assert note.startswith("2 of 3 samples at 2 of 4 validations")
