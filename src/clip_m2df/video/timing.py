"""When the frames of a video are shown, and which of them at regular times.

Times are exact fractions of a second from the first frame on. At many rates, half the video's own for one, the wanted
times are just those at which frames change, and rounding would choose now one frame, now its neighbour.
"""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from clip_m2df.errors import UserError
from clip_m2df.video.seeking import guesses_times

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


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
    if not 0 < rate < math.inf:
        raise UserError(f"{name} is {rate!r} a second; it must be a number above 0")
    return Fraction(rate).limit_denominator() or Fraction(rate)


def evenly_timed(items: Iterable[Item], fps: Fraction) -> Iterator[Timed[Item]]:
    """Give each item the same time."""
    for number, item in enumerate(items):
        yield Timed(item, number / fps, (number + 1) / fps)


def timed(
    frames: Iterable["VideoFrame"], container: "InputContainer", stream: "VideoStream", path: str
) -> Iterator[Timed["VideoFrame"]]:
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


def counted(frames: Iterable[Timed[Item]], rate: Fraction) -> Iterator[tuple[Item, int]]:
    """Count at how many of the times (k + 0.5) / rate each frame is the last that has begun.

    Yields:
        Each frame, in order, with its count, which may be 0; it is known when the next one comes.
    """
    held: Timed[Item] | None = None
    passed = 0
    for frame in frames:
        if held is not None:
            before, passed = passed, _times_before(frame.start, rate)
            yield held.item, passed - before
        held = frame
    if held is not None:
        yield held.item, _times_before(held.end, rate) - passed


def _times_before(time: Fraction, rate: Fraction) -> int:
    """Count the k from 0 on with (k + 0.5) / rate < time."""
    return math.ceil(time * rate - Fraction(1, 2))
