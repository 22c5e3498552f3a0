"""Videos, images and curves for the trackers of Accelerate; scalars go through `Accelerator.log` without this."""

import io
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..data.container import open_video
from ..inference.video_files import write_video


logger = get_logger(__name__)

# Trackers that this module can send videos and images to.
MEDIA_TRACKERS = ("tensorboard", "wandb", "trackio")

# TensorBoard keeps videos as GIFs inside its event files: longer sides are scaled down to this.
GIF_SIDE = 320


def announce_trackers(accelerator: Accelerator) -> None:
    """
    Warn once, after the trackers have started, which of them will show no videos and no curves.

    Args:
        accelerator (`Accelerator`):
            After `init_trackers`.
    """
    others = [tracker.name for tracker in accelerator.trackers if tracker.name not in MEDIA_TRACKERS]
    if others:
        logger.warning("%s: videos and curves are not logged there, only to %s.", others, ", ".join(MEDIA_TRACKERS))


def log_videos(
    accelerator: Accelerator, videos: Mapping[str, str | Path | np.ndarray], *, step: int, fps: float
) -> None:
    """
    Show videos in every tracker that can. Only the main process logs.

    Args:
        accelerator (`Accelerator`):
            Its trackers are used.
        videos (`Mapping`):
            Videos by their names in the tracker: mp4 files, or frames `(num_frames, height, width, 3)` as
            `write_video` takes them, uint8 or float in [0, 1].
        step (`int`):
            Step of the run that they belong to.
        fps (`float`):
            Frame rate of frames, and of TensorBoard's GIFs.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not accelerator.is_main_process or not videos:
        return
    for name, video in videos.items():
        if not isinstance(video, np.ndarray) and not Path(video).is_file():
            raise FileNotFoundError(f"video '{name}': there is no file '{video}'.")
    with _as_files(videos, fps) as files:
        for tracker in _media_trackers(accelerator):
            run = accelerator.get_tracker(tracker, unwrap=True)
            if tracker == "tensorboard":
                for name, path in files.items():
                    _add_gif(run, name, path, step=step, fps=fps)
            elif tracker == "wandb":
                import wandb

                run.log({name: wandb.Video(str(path), format="mp4") for name, path in files.items()}, step=step)
            else:
                import trackio

                run.log({name: trackio.Video(path) for name, path in files.items()}, step=step)


def log_figure(accelerator: Accelerator, name: str, figure: Figure, *, step: int) -> None:
    """Show a figure under this name in every tracker that can. Only the main process logs."""
    if not accelerator.is_main_process:
        return
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    for tracker in _media_trackers(accelerator):
        run = accelerator.get_tracker(tracker, unwrap=True)
        if tracker == "tensorboard":
            run.add_image(name, pixels, global_step=step, dataformats="HWC")
            run.flush()
        elif tracker == "wandb":
            import wandb

            run.log({name: wandb.Image(pixels)}, step=step)
        else:
            import trackio

            run.log({name: trackio.Image(pixels)}, step=step)


def log_timestep_curves(accelerator: Accelerator, metrics: Mapping[str, float], *, step: int, name: str) -> None:
    """
    Show the metrics that were measured at several timesteps as curves, one panel for each metric.

    Args:
        metrics (`Mapping[str, float]`):
            Metrics, of which `<metric>/t<timestep>` are drawn, as [`RewardEvaluator`] and [`SampleEvaluator`] return them.
        name (`str`):
            Name of the image in the trackers.
    """
    if accelerator.is_main_process and _media_trackers(accelerator):
        figure = draw_timestep_curves(metrics)
        if figure is not None:
            log_figure(accelerator, name, figure, step=step)


def draw_timestep_curves(metrics: Mapping[str, float]) -> Figure | None:
    """
    A panel for each metric that was measured at more than one timestep, its values against the timestep.

    Returns:
        `matplotlib.figure.Figure`, or None if there is no such metric.
    """
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for key, value in metrics.items():
        match = re.fullmatch(r"(.+)/t(\d+(?:\.\d+)?)", key)
        if match is not None:
            curves[match[1]][float(match[2])] = value
    curves = {metric: points for metric, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    num_columns = math.ceil(math.sqrt(len(curves)))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(3.6 * num_columns, 2.6 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for panel, (metric, points) in zip(panels[: len(curves)], curves.items(), strict=True):
        timesteps = sorted(points)
        panel.plot(timesteps, [points[timestep] for timestep in timesteps], marker="o")
        panel.set_title(metric)
        panel.set_xlabel("timestep")
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.remove()
    return figure


def _media_trackers(accelerator: Accelerator) -> list[str]:
    return [tracker.name for tracker in accelerator.trackers if tracker.name in MEDIA_TRACKERS]


@contextmanager
def _as_files(videos: Mapping[str, str | Path | np.ndarray], fps: float) -> Iterator[dict[str, Path]]:
    """The videos as mp4 files; W&B and Trackio copy them when they are logged."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for index, (name, video) in enumerate(videos.items()):
            if isinstance(video, np.ndarray):
                files[name] = Path(folder) / f"{index}.mp4"
                write_video(files[name], video, round(fps))
            else:
                files[name] = Path(video)
        yield files


def _add_gif(writer: Any, name: str, path: Path, *, step: int, fps: float) -> None:
    """`SummaryWriter.add_video` without moviepy: the animated GIF that it would store."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = []
    with open_video(path) as container:
        for frame in container.decode(video=0):
            image = frame.to_image()
            image.thumbnail((GIF_SIDE, GIF_SIDE))
            frames.append(image)
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    width, height = frames[0].size
    image_summary = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image_summary)]), step)
    writer.flush()
