"""How many frames a video has, when they are shown, and which of them at regular times.

Times of frames are exact fractions of a second from the first frame on. At many rates, half the video's own for one,
the wanted times are just those at which frames change, and rounding would choose now one frame, now its neighbour.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from clip_m2df.errors import UserError, require
from clip_m2df.video.images import Orientation

Item = TypeVar("Item")

# Seconds that a frame may be shown. What seems to last longer has damaged times, and would be given for ever.
LONGEST = 3600


class Timed(NamedTuple, Generic[Item]):
    """A frame, or an image's file, and when it is shown, in seconds.

    Attributes:
        item: What is shown.
        start: From when on.
        end: Until when, if nothing follows it.
    """

    item: Item
    start: Fraction
    end: Fraction


def exact_rate(name: str, rate: float) -> Fraction:
    """Return what a person means by a number a second, where 0.8 is four fifths, and not the float nearest to it.

    Raises:
        UserError: If it is not above 0, or infinite.
    """
    require(above=0, below=math.inf, **{name: rate})
    return Fraction(rate).limit_denominator() or Fraction(rate)


def evenly_timed(items: Iterable[Item], fps: Fraction) -> Iterator[Timed[Item]]:
    """Give each item the same time."""
    for number, item in enumerate(items):
        yield Timed(item, number / fps, (number + 1) / fps)


def timed(
    frames: Iterable[VideoFrame], container: InputContainer, stream: VideoStream, path: str
) -> Iterator[Timed[VideoFrame]]:
    """Give frames, in the order of presentation, their times in the file.

    One without a time follows the frame before it at the video's average rate. Where times start anew, as in a file
    that was joined from two, the second part goes on where the first ended.

    Raises:
        UserError: If a frame has no time and the file tells no rate, or one lasts longer than an hour.
    """
    usual = 1 / Fraction(stream.average_rate) if stream.average_rate else Fraction(0)
    unit = None if guesses_times(container) else stream.time_base
    origin: Fraction | None = None
    start = end = Fraction(0)
    for frame in frames:
        if unit is None or frame.pts is None:
            if not usual:
                raise UserError(f"the video {path} does not tell when its frames are shown: give fps, frames a second")
            start, end = end, end + usual
        else:
            time = frame.pts * unit
            if origin is None or time - origin < start:
                origin = time - end
            before, start = start, time - origin
            end = start + ((frame.duration or 0) * unit or usual)
            if max(start - before, end - start) > LONGEST:
                hours = float(max(start - before, end - start) / 3600)
                raise UserError(
                    f"the video {path} shows a frame for {hours:.3g} hours, so its times are damaged: give fps, frames"
                    " a second, to go without them"
                )
        yield Timed(frame, start, end)


def count_samples(frames: Iterable[Timed[Item]], rate: Fraction) -> Iterator[tuple[Item, int]]:
    """Count at how many of the times (k + 0.5) / rate each frame is the last that has begun.

    Yields:
        Each frame, in order, with its count, which may be 0; it is known when the next one comes.
    """
    passed = 0
    for frame, following in itertools.pairwise(itertools.chain(frames, [None])):
        assert frame is not None
        end = frame.end if following is None else following.start
        # The k from 0 on with (k + 0.5) / rate < end.
        before, passed = passed, math.ceil(end * rate - Fraction(1, 2))
        yield frame.item, passed - before


@dataclass(frozen=True)
class VideoFacts:
    """What a video file tells, and how much of that is true.

    Attributes:
        frames: Frames that decode.
        promised: Frames that it should have by its packets, its index or its duration: more than ``frames`` if it was
            cut off or damaged, or announces some that are none.
        fps: Frames per second on average, where it says.
        rotation: Degrees by which a frame is turned clockwise to be shown; only 0, 90, 180 and 270 are applied.
        variable_rate: Whether the time from one frame to the next varies.
        mirrored: Whether it is mirrored left to right before it is turned.
        pixel_aspect: Width of a stored pixel by its height, as a player shows it.
        left_out: Stored frames that its edit list leaves out.
    """

    frames: int
    promised: int
    fps: float | None
    rotation: int
    variable_rate: bool
    mirrored: bool = False
    pixel_aspect: float = 1.0
    left_out: int = 0


def read_facts(container: InputContainer, stream: VideoStream, decoded: int, orientation: Orientation) -> VideoFacts:
    """Read all packets of a video that has just been opened.

    Args:
        container: The file.
        stream: Its video.
        decoded: How many frames decode.
        orientation: How the first of them is meant to be seen.
    """
    times: list[float] = []
    stored, end = 0, 0.0
    with suppress(av.FFmpegError):
        # A file's duration is that of its longest stream.
        for packet in container.demux():
            time = packet.dts if packet.pts is None or guesses_times(container) else packet.pts
            shown = packet.size > 0 and packet.stream.index == stream.index and not packet.is_discard
            stored += shown
            base = packet.time_base
            if packet.size > 0 and time is not None and base:
                # As exact as with fractions, and ten times as fast.
                end = max(end, (time + (packet.duration or 0)) * base.numerator / base.denominator)
                if shown:
                    times.append(time * base.numerator / base.denominator)
    times.sort()
    # Files such as mp4 and AVI have an index of all frames.
    indexed = sum(not entry.is_discard for entry in stream.index_entries)
    expected = 0
    # An mp4's duration includes what an edit list cuts away.
    if "mp4" not in container.format.name and times and end > times[0]:
        duration = (container.duration or 0) / av.time_base
        if container.format.name == "avi":
            # FFmpeg shortens the duration of a file that lost its index.
            duration = float(stream.frames * (stream.time_base or 0))
        # As many as there would be if the frames went on so until the end of the duration, which is counted from 0, as
        # Matroska does, also where the first frame comes later.
        expected = len(times) + round(max(duration - end, 0.0) * len(times) / (end - times[0]))
    promised = max(decoded, stored, indexed, expected)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times)) or [0.0]
    usual = gaps[len(gaps) // 2]
    # More than by rounding, to milliseconds in Matroska.
    varies = max(gaps[-1] - usual, usual - gaps[0]) > max(0.1 * usual, 0.002)
    return VideoFacts(
        frames=decoded,
        promised=promised,
        fps=float(stream.average_rate) if stream.average_rate else None,
        rotation=orientation.degrees,
        variable_rate=varies,
        mirrored=orientation.mirrored,
        pixel_aspect=float(stream.sample_aspect_ratio or 1),
        # An mp4 counts what it stores, and has an index of what it shows.
        left_out=max(0, stream.frames - indexed) if "mp4" in container.format.name else 0,
    )


def guesses_times(container: InputContainer) -> bool:
    """Tell whether FFmpeg guesses the times of presentation, as AVI has none."""
    return bool(container.format.name == "avi")
