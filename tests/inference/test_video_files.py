import itertools
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest

from hy_prfl.data.video import read_video
from hy_prfl.inference.video_files import read_record, write_video


def smooth_frames(num_frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of a slow gradient, which chroma subsampling hardly changes."""
    y, x = np.mgrid[:height, :width]
    frames = [np.stack([4 * x + 8 * t, 255 - 4 * y, 80 + 2 * (x + y)], axis=-1) for t in range(num_frames)]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


class TestWriteVideo:
    def test_can_be_read_back(self, tmp_path: Path) -> None:
        frames = smooth_frames()
        write_video(tmp_path / "new" / "a.mp4", frames, fps=12, crf=4)
        with av.open(str(tmp_path / "new" / "a.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
        decoded = read_video(tmp_path / "new" / "a.mp4", fps=12, num_frames=5)
        assert np.abs(decoded.astype(int) - frames).mean() < 3
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]

    def test_float_frames_are_in_0_to_1(self, tmp_path: Path) -> None:
        frames = smooth_frames()
        write_video(tmp_path / "int.mp4", frames, fps=16)
        write_video(tmp_path / "float.mp4", frames.astype(np.float32) / 255, fps=16)
        assert (tmp_path / "int.mp4").read_bytes() == (tmp_path / "float.mp4").read_bytes()

    @pytest.mark.parametrize("size", [(32, 48), (720, 1280)])
    def test_pure_colors_come_back(self, tmp_path: Path, size: tuple[int, int]) -> None:
        """By the tags, and by what players assume of HD without them: BT.709 in limited range."""
        colors = np.array(list(itertools.product((0, 128, 255), repeat=3)), np.uint8)
        if size[0] > 100:
            colors = colors[[0, 2, 6, 8, 13, 18, 20, 24, 26]]
        for color in colors:
            path = tmp_path / "a.mp4"
            write_video(path, np.broadcast_to(color, (2, *size, 3)).copy(), fps=16)
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
            tags = (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc)
            assert [int(tag) for tag in tags] == [1, 1, 1, 1]
            planes = [np.frombuffer(plane, np.uint8)[0].astype(float) for plane in frame.planes]
            luma, blue, red = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
            r, b = luma + 1.5748 * red, luma + 1.8556 * blue
            rgb = 255 * np.clip([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], 0, 1)
            np.testing.assert_allclose(rgb, color, atol=3)
            decoded = read_video(path, fps=16, num_frames=1)[0].astype(int)
            np.testing.assert_allclose(decoded, np.broadcast_to(color, decoded.shape), atol=3)

    def test_names_with_colons(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_video("run:1/12:30:05.mp4", smooth_frames(), fps=16, comment='{"seed": 1}')
        write_video(tmp_path / "plain.mp4", smooth_frames(), fps=16, comment='{"seed": 1}')
        assert Path("run:1/12:30:05.mp4").read_bytes() == Path("plain.mp4").read_bytes()
        assert read_record("run:1/12:30:05.mp4") == {"seed": 1}

    def test_comment_is_kept(self, tmp_path: Path) -> None:
        record = {"caption": 'eine grüne Katze; 一只猫 = "x" \\ \'\n' + "long " * 500, "seed": 3}
        write_video(tmp_path / "a.mp4", smooth_frames(), fps=16, comment=json.dumps(record))
        assert read_record(tmp_path / "a.mp4") == record

    @pytest.mark.parametrize(
        "frames",
        [
            np.zeros((5, 31, 48, 3), np.uint8),
            np.zeros((5, 32, 47, 3), np.uint8),
            np.zeros((0, 32, 48, 3), np.uint8),
            np.zeros((5, 3, 32, 48), np.uint8),
            np.zeros((32, 48, 3), np.uint8),
            np.full((5, 32, 48, 3), np.nan, np.float32),
            np.full((5, 32, 48, 3), np.inf, np.float32),
            np.full((5, 32, 48, 3), 1.1, np.float32),
            np.full((5, 32, 48, 3), 255.0),
            np.full((5, 32, 48, 3), -0.5, np.float16),
            np.zeros((5, 32, 48, 3), np.int64),
            np.zeros((5, 32, 48, 3), np.int8),
            np.zeros((5, 32, 48, 3), np.uint16),
            np.zeros((5, 32, 48, 3), bool),
            np.zeros((5, 32, 48, 3), complex),
        ],
    )
    def test_bad_frames(self, tmp_path: Path, frames: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"a\.mp4"):
            write_video(tmp_path / "a.mp4", frames, fps=16)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("fps", [math.inf, math.nan, 0, -1])
    def test_bad_frame_rates(self, tmp_path: Path, fps: float) -> None:
        with pytest.raises(ValueError, match=rf"`fps` must be a finite number greater than 0, got {fps!r}"):
            write_video(tmp_path / "a.mp4", smooth_frames(), fps=fps)
        assert not list(tmp_path.iterdir())

    def test_floats_a_rounding_error_beyond_the_range(self, tmp_path: Path) -> None:
        write_video(tmp_path / "a.mp4", np.full((5, 32, 48, 3), 1 + 1e-6, np.float32), fps=16)
        assert read_video(tmp_path / "a.mp4", fps=16, num_frames=5).min() == 255
