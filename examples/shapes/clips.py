"""
Writes short mp4 clips of coloured shapes that move over a wall, with captions and exact labels.

    python -m examples.shapes.clips --output_dir outputs/clips/train --num_clips 96 --split train

A good clip shows what its caption says: the shape moves steadily in the named direction and does not change. A bad clip
fails in one of five ways. Clip `index` of a seed is always the same, however many clips are written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from hy_prfl.configs.base import check
from hy_prfl.configs.parser import parse_config
from hy_prfl.inference.video_files import write_video


NUM_FRAMES, SIZE, FPS = 17, 48, 16

SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (224, 40, 40), "green": (40, 190, 60), "blue": (48, 80, 232), "yellow": (240, 216, 32)}
DIRECTIONS = {"to the left": (-1, 0), "to the right": (1, 0), "up": (0, -1), "down": (0, 1)}
WALLS = ("plain", "striped", "checkered", "dotted")

MOTION_FAILURES = ("frozen", "jittering", "wrong_direction")
BODY_FAILURES = ("deforming", "vanishing")
FAILURES = (*MOTION_FAILURES, *BODY_FAILURES)


@dataclass(frozen=True)
class Caption:
    """What a clip should show."""

    shape: str
    color: str
    direction: str
    wall: str

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} moves {self.direction} over a {self.wall} wall"


@dataclass(frozen=True)
class Clip:
    """
    Everything that determines the pixels of one clip. Lengths are in pixels, times in frames.

    `positions` `(NUM_FRAMES, 2)` are the centres (x, y), `stretch` `(NUM_FRAMES,)` is the width divided by the height of
    the shape, `opacity` `(NUM_FRAMES,)` is in [0, 1].
    """

    caption: Caption
    failure: str | None
    radius: float
    brightness: float
    positions: np.ndarray
    stretch: np.ndarray
    opacity: np.ndarray

    @property
    def labels(self) -> dict[str, int | None]:
        """
        Exact labels of the clip.

        `physics_quality` is about the motion, `human_quality` about the shape itself. `text_alignment` is 0 if the motion
        is not that of the caption, and unknown if the shape deforms or vanishes. `blur_quality` is always unknown.
        """
        return {
            "text_alignment": None if self.failure in BODY_FAILURES else int(self.failure is None),
            "blur_quality": None,
            "physics_quality": int(self.failure not in MOTION_FAILURES),
            "human_quality": int(self.failure not in BODY_FAILURES),
        }


def split_captions(split: Literal["train", "held_out"], num_held_out_captions: int = 24) -> list[Caption]:
    """The captions of a split. The held-out captions are the same for every seed of the clips."""
    captions = [
        Caption(shape, color, direction, wall)
        for shape in SHAPES
        for color in COLORS
        for direction in DIRECTIONS
        for wall in WALLS
    ]
    order = np.random.default_rng(2024).permutation(len(captions))
    chosen = order[:num_held_out_captions] if split == "held_out" else order[num_held_out_captions:]
    return [captions[index] for index in sorted(chosen)]


def draw_clip(
    index: int, *, captions: Sequence[Caption], good_share: float, failures: Sequence[str] = FAILURES, seed: int = 0
) -> Clip:
    """
    Clip number `index` of an endless list.

    The share `good_share` of the first N clips is good, for any N. The bad ones take the `failures` in turn.
    """
    rng = np.random.default_rng([seed, index])
    num_good_before = int(index * good_share + 1e-9)
    good = int((index + 1) * good_share + 1e-9) > num_good_before
    failure = None if good else failures[(index - num_good_before) % len(failures)]
    caption = captions[rng.integers(len(captions))]
    radius, brightness = rng.uniform(7.0, 9.0), rng.uniform(0.95, 1.05)
    time = np.arange(NUM_FRAMES)

    direction = caption.direction
    if failure == "wrong_direction":
        direction = str(rng.choice([other for other in DIRECTIONS if other != direction]))
    velocity = rng.uniform(0.9, 1.3) * np.array(DIRECTIONS[direction])
    if failure in ("frozen", "jittering"):
        velocity = np.zeros(2)
    path = (time[:, None] - (NUM_FRAMES - 1) / 2) * velocity
    if failure == "jittering":
        path = np.repeat(rng.uniform(-5.0, 5.0, size=(NUM_FRAMES // 2 + 1, 2)), 2, axis=0)[:NUM_FRAMES]
    room = np.maximum(SIZE / 2 - radius - np.abs(path).max(axis=0), 0.0)
    positions = SIZE / 2 + rng.uniform(-room, room) + path

    stretch, opacity = np.ones(NUM_FRAMES), np.ones(NUM_FRAMES)
    if failure == "deforming":
        stretch = np.exp(rng.choice([-1.0, 1.0]) * 0.9 * np.sin(2 * np.pi * time / (NUM_FRAMES - 1)))
    if failure == "vanishing":
        opacity = np.clip(1.0 - (time - rng.integers(4, 9)) / 3.0, 0.0, 1.0)
    return Clip(caption, failure, radius, brightness, positions, stretch, opacity)


def render_clip(clip: Clip) -> np.ndarray:
    """Frames of a clip, `uint8` RGB of shape `(NUM_FRAMES, SIZE, SIZE, 3)`."""
    wall = render_wall(clip.caption.wall, clip.brightness)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    squash = np.sqrt(clip.stretch)[:, None, None]
    x = (x - clip.positions[:, 0, None, None]) / squash
    y = (y - clip.positions[:, 1, None, None]) * squash
    coverage = np.clip(0.5 - shape_distance(clip.caption.shape, x, y, clip.radius), 0.0, 1.0)
    alpha = (coverage * clip.opacity[:, None, None])[..., None]
    frames = (1 - alpha) * wall[None, :, :, None] + alpha * np.array(COLORS[clip.caption.color])
    return np.round(frames).astype(np.uint8)


def render_wall(wall: str, brightness: float) -> np.ndarray:
    """Grey wall, an array of shape `(SIZE, SIZE)`. Only the moving shapes have a colour."""
    y, x = np.mgrid[:SIZE, :SIZE]
    if wall == "striped":
        light = (x // 8) % 2 == 0
    elif wall == "checkered":
        light = (x // 8 + y // 8) % 2 == 0
    elif wall == "dotted":
        light = (x % 8 - 3.5) ** 2 + (y % 8 - 3.5) ** 2 > 5
    else:
        light = np.ones_like(x, dtype=bool)
    return brightness * np.where(light, 160.0, 120.0)


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline of a shape with a circumscribed circle of about `radius`. Negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.8 * radius
    slope = np.hypot(2.0, 1.0)
    return np.maximum(y - 0.9 * radius, (2.0 * np.abs(x) - y - 0.9 * radius) / slope)


@dataclass(kw_only=True)
class ClipsConfig:
    """Options of `clips`."""

    output_dir: str = field(metadata={"help": "Folder for the clips and their manifest.json."})
    num_clips: int = field(default=96, metadata={"help": "Number of clips."})
    good_share: float = field(default=0.5, metadata={"help": "Share of good clips, 0 to 1."})
    failures: list[str] = field(
        default_factory=lambda: list(FAILURES), metadata={"help": f"Failures of the bad clips: {', '.join(FAILURES)}."}
    )
    split: Literal["train", "held_out"] = field(
        default="train", metadata={"help": "Use the captions for training, or the held-out ones."}
    )
    num_held_out_captions: int = field(default=24, metadata={"help": "Number of held-out captions, of 192."})
    seed: int = field(default=0, metadata={"help": "Seed of the clips."})

    def __post_init__(self) -> None:
        check(self.num_clips >= 1, "num_clips", self.num_clips, "at least 1")
        check(0 <= self.good_share <= 1, "good_share", self.good_share, "in [0, 1]")
        known = bool(self.failures) and set(self.failures) <= set(FAILURES)
        check(known, "failures", self.failures, f"one or more of {', '.join(FAILURES)}")
        check(
            1 <= self.num_held_out_captions < 192, "num_held_out_captions", self.num_held_out_captions, "in [1, 191]"
        )
        check(self.seed >= 0, "seed", self.seed, "at least 0")


def write_clips(config: ClipsConfig) -> Path:
    """Write the clips, and then `manifest.json`: if it exists, the clips are complete."""
    output_dir = Path(config.output_dir)
    (output_dir / "videos").mkdir(parents=True, exist_ok=True)
    captions = split_captions(config.split, config.num_held_out_captions)
    rows = []
    for index in range(config.num_clips):
        clip = draw_clip(
            index, captions=captions, good_share=config.good_share, failures=config.failures, seed=config.seed
        )
        name = f"{config.split}-{config.seed}-{index:05d}"
        write_video(output_dir / "videos" / f"{name}.mp4", render_clip(clip), FPS)
        row = {"id": name, "video": f"videos/{name}.mp4", "caption": str(clip.caption), **clip.labels}
        rows.append({**row, "failure": clip.failure})
    manifest = output_dir / "manifest.json"
    temporary = manifest.with_name(".manifest.json")
    temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    temporary.replace(manifest)
    return manifest


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(ClipsConfig, argv, description=__doc__)
    print(f"{config.num_clips} clips: {write_clips(config)}")


if __name__ == "__main__":
    main()
