"""Orientation, pixel shape, transparency and colours of decoded frames, against arithmetic of the test's own."""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hy_prfl.data.preprocessing import ClipSettings
from hy_prfl.data.video import DecodingRules, VideoError, decode_video, read_video


ONE = 1 << 16


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write a matrix into the track header: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def write_planes(
    path: Path,
    planes: Sequence[np.ndarray],
    pix_fmt: str,
    *,
    codec: str = "ffv1",
    num_frames: int = 5,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    **colors: int,
) -> Path:
    """Video of equal frames of these planes; `colors` are attributes such as `color_trc`."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=16, options=options or {})
        stream.height, stream.width = planes[0].shape
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in colors.items():
            setattr(stream.codec_context, name, value)
        for _ in range(num_frames):
            frame = av.VideoFrame(stream.width, stream.height, pix_fmt)
            for plane, values in zip(frame.planes, planes, strict=True):
                row = plane.line_size // values.itemsize
                plane.update(np.pad(values, ((0, 0), (0, row - values.shape[1]))).tobytes())
            for name, value in colors.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_clips_decoded_at_once_keep_their_own_frames(tmp_path: Path) -> None:
    """Clips of one size share FFmpeg's filters within a thread, and never with another thread."""
    levels = [16, 81, 145, 235]
    planes = [[np.full((64, 96), level, np.uint8)] for level in levels]
    paths = [write_planes(tmp_path / f"{index}.mkv", each, "gray", num_frames=25) for index, each in enumerate(planes)]
    with ThreadPoolExecutor(4) as executor:
        videos = list(executor.map(lambda path: decode_video(path, 16, 25).frames, 5 * paths))
    for index, frames in enumerate(videos):
        assert np.unique(frames).tolist() == np.unique(decode_video(paths[index % 4], 16, 1).frames).tolist()
        assert len(np.unique(frames)) == 1


class TestOrientation:
    @pytest.mark.parametrize(
        ("matrix", "shown"),
        [
            ((1, 0, 0, 1), lambda frames: frames),
            ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
            ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
            ((-1, 0, 0, -1), lambda frames: frames[:, ::-1, ::-1]),
            ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
            ((0, 1, -1, 0), lambda frames: frames.swapaxes(1, 2)[:, :, ::-1]),
            ((0, -1, 1, 0), lambda frames: frames.swapaxes(1, 2)[:, ::-1]),
            ((0, -1, -1, 0), lambda frames: frames.swapaxes(1, 2)[:, ::-1, ::-1]),
        ],
    )
    @pytest.mark.parametrize("size", [(32, 48), (48, 32)])
    def test_quarter_turns_and_mirrors(
        self,
        write_video: Callable[..., Path],
        tmp_path: Path,
        matrix: tuple[int, ...],
        shown: Callable[[np.ndarray], np.ndarray],
        size: tuple[int, int],
    ) -> None:
        path = write_video(tmp_path / "clip.mp4", num_frames=5, height=size[0], width=size[1])
        stored = read_video(path, fps=16, num_frames=5)
        set_display_matrix(path, *(ONE * value for value in matrix))
        np.testing.assert_array_equal(read_video(path, fps=16, num_frames=5), shown(stored))

    @pytest.mark.parametrize(
        ("matrix", "text"),
        [
            (
                (46341, 46341, -46341, 46341),
                r"\(0\.707\d+ 0\.707\d+; -0\.707\d+ 0\.707\d+\).*rotated clockwise by 45 degrees",
            ),
            ((64540, 11380, -11380, 64540), "rotated clockwise by 10 degrees"),
            ((ONE, ONE, 0, ONE), "not a quarter turn"),
            ((ONE, 0, ONE, ONE), "not a quarter turn"),
            ((0, 0, 0, 0), "not a quarter turn"),
            ((ONE, 0, 0, 0), "not a quarter turn"),
        ],
    )
    def test_any_other_matrix_is_refused(
        self, write_video: Callable[..., Path], tmp_path: Path, matrix: tuple[int, ...], text: str
    ) -> None:
        path = write_video(tmp_path / "clip.mp4", num_frames=5)
        set_display_matrix(path, *matrix)
        with pytest.raises(VideoError, match=text):
            read_video(path, fps=16, num_frames=5)

    def test_a_matrix_in_a_part_of_the_frames_is_refused(
        self, write_video: Callable[..., Path], tmp_path: Path
    ) -> None:
        """As H.264 may have it, in a message beside its key frames."""
        half_turn = av.BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=180", "h264")
        path = tmp_path / "clip.mkv"
        with (
            av.open(str(write_video(tmp_path / "plain.ts", num_frames=9))) as read,
            av.open(str(path), "w") as written,
        ):
            stream = written.add_stream_from_template(read.streams.video[0])
            for packet in [packet for packet in read.demux(video=0) if packet.size]:
                for turned in half_turn.filter(packet):
                    turned.stream = stream
                    written.mux(turned)
        assert len(read_video(path, fps=16, num_frames=1)) == 1
        with pytest.raises(VideoError, match="its orientation changes within the clip, at 0"):
            read_video(path, fps=16, num_frames=9)


class TestPixelShape:
    @pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(128, 117), Fraction(8, 9), Fraction(1)])
    @pytest.mark.parametrize("turned", [False, True])
    def test_pixels_become_square(self, tmp_path: Path, aspect: Fraction, turned: bool) -> None:
        height, width = 96, 320
        # A bright disc that is a circle on the screen.
        rows, columns = np.mgrid[:height, :width]
        disc = ((rows - 47.5) ** 2 + ((columns - 159.5) * float(aspect)) ** 2) < 40**2
        planes = [np.where(disc, 235, 16).astype(np.uint8), *[np.full((48, 160), 128, np.uint8)] * 2]
        path = write_planes(
            tmp_path / "clip.mp4", planes, "yuv420p", codec="libx264", options={"crf": "1"}, aspect=aspect
        )
        if turned:
            set_display_matrix(path, 0, ONE, -ONE, 0)
        frames = read_video(path, fps=16, num_frames=5)
        shown = (height, round(width * aspect))
        assert frames.shape == (5, *(shown[::-1] if turned else shown), 3)
        bright = frames[0, ..., 0] > 127
        for axis in (0, 1):
            assert abs(int(bright.any(axis=axis).sum()) - 80) <= 2

    def test_they_decide_the_bucket(self, tmp_path: Path) -> None:
        planes = [np.full((576, 720), 100, np.uint8), *[np.full((288, 360), 128, np.uint8)] * 2]
        path = write_planes(
            tmp_path / "clip.mkv", planes, "yuv420p", codec="libx264", num_frames=1, aspect=Fraction(64, 45)
        )
        frames = read_video(path, fps=16, num_frames=1)
        assert frames.shape == (1, 576, 1024, 3)
        settings = ClipSettings(buckets=((480, 832), (544, 704)))
        assert settings.choose_size(*frames.shape[1:3]) == (480, 832)

    def test_absurd_shapes_are_refused(self, tmp_path: Path) -> None:
        planes = [np.full((320, 320), 100, np.uint8), *[np.full((160, 160), 128, np.uint8)] * 2]
        for aspect in (Fraction(1, 40), Fraction(40)):
            path = write_planes(tmp_path / "clip.mp4", planes, "yuv420p", codec="libx264", aspect=aspect)
            with pytest.raises(VideoError, match=f"pixels of {aspect.numerator}:{aspect.denominator} "):
                read_video(path, fps=16, num_frames=5)


class TestTransparency:
    def write(self, path: Path, pix_fmt: str, codec: str) -> Path:
        """The left half opaque blue, the right half a red that is transparent."""
        pixels = np.zeros((32, 64, 4), np.uint8)
        pixels[:, :32], pixels[:, 32:] = (0, 0, 255, 255), (255, 0, 0, 0)
        with av.open(str(path), mode="w") as container:
            options = {"auto-alt-ref": "0"} if codec.startswith("libvpx") else {}
            stream = container.add_stream(codec, rate=16, options=options)
            stream.height, stream.width, stream.pix_fmt = 32, 64, pix_fmt
            for _ in range(5):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
                container.mux(stream.encode(frame.reformat(format=pix_fmt)))
            container.mux(stream.encode(None))
        return path

    @pytest.mark.parametrize(
        ("suffix", "pix_fmt", "codec"),
        [
            ("mov", "argb", "qtrle"),
            ("mov", "rgba", "png"),
            ("mkv", "yuva420p", "ffv1"),
            ("webm", "yuva420p", "libvpx-vp9"),
            ("webm", "yuva420p", "libvpx"),
        ],
    )
    def test_is_laid_on_white(self, tmp_path: Path, suffix: str, pix_fmt: str, codec: str) -> None:
        frames = read_video(self.write(tmp_path / f"clip.{suffix}", pix_fmt, codec), fps=16, num_frames=5)
        np.testing.assert_allclose(frames[:, 8:24, 40:56].astype(float), 255, atol=3)
        np.testing.assert_allclose(
            frames[:, 8:24, 8:24].astype(float), np.broadcast_to([0, 0, 255], (5, 16, 16, 3)), atol=8
        )

    def test_the_containers_matrix_and_colors_count_too(self, tmp_path: Path) -> None:
        """The decoders that read the transparency of WebM do not get them."""
        source = self.write(tmp_path / "source.webm", "yuva420p", "libvpx-vp9")
        turned, path = tmp_path / "turned.mp4", tmp_path / "clip.webm"
        with av.open(str(source)) as read, av.open(str(turned), mode="w") as written:
            stream = written.add_stream_from_template(read.streams.video[0])
            for packet in read.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    written.mux(packet)
        set_display_matrix(turned, 0, ONE, -ONE, 0)
        for transfer in (1, 16):
            with (
                av.open(str(source)) as read,
                av.open(str(turned)) as template,
                av.open(str(path), mode="w") as written,
            ):
                stream = written.add_stream_from_template(template.streams.video[0])
                stream.metadata["alpha_mode"] = "1"
                stream.codec_context.color_trc = transfer
                for packet in read.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        written.mux(packet)
            if transfer == 1:
                expected = read_video(source, fps=16, num_frames=5).swapaxes(1, 2)[:, :, ::-1]
                np.testing.assert_array_equal(read_video(path, fps=16, num_frames=5), expected)
            else:
                with pytest.raises(VideoError, match="its colours are HDR, with the transfer function PQ"):
                    read_video(path, fps=16, num_frames=5)


def limited_rgb(y: float, cb: float, cr: float, kr: float, kb: float, bits: int = 8) -> np.ndarray:
    """RGB in [0, 255] of limited-range YCbCr codes, by the definition of the matrix."""
    unit = 1 << (bits - 8)
    luma, blue, red = (y / unit - 16) / 219, (cb / unit - 128) / 224, (cr / unit - 128) / 224
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(255 * np.array([r, g, b]), 0, 255)


MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087)}


class TestColors:
    @pytest.mark.parametrize("bits", [8, 10])
    @pytest.mark.parametrize("matrix", sorted(MATRICES))
    def test_matrices(self, tmp_path: Path, matrix: int, bits: int) -> None:
        unit, dtype = 1 << (bits - 8), np.uint8 if bits == 8 else np.dtype("<u2")
        pix_fmt = "yuv444p" if bits == 8 else "yuv444p10le"
        for codes in ((120, 90, 170), (60, 140, 120), (235, 128, 128), (16, 128, 128), (126, 128, 128)):
            planes = [np.full((32, 32), code * unit, dtype) for code in codes]
            path = write_planes(tmp_path / "clip.mkv", planes, pix_fmt, colorspace=matrix, color_range=1)
            expected = limited_rgb(*(code * unit for code in codes), *MATRICES[matrix], bits=bits)
            frames = read_video(path, fps=16, num_frames=5)
            np.testing.assert_allclose(frames.reshape(-1, 3), np.broadcast_to(expected, (5 * 1024, 3)), atol=3)

    def test_full_range(self, tmp_path: Path) -> None:
        for code in (0, 20, 128, 255):
            planes = [np.full((32, 32), code, np.uint8), *[np.full((32, 32), 128, np.uint8)] * 2]
            path = write_planes(tmp_path / "clip.mkv", planes, "yuv444p", color_range=2)
            np.testing.assert_allclose(read_video(path, fps=16, num_frames=5).astype(int), code, atol=1)

    @pytest.mark.parametrize("matrix", [8, 10, 14])
    def test_unknown_matrices_are_refused(self, tmp_path: Path, matrix: int) -> None:
        planes = [np.full((32, 32), 100, np.uint8)] * 3
        path = write_planes(
            tmp_path / "clip.mp4", planes, "yuv444p", codec="libx264", colorspace=matrix, options={"crf": "1"}
        )
        with pytest.raises(VideoError, match=f"cannot be converted: FFmpeg's colour matrix {matrix}"):
            read_video(path, fps=16, num_frames=5)


def pq(nits: float) -> float:
    """Signal in [0, 1] of SMPTE ST 2084."""
    power = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: float) -> float:
    """Signal in [0, 1] of ARIB STD-B67 for scene light in [0, 1]."""
    return (3 * light) ** 0.5 if light <= 1 / 12 else 0.17883277 * np.log(12 * light - 0.28466892) + 0.55991073


class TestHDR:
    PQ, HLG, BT709, BT2020_10 = 16, 18, 1, 14

    def write(self, path: Path, rgb: Sequence[float], *, transfer: int, primaries: int = 9, matrix: int = 9) -> Path:
        """Ten bits of one colour; `rgb` are signals in [0, 1]."""
        kr, kb = 0.2627, 0.0593
        luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
        codes = [64 + 876 * luma, *(512 + 896 * (rgb[i] - luma) / (2 * (1 - k)) for i, k in ((2, kb), (0, kr)))]
        planes = [np.full((32, 32), round(code), np.dtype("<u2")) for code in codes]
        colors = {"color_trc": transfer, "color_primaries": primaries, "colorspace": matrix, "color_range": 1}
        return write_planes(path, planes, "yuv444p10le", codec="libx264", options={"crf": "1"}, **colors)

    def decode(self, path: Path, **rules: Any) -> np.ndarray:
        frames = decode_video(path, 16, 5, rules=DecodingRules(**rules)).frames
        assert frames.reshape(-1, 3).std(axis=0).max() < 1
        return frames.reshape(-1, 3).mean(axis=0)

    @pytest.mark.parametrize(
        ("transfer", "name"), [(PQ, "HDR.*PQ"), (HLG, "HDR.*HLG"), (BT709, "BT.2020"), (2, "BT.2020")]
    )
    def test_refused_unless_asked_for(self, tmp_path: Path, transfer: int, name: str) -> None:
        path = self.write(tmp_path / "clip.mkv", [0.5] * 3, transfer=transfer)
        with pytest.raises(VideoError, match=f"{name}.*`hdr: tone_map`"):
            self.decode(path)

    @pytest.mark.parametrize("primaries", [9, 1, 2])
    @pytest.mark.parametrize("transfer", [PQ, HLG])
    def test_refused_by_the_transfer_function_alone(self, tmp_path: Path, transfer: int, primaries: int) -> None:
        path = self.write(tmp_path / "clip.mkv", [0.5] * 3, transfer=transfer, primaries=primaries, matrix=1)
        with pytest.raises(VideoError, match="HDR"):
            self.decode(path)

    def test_tone_mapped_grey(self, tmp_path: Path) -> None:
        """Grey stays grey, black black, the peak becomes white, and skin and paper are as bright as in SDR."""
        for signal, transfer in ((pq, self.PQ), (hlg, self.HLG)):
            peak, middle = (10000, 203) if signal is pq else (1, 0.26496256)
            levels = [0, middle / 20, middle / 4, middle, peak]
            values = []
            for level in levels:
                path = self.write(tmp_path / "clip.mkv", [signal(level)] * 3, transfer=transfer)
                color = self.decode(path, hdr="tone_map")
                assert np.ptp(color) <= 2
                values.append(color.mean())
            assert values[0] <= 1
            assert values[-1] >= 253
            assert np.all(np.diff(values) > 5)
            # Reference white, three quarters of the HLG signal: far above what its PQ signal alone would show (146).
            assert 150 <= values[3] <= 200

    def test_wide_gamut_in_sdr(self, tmp_path: Path) -> None:
        """Colours of BT.709 written in BT.2020 come back."""
        to_bt2020 = np.array(
            [[0.6274040, 0.3292820, 0.0433136], [0.0690970, 0.9195400, 0.0113612], [0.0163916, 0.0880132, 0.8955950]]
        )
        for transfer in (self.BT709, self.BT2020_10):
            for color in ([0.8, 0.2, 0.2], [0.2, 0.7, 0.3], [0.3, 0.3, 0.9], [0.5, 0.5, 0.5], [1, 1, 1]):
                # By a display's gamma of 2.4.
                signal = (to_bt2020 @ np.array(color) ** 2.4) ** (1 / 2.4)
                path = self.write(tmp_path / "clip.mkv", signal.tolist(), transfer=transfer)
                np.testing.assert_allclose(
                    self.decode(path, hdr="tone_map"), 255 * np.array(color, dtype=float), atol=3
                )

    def test_tone_mapped_colors(self, tmp_path: Path) -> None:
        """Colours of BT.709 keep their hue in PQ: the channels stay in order, and equal ones equal."""
        to_bt2020 = np.array(
            [[0.6274040, 0.3292820, 0.0433136], [0.0690970, 0.9195400, 0.0113612], [0.0163916, 0.0880132, 0.8955950]]
        )
        for color in ([0.7, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.7], [0.6, 0.4, 0.2]):
            nits = 203 * to_bt2020 @ np.array(color) ** 2.4
            path = self.write(tmp_path / "clip.mkv", [pq(value) for value in nits], transfer=self.PQ)
            shown = self.decode(path, hdr="tone_map")
            assert np.argmax(shown) == np.argmax(color)
            assert shown.max() > 80
            if len(set(color)) == 2:
                low = np.delete(shown, np.argmax(shown))
                assert np.ptp(low) < 0.35 * (shown.max() - low.mean())

    def test_wide_gamut_of_unknown_brightness(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "clip.mkv", [0.5] * 3, transfer=2)
        with pytest.raises(VideoError, match="does not name a transfer function"):
            self.decode(path, hdr="tone_map")

    def test_ten_bits_of_sdr_stay(self, tmp_path: Path) -> None:
        planes = [np.full((32, 32), 64 + 438, np.dtype("<u2")), *[np.full((32, 32), 512, np.dtype("<u2"))] * 2]
        path = write_planes(
            tmp_path / "clip.mkv", planes, "yuv444p10le", color_trc=1, color_primaries=1, colorspace=1, color_range=1
        )
        np.testing.assert_allclose(self.decode(path), 127.5, atol=1.5)
