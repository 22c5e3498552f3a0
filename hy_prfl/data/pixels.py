"""Converts decoded frames to upright RGB arrays with square pixels, by FFmpeg's own filters."""

import math
import threading
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorPrimaries, ColorTrc


HDR = Literal["refuse", "tone_map"]

HDR_TRANSFERS: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
# Transfer functions of frames that need no conversion for a BT.709 display. FFmpeg reserves 0 and 3.
UNKNOWN_TRANSFERS: set[int] = {0, 3, ColorTrc.UNSPECIFIED}
SDR_TRANSFERS: set[int] = {
    ColorTrc.BT709,
    ColorTrc.GAMMA22,
    ColorTrc.GAMMA28,
    ColorTrc.SMPTE170M,
    ColorTrc.SMPTE240M,
    ColorTrc.IEC61966_2_4,
    ColorTrc.BT1361_ECG,
    ColorTrc.IEC61966_2_1,
    ColorTrc.BT2020_10,
    ColorTrc.BT2020_12,
}
# Transfer functions that look wrong on a BT.709 display. swscale converts them.
OTHER_TRANSFERS: set[int] = {ColorTrc.LINEAR, ColorTrc.SMPTE428}
P3_PRIMARIES = (ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432)

# FFmpeg's numbers for colour matrices; PyAV has no names for them.
RGB_MATRIX, UNSPECIFIED_MATRIX, BT2020_MATRIX = 0, 2, 9
KNOWN_MATRICES = {RGB_MATRIX, 1, UNSPECIFIED_MATRIX, 3, 4, 5, 6, 7, BT2020_MATRIX}

DOLBY_VISION = (SideDataType.DOVI_METADATA, SideDataType.DOVI_RPU_BUFFER)

# Largest ratio of a pixel's sides. A larger one means that the header is broken.
MAX_PIXEL_ASPECT = 16

# Sine of the largest deviation from a quarter turn: one degree, as in the ffmpeg program.
ONE_DEGREE = math.sin(math.radians(1))


class VideoError(ValueError):
    """A single clip cannot be used. The message is the reason, for the report. Other clips are not affected."""


class FrameConverter:
    """
    Turns the frames of one clip into arrays.

    The result is that of `ffmpeg -pix_fmt rgb24`, with its autorotation. Frames with non-square pixels are resized: the
    width is multiplied by the sample aspect ratio before the frame is rotated. Transparent pixels get a white background.

    Args:
        sample_aspect_ratio (`Fraction`, *optional*):
            Width of a pixel divided by its height, 1 if not known.
        hdr (`str`, defaults to `"refuse"`):
            `"tone_map"` converts PQ, HLG and BT.2020 to BT.709 with swscale's perceptual intent. White is then the peak
            brightness in the file, or that of the transfer function if the file names none. `"refuse"` raises an error
            for such frames.
    """

    def __init__(self, sample_aspect_ratio: Fraction | None, hdr: HDR = "refuse") -> None:
        self.aspect = sample_aspect_ratio or Fraction(1)
        if not Fraction(1, MAX_PIXEL_ASPECT) <= self.aspect <= MAX_PIXEL_ASPECT:
            raise VideoError(f"pixels of {self.aspect.numerator}:{self.aspect.denominator} (width to height)")
        self.hdr = hdr
        self.turns: tuple[str, ...] | None = None

    def __call__(self, frame: av.VideoFrame, tagged: av.VideoFrame | None = None) -> np.ndarray:
        """
        Convert one frame.

        Args:
            tagged (`av.VideoFrame`, *optional*):
                A frame that has the clip's colour tags and display matrix, if `frame` itself has none.

        Returns:
            `np.ndarray` of shape `(height, width, 3)` and type uint8.

        Raises:
            VideoError: If the frame's display matrix is more than quarter turns and mirrors, or another than that of the
                frames before, if the frame is HDR and `hdr` is `"refuse"`, or if its colours cannot be converted.
        """
        tagged = frame if tagged is None else tagged
        turns = orientation_filters(tagged)
        self.turns = turns if self.turns is None else self.turns
        if turns != self.turns:
            raise VideoError(f"its orientation changes within the clip, at {frame.time:.3f} s")
        graph = _graphs.build(
            (frame.width, frame.height),
            max(round(frame.width * self.aspect), 1),
            frame.format.name,
            int(tagged.colorspace),
            int(tagged.color_range),
            color_options(tagged, self.hdr),
            turns,
        )
        graph.push(frame)
        pixels = graph.pull().to_ndarray()
        return on_white(pixels) if pixels.shape[2] == 4 else pixels


def _build_graph(
    size: tuple[int, int],
    width: int,
    pixel_format: str,
    matrix: int,
    color_range: int,
    colors: str,
    turns: tuple[str, ...],
) -> Graph:
    graph = Graph()
    filters = [("scale", f"w={width}:h={size[1]}:flags=bicubic")]
    alpha = _has_alpha(av.VideoFormat(pixel_format))
    if colors:
        # In a single step, swscale would assume the matrix of BT.601.
        filters += [("format", "rgba64le" if alpha else "rgb48le"), ("scale", f"flags=bicubic:{colors}")]
    filters.append(("format", "rgba" if alpha else "rgb24"))
    filters += [(name, arguments) for name, _, arguments in (turn.partition("=") for turn in turns)]
    source = graph.add(
        "buffer",
        video_size=f"{size[0]}x{size[1]}",
        pix_fmt=pixel_format,
        time_base="1/90000",
        colorspace=str(matrix),
        range=str(color_range),
    )
    nodes = [graph.add(name, arguments or None) for name, arguments in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


class _Graphs(threading.local):
    """
    Filter graphs that are reused from clip to clip. swscale computes a table of colours at its start: seconds for HDR.

    Each thread has its own graphs. If two threads shared one, each could get the frames of the other.
    """

    def __init__(self) -> None:
        self.build = lru_cache(maxsize=4)(_build_graph)


_graphs = _Graphs()


def on_white(pixels: np.ndarray) -> np.ndarray:
    """RGBA pixels `(height, width, 4)` on a white background: `(height, width, 3)`, both uint8."""
    color, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _has_alpha(pixel_format: av.VideoFormat) -> bool:
    return pixel_format.has_palette or any(component.is_alpha for component in pixel_format.components)


def orientation_filters(frame: av.VideoFrame) -> tuple[str, ...]:
    """
    Filters that apply a frame's display matrix, as the ffmpeg program does automatically.

    Raises:
        VideoError: If the matrix is not one of the eight combinations of quarter turns and mirrors.
    """
    data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if data is None:
        return ()
    matrix = np.frombuffer(data, np.int32)[:9].astype(float)
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, c, d = matrix[[0, 1, 3, 4]] / 65536
    scale = max(abs(a), abs(b), abs(c), abs(d))
    small = ONE_DEGREE * scale
    flat = not matrix[[2, 5]].any()
    if flat and max(abs(b), abs(c)) <= small < min(abs(a), abs(d)):
        turns, mirrored = [], (a < 0, d < 0)
    elif flat and max(abs(a), abs(d)) <= small < min(abs(b), abs(c)):
        turns, mirrored = ["transpose=cclock_flip"], (c < 0, b < 0)
    else:
        angle = math.degrees(math.atan2(b, a))
        raise VideoError(
            f"its display matrix ({a:g} {b:g}; {c:g} {d:g}) is not a quarter turn, mirrored or not: the frames would be "
            f"shown rotated clockwise by {angle:.4g} degrees, or sheared"
        )
    return (*turns, *(name for name, wanted in zip(("hflip", "vflip"), mirrored, strict=True) if wanted))


def color_options(frame: av.VideoFrame, hdr: HDR) -> str:
    """
    Options of the `scale` filter that convert the colours of a frame to BT.709. Empty if no conversion is needed.

    Raises:
        VideoError: If the frame is HDR or BT.2020 and `hdr` is `"refuse"`, or if its colours cannot be converted.
    """
    transfer, primaries, matrix = int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace)
    dolby = any(frame.side_data.get(kind) is not None for kind in DOLBY_VISION)
    if dolby and transfer in UNKNOWN_TRANSFERS:
        raise VideoError("its colours cannot be converted: Dolby Vision without a base layer for other displays")
    if matrix not in KNOWN_MATRICES:
        raise VideoError(f"its colours cannot be converted: FFmpeg's colour matrix {matrix}")
    if transfer not in {*HDR_TRANSFERS, *SDR_TRANSFERS, *OTHER_TRANSFERS, *UNKNOWN_TRANSFERS}:
        raise VideoError(f"its colours cannot be converted: FFmpeg's transfer function {transfer}")
    name = HDR_TRANSFERS.get(transfer)
    wide = primaries == ColorPrimaries.BT2020 or matrix == BT2020_MATRIX
    if name is None and not wide:
        if primaries in P3_PRIMARIES or transfer in OTHER_TRANSFERS:
            return "out_primaries=bt709:out_transfer=bt709:intent=relative_colorimetric"
        return ""
    if hdr == "refuse":
        what = f"are HDR, with the transfer function {name}" if name else "have the wide gamut BT.2020"
        raise VideoError(f"its colours {what}; `hdr: tone_map` converts them to BT.709")
    if transfer in UNKNOWN_TRANSFERS:
        raise VideoError("its colours have the wide gamut BT.2020, but the file does not name a transfer function")
    source = "in_primaries=bt2020:" if primaries == ColorPrimaries.UNSPECIFIED else ""
    intent = "perceptual" if name else "relative_colorimetric"
    return f"{source}out_primaries=bt709:out_transfer=bt709:intent={intent}"
