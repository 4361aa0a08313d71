"""The only file that opens a video.

A frame that is silently another frame is worse than a slow one. decord and torchcodec seek, and on some containers they
return neighbours of the frames they were asked for; reading from the start, as PyAV does here, never does. So ``auto``
reads everything with PyAV, and seeks only where its packets make the frame sure (see :mod:`~clip_m2df.data.seeking`).
On VP8 and VP9 in WebM decord is exact too, but PyAV takes 0.9 to 1.1 times as long, and a flipped bit can make decord
abort the whole process.
"""

import io
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.data.seeking import PacketTable, read_packets
from clip_m2df.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Decoder = Literal["auto", "decord", "pyav", "torchcodec"]
Choose = Callable[[int], Sequence[int]]
"""From the number of frames that a video has to the numbers of those that are wanted."""

_Picture = NDArray[np.uint8]  # (height, width, 3)

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# FFmpeg's names of what holds all of its pictures itself. A playlist, whatever it is called, names other files, and so
# would lead out of the data set.
_CONTAINERS = (
    "mov,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,ivf,dv,mxf,gxf,nut,rm,wtv,gif,mjpeg,"
    "yuv4mpegpipe,jpeg_pipe,png_pipe,bmp_pipe,webp_pipe,gif_pipe,tiff_pipe,ppm_pipe"
)


class VideoError(UserError):
    """A video that cannot be read; the message names the file and the reason.

    Attributes:
        path: The file, which may be an image of a folder.
        reason: The reason alone.
    """

    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message


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


def read_frames(path: str, choose: Choose, *, decoder: Decoder = "auto") -> Tensor:
    """Read chosen frames of a video.

    Frame k is the k-th that is shown, as the video is meant to be seen: edit lists and rotation are applied. A
    video that ends before the last wanted frame is a shorter one than its file says. A frame of another size than the
    first is scaled to it.

    Args:
        path: A video file, or a folder of images, whose numbers order them.
        choose: From the number of frames to the wanted ones, in any order, repeats allowed. It is asked again when
            fewer frames decode than the file promised, so it must not depend on anything else.
        decoder: What reads a video file. ``auto`` is exact, today PyAV; the others are a person's own choice.

    Returns:
        uint8 RGB pixels, shape ``(frames, 3, height, width)``.

    Raises:
        VideoError: If the file is no video, or not one frame of it decodes.
        UserError: If the decoder is unknown or not installed.
    """
    if decoder not in _READERS:
        raise UserError(f"there is no decoder {decoder!r}: choose from {', '.join(_READERS)}")
    path = os.path.abspath(path)
    with _naming(path):
        mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return _read_images(path, choose)
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
        raise _unreadable(path, "it is neither a regular file nor a folder of images")
    with _naming(path), open(path, "rb") as file:
        is_empty = not file.read(1)
    if is_empty:
        raise _unreadable(path, "it is empty")
    if _READERS[decoder] is not _read_pyav:
        with _open(path, path):  # the others would follow a playlist
            pass
    try:
        return _READERS[decoder](path, choose)
    except ValueError:  # this module's own errors, and those of a choice out of range
        raise
    except Exception as error:  # whatever a damaged file does to a decoder is the file's fault
        raise _unreadable(path, f"reading it fails: {type(error).__name__}: {error}") from error


def probe(path: str) -> VideoFacts:
    """Read what a video file tells of itself: its packets and its first frame, which has the rotation.

    Raises:
        VideoError: If the file is no video.
    """
    import av

    path = os.path.abspath(path)
    times: list[float] = []
    frames, end = 0, 0.0
    with _open(path, path) as (container, stream):
        try:
            # A file's duration is that of its longest stream.
            for packet in container.demux():
                # AVI has no times of presentation: FFmpeg guesses them.
                time = packet.dts if packet.pts is None or container.format.name == "avi" else packet.pts
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
    with _open(path, path) as (container, stream):
        first = next(_frames(container, stream), None)
    rotation = 0 if first is None else -_quarters(first) % 4 * 90
    return VideoFacts(frames, promised, fps, rotation, _varies(times))


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


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the video."""
    try:
        yield
    except FileNotFoundError as error:
        raise _unreadable(path, "there is no such file") from error
    except PermissionError as error:
        reason = "no permission; allow reading it"
        raise VideoError(f"cannot read the video {path}: {reason}", path=path, reason=reason) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(path, str(error)) from error


def _read_decord(path: str, choose: Choose) -> Tensor:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise _not_installed("decord") from error
    broken = (RuntimeError, AssertionError, IndexError, decord.DECORDError, decord.DECORDLimitReachedError)
    try:
        # More threads fail on some VP9 files. The reader lives as short as can be: it hangs after a fork.
        reader = decord.VideoReader(path, num_threads=1)
    except broken as error:
        raise _unreadable(path, "decord cannot open it") from error
    wanted = _wanted(choose, len(reader))
    numbers = sorted(set(wanted))
    try:
        pictures = reader.get_batch(numbers).asnumpy()
    except broken as error:
        raise _unreadable(path, "decord cannot decode the wanted frames") from error
    return _clip(dict(zip(numbers, pictures, strict=True)), wanted)


def _read_torchcodec(path: str, choose: Choose) -> Tensor:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # the last two where FFmpeg's libraries are not found
        raise _not_installed("torchcodec") from error
    try:
        video = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=1)
    except (RuntimeError, ValueError) as error:
        raise _unreadable(path, "torchcodec cannot open it") from error
    wanted = _wanted(choose, len(video))
    numbers = sorted(set(wanted))
    try:
        frames: Tensor = video.get_frames_at(indices=numbers).data
    except (RuntimeError, ValueError, IndexError) as error:
        raise _unreadable(path, "torchcodec cannot decode the wanted frames") from error
    return frames[[numbers.index(number) for number in wanted]]


def _read_pyav(path: str, choose: Choose) -> Tensor:
    """Decode the wanted frames by seeking, or else from the first frame to the last wanted one.

    Where damage costs a frame, those after it are one number lower; not if seeking passes over it, which hides the
    loss.
    """
    with _open(path, path) as (container, stream):
        packets = read_packets(container, stream)
    n_frames = packets.n_frames
    while n_frames > 0:
        wanted = _wanted(choose, n_frames)
        numbers = set(wanted)
        pictures = _decode_runs(path, packets, numbers) if n_frames == packets.n_frames else {}
        if len(pictures) < len(numbers):
            pictures, decoded = _decode(path, numbers)
        if len(pictures) == len(numbers):
            return _clip(pictures, wanted)
        # It ended before the last wanted frame, so this is fewer than before.
        n_frames = decoded
    raise _unreadable(path, "not one frame of it decodes")


def _read_images(folder: str, choose: Choose) -> Tensor:
    with _naming(folder), os.scandir(folder) as entries:
        # A leading dot marks what macOS and editors leave beside the images.
        names = [e.name for e in entries if e.name.lower().endswith(_IMAGES) and e.name[0] != "." and e.is_file()]
    if not names:
        raise _unreadable(folder, f"the folder has no images ({', '.join(_IMAGES)})")
    names.sort(key=_natural)
    wanted = _wanted(choose, len(names))
    pictures: dict[int, _Picture] = {}
    size: tuple[int, int] | None = None
    for number in sorted(set(wanted)):
        path = os.path.join(folder, names[number])
        with _naming(path), open(path, "rb") as file:
            # From memory: FFmpeg would take a name such as "img_%d.jpg" for a pattern.
            data = io.BytesIO(file.read())
        with _open(data, path) as (container, stream):
            frame = next(_frames(container, stream), None)
            if frame is None:
                raise _unreadable(path, "the image does not decode")
            size = size or _size(frame)
            pictures[number] = _picture(frame, size)
    return _clip(pictures, wanted)


def _natural(name: str) -> tuple[list[int], str]:
    """Order names by the numbers in them, then by their letters."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


@contextmanager
def _open(source: str | IO[bytes], path: str) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    import av

    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        # Old files carry titles in any encoding.
        container = av.open(source, "r", metadata_errors="replace", options=options)
    except av.ArgumentError as error:
        raise _unreadable(path, "it is of no kind that is read here: text, sound or a playlist, perhaps") from error
    except av.FFmpegError as error:
        raise _unreadable(path, f"it is not a video that FFmpeg knows ({error.strerror})") from error
    with container:
        # A cover picture is a video stream too.
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise _unreadable(path, "it has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise _unreadable(path, "there is no decoder for its codec")
        stream.thread_count = 1  # the workers are the parallelism
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise _unreadable(path, f"a frame cannot be converted to RGB ({error.strerror})") from error


def _decode_runs(path: str, packets: PacketTable, numbers: set[int]) -> dict[int, _Picture]:
    """Decode the numbered frames by seeking; some or all are left out if that is not safe or saves little."""
    import av

    pictures: dict[int, _Picture] = {}
    runs = packets.runs(numbers)
    if not runs:
        return pictures
    with _open(path, path) as (container, stream):
        for run in runs:
            start = packets.times[run[0]]
            try:
                container.seek(start, stream=stream)
            except av.FFmpegError:
                break
            # Those shown before the start refer to what was not decoded.
            frames = (frame for frame in _frames(container, stream) if frame.pts is None or frame.pts >= start)
            for number, frame in zip(run, frames, strict=False):
                if frame.pts != packets.times[number] or frame.is_corrupt:
                    return pictures
                if number == 0:
                    size = _size(frame)
                if number in numbers:
                    pictures[number] = _picture(frame, size)
    return pictures


def _decode(path: str, numbers: set[int]) -> tuple[dict[int, _Picture], int]:
    """Decode up to the last of the numbered frames; return those that there are, and how many were decoded."""
    pictures: dict[int, _Picture] = {}
    decoded = 0
    last = max(numbers)
    with _open(path, path) as (container, stream):
        for frame in _frames(container, stream):
            if decoded == 0:
                size = _size(frame)
            if decoded in numbers:
                pictures[decoded] = _picture(frame, size)
            decoded += 1
            if decoded > last:
                break
    return pictures, decoded


def _frames(container: "InputContainer", stream: "VideoStream") -> Iterator["VideoFrame"]:
    """Yield what decodes, in the order of presentation."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            break
        try:
            frames = packet.decode()
        except av.FFmpegError:
            # A broken packet costs its own frames, not those after it.
            continue
        yield from frames
    # A truncated file ends without the empty packet that hands out the frames still held for reordering.
    try:
        frames = stream.decode(None)
    except av.FFmpegError:
        return
    yield from frames


def _size(frame: "VideoFrame") -> tuple[int, int]:
    """Return the width and height of a frame as it is shown."""
    return (frame.height, frame.width) if _quarters(frame) % 2 else (frame.width, frame.height)


def _picture(frame: "VideoFrame", size: tuple[int, int]) -> _Picture:
    """Convert a frame to RGB, turned as it is shown and scaled to a width and height."""
    quarters = _quarters(frame)
    width, height = size[::-1] if quarters % 2 else size
    # By default PyAV starts a thread a core for each frame.
    array = frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
    return np.rot90(array, quarters)


def _quarters(frame: "VideoFrame") -> int:
    return round(frame.rotation / 90) % 4


def _clip(pictures: dict[int, _Picture], wanted: Sequence[int]) -> Tensor:
    frames = np.stack([pictures[number] for number in wanted])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _wanted(choose: Choose, n_frames: int) -> list[int]:
    wanted = [int(number) for number in choose(n_frames)]
    if not wanted or min(wanted) < 0 or max(wanted) >= n_frames:
        raise ValueError(f"choose({n_frames}) returned {wanted}, not frame numbers from 0 to {n_frames - 1}")
    return wanted


def _unreadable(path: str, reason: str) -> VideoError:
    message = f"cannot read the video {path}: {reason}; remove it from the manifest or replace it"
    return VideoError(message, path=path, reason=reason)


def _not_installed(package: str) -> UserError:
    return UserError(
        f"decoder {package!r} needs the package {package}, which cannot be imported: install it, or use 'auto'"
    )


_READERS: dict[str, Callable[[str, Choose], Tensor]] = {
    "auto": _read_pyav,
    "decord": _read_decord,
    "pyav": _read_pyav,
    "torchcodec": _read_torchcodec,
}
