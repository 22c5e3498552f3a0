"""
Tracks the shape of a clip through its frames and measures it, only from the pixels.

Only the shapes have a colour, so the shape is where the colour is.
"""

from collections.abc import Mapping
from functools import cache
from itertools import combinations

import numpy as np

from examples.shapes.clips import COLORS, DIRECTIONS, SIZE, Caption, shape_distance


# Radius of the window around a shape, relative to the radius of a disc with the same area.
WINDOW = 2.2


@cache
def chroma_of_colors() -> dict[str, np.ndarray]:
    """Each colour minus its mean over the channels (its grey), as RGB / 255."""
    return {name: (np.array(rgb) - np.mean(rgb)) / 255 for name, rgb in COLORS.items()}


@cache
def area_of_unit(shape: str) -> float:
    """Area of a shape of radius 1, measured on a fine grid."""
    axis = np.linspace(-1.2, 1.2, 601)
    inside = shape_distance(shape, axis[None, :], axis[:, None], 1.0) < 0
    return float(inside.sum() * (axis[1] - axis[0]) ** 2)


def smallest_angle() -> float:
    """Angle in radians between the two colours that are closest to each other."""
    return min(angle_between(*pair) for pair in combinations(chroma_of_colors().values(), 2))


def measure_video(frames: np.ndarray, caption: Caption) -> dict[str, float]:
    """All measurements of a clip except the radius, which depends on the kind of shape."""
    if frames.ndim != 4 or frames.shape[0] < 5 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"`frames` must have the shape (5 or more, {SIZE}, {SIZE}, 3), got {frames.shape}.")
    if not np.isfinite(frames).all():
        raise ValueError("`frames` must be finite, got a NaN or an infinity.")
    pixels = frames.astype(np.float32) / 255 if frames.dtype == np.uint8 else np.asarray(frames, dtype=np.float32)
    chroma = pixels - pixels.mean(axis=-1, keepdims=True)
    chroma = chroma - np.median(chroma, axis=(1, 2), keepdims=True)  # a tint of the whole frame is not the shape
    hue, strength = find_color(chroma)
    if strength == 0:
        return {"saturation": 0.0, "hue_error": np.nan}
    color, hue_error = nearest_color(hue)
    ideal = float(np.linalg.norm(chroma_of_colors()[color]))
    along = chroma @ hue
    along = np.where(along > 0.2 * strength, along, 0.0)  # faint stains on the wall do not belong to the shape
    cover = np.clip((along / strength - 0.25) / 0.5, 0, 1)
    by_frame = (cover[..., None] * chroma).sum(axis=(1, 2))
    return {
        "saturation": strength / ideal,
        "hue_error": hue_error,
        **measure_wall(pixels.mean(axis=-1), along),
        **measure_body(along / ideal, cover, np.array([angle_between(one, hue) for one in by_frame]), caption),
        **{f"hue_{axis}": float(value) for axis, value in zip("rgb", hue, strict=True)},
    }


def find_color(chroma: np.ndarray, num_frames: int = 4) -> tuple[np.ndarray, float]:
    """
    Direction and strength of the shape's colour.

    They are from the 2% most coloured pixels (half of the smallest shape) of the most coloured frames, because a shape
    may be visible in only a few frames.
    """
    length = np.linalg.norm(chroma, axis=-1)
    peak = np.sort(np.quantile(length, 0.98, axis=(1, 2)))[-num_frames:].mean()
    if peak < 1e-3:
        return np.zeros(3), 0.0
    core = chroma[length > 0.7 * peak]
    hue = core.mean(axis=0) / np.linalg.norm(core.mean(axis=0))
    return hue, max(float(np.median(core @ hue)), 0.0)


def nearest_color(hue: np.ndarray) -> tuple[str, float]:
    """Name of the nearest colour, and the angle to it in radians."""
    angles = {name: angle_between(hue, vector) for name, vector in chroma_of_colors().items()}
    name = min(angles, key=lambda key: angles[key])
    return name, angles[name]


def angle_between(one: np.ndarray, other: np.ndarray) -> float:
    """Angle between two vectors in radians; NaN if one of them is zero."""
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.arccos(np.clip(one @ other / lengths, -1, 1))) if lengths > 0 else np.nan


def measure_wall(light: np.ndarray, paint: np.ndarray) -> dict[str, float]:
    """Mean brightness of the wall and the standard deviation of its pattern, both in [0, 1]."""
    wall = light[paint == 0]
    return {"wall_light": float(wall.mean()), "wall_contrast": float(wall.std())} if wall.size else {}


def measure_body(paint: np.ndarray, cover: np.ndarray, hues: np.ndarray, caption: Caption) -> dict[str, float]:
    """
    Track the shape through the frames, and measure its size, form, position and motion.

    Args:
        paint (`np.ndarray` of shape `(num_frames, SIZE, SIZE)`):
            Amount of colour in each pixel, 1 inside a perfect shape. Its sum is the area, even if the edges are soft.
        cover (`np.ndarray` of shape `(num_frames, SIZE, SIZE)`):
            Share of each pixel that the shape covers, in [0, 1], with a sharpened outline.
        hues (`np.ndarray` of shape `(num_frames,)`):
            Angle in radians between the shape's colour in each frame and its colour in the whole clip.
    """
    total = cover.sum(axis=(1, 2))
    # The outline of a fading shape cannot be measured.
    visible = total > 0.6 * np.quantile(total, 0.75)
    if visible.sum() < 3:
        return {"presence": 0.0}
    times = np.flatnonzero(visible)
    bodies = cut_out(cover[times])
    area, aspect, spread, skew, cross = moments_of(bodies)
    painted = paint.sum(axis=(1, 2))
    usual = np.median(painted[times])
    return {
        "clutter": float(np.median(1 - area / total[times])),
        "spread": float(np.median(spread)),
        "presence": float(painted.min() / usual),
        "area": float(usual),
        "aspect_change": float(np.ptp(np.log(aspect))),
        "area_change": float(painted.max() / usual - 1),
        "hue_change": float(hues[times].max()),
        "skew": float(np.median(skew)),
        "cross": float(np.median(cross)),
        **measure_motion(times, centres_of(np.where(bodies > 0, paint[times], 0.0)), caption),
    }


def cut_out(cover: np.ndarray) -> np.ndarray:
    """Frames `(num_frames, SIZE, SIZE)` with zeros far away from the shape."""
    grid = np.arange(SIZE) + 0.5
    total = cover.sum(axis=(1, 2))
    # The median is inside the shape even if other pixels have a colour.
    columns, rows = np.cumsum(cover.sum(axis=1), axis=1), np.cumsum(cover.sum(axis=2), axis=1)
    x, y = (grid - (sums < total[:, None] / 2).sum(axis=1)[:, None] - 0.5 for sums in (columns, rows))
    near = y[:, :, None] ** 2 + x[:, None, :] ** 2 < (WINDOW**2 * total / np.pi)[:, None, None]
    return np.where(near, cover, 0.0)


def centres_of(bodies: np.ndarray) -> np.ndarray:
    """Centre (x, y) of each frame."""
    grid = np.arange(SIZE) + 0.5
    sums = np.stack([bodies.sum(axis=1) @ grid, bodies.sum(axis=2) @ grid], axis=1)
    return sums / bodies.sum(axis=(1, 2))[:, None]


def moments_of(bodies: np.ndarray) -> tuple[np.ndarray, ...]:
    """
    For each frame: area, width / height, spread, skewness of y, and cross moment E[x^2 y^2] / (E[x^2] E[y^2]).

    The spread is the variance divided by the area: 1 / (2 pi) for a disc.
    """
    centres = centres_of(bodies)
    x, y = ((np.arange(SIZE) + 0.5 - centre[:, None]) for centre in centres.T)
    area, columns, rows = bodies.sum(axis=(1, 2)), bodies.sum(axis=1), bodies.sum(axis=2)
    # The variance of a single pixel is zero.
    xx, yy = (
        np.maximum((columns * x**2).sum(axis=1) / area, 1e-6),
        np.maximum((rows * y**2).sum(axis=1) / area, 1e-6),
    )
    yyy = (rows * y**3).sum(axis=1) / area
    xxyy = ((bodies @ (x**2)[:, :, None])[..., 0] * y**2).sum(axis=1) / area
    return area, np.sqrt(xx / yy), (xx + yy) / area, yyy / yy**1.5, xxyy / (xx * yy)


def measure_motion(times: np.ndarray, centres: np.ndarray, caption: Caption) -> dict[str, float]:
    """Speed of the least-squares path, its angle to the caption's direction, and the RMS distance of the shape from it."""
    line = np.polynomial.polynomial.polyfit(times, centres, 1)
    expected = np.polynomial.polynomial.polyval(times, line).T
    velocity = line[1]
    return {
        "speed": float(np.linalg.norm(velocity)),
        "angle": angle_between(velocity, np.array(DIRECTIONS[caption.direction], dtype=float)),
        "unsteadiness": float(np.sqrt(((centres - expected) ** 2).sum(axis=1).mean())),
    }


def recognise(
    measured: Mapping[str, float], shapes: Mapping[str, Mapping[str, float]]
) -> tuple[str | None, str | None]:
    """The shape with the nearest skewness and cross moment, and the nearest colour. None if there is no shape or colour."""
    color = (
        None if "hue_r" not in measured else nearest_color(np.array([measured[f"hue_{axis}"] for axis in "rgb"]))[0]
    )
    if "skew" not in measured:
        return None, color
    distance = {
        shape: np.hypot(measured["skew"] - typical["skew"], measured["cross"] - typical["cross"])
        for shape, typical in shapes.items()
    }
    return min(distance, key=lambda shape: distance[shape]), color
