"""Which stream of which file is read: names that FFmpeg would read otherwise, cover pictures, several streams."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from hy_prfl.data.video import VideoError, read_video


NAMES = (
    "12:30:05.mp4",
    "concat:a|b.mp4",
    "file:a.mp4",
    "pipe:0",
    "http://a.mp4",
    "a%03d.mp4",
    "b?*[a].mp4",
    "-i.mp4",
    "ü 片.mp4",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_mean_nothing(
    write_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = read_video(write_video(tmp_path / "plain.mp4"), fps=16, num_frames=9)
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy("plain.mp4", name)
    np.testing.assert_array_equal(read_video(name, fps=16, num_frames=9), expected)
    np.testing.assert_array_equal(read_video(Path(name).resolve(), fps=16, num_frames=9), expected)
    with pytest.raises(VideoError, match="there is no file"):
        read_video("missing:" + os.path.basename(name), fps=16, num_frames=9)


@pytest.mark.parametrize("name", ["a%03d.gif", "b*.gif", "1:2.gif"])
def test_names_of_images_are_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with av.open("plain.gif", mode="w") as container:
        stream = container.add_stream("gif", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "gray"
        for level in (20, 60, 100, 140, 180):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32), level, np.uint8), format="gray")))
        container.mux(stream.encode(None))
    os.rename("plain.gif", name)
    assert read_video(name, fps=25, num_frames=5)[:, 0, 0, 0].tolist() == [20, 60, 100, 140, 180]


def write_streams(path: Path, levels: list[tuple[int, int, Disposition]], num_frames: int = 5) -> None:
    """One video stream for each grey level, side in pixels and disposition."""
    with av.open(str(path), mode="w") as container:
        streams = []
        for _, side, disposition in levels:
            picture = disposition & Disposition.attached_pic
            stream = container.add_stream("png" if picture else "libx264", rate=16)
            stream.width = stream.height = side
            stream.pix_fmt = "rgb24" if picture else "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for (level, side, disposition), stream in zip(levels, streams, strict=True):
            for _ in range(1 if disposition & Disposition.attached_pic else num_frames):
                image = np.full((side, side, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_streams(path, [(200, 64, Disposition.attached_pic), (50, 32, Disposition.default)])
    with av.open(str(path)) as container:
        assert any(stream.disposition & Disposition.attached_pic for stream in container.streams.video)
    frames = read_video(path, fps=16, num_frames=5)
    assert frames.shape == (5, 32, 32, 3)
    assert abs(int(frames.mean()) - 50) <= 2


def test_nothing_but_a_cover_picture(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_streams(path, [(200, 64, Disposition.attached_pic)])
    with pytest.raises(VideoError, match="no video stream but a cover picture"):
        read_video(path, fps=16, num_frames=1)


@pytest.mark.parametrize("default", [True, False])
def test_the_default_stream_is_read_else_the_largest(tmp_path: Path, default: bool) -> None:
    path = tmp_path / "clip.mkv"
    none = Disposition(0)
    write_streams(path, [(40, 32, none), (120, 64, none), (200, 48, Disposition.default if default else none)])
    frames = read_video(path, fps=16, num_frames=5)
    assert frames.shape[1] == (48 if default else 64)
    assert abs(int(frames.mean()) - (200 if default else 120)) <= 2


@pytest.mark.parametrize(
    ("suffix", "codec"), [("webm", "libvpx-vp9"), ("mkv", "libx264"), ("flv", "flv"), ("avi", "mpeg4")]
)
def test_truncated_files_of_other_formats(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"clip.{suffix}"
    rng = np.random.default_rng(0)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 1_000_000
        for _ in range(41):
            image = rng.integers(0, 255, size=(64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(read_video(path, fps=16, num_frames=41)) == 41
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="truncated|cannot be decoded|damaged"):
        read_video(path, fps=16, num_frames=41, min_num_frames=5)


@pytest.mark.parametrize("rate", [24, 30])
def test_asf_counts_its_duration_from_zero(tmp_path: Path, rate: int) -> None:
    """Its first frame comes later, and the more so with B-frames. That is no truncation."""
    path = tmp_path / "clip.wmv"
    with av.open(str(path), mode="w", format="asf") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for level in range(40):
            image = np.full((64, 64, 3), 20 + 4 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(read_video(path, fps=rate, num_frames=81, min_num_frames=1)) == 37


def test_damage_behind_what_is_read_does_not_matter(write_video: Callable[..., Path], tmp_path: Path) -> None:
    """The clock looks ahead, and must not stumble there."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for level in range(20, 220, 10):
            image = np.full((32, 32, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuvj420p")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    starts = [at for at in range(len(data)) if data.startswith(b"\xff\xd8\xff", at)]
    path.write_bytes(data[: starts[10]] + bytes(len(data) - starts[10]))
    assert read_video(path, fps=16, num_frames=9)[:, 16, 16, 0].tolist() == pytest.approx(
        list(range(20, 110, 10)), abs=2
    )


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile a.mp4\n",
    "concat after a mark": "\ufeffffconcat version 1.0\nfile a.mp4\n",
    "concat of a part": "ffconcat version 1.0\nfile 'subfile,,start,0,end,0,,:a.mp4'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\na.mp4\n#EXT-X-ENDLIST\n",
    "m3u": "#EXTM3U\na.mp4\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>a.mp4</BaseURL></Period></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
}


@pytest.mark.parametrize("content", PLAYLISTS.values(), ids=PLAYLISTS.keys())
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list"])
def test_playlists_are_no_videos(
    write_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(VideoError, match=r"a list of other files \((ffconcat|HLS or M3U|DASH|SDP)\), not a video"):
        read_video(tmp_path / name, fps=16, num_frames=5)


def test_no_other_file_is_opened(
    write_video: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the format: a list that is not known as one is none that FFmpeg may follow."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
    monkeypatch.setattr("hy_prfl.data.container.LISTS", {})
    with pytest.raises(VideoError, match="cannot be decoded"):
        read_video(tmp_path / "list.mp4", fps=16, num_frames=5)
