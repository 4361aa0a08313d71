"""Finds where in a video decoding may start, from its packets alone.

Seeking is exact only where the numbers of frames are known without decoding, and where nothing before the start is
needed. A container's keyframe flags do not promise that: they also mark recovery points and open groups of pictures.
So the packets themselves are looked into, and a video that leaves a doubt is one to decode from its first frame. Among
them are those in AVI, which has no times of presentation, in MPEG-TS, which has no index, and in AV1, whose keyframes
may be shown later than they are stored.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import av
from av.container import InputContainer
from av.video.stream import VideoStream

CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
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
        positions: Index of each, in the same order, among the stored packets.
        starts: Numbers of the frames where decoding may start, sorted: all that are shown later need none before.
        keyframes: How many packets the container marks as keyframes.
        in_order: Whether the frames are shown in the order in which they are stored, and all of them.
    """

    n_frames: int
    times: list[int]
    positions: list[int]
    starts: list[int]
    keyframes: int
    in_order: bool

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


def decord_doubt(packets: PacketTable, codec: str) -> str:
    """Tell why decord, which seeks to keyframes, may give other frames of a video; empty if it does not.

    Measured on every kind of file that the tests have: it counts frames as they are stored, takes every keyframe for a
    start, and knows the order of H.264, HEVC, VP8 and VP9 in MP4 and Matroska alone.
    """
    if len(packets.starts) == packets.keyframes > 0 and (packets.in_order or codec != "mpeg4"):
        return ""
    if codec in ("h264", "hevc"):
        return "its keyframes do not tell where decoding may start, or an edit list cuts it"
    return "" if packets.in_order else "its frames are not shown in the order in which they are stored"


def read_packets(container: InputContainer, stream: VideoStream) -> PacketTable:
    """Read all packets of a video, without decoding: headers lie, and some have no count of frames."""
    is_start = _rule(container, stream)
    n_frames = keyframes = 0
    in_order = True
    times: list[int] = []
    starts: set[int] = set()
    latest: int | None = None
    with suppress(av.FFmpegError):
        for packet in container.demux(stream):
            if packet.size == 0:  # the last
                continue
            # Those that an edit list cuts away are decoded, but not shown.
            n_frames += not packet.is_discard
            keyframes += packet.is_keyframe
            in_order &= packet.pts == packet.dts and not packet.is_discard
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
    positions = sorted(range(len(times)), key=times.__getitem__)
    # The first packet has to be the first frame: a decoder may drop what is shown before it.
    if is_start is None or len(set(times)) < n_frames or 0 not in starts or positions[0] != 0:
        return PacketTable(n_frames, [], [], [], keyframes, in_order)
    found = [n for n, at in enumerate(positions) if at in starts]
    return PacketTable(n_frames, sorted(times), positions, found, keyframes, in_order)


def _rule(container: InputContainer, stream: VideoStream) -> _IsStart | None:
    """Return what tells starts in a video, or None if nothing does."""
    if container.format.name not in CONTAINERS:
        return None
    extradata = stream.codec_context.extradata or b""
    rules: dict[str, _IsStart | None] = {
        # 5: IDR slices; 7, 8: parameter sets
        "h264": nal_rule(extradata, 4, lambda byte: byte & 31, slices={1, 2, 5}, keys={5}, parameters={7, 8}),
        # 19, 20: IDR slices; 33, 34: parameter sets
        "hevc": nal_rule(
            extradata, 21, lambda byte: byte >> 1 & 63, slices={*range(32)}, keys={19, 20}, parameters={33, 34}
        ),
        "mpeg4": is_mpeg4_start,
        "vp8": is_vp8_start,
        "vp9": is_vp9_start,
        "mjpeg": lambda _: True,
    }
    return rules.get(stream.codec_context.name)


def nal_rule(
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


def is_mpeg4_start(data: bytes) -> bool | None:
    """The rule of MPEG-4 ASP."""
    _, mark, picture = data.partition(b"\0\0\1\xb6")
    if not picture or mark in picture or len(data) <= _LARGEST_WITHOUT_PICTURE:
        return None
    return picture[0] >> 6 == 0  # intra


def is_vp8_start(data: bytes) -> bool | None:
    """The rule of VP8."""
    is_shown = data[0] >> 4 & 1
    return data[0] & 1 == 0 if is_shown else None


def is_vp9_start(data: bytes) -> bool | None:
    """The rule of VP9, profiles 0 to 2."""
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
