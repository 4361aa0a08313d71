"""What a video file tells of itself without being decoded, from its packets and its header."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class VideoFacts:
    """What a video file tells without being decoded.

    Attributes:
        frames: Frames that are stored to be shown; some of a damaged file may not decode.
        promised: Frames that it should have by its index or its duration: more than ``frames`` if it was cut off.
        fps: Frames per second on average, where it says.
        rotation: Degrees by which a frame is turned clockwise to be shown: 0, 90, 180 or 270.
        variable_rate: Whether the time from one frame to the next varies.
    """

    frames: int
    promised: int
    fps: float | None
    rotation: int
    variable_rate: bool


def read_facts(container: "InputContainer", stream: "VideoStream", rotation: int) -> VideoFacts:
    """Read all packets of a video that has just been opened; only a decoded frame has the rotation."""
    import av

    times: list[float] = []
    frames, end = 0, 0.0
    try:
        # A file's duration is that of its longest stream.
        for packet in container.demux():
            time = packet.dts if packet.pts is None or guesses_times(container) else packet.pts
            shown = packet.size > 0 and packet.stream.index == stream.index and not packet.is_discard
            frames += shown
            if packet.size == 0 or time is None or not packet.time_base:
                continue
            end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
            if shown:
                times.append(float(time * packet.time_base))
    except av.FFmpegError:
        pass
    times.sort()
    promised = max(frames, _indexed(stream), _expected(container, stream, times, end))
    fps = float(stream.average_rate) if stream.average_rate else None
    return VideoFacts(frames, promised, fps, rotation, _varies(times))


def guesses_times(container: "InputContainer") -> bool:
    """Tell whether FFmpeg guesses the times of presentation, as AVI has none."""
    return bool(container.format.name == "avi")


def _indexed(stream: "VideoStream") -> int:
    """Count the frames in the index of a file that has one of all frames, as mp4 and AVI have."""
    return sum(not entry.is_discard for entry in stream.index_entries)


def _expected(container: "InputContainer", stream: "VideoStream", times: Sequence[float], end: float) -> int:
    """Count the frames that there would be if those at the sorted times, until an end, went on for the duration."""
    import av

    # An mp4's duration includes what an edit list cuts away.
    if "mp4" in container.format.name or not times or end <= times[0]:
        return 0
    if container.format.name == "avi":
        # FFmpeg shortens the duration of a file that lost its index.
        duration = float(stream.frames * (stream.time_base or 0))
    else:
        duration = (container.duration or 0) / av.time_base
    # Counted from 0, as Matroska does, also where the first frame comes later.
    missing = max(duration - end, 0.0)
    return len(times) + round(missing * len(times) / (end - times[0]))


def _varies(times: Sequence[float]) -> bool:
    """Tell whether the gaps between sorted times differ by more than their rounding, to milliseconds in Matroska."""
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    if not gaps:
        return False
    usual = gaps[len(gaps) // 2]
    return max(gaps[-1] - usual, usual - gaps[0]) > max(0.1 * usual, 0.002)
