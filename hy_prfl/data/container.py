"""Opens a video file and decodes the frames of its video stream. Times and colours are handled elsewhere."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
from av.stream import Disposition

from .pixels import VideoError


# FFmpeg's own decoders for these drop transparency. The others drop what the container says of colours and orientation.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Start of files that contain no video but only refer to other files or network streams.
LISTS = {
    rb"ffconcat version": "ffconcat",
    rb"#EXTM3U": "HLS or M3U",
    rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<MPD[\s>]": "DASH",
    rb"v=0\r?\no=": "SDP",
}


@contextmanager
def open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    """
    Open a file for reading with PyAV, independently of its name.

    FFmpeg does not get the name: it would take the start of `12:30:05.mp4` for a protocol, and replace `%d` by a number.
    FFmpeg may not open any other file either; a list of files would make it do so.

    Raises:
        VideoError: If there is no such file, or it is a list of other files.
        av.error.FFmpegError: If FFmpeg cannot read it.
    """
    if not Path(path).is_file():
        raise VideoError(f"there is no file '{path}'")
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        for start, kind in LISTS.items():
            if re.match(start, head, re.DOTALL):
                raise VideoError(f"a list of other files ({kind}), not a video")
        file.seek(0)
        # No protocol has this name, so FFmpeg cannot open another file.
        options = {"protocol_whitelist": "none"}
        with av.open(_Nameless(file), container_options=options, buffer_size=1 << 18) as container:
            yield container


class _Nameless:
    """A file without the attribute `name`, which PyAV would pass to FFmpeg."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def choose_stream(container: av.container.InputContainer) -> av.VideoStream:
    """
    The default video stream, or else the largest one. Cover pictures and thumbnails do not count.

    Raises:
        VideoError: If there is no video stream.
    """
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        what = " but a cover picture" if container.streams.video else ""
        raise VideoError(f"the file holds no video stream{what}")
    return max(
        streams, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.width * stream.height)
    )


class DecodedStream:
    """
    Decoded frames of a stream, up to the first error. The error is stored, and `check` raises it.

    The clock reads ahead, so the error may be in a frame that nobody needs. Call `check` only if frames are missing.

    Attributes:
        tagged (`av.VideoFrame`, *optional*): A frame with the stream's colour tags and display matrix, if the decoded frames
            do not have them.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.container, self.stream = container, stream
        self.error: av.error.FFmpegError | None = None
        self.start: float | None = None
        self.tagged: av.VideoFrame | None = None
        self.num_frames = 0

    def __iter__(self) -> Iterator[av.VideoFrame]:
        try:
            for frame in self._decode():
                self.num_frames += 1
                if frame.time is not None:
                    self.start = frame.time if self.start is None else min(self.start, frame.time)
                yield frame
        except av.error.FFmpegError as error:
            self.error = error

    def _decode(self) -> Iterator[av.VideoFrame]:
        codec = ALPHA_DECODERS.get(self.stream.codec_context.name)
        # Copies that FFmpeg makes have the name in capitals.
        metadata = {name.lower(): value for name, value in self.stream.metadata.items()}
        if codec is None or metadata.get("alpha_mode") != "1":
            yield from self.container.decode(self.stream)
            return
        decoder = av.CodecContext.create(codec, "r")
        # Several threads would return the first frame later.
        self.stream.thread_type = "NONE"
        for packet in self.container.demux(self.stream):
            if self.tagged is None:
                self.tagged = next(iter(packet.decode()), None)
            yield from decoder.decode(packet if packet.size else None)

    def check(self, end: float) -> None:
        """Raise an error if a stream that ended `end` seconds after its first frame is broken or truncated."""
        if self.error is not None:
            raise self.error
        if self.num_frames == 0:
            raise VideoError("zero frames could be decoded")
        rate = self.stream.average_rate or self.stream.guessed_rate
        duration = self._announced()
        if duration is not None and end < duration - (2 / float(rate) if rate else 0):
            raise VideoError(f"truncated: {end:.2f} s of the announced {duration:.2f} s can be decoded")

    def _announced(self) -> float | None:
        """Duration in seconds that the header gives the stream."""
        if self.stream.duration is not None:
            duration = float(self.stream.duration * self.stream.time_base)
            # ASF counts from 0, but its first frame comes later.
            return duration - (self.start or 0.0) if self.container.format.name == "asf" else duration
        # These formats store one duration for all streams, starting at 0. For others FFmpeg only estimates one.
        container = self.container
        exact = container.format.name in ("matroska,webm", "flv") and len(container.streams) == 1
        if not exact or container.duration is None:
            return None
        return float((container.duration - max(container.start_time or 0, 0)) / av.time_base)
