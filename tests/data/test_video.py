"""Decoding, resampling and sizes, against files whose frames are known."""

import math
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from hy_prfl.data.video import (
    VideoError,
    floor_num_frames,
    nearest_bucket,
    parse_size,
    read_image,
    read_video,
    resize_and_crop,
    short_side_bucket,
    to_float,
    to_uint8,
)


def write_gray_levels(path: Path, times: Sequence[Fraction], end: Fraction, levels: Sequence[int]) -> Path:
    """Lossless video whose frame `i` is a plain gray of `levels[i]`, on the screen from `times[i]` on."""
    time_base = Fraction(1, 90000)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264rgb", rate=30, options={"crf": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgb24"
        stream.codec_context.time_base = time_base
        for time, following, level in zip(times, [*times[1:], end], levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = int(time / time_base), time_base
            frame.duration = int((following - time) / time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_same_rate_gives_every_frame(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=13)
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    frames = read_video(path, fps=16, num_frames=13)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_array_equal(read_video(path, fps=16, num_frames=9), expected[:9])


@pytest.mark.parametrize(("source_fps", "num_source_frames"), [(8, 9), (24, 25), (30, 31), (60, 61)])
def test_resampling_takes_the_frame_on_the_screen(tmp_path: Path, source_fps: int, num_source_frames: int) -> None:
    times = [Fraction(index, source_fps) for index in range(num_source_frames)]
    levels = [4 * index for index in range(num_source_frames)]
    path = write_gray_levels(tmp_path / "clip.mp4", times, Fraction(num_source_frames, source_fps), levels)
    frames = read_video(path, fps=16, num_frames=13)
    expected = [4 * (index * source_fps // 16) for index in range(13)]
    np.testing.assert_array_equal(frames[:, 16, 16, 0], expected)


def test_variable_frame_rate_goes_by_presentation_time(tmp_path: Path) -> None:
    times = [Fraction(numerator, 16) for numerator in (0, 1, 4, 5, 11, 13)]
    path = write_gray_levels(tmp_path / "clip.mp4", times, Fraction(14, 16), [10, 60, 110, 160, 210, 230])
    frames = read_video(path, fps=16, num_frames=13)
    expected = [10, 60, 60, 60, 110, 160, 160, 160, 160, 160, 160, 210, 210]
    np.testing.assert_array_equal(frames[:, 0, 0, 0], expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of the peak memory")
def test_frames_are_in_memory_once(write_video: Callable[..., Path], tmp_path: Path) -> None:
    # FFmpeg's memory is not numpy's, so this asks the kernel.
    def resident(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]

    path = write_video(tmp_path / "clip.mp4", num_frames=81, height=480, width=640)
    read_video(path, fps=16, num_frames=9)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    frames = read_video(path, fps=16, num_frames=81)
    assert resident("VmHWM") - before < 1.5 * frames.nbytes


def test_short_clip_is_refused_or_cut(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=12)
    with pytest.raises(VideoError, match="too short: 12 frames at 16 fps, 13 are needed"):
        read_video(path, fps=16, num_frames=13)
    assert len(read_video(path, fps=16, num_frames=13, min_num_frames=5)) == 9


def test_missing_file() -> None:
    with pytest.raises(VideoError, match="there is no file 'nowhere.mp4'"):
        read_video("nowhere.mp4", fps=16, num_frames=5)


def test_file_that_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"not a video" * 100)
    with pytest.raises(VideoError, match="cannot be decoded"):
        read_video(path, fps=16, num_frames=5)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.touch()
    with pytest.raises(VideoError, match="cannot be decoded"):
        read_video(path, fps=16, num_frames=5)


def test_truncated_file(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=41)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="cannot be decoded"):
        read_video(path, fps=16, num_frames=41)


def test_truncated_file_with_its_index_in_front_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), mode="w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(41):
            image = rng.integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="truncated|cannot be decoded|damaged"):
        read_video(path, fps=16, num_frames=41, min_num_frames=5)


def test_zero_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), mode="w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.open()
        container.start_encoding()
    with pytest.raises(VideoError, match="zero frames"):
        read_video(path, fps=16, num_frames=5)


def test_file_without_a_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        read_video(path, fps=16, num_frames=5)


def test_rotation_of_the_file_is_applied(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=5, height=32, width=48)
    upright = read_video(path, fps=16, num_frames=5)
    # Display matrix of a track header, as a phone held upright writes it: a quarter turn clockwise.
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(data)
    np.testing.assert_array_equal(read_video(path, fps=16, num_frames=5), np.rot90(upright, k=-1, axes=(1, 2)))


@pytest.mark.parametrize(("num_frames", "floor"), [(1, 1), (4, 1), (5, 5), (8, 5), (81, 81), (84, 81)])
def test_floor_num_frames(num_frames: int, floor: int) -> None:
    assert floor_num_frames(num_frames) == floor


def test_nearest_bucket_goes_by_aspect_ratio() -> None:
    buckets = [(480, 832), (832, 480), (624, 624)]
    assert nearest_bucket(1080, 1920, buckets) == (480, 832)
    assert nearest_bucket(1920, 1080, buckets) == (832, 480)
    assert nearest_bucket(500, 480, buckets) == (624, 624)


@pytest.mark.parametrize(
    ("size", "resolution", "max_aspect_ratio", "expected"),
    [
        ((1080, 1920), 480, 1.78, (480, 864)),
        ((1080, 1920), 480, 1.7, (480, 832)),
        ((1920, 1080), 480, 1.7, (832, 480)),
        ((480, 832), 480, 1.78, (480, 832)),
        ((1080, 1920), 704, 1.78, (704, 1280)),
        ((720, 720), 704, 1.78, (704, 704)),
        ((400, 1600), 480, 1.78, (480, 864)),
        ((240, 320), 480, 1.78, (480, 640)),
    ],
)
def test_short_side_bucket(
    size: tuple[int, int], resolution: int, max_aspect_ratio: float, expected: tuple[int, int]
) -> None:
    assert short_side_bucket(*size, resolution, max_aspect_ratio) == expected


def test_parse_size() -> None:
    assert parse_size("480x832") == (480, 832)
    for size in ("480", "480*832", "x", "axb", "-1x2"):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size(size)


@pytest.mark.parametrize(
    ("size", "kept"), [((32, 96), (slice(None), slice(32, 64))), ((96, 32), (slice(32, 64), slice(None)))]
)
def test_crop_keeps_the_centre(size: tuple[int, int], kept: tuple[slice, slice]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, size=(2, *size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_and_crop(frames, 32, 32), frames[:, kept[0], kept[1]])


def test_resize_covers_and_keeps_proportions() -> None:
    rows, columns = np.mgrid[0:90, 0:160]
    frames = np.stack([rows, columns, rows + columns], axis=-1)[None].astype(np.uint8)
    resized = resize_and_crop(frames, 32, 48).astype(float)[0]
    # The scale is 32 / 90, by height; 135 of the 160 columns stay, in the middle. Pixel centres map to pixel centres.
    scale = 90 / 32
    expected_rows = (np.arange(32) + 0.5) * scale - 0.5
    expected_columns = 12.5 + (np.arange(48) + 0.5) * scale - 0.5
    np.testing.assert_allclose(resized[4:-4, 20, 0], expected_rows[4:-4], atol=1.0)
    np.testing.assert_allclose(resized[16, 4:-4, 1], expected_columns[4:-4], atol=1.0)


def test_values_are_those_of_the_pipelines_video_processor() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    tensor = to_float(frames)
    assert tensor.shape == (1, 3, 16, 16)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(frames[0]), height=16, width=16)
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    np.testing.assert_array_equal(to_uint8(tensor), frames)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, size=(16, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), np.rot90(pixels, k=-1))


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    for suffix in ("png", "tiff"):
        Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    (tmp_path / "image.pgm").write_bytes(b"P5 64 64 65535\n" + values.astype(">u2").tobytes())
    for suffix in ("png", "tiff", "pgm"):
        image = read_image(tmp_path / f"image.{suffix}")
        assert image.shape == (64, 64, 3)
        np.testing.assert_allclose(image[..., 0], values / 257, atol=0.51)
        assert abs(image.mean() - 127.5) < 0.5


def test_numbers_without_a_white_are_refused(tmp_path: Path) -> None:
    for name, dtype in (("float", np.float32), ("int", np.int32)):
        Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / f"{name}.tiff")
        with pytest.raises(VideoError, match="unknown which value is white"):
            read_image(tmp_path / f"{name}.tiff")


def write_deep_tiff(path: Path, values: np.ndarray, *, bits: int, white_is_zero: bool, big_endian: bool) -> None:
    """Gray TIFF `(height, width)` written byte by byte, of 12 or 16 bits."""
    height, width = values.shape
    order = ">" if big_endian else "<"
    data = values.astype(f"{order}u2").tobytes()
    if bits == 12:
        data = b"".join(
            bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).astype(int).tolist()
        )
    photometric = 0 if white_is_zero else 1
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8 + 2 + 9 * 12 + 4)]
    tags += [(277, 1), (278, height), (279, len(data))]
    header = (b"MM" if big_endian else b"II") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    path.write_bytes(header + entries + struct.pack(f"{order}I", 0) + data)


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "big_endian"),
    [(16, False, False), (16, True, False), (16, False, True), (12, False, False)],
)
def test_deep_gray_tiffs(tmp_path: Path, bits: int, white_is_zero: bool, big_endian: bool) -> None:
    white = 2**bits - 1
    values = np.random.default_rng(0).integers(0, white + 1, (6, 8))
    values[0, :2] = 0, white
    path = tmp_path / "a.tiff"
    write_deep_tiff(path, values, bits=bits, white_is_zero=white_is_zero, big_endian=big_endian)
    brightness = (white - values if white_is_zero else values) / white
    expected = np.floor(brightness * 255 + 0.5)
    np.testing.assert_array_equal(read_image(path), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("key", [(0x1234, 0x0011, 0), (0, 0, 255)])
def test_deep_png_with_a_transparent_color_is_refused(tmp_path: Path, key: tuple[int, int, int]) -> None:
    """Pillow keeps 8 of its 16 bits, in which the colour cannot be found again."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">6H", *key, 9, 9, 9)))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">3H", *key)) + pixels + chunk(b"IEND", b"")
    )
    with pytest.raises(VideoError, match=r"a\.png' cannot be read: .*16 bits.*transparent"):
        read_image(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    assert read_image(path).shape == (1, 2, 3)


@pytest.mark.parametrize("fps", [math.inf, -math.inf, math.nan, 0, -1, 0.0])
def test_impossible_frame_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match=rf"`fps` must be a finite number greater than 0, got {fps!r}"):
        read_video(tmp_path / "a.mp4", fps=fps, num_frames=5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "I;16"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    """The left half of each image is dark, the right one hides a colour; a half-transparent black is grey."""
    path = tmp_path / "image.png"
    pixels = np.zeros((8, 16, 4), np.uint8)
    pixels[:, :8, 3], pixels[:, 8:, 0] = 255, 200
    if mode in ("RGBA", "LA"):
        pixels[0, 0, 3] = 102
        Image.fromarray(pixels).convert(mode).save(path)
    elif mode == "PA":
        path = tmp_path / "image.webp"
        Image.fromarray(pixels).save(path, lossless=True, exact=True)
    elif mode == "I;16":
        values = np.where(np.arange(16) < 8, 0, 40000).astype(np.uint16)[None].repeat(8, axis=0)
        Image.fromarray(values).save(path, transparency=40000)
    else:
        opaque = Image.fromarray(pixels[..., :3])
        image = opaque.quantize(2) if mode == "P" else opaque.convert(mode)
        image.save(path, transparency=image.getpixel((15, 0)))
    read = read_image(path)
    assert (read[1:, :8] == 0).all()
    assert (read[:, 8:] == 255).all()
    if mode in ("RGBA", "LA"):
        assert read[0, 0].tolist() == [153] * 3


def test_first_picture_of_several(tmp_path: Path) -> None:
    pictures = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (50, 150, 250)]
    for suffix in ("gif", "png", "webp", "tiff"):
        path = tmp_path / f"image.{suffix}"
        options = {"lossless": True} if suffix == "webp" else {}
        pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
        assert (read_image(path) == 50).all()


@pytest.mark.parametrize("mode", ["CMYK", "1", "L", "LAB"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    if mode == "LAB":
        image = Image.new("LAB", (16, 16), (255, 128, 128))
    else:
        image = Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert(mode)
    image.save(tmp_path / "image.tiff")
    np.testing.assert_allclose(read_image(tmp_path / "image.tiff").astype(int), 255, atol=1)


@pytest.mark.parametrize("content", [None, b"", b"no image"])
def test_bad_images(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VideoError, match="image.png' cannot be read"):
        read_image(path)
