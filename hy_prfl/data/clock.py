"""Computes when each frame of a clip is on the screen: sorts presentation times, finds jumps, undoes rounding."""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import av
import numpy as np

from .pixels import VideoError


ClockJumps = Literal["refuse", "join"]

# Smallest error, in seconds, to allow for the times of any container: some round to milliseconds (WebM).
MILLISECOND = 1e-3

# Coarsest rounding, in seconds, to look for in the times of a finer clock: that of a GIF which was converted.
COARSEST = 1e-2

# Relative difference between the source's and the wanted rate up to which every frame is used: NTSC has 24 / 1.001.
DRIFT = 1.5e-3

# Rounding error of the arithmetic, in seconds.
EPSILON = 1e-6

# Frames that are read before one is passed on. In H.264, display order and coding order differ by at most 16 frames.
WINDOW = 18

# Frames that may have the same time. If there are more, the clock stands still.
MOST_AT_ONCE = 4


@dataclass(frozen=True)
class Shown:
    """A frame and the time at which it is on the screen, in seconds since the first frame."""

    frame: av.VideoFrame
    start: float
    end: float


@dataclass(frozen=True)
class _Timed:
    """A frame, its time by the file's clock, the known times of the frames after it, and whether times had to be sorted."""

    frame: av.VideoFrame
    time: float
    upcoming: list[float]
    was_sorted: bool


@dataclass
class Clock:
    """
    Computes when the frames of a stream, in the order of the decoder, are on the screen. Times are in seconds.

    - Missing times are computed from the durations of the frames before.
    - Times in coding order are sorted. Containers without presentation times (AVI) give such times.
    - Rounded times (to 10 ms in a GIF) are replaced by those of a constant rate, if one fits: the wanted rate, twice or
      three times this rate, or `base_rate`. A rate fits if no time is more than a tick, or a millisecond if that is more,
      away from it. If no rate fits, a frame may be a tick late, or a millisecond if that is less. If all times are
      multiples of up to 10 ms, as after a GIF was converted, that counts as the tick.
    - If the source has the NTSC variant of the wanted rate (29.97 for 30), every frame is used.
    - If the clock runs back or stands still, or a frame stays longer than `max_frame_duration`, that is an error. With
      `"join"` the parts are joined instead: the last frame before the jump stays as long as the one before it.

    Args:
        tick (`float`): Resolution of the clock, the stream's time base.
        interval (`float`): Usual duration of a frame, where the file does not say.
        fps (`float`): The wanted frame rate.
        base_rate (`float`): FFmpeg's guess of the frame rate before times were rounded.
        max_frame_duration (`float`): Longest time that one frame may stay.
        jumps (`str`, defaults to `"refuse"`): `"refuse"` or `"join"`.
        is_made_up (`bool`, defaults to `False`): Whether the file has no times and FFmpeg makes them up. They have holes
            then, or are all the same, so the durations of the frames are used.

    Attributes:
        joined (`list[str]`): A description of each jump that was joined.
        skipped (`float`): Seconds of the file's clock that these jumps skipped.
    """

    tick: float
    interval: float
    fps: float
    base_rate: float
    max_frame_duration: float
    jumps: ClockJumps = "refuse"
    is_made_up: bool = False
    joined: list[str] = field(default_factory=list)
    skipped: float = 0.0

    def show(self, frames: Iterable[av.VideoFrame]) -> Iterator[Shown]:
        """
        Frames with the times at which they appear and disappear, in display order.

        Raises:
            VideoError: If the clock jumps and `jumps` is `"refuse"`. It is raised when a frame after the jump is requested.
        """
        part, before, start, usual, at_once = _Part(self, 0.0), None, 0.0, self.interval, 1
        for timed in self._sort(frames):
            if before is not None:
                jump = self._find_jump(before.time, timed)
                following = start + usual if jump else max(part.place(timed), start)
                at_once = at_once + 1 if following == start else 1
                if following == start and at_once + timed.upcoming.count(timed.time) > MOST_AT_ONCE:
                    jump = f"its clock stands still at {before.time:.3f} s"
                    following = start + (self._duration(before.frame) or usual)
                yield Shown(before.frame, start, following)
                if jump:
                    self._refuse_or_note(jump, timed.time - before.time - usual)
                    part = _Part(self, following)
                usual, start = following - start or usual, following
            if part.origin is None:
                part.place(timed)
            before = timed
        if before is not None:
            duration = self._duration(before.frame) or usual
            too_long = duration > self.max_frame_duration
            leaving = _Timed(before.frame, before.time + duration, [], False)
            yield Shown(before.frame, start, start + usual if too_long else max(part.place(leaving), start))
            if too_long:
                self._refuse_or_note(self._stays(before.time, duration), duration - usual)

    def _sort(self, frames: Iterable[av.VideoFrame]) -> Iterator[_Timed]:
        """
        Frames with their times in ascending order, if no time is more than `WINDOW` frames away from its place.

        The decoder returns frames in display order, so only the times are sorted.
        """
        waiting: deque[av.VideoFrame] = deque()
        times: list[float] = []
        latest, end = -float("inf"), 0.0
        # Most places that a time had to move forwards.
        depth = 0

        def pop() -> _Timed:
            time = heapq.heappop(times)
            # Times that are still to be read may belong between the last ones.
            return _Timed(waiting.popleft(), time, sorted(times)[: max(len(times) - depth, 0)], depth > 0)

        for frame in frames:
            time = end if frame.pts is None or self.is_made_up else float(frame.pts * frame.time_base)
            end = time + (self._duration(frame) or self.interval)
            if time < latest - 2 * WINDOW * self.interval:
                # This far back it is not coding order but a new clock: all frames before it come first.
                while waiting:
                    yield pop()
                latest = time
            depth = max(depth, sum(other > time for other in times))
            latest = max(latest, time)
            waiting.append(frame)
            heapq.heappush(times, time)
            if len(waiting) > WINDOW:
                yield pop()
        while waiting:
            yield pop()

    def _find_jump(self, before: float, timed: _Timed) -> str | None:
        """Description of a jump between the previous frame and this one, None if there is none."""
        step = timed.time - before
        # In a sorted stream, times that nearly coincide come from two clocks, not from coding order.
        if step < 0 or (timed.was_sorted and step < self.interval / 2):
            return f"its clock runs back at {before:.3f} s"
        return self._stays(before, step) if step > self.max_frame_duration else None

    def _stays(self, time: float, duration: float) -> str:
        return (
            f"the frame at {time:.3f} s stays for {duration:.3f} s, longer than `max_frame_duration` "
            f"({self.max_frame_duration:g} s)"
        )

    def _refuse_or_note(self, jump: str, skipped: float) -> None:
        if self.jumps == "refuse":
            raise VideoError(f"{jump}; `clock_jumps: join` joins the parts before and after it")
        self.joined.append(jump)
        self.skipped += max(skipped, 0)

    def _duration(self, frame: av.VideoFrame) -> float:
        return float(frame.duration * frame.time_base) if frame.duration else 0.0


class _Part:
    """Frames between two jumps of the clock; the first one appears at `offset`."""

    def __init__(self, clock: Clock, offset: float) -> None:
        self.clock = clock
        self.offset = offset
        self.origin: float | None = None
        self.latest: float | None = None
        self.index = 0
        self.rates = np.array([clock.fps, 2 * clock.fps, 3 * clock.fps, clock.base_rate, 1 / clock.tick])
        self.drifts = np.array([DRIFT, DRIFT, DRIFT, 0, 0])
        self.steps: set[int] = set()

    def place(self, timed: _Timed) -> float:
        """When the next frame of this part appears on the screen."""
        if self.origin is None:
            self.origin = timed.time
        times = [timed.time]
        for time in timed.upcoming:
            if time - times[-1] > self.clock.max_frame_duration:
                break
            times.append(time)
        known = times if self.latest is None else [self.latest, *times]
        self.steps |= {round((second - first) / self.clock.tick) for first, second in pairwise(known)}
        self.latest = timed.time
        # Times with equal steps were not rounded.
        rounded = len(self.steps) > 1
        since = np.array(times) - self.origin
        errors = np.abs(since - np.arange(self.index, self.index + len(times)) / self.rates[:, None])
        tick = self.clock.tick * math.gcd(*self.steps)
        tick = tick if tick <= COARSEST else self.clock.tick
        slack = np.full(len(self.rates), max(tick, MILLISECOND) if rounded else 0.0)
        if tick > COARSEST and min(self.steps, default=0) == 1:
            # The clock counts frames (AVI). The wanted rate may be within a tick for a second, and yet be wrong.
            slack[self.drifts > 0] = MILLISECOND
        fit = (errors <= slack[:, None] + self.drifts[:, None] * since + EPSILON).all(axis=1)
        self.rates, self.drifts = self.rates[fit], self.drifts[fit]
        self.index += 1
        if len(self.rates):
            return self.offset + float((self.index - 1) / self.rates[0])
        late = min(tick, MILLISECOND) if rounded else 0.0
        return self.offset + max(float(since[0]) - late, 0.0)
