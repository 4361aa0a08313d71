"""Finds where in a video decoding may start, from its packets alone.

Seeking is exact only where the numbers of frames are known without decoding, and where nothing before the start is
needed. A container's keyframe flags do not promise that: they also mark recovery points and open groups of pictures.
So the packets themselves are looked into, and a video that leaves a doubt is one to decode from its first frame. Among
them are those in AVI, which has no times of presentation, in MPEG-TS, which has no index, and in AV1, whose keyframes
may be shown later than they are stored.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


_MOST_COST = 0.8  # of decoding from the first frame; a seek costs a little too


_LARGEST_WITHOUT_PICTURE = 19  # bytes of an MPEG-4 packet that repeats a frame, as FFmpeg has it


_IsStart = Callable[[bytes], bool | None]
"""Told each packet of a video in their order: whether what is shown from it on needs none before it.

None if it is not sure that the packet is one frame.
"""


@dataclass(frozen=True)
class PacketTable:
    """What the packets of a video tell of its frames.

    Attributes:
        n_frames: Frames that are stored to be shown.
        times: When each is shown, sorted, in the stream's time base; empty if seeking is not safe.
        positions: Place of each, in the same order, among the stored packets.
        starts: Numbers of the frames where decoding may start, sorted: all that are shown later need none before.
    """

    n_frames: int
    times: list[int]
    positions: list[int]
    starts: list[int]

    def runs(self, numbers: set[int]) -> list[range]:
        """Choose what to decode for wanted frames.

        The first frame is always decoded, for what a decoder learns only from the first packet, such as the name of
        an encoder whose errors it repeats.

        Returns:
            Frame numbers, in runs that begin where decoding may start; none if seeking is not safe or saves little.
        """
        if not self.starts:
            return []
        groups = itertools.groupby(sorted({0, *numbers}), lambda n: self.starts[bisect_right(self.starts, n) - 1])
        runs = [range(start, max(group) + 1) for start, group in groups]
        cost = sum(max(self.positions[n] for n in run) - self.positions[run[0]] + 1 for run in runs)
        return runs if cost <= _MOST_COST * (self.positions[max(numbers)] + 1) else []


def read_packets(container: "InputContainer", stream: "VideoStream") -> PacketTable:
    """Read all packets of a video, without decoding: headers lie, and some have no count of frames."""
    import av

    is_start = _rule(container, stream)
    n_frames = 0
    times: list[int] = []
    starts: set[int] = set()
    latest: int | None = None
    try:
        for packet in container.demux(stream):
            if packet.size == 0:  # the last
                continue
            # Those that an edit list cuts away are decoded, but not shown.
            n_frames += not packet.is_discard
            is_plain = packet.pts is not None and not packet.is_discard and not packet.has_sidedata("new_extradata")
            start = is_start(bytes(packet)) if is_start and is_plain else None
            if start is None or packet.pts is None:
                is_start = None
                continue
            if latest is None or packet.pts > latest:
                latest = packet.pts
                if start and packet.is_keyframe:  # both, as damage may make a start of any packet
                    starts.add(len(times))
            times.append(packet.pts)
    except av.FFmpegError:
        pass
    positions = sorted(range(len(times)), key=times.__getitem__)
    # The first packet has to be the first frame: a decoder may drop what is shown before it.
    if is_start is None or len(set(times)) < n_frames or 0 not in starts or positions[0] != 0:
        return PacketTable(n_frames, [], [], [])
    return PacketTable(n_frames, sorted(times), positions, [n for n, at in enumerate(positions) if at in starts])


def _rule(container: "InputContainer", stream: "VideoStream") -> _IsStart | None:
    """Return what tells starts in a video, or None if nothing does."""
    if container.format.name not in _CONTAINERS:
        return None
    extradata = stream.codec_context.extradata or b""
    match stream.codec_context.name:
        case "h264":  # 5: IDR slices; 7, 8: parameter sets
            return _nal_rule(extradata, 4, lambda byte: byte & 31, slices={1, 2, 5}, keys={5}, parameters={7, 8})
        case "hevc":  # 19, 20: IDR slices; 33, 34: parameter sets
            return _nal_rule(
                extradata, 21, lambda byte: byte >> 1 & 63, slices={*range(32)}, keys={19, 20}, parameters={33, 34}
            )
        case "mpeg4":
            return _is_mpeg4_start
        case "vp8":
            return _is_vp8_start
        case "vp9":
            return _is_vp9_start
        case "mjpeg":
            return lambda _: True
    return None


def _nal_rule(
    extradata: bytes, at: int, kind: Callable[[int], int], slices: set[int], keys: set[int], parameters: set[int]
) -> _IsStart | None:
    """Return the rule of H.264 and HEVC, whose packets are units that each begin with their length.

    Args:
        extradata: The decoder's configuration.
        at: Which byte of it has the lengths' own length.
        kind: From a unit's first byte to its kind.
        slices: Kinds that are pictures.
        keys: Those of them after which nothing refers to what came before.
        parameters: Kinds that later pictures need too.
    """
    if len(extradata) <= at or extradata[0] != 1:
        return None
    width = (extradata[at] & 3) + 1
    n_packets, has_changed = 0, False

    def is_start(data: bytes) -> bool | None:
        nonlocal n_packets, has_changed
        kinds, offset = set(), 0
        while offset + width < len(data):
            kinds.add(kind(data[offset + width]))
            offset += width + int.from_bytes(data[offset : offset + width])
        if offset != len(data) or not kinds & slices:
            return None
        # The first packet is always decoded; after others with parameters a start has to bring its own.
        has_changed |= n_packets > 0 and bool(kinds & parameters)
        n_packets += 1
        return kinds & slices <= keys and (parameters <= kinds or not has_changed)

    return is_start


def _is_mpeg4_start(data: bytes) -> bool | None:
    _, mark, picture = data.partition(b"\0\0\1\xb6")
    if not picture or mark in picture or len(data) <= _LARGEST_WITHOUT_PICTURE:
        return None
    return picture[0] >> 6 == 0  # intra


def _is_vp8_start(data: bytes) -> bool | None:
    is_shown = data[0] >> 4 & 1
    return data[0] & 1 == 0 if is_shown else None


def _is_vp9_start(data: bytes) -> bool | None:
    # A packet may end with an index of the frames in it, of which one is shown.
    sizes = [len(data)]
    if data[-1] & 0xE0 == 0xC0:
        width, n_frames = (data[-1] >> 3 & 3) + 1, (data[-1] & 7) + 1
        index = data[-1 - n_frames * width : -1]
        sizes = [int.from_bytes(index[k : k + width], "little") for k in range(0, len(index), width)]
    offsets = [0, *itertools.accumulate(sizes[:-1])]
    headers = [data[offset] for offset in offsets if offset < len(data)]
    if len(headers) < len(sizes) or any(header >> 4 not in (8, 9, 10) for header in headers):  # not profiles 0 to 2
        return None
    n_shown = sum(header & 0b1010 != 0 for header in headers)
    return headers[0] & 0b1100 == 0 if n_shown == 1 else None


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
