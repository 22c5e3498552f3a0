"""
Makes the picture and the figures of the demo in README and docs/costs.md from a finished `make demo`:

    python -m examples.shapes.picture --demo_dir outputs/demo

The picture shows the first held-out captions, not selected by their verdicts: a row before PRFL, one after it and one after
a round of labels, with the same noise in each column. `summary.json` of the same run is copied without its seconds, which depend on the machine.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.shapes.clips import FPS, NUM_FRAMES
from examples.shapes.report import ARM_COLORS
from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.video import read_video
from hy_prfl.runtime.atomic_writes import write_text


RESULTS_DIR = Path(__file__).with_name("results")
ROWS = {"base": "before", "prfl": "after PRFL", "round": "and a round"}
# In pixels: side of a video, gap between two videos, height of a line of text, width of the row names.
SIDE, GAP, LINE, NAMES = 96, 6, 18, 84
GOOD, BAD = "#2c8a57", "#b3402f"
HOLD = 5  # number of frames that the last frame is shown for
NUM_COLORS = 64


@dataclass(kw_only=True)
class PictureConfig:
    """Options of `picture`."""

    demo_dir: str = field(default="outputs/demo", metadata={"help": "Folder of a finished demo."})
    output_dir: str = field(default=str(RESULTS_DIR), metadata={"help": "Folder for picture and figures."})
    num_videos: int = field(default=6, metadata={"help": "Videos in a row."})

    def __post_init__(self) -> None:
        check(self.num_videos >= 1, "num_videos", self.num_videos, "at least 1")


def draw(videos: Sequence[Sequence[np.ndarray]], verdicts: Sequence[Sequence[str]]) -> list[Image.Image]:
    """
    One picture for each frame of the videos.

    Args:
        videos:
            For each row in `ROWS` its videos, uint8 arrays `(num_frames, height, width, 3)`.
        verdicts:
            For each video the judge's verdict, "good" or the kind of failure.
    """
    columns = len(videos[0])
    size = (NAMES + columns * (SIDE + GAP), len(videos) * (SIDE + LINE + GAP))
    font = ImageFont.load_default(12)
    frames = []
    for index in range(len(videos[0][0])):
        image = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(image)
        for row, arm in enumerate(ROWS):
            top = row * (SIDE + LINE + GAP)
            pen.text((4, top + SIDE // 2 - 8), ROWS[arm], fill=ARM_COLORS[arm], font=font)
            for column in range(columns):
                left = NAMES + column * (SIDE + GAP)
                video = Image.fromarray(videos[row][column][index])
                image.paste(video.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
                verdict = verdicts[row][column]
                pen.text((left + 2, top + SIDE + 2), verdict, fill=GOOD if verdict == "good" else BAD, font=font)
        frames.append(image)
    return frames


def main(argv: Sequence[str] | None = None) -> Path:
    """Write `before_after.gif` and `summary.json`, and return the picture's path."""
    config = parse_config(PictureConfig, sys.argv[1:] if argv is None else argv, description=__doc__)
    demo, output_dir = Path(config.demo_dir), Path(config.output_dir)
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    del summary["seconds"]
    videos, verdicts = [], []
    for arm in ROWS:
        rows = json.loads((demo / "videos" / arm / "manifest.json").read_text(encoding="utf-8"))[: config.num_videos]
        said = json.loads((demo / "verdicts" / f"{arm}.json").read_text(encoding="utf-8"))["verdicts"]
        kinds = {each["id"]: each["kind"] for each in said}
        files = [demo / "videos" / arm / row["video"] for row in rows]
        videos.append([read_video(path, fps=FPS, num_frames=NUM_FRAMES) for path in files])
        verdicts.append([kinds[row["id"]] for row in rows])
    frames = draw(videos, verdicts)
    # One palette without dithering makes the file three times smaller.
    palette = frames[-1].quantize(NUM_COLORS, dither=Image.Dither.NONE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    duration = 1000 // FPS
    durations = [duration] * len(others) + [HOLD * duration]
    output_dir.mkdir(parents=True, exist_ok=True)
    picture = output_dir / "before_after.gif"
    temporary = picture.with_name(picture.name + ".tmp")
    first.save(temporary, "GIF", save_all=True, append_images=others, loop=0, duration=durations)
    temporary.replace(picture)
    write_text(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return picture


if __name__ == "__main__":
    print(main())
