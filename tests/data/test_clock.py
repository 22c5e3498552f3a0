"""Which source frame is on the screen when, for every kind of clock that files have: frames are known by their grey."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from hy_prfl.data.video import DecodedVideo, DecodingRules, VideoError, decode_video


def write_numbered(
    path: Path,
    times: Sequence[Fraction | float],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    time_base: Fraction = Fraction(1, 90000),
    rate: Fraction = Fraction(30),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    file_format: str | None = None,
) -> Path:
    """Video whose frame `i` is a plain grey of 20 + 3 i, shown from `times[i]` on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(f"file:{path}", mode="w", format=file_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, pix_fmt
        stream.codec_context.time_base = time_base
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 3 * index, np.uint8), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(video: DecodedVideo) -> list[int]:
    """Numbers of the source frames."""
    return [round((float(frame.mean()) - 20) / 3) for frame in video.frames]


def decode(path: Path, fps: float, num_frames: int, **rules: Any) -> DecodedVideo:
    return decode_video(path, fps, num_frames, rules=DecodingRules(**rules))


def constant(rate: Fraction | int, num_frames: int, start: Fraction | int = 0) -> list[Fraction]:
    return [start + index / Fraction(rate) for index in range(num_frames)]


B_FRAMES = {"crf": "1", "x264-params": "b-adapt=0:scenecut=0:keyint=24"}


class TestUnsortedClocks:
    @pytest.mark.parametrize("num_b_frames", [1, 2, 3, 16])
    def test_avi_with_b_frames(self, tmp_path: Path, num_b_frames: int) -> None:
        path = write_numbered(
            tmp_path / "clip.avi",
            constant(30, 61),
            time_base=Fraction(1, 30),
            options=B_FRAMES | {"bf": str(num_b_frames)},
        )
        with av.open(str(path)) as container:
            pts = [frame.pts for frame in container.decode(video=0)]
        assert pts != sorted(pts)
        video = decode(path, 16, 29)
        assert numbers(video)[:7] == [0, 1, 3, 5, 7, 9, 11]
        assert numbers(video) == [30 * index // 16 for index in range(29)]
        assert video.remarks == ()

    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "mov"])
    def test_b_frames_elsewhere(self, tmp_path: Path, suffix: str) -> None:
        path = write_numbered(tmp_path / f"clip.{suffix}", constant(30, 61), options=B_FRAMES | {"bf": "3"})
        assert numbers(decode(path, 16, 29)) == [30 * index // 16 for index in range(29)]

    def test_no_clock_at_all(self, tmp_path: Path) -> None:
        path = write_numbered(
            tmp_path / "clip.h264", constant(30, 61), time_base=Fraction(1, 30), options=B_FRAMES | {"bf": "3"}
        )
        with av.open(str(path)) as container:
            assert next(container.decode(video=0)).pts is None
        assert numbers(decode(path, 16, 29)) == [30 * index // 16 for index in range(29)]

    @pytest.mark.parametrize(
        ("codec", "file_format"), [("mpeg1video", "mpeg1video"), ("vc2", "dirac"), ("mjpeg", "mjpeg")]
    )
    def test_streams_without_a_container(self, tmp_path: Path, codec: str, file_format: str) -> None:
        """FFmpeg makes up times for them, with holes after B-frames or all the same."""
        path = tmp_path / "clip.bin"
        with av.open(str(path), mode="w", format=file_format) as container:
            stream = container.add_stream(codec, rate=25, options={"bf": "2"} if codec == "mpeg1video" else {})
            stream.width, stream.height, stream.bit_rate = 64, 64, 2_000_000
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for index in range(50):
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 4 * index, np.uint8), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode(None))
        shown = decode(path, 16, 25).frames.mean(axis=(1, 2, 3))
        expected = [20 + 4 * (index * 25 // 16) for index in range(25)]
        np.testing.assert_allclose(shown, expected, atol=1.9)

    @pytest.mark.parametrize("file_format", ["avi", "mxf"])
    @pytest.mark.parametrize("rate", [25, Fraction(30000, 1001)])
    def test_a_clock_that_counts_frames_knows_their_rate(
        self, tmp_path: Path, file_format: str, rate: Fraction | int
    ) -> None:
        """24 frames per second differ from 25 by less than a tick for a second."""
        path = write_numbered(
            tmp_path / "clip.bin",
            constant(rate, 61),
            time_base=1 / Fraction(rate),
            rate=Fraction(rate),
            options=B_FRAMES | {"bf": "3"},
            file_format=file_format,
        )
        for fps in (16, 24):
            num_frames = int(60 / rate * fps) // 4 * 4 + 1
            assert numbers(decode(path, fps, num_frames)) == [int(index * rate / fps) for index in range(num_frames)]

    def test_a_clock_that_stands_still(self, tmp_path: Path) -> None:
        source = write_numbered(tmp_path / "source.mkv", constant(25, 40), rate=Fraction(25))
        path = tmp_path / "clip.mkv"
        with av.open(str(source)) as read, av.open(str(path), mode="w") as written:
            stream = written.add_stream_from_template(read.streams.video[0])
            for packet in read.demux(video=0):
                if packet.size:
                    packet.stream, packet.pts, packet.dts = stream, 0, 0
                    written.mux(packet)
        with pytest.raises(VideoError, match=r"its clock stands still at 0\.000 s; `clock_jumps: join`"):
            decode(path, 16, 17)
        video = decode(path, 16, 17, clock_jumps="join")
        assert numbers(video) == [25 * index // 16 for index in range(17)]
        assert "stands still at 0.000 s" in video.remarks[0]

    def test_frames_with_the_time_of_another(self, tmp_path: Path) -> None:
        """The last of them is shown. A clock that is too coarse for its frames stands still for some of them too."""
        times = [Fraction(index - index % 3, 48) for index in range(60)]
        assert numbers(decode(write_numbered(tmp_path / "clip.mkv", times), 16, 17)) == list(range(2, 53, 3))


class TestCoarseClocks:
    @pytest.mark.parametrize("rate", [8, 10, 12, 15, 16, 20, 24, 25, 30, 32, 33, 48, 50])
    @pytest.mark.parametrize("fps", [16, None])
    def test_gif(self, tmp_path: Path, rate: int, fps: int | None) -> None:
        """Ticks of 10 ms, as ffmpeg writes any rate."""
        path = write_numbered(
            tmp_path / "clip.gif",
            constant(rate, 61),
            codec="gif",
            pix_fmt="gray",
            time_base=Fraction(1, 100),
            options={},
        )
        fps = rate if fps is None else fps
        num_frames = min(60 * fps // rate // 4 * 4 + 1, 61)
        assert numbers(decode(path, fps, num_frames)) == [index * rate // fps for index in range(num_frames)]

    @pytest.mark.parametrize("rounding", [np.floor, np.round, np.ceil])
    @pytest.mark.parametrize("start", [0, Fraction(1, 16)])
    @pytest.mark.parametrize("ticks", [100, 250, 1000])
    def test_any_rounding(self, tmp_path: Path, rounding: Any, start: Fraction, ticks: int) -> None:
        times = [Fraction(int(rounding(float(time * ticks))), ticks) for time in constant(16, 45, start)]
        path = write_numbered(
            tmp_path / "clip.mp4",
            times,
            time_base=Fraction(1, ticks),
            container_options={"video_track_timescale": str(ticks)},
        )
        assert numbers(decode(path, 16, 41)) == list(range(41))

    @pytest.mark.parametrize("rate", [15, 16, 24, 25, 30])
    def test_a_coarse_clock_that_is_exact_stays(self, tmp_path: Path, rate: int) -> None:
        """One tick per frame: nothing was rounded, so nothing may be moved."""
        path = write_numbered(
            tmp_path / "clip.mp4",
            constant(rate, 61),
            time_base=Fraction(1, rate),
            container_options={"video_track_timescale": str(rate)},
        )
        for fps in (rate, rate + 1, rate - 1, 16):
            num_frames = 60 * fps // rate // 4 * 4 + 1
            expected = [index * rate // fps for index in range(num_frames)]
            assert numbers(decode(path, fps, num_frames)) == expected

    def test_frames_left_out_on_an_exact_clock(self, tmp_path: Path) -> None:
        ticks = [tick for tick in range(80) if tick % 5 != 3]
        path = write_numbered(
            tmp_path / "clip.mp4",
            [Fraction(tick, 30) for tick in ticks],
            time_base=Fraction(1, 30),
            container_options={"video_track_timescale": "30"},
        )
        due = [30 * index // 16 for index in range(37)]
        expected = [max(number for number, tick in enumerate(ticks) if tick <= time) for time in due]
        assert numbers(decode(path, 16, 37)) == expected

    def test_milliseconds_copied_to_a_finer_clock(self, tmp_path: Path) -> None:
        times = [Fraction(round(time * 1000), 1000) for time in constant(16, 45)]
        path = write_numbered(tmp_path / "clip.mp4", times)
        assert numbers(decode(path, 16, 41)) == list(range(41))

    @pytest.mark.parametrize("rate", [15, 16, 24, 30])
    @pytest.mark.parametrize("ticks", [100, 250])
    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
    def test_any_rounding_copied_to_a_finer_clock(self, tmp_path: Path, suffix: str, ticks: int, rate: int) -> None:
        """A GIF that was converted to another format."""
        times = [Fraction(round(time * ticks), ticks) for time in constant(rate, 61)]
        path = write_numbered(tmp_path / f"clip.{suffix}", times)
        assert numbers(decode(path, rate, 57)) == list(range(57))

    def test_rounding_and_a_pause(self, tmp_path: Path) -> None:
        times = [Fraction(round(time * 1000), 1000) for time in constant(16, 20) + constant(16, 20, 4)]
        path = write_numbered(tmp_path / "clip.mp4", times)
        assert numbers(decode(path, 16, 77)) == [*range(20), *[19] * 44, *range(20, 33)]

    @pytest.mark.parametrize(("codec", "suffix"), [("gif", "gif"), ("libx264", "mp4"), ("libx264", "mkv")])
    def test_nothing_is_added_at_the_end(self, tmp_path: Path, codec: str, suffix: str) -> None:
        gif = {"codec": "gif", "pix_fmt": "gray", "time_base": Fraction(1, 100), "options": {}}
        arguments: dict[str, Any] = gif if codec == "gif" else {"rate": Fraction(16)}
        path = write_numbered(tmp_path / f"clip.{suffix}", constant(16, 12), **arguments)
        with pytest.raises(VideoError, match="too short: 12 frames"):
            decode(path, 16, 13)

    @pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)])
    def test_ntsc(self, tmp_path: Path, rate: Fraction) -> None:
        path = write_numbered(
            tmp_path / "clip.mp4", constant(rate, 78), time_base=1 / rate, rate=rate, options={"crf": "1", "bf": "0"}
        )
        # By the clock to the microsecond, not to the millisecond.
        num_frames = int(77 / rate * 16) // 4 * 4 + 1
        assert numbers(decode(path, 16, num_frames)) == [int(index * rate / 16) for index in range(num_frames)]
        # The rate that it is called by gives every frame, and half of that every other one.
        assert numbers(decode(path, round(rate), 77)) == list(range(77))
        assert numbers(decode(path, round(rate) / 2, 37)) == list(range(0, 74, 2))


class TestJumps:
    FIRST = constant(16, 20)

    @pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
    def test_forward(self, tmp_path: Path, suffix: str) -> None:
        path = write_numbered(tmp_path / f"clip.{suffix}", self.FIRST + constant(16, 20, 1000))
        with pytest.raises(VideoError, match=r"the frame at \d\.\d+ s stays for 998\.8\d+ s, longer than `max_frame_"):
            decode(path, 16, 37)
        video = decode(path, 16, 37, clock_jumps="join")
        assert numbers(video) == list(range(37))
        assert len(video.remarks) == 1
        assert "stays for 998.8" in video.remarks[0]

    def test_backward(self, tmp_path: Path) -> None:
        parts = [
            write_numbered(tmp_path / f"{index}.ts", constant(16, 20, start), file_format="mpegts").read_bytes()
            for index, start in enumerate((7, 0))
        ]
        path = tmp_path / "clip.ts"
        path.write_bytes(b"".join(parts))
        with pytest.raises(VideoError, match=r"its clock runs back at \d\.\d+ s"):
            decode(path, 16, 37)
        video = decode(path, 16, 37, clock_jumps="join")
        assert numbers(video) == [*range(20), *range(17)]
        assert "runs back" in video.remarks[0]

    def test_a_little_backward_is_not_taken_for_b_frames(self, tmp_path: Path) -> None:
        parts = [
            write_numbered(tmp_path / f"{index}.ts", constant(16, 20, start), file_format="mpegts").read_bytes()
            for index, start in enumerate((Fraction(1, 2), 0))
        ]
        path = tmp_path / "clip.ts"
        path.write_bytes(b"".join(parts))
        with pytest.raises(VideoError, match="runs back"):
            decode(path, 16, 37)
        assert numbers(decode(path, 16, 37, clock_jumps="join")) == [*range(20), *range(17)]

    def test_behind_what_is_read_it_does_not_matter(self, tmp_path: Path) -> None:
        path = write_numbered(tmp_path / "clip.mp4", self.FIRST + constant(16, 20, 1000))
        assert numbers(decode(path, 16, 17)) == list(range(17))


class TestPauses:
    TIMES = constant(16, 8) + constant(16, 12, 3)

    def test_a_pause_is_shown_and_reported(self, tmp_path: Path) -> None:
        video = decode(write_numbered(tmp_path / "clip.mp4", self.TIMES), 16, 53)
        assert numbers(video) == [*range(8), *[7] * 40, *range(8, 13)]
        assert video.remarks == ("one frame fills 2.56 s of the clip",)

    def test_limit(self, tmp_path: Path) -> None:
        path = write_numbered(tmp_path / "clip.mp4", self.TIMES)
        with pytest.raises(VideoError, match=r"the frame at 0\.438 s stays for 2\.562 s, longer than `max_frame_dur"):
            decode(path, 16, 17, max_frame_duration=2.0)
        video = decode(path, 16, 17, max_frame_duration=2.0, clock_jumps="join")
        assert numbers(video) == list(range(17))
        assert len(video.remarks) == 1

    def test_the_last_frame_too(self, tmp_path: Path) -> None:
        path = write_numbered(tmp_path / "clip.mp4", constant(16, 9))
        data = bytearray(path.read_bytes())
        # In the table of durations the last frame has a run of its own.
        run = data.index(b"stts") + 20
        assert struct.unpack(">2I", data[run : run + 8]) == (1, 3000)
        data[run : run + 8] = struct.pack(">2I", 1, 20 * 90000)
        path.write_bytes(data)
        assert numbers(decode(path, 16, 9)) == list(range(9))
        with pytest.raises(VideoError, match=r"the frame at 0\.500 s stays for 20\.000 s"):
            decode(path, 16, 13)
        assert numbers(decode(path, 16, 13, max_frame_duration=60)) == [*range(9), 8, 8, 8, 8]
