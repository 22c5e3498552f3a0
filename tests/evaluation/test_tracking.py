"""The trackers are the real ones; what they stored is read back from their files."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hy_prfl.evaluation.tracking import (
    GIF_SIDE,
    announce_trackers,
    draw_timestep_curves,
    log_figure,
    log_timestep_curves,
    log_videos,
)


METRICS = {"auc/t1000": 0.5, "auc/t201": 0.9, "auc": 0.7, "loss/t201": 0.3, "loss/t1000": 0.7, "reward": 1.0}


class PlainTracker(GeneralTracker):
    """A tracker of the user's own, for scalars."""

    name = "plain"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.values: list[dict] = []

    @property
    def tracker(self) -> list[dict]:
        return self.values

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None = None) -> None:
        self.values.append(values)


@pytest.fixture
def accelerator(tmp_path: Path) -> Accelerator:
    """Accelerator with a running TensorBoard."""
    configuration = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path / "logs"))
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=configuration)
    accelerator.init_trackers("hy_prfl", config={"seed": 0})
    return accelerator


def read_events(accelerator: Accelerator) -> EventAccumulator:
    accelerator.end_training()
    events = EventAccumulator(str(accelerator.get_tracker("tensorboard").logging_dir), size_guidance={"images": 0})
    events.Reload()
    return events


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


class TestTensorBoard:
    def test_videos_are_animated(
        self, accelerator: Accelerator, write_video: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = write_video(tmp_path / "clip.mp4", num_frames=9)
        frames = np.zeros((5, 32, 640, 3), dtype=np.float32)
        for index in range(5):
            frames[index, :, 100 * index : 100 * index + 80] = 1.0
        log_videos(accelerator, {"validation/clip": path, "made": frames}, step=3, fps=10)
        log_videos(accelerator, {"validation/clip": path}, step=4, fps=10)
        events = read_events(accelerator)
        assert set(events.Tags()["images"]) == {"validation/clip", "made"}
        stored = events.Images("validation/clip")
        assert [event.step for event in stored] == [3, 4]
        with Image.open(io.BytesIO(stored[0].encoded_image_string)) as gif:
            assert (gif.format, gif.n_frames, gif.size) == ("GIF", 9, (48, 32))
            assert gif.info["duration"] == 100
            assert gif.info["loop"] == 0
            expected = decode(path)
            for index in range(9):
                gif.seek(index)
                shown = np.asarray(gif.convert("RGB")).astype(int)
                assert abs(shown - expected[index]).mean() < 4
        with Image.open(io.BytesIO(events.Images("made")[0].encoded_image_string)) as gif:
            assert (gif.n_frames, gif.size) == (5, (GIF_SIDE, 16))
            gif.seek(4)
            brightness = np.asarray(gif.convert("L")).mean(axis=0)
            assert brightness[202:238].min() > 200
            assert brightness[:190].max() < 50

    def test_a_figure(self, accelerator: Accelerator) -> None:
        figure = Figure(figsize=(2, 1), dpi=50, facecolor=(1.0, 0.0, 0.2))
        log_figure(accelerator, "figure", figure, step=1)
        events = read_events(accelerator)
        with Image.open(io.BytesIO(events.Images("figure")[0].encoded_image_string)) as image:
            assert image.size == (100, 50)
            assert image.convert("RGB").getpixel((50, 25)) == (255, 0, 51)

    def test_curves(self, accelerator: Accelerator) -> None:
        log_timestep_curves(accelerator, METRICS, step=7, name="validation/by_timestep")
        log_timestep_curves(accelerator, {"reward": 1.0}, step=7, name="nothing")
        events = read_events(accelerator)
        assert events.Tags()["images"] == ["validation/by_timestep"]
        assert events.Images("validation/by_timestep")[0].step == 7


def test_curves_go_through_the_metrics() -> None:
    figure = draw_timestep_curves(METRICS)
    assert figure is not None
    lines = {panel.get_title(): panel.lines[0].get_xydata().tolist() for panel in figure.axes}
    assert lines == {"auc": [[201, 0.9], [1000, 0.5]], "loss": [[201, 0.3], [1000, 0.7]]}
    assert draw_timestep_curves({"auc": 1.0, "auc/t201": 1.0}) is None


def test_a_missing_file_is_named(accelerator: Accelerator, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"video 'clip': there is no file '.*none\.mp4'"):
        log_videos(accelerator, {"clip": tmp_path / "none.mp4"}, step=0, fps=16)


def test_other_trackers_are_announced_once_and_left_alone(
    write_video: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = PlainTracker()
    accelerator = Accelerator(cpu=True, log_with=plain)
    accelerator.init_trackers("hy_prfl")
    announce_trackers(accelerator)
    assert "['plain']: videos and curves are not logged there" in caplog.text
    caplog.clear()
    log_videos(accelerator, {"clip": write_video(tmp_path / "clip.mp4")}, step=0, fps=16)
    log_timestep_curves(accelerator, METRICS, step=0, name="curves")
    accelerator.log({"loss": 1.0}, step=0)
    assert plain.values == [{"loss": 1.0}]
    assert caplog.text == ""


def test_known_trackers_are_not_announced(accelerator: Accelerator, caplog: pytest.LogCaptureFixture) -> None:
    announce_trackers(accelerator)
    assert caplog.text == ""


# W&B and Trackio read their environment when they are imported, and start threads: a process of their own.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from accelerate import Accelerator
from hy_prfl.evaluation.tracking import log_timestep_curves, log_videos

tracker, clip = sys.argv[1:]
accelerator = Accelerator(cpu=True, log_with=tracker)
accelerator.init_trackers("hy_prfl", config={"seed": 0})
accelerator.log({"train/loss": 0.5}, step=2)
frames = np.random.default_rng(0).random((5, 16, 16, 3))
log_videos(accelerator, {"validation/clip": Path(clip), "frames": frames}, step=2, fps=16)
log_timestep_curves(accelerator, {"auc/t201": 0.9, "auc/t1000": 0.5}, step=2, name="validation/by_timestep")
accelerator.end_training()
"""


def run_tracker(name: str, clip: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", SCRIPT, name, str(clip)]
    subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_wandb_offline(write_video: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    clip = write_video(tmp_path / "clip.mp4")
    run_tracker("wandb", clip, {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"})
    (run,) = tmp_path.glob("wandb/offline-run-*")
    videos = sorted(run.glob("files/media/videos/**/*.mp4"))
    assert [path.relative_to(run / "files/media/videos").parts[0][:6] for path in videos] == ["frames", "valida"]
    assert videos[1].read_bytes() == clip.read_bytes()
    assert decode(videos[0]).shape == (5, 16, 16, 3)
    assert len(list(run.glob("files/media/images/validation/by_timestep*.png"))) == 1
    log = next(run.glob("run-*.wandb")).read_bytes()
    assert b"train/loss" in log
    assert b"validation/clip" in log


def test_trackio_local(write_video: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    clip = write_video(tmp_path / "clip.mp4")
    run_tracker("trackio", clip, {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"})
    media = tmp_path / "trackio" / "media"
    videos = sorted(media.rglob("*.mp4"), key=lambda path: path.stat().st_size)
    assert clip.read_bytes() in [path.read_bytes() for path in videos]
    assert (5, 16, 16, 3) in [decode(path).shape for path in videos]
    assert len(videos) == 2
    assert len(list(media.rglob("*.png"))) == 1
