"""The only way to the pixels of a video; no other file opens one, but for the decoders of a person's own choice.

A frame that is silently another frame is worse than a slow one. decord and torchcodec seek, and on some containers they
return neighbours of the frames they were asked for; reading from the start, as PyAV does here, never does. So ``auto``
reads everything with PyAV, and seeks only where its packets make the frame sure (see :mod:`~clip_m2df.video.seeking`).
On VP8 and VP9 in WebM decord is exact too, but PyAV takes 0.9 to 1.1 times as long, and a flipped bit can make decord
abort the whole process.

torch is imported when a tensor is first asked for: a process that only decodes starts in a tenth of the time.
"""

from __future__ import annotations

import importlib
import io
import itertools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from clip_m2df.errors import UserError
from clip_m2df.files import Fingerprint, fingerprint
from clip_m2df.video import Decoder as Decoder
from clip_m2df.video.images import (
    MOST_PIXELS,
    Orientation,
    UnclearOrderError,
    excessive_size,
    exif_orientation,
    matrix_orientation,
    order_images,
)
from clip_m2df.video.seeking import CONTAINERS, PacketTable, decord_doubt, read_packets
from clip_m2df.video.timing import VideoFacts, count_samples, evenly_timed, exact_rate, read_facts, timed

if TYPE_CHECKING:
    from torch import Tensor

Choose = Callable[[int], Sequence[int]]
"""From the number of frames that a video has to the numbers of those that are wanted."""

_Picture = NDArray[np.uint8]  # (height, width, 3)

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# FFmpeg's names of what holds all of its pictures itself. A playlist, whatever it is called, names other files, and so
# would lead out of the data set.
_CONTAINERS = (
    "mov,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts,mpegvideo,m4v,h264,hevc,av1,obu,ivf,dv,mxf,gxf,nut,rm,wtv,gif,mjpeg,"
    "yuv4mpegpipe,jpeg_pipe,png_pipe,bmp_pipe,webp_pipe,gif_pipe,tiff_pipe,ppm_pipe"
)


_LIMITS = {"max_pixels": str(MOST_PIXELS)}
_MOST = f"{MOST_PIXELS // 10**6} million"
_NO_FRAME = f"not one frame of it decodes (of more than {_MOST} pixels none is tried)"

_COVERS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
_STILLS = ("mjpeg", "png", "bmp", "gif", "tiff", "webp")


def read_frames(path: str, choose: Choose, *, decoder: Decoder = "auto") -> tuple[Tensor, int]:
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
        uint8 RGB pixels, shape ``(frames, 3, height, width)``; and how many frames there were to choose from.

    Raises:
        UserError: As :func:`read_pictures`.
        ChoiceError: The same.
    """
    pictures, n_frames = read_pictures(path, choose, decoder=decoder)
    return as_clip(pictures), n_frames


def as_clip(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures ``(frames, height, width, 3)`` as a tensor ``(frames, 3, height, width)``."""
    import torch

    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def read_pictures(path: str, choose: Choose, *, decoder: Decoder = "auto") -> tuple[NDArray[np.uint8], int]:
    """Read chosen frames as :func:`read_frames` does, without torch: ``(frames, height, width, 3)``.

    Raises:
        VideoError: If the file is not a video, or not one frame of it decodes.
        UserError: If the decoder is unknown or not installed.
        ChoiceError: If a frame is chosen that there is not.
    """
    if decoder not in _READERS:
        raise UserError(f"there is no decoder {decoder!r}: choose from {', '.join(_READERS)}")
    path = _find(path)
    read = _READERS[decoder]
    with as_video_error(path, "" if read is _read_pyav else decoder):
        if os.path.isdir(path):
            return _read_images(path, choose)
        if read is not _read_pyav and (doubt := decoder_doubt(path, decoder)):
            raise UserError(
                f"of the video {path} {doubt}: take the decoder auto (--data.decoder auto);"
                f" `clip-m2df check --decoder {decoder}` names all such videos"
            )
        return read(path, choose)


def sample_pictures(path: str, rate: float, *, fps: float | None = None) -> Iterator[NDArray[np.uint8]]:
    """Read the frames of a video at regular times, in one pass that never holds more than a few of them.

    Times are counted from the first frame's. What is shown at one is the last frame that has begun, and the video ends
    when its last frame does. Frames without a time, as all in AVI are, follow at the average rate.

    Args:
        path: A video file, or a folder of images, whose numbers order them.
        rate: Frames a second to read: those shown at the times (k + 0.5) / rate seconds, k = 0, 1, …
        fps: How many frames of the video a second has. A folder of images needs it; it overrides a file's own times.

    Returns:
        uint8 RGB pixels, shape ``(height, width, 3)``, for each such time within the video: none at all for one that
        is not longer than 0.5 / rate.

    Raises:
        VideoError: If the file is not a video, or not one frame of it decodes; in part only when frames are asked for.
        UserError: If rate or fps is not above 0, or fps is needed.
    """
    exact = exact_rate("rate", rate)
    own = None if fps is None else exact_rate("fps", fps)
    path = _find(path)
    if not os.path.isdir(path):
        return _sample_pyav(path, exact, own)
    if own is None:
        raise UserError(f"{path} is a folder of images, which have no times: give fps, how many of them a second has")
    return _sample_images(_list_images(path), exact, own)


def is_video(path: str) -> bool:
    """Tell by its content whether a file, whatever it is called, is a video: no text, sound, picture or playlist."""
    try:
        path = _find(path)
        with as_video_error(path), _open(path, path) as (container, stream):
            # FFmpeg's formats of single pictures are called png_pipe and so on; Motion JPEG looks like several.
            is_picture = container.format.name.endswith("_pipe") and not path.lower().endswith((".mjpeg", ".mjpg"))
            return not is_picture and next(_frames(container, stream), None) is not None
    except VideoError:
        return False


def probe(path: str) -> VideoFacts:
    """Read what a video file tells of itself, and decode it to its end to see how much of that is true.

    Raises:
        VideoError: If the file is not a video.
    """
    path = os.path.abspath(path)
    with as_video_error(path):
        _, decoded, orientation = _decode(path, set(), to_end=True)
        with _open(path, path) as (container, stream):
            return read_facts(container, stream, decoded, orientation)


def examine_video(path: str, choose: Choose) -> tuple[NDArray[np.uint8], int, VideoFacts]:
    """Read chosen frames of a video file as :func:`read_pictures` does, and its facts as :func:`probe` does.

    It is decoded once where the frames are not to be had by seeking.

    Raises:
        UserError: As :func:`read_pictures`.
        ChoiceError: The same.
    """
    path = _find(path)
    with as_video_error(path):
        with _open(path, path) as (container, stream):
            packets = read_packets(container, stream)
        wanted = chosen_frames(choose, packets.n_frames) if packets.n_frames else []
        if wanted and not packets.runs(set(wanted)):
            pictures, decoded, orientation = _decode(path, set(wanted), to_end=True)
            if len(pictures) == len(set(wanted)):
                with _open(path, path) as (container, stream):
                    facts = read_facts(container, stream, decoded, orientation)
                return _stack(pictures, wanted), packets.n_frames, facts
    return *read_pictures(path, choose), probe(path)


def decoder_doubt(path: str, decoder: Decoder) -> str:
    """Tell why a decoder may give other frames of a video file than those that are shown; empty if it does not.

    Raises:
        VideoError: If the file is not a video; what it names, as a playlist does, is not opened.
    """
    path = os.path.abspath(path)
    if _READERS[decoder] is _read_pyav or os.path.isdir(path):
        return ""
    with as_video_error(path):
        return _decoder_doubt(path, decoder, fingerprint(path))


@lru_cache(maxsize=1 << 20)  # told once before a training, and not again each time that a video is read
def _decoder_doubt(path: str, decoder: Decoder, key: Fingerprint) -> str:
    with as_video_error(path):
        with _open(path, path) as (container, stream):
            several, kind, codec = len(container.streams.video) > 1, container.format.name, stream.codec_context.name
            packets = read_packets(container, stream)
        with _open(path, path) as (container, stream):
            orientations = [matrix_orientation(f) for f in itertools.islice(_frames(container, stream), 2)]
    turned = orientations[0] if orientations else Orientation()
    # decord turns by the header of MOV and MP4 alone, which holds for all frames.
    by_header = decoder == "decord" and kind == CONTAINERS[0] and len(set(orientations)) == 1
    if several:
        why = "it has several video streams"
    elif turned.mirrored or turned.degrees % 90 or (turned.degrees and not by_header):
        why = "it is to be shown turned or mirrored"
    elif decoder == "torchcodec":
        why = "" if packets.in_order or kind in CONTAINERS else "its frames have no reliable times"
    else:
        why = decord_doubt(packets, codec)
    return f"{decoder} may give other frames ({why})" if why else ""


def examine_images(folder: str) -> tuple[list[str], list[str]]:
    """Decode every image of a folder that is a frame of its video.

    Returns:
        The names of those that cannot be had, each with the reason; and those of images that are not frames, such as
        masks.
    """
    folder = os.path.abspath(folder)
    images, broken = _list_images(folder), []
    for image in images:
        try:
            list(_pictures([image]))
        except VideoError as error:
            broken.append(error.reason_for(folder))
    return broken, sorted({*_image_names(folder)} - {*map(os.path.basename, images)})


def _find(path: str) -> str:
    """Return the absolute path of what may be a video: a file that is not empty, or a folder."""
    path = os.path.abspath(path)
    with as_video_error(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
                raise unreadable(path, "it is neither a regular file nor a folder of images")
            with open(path, "rb") as file:
                if not file.read(1):
                    raise unreadable(path, "it is empty")
    return path


def _read_pyav(path: str, choose: Choose) -> tuple[NDArray[np.uint8], int]:
    """Decode the wanted frames by seeking, or else from the first frame to the last wanted one.

    Where damage costs a frame, those after it are one number lower; not if seeking passes over it, which hides the
    loss.
    """
    with _open(path, path) as (container, stream):
        packets = read_packets(container, stream)
    n_frames = packets.n_frames
    while n_frames > 0:
        wanted = chosen_frames(choose, n_frames)
        numbers = set(wanted)
        pictures = _decode_runs(path, packets, numbers) if n_frames == packets.n_frames else {}
        if len(pictures) < len(numbers):
            pictures, decoded, _ = _decode(path, numbers)
        if len(pictures) == len(numbers):
            return _stack(pictures, wanted), n_frames
        # It ended before the last wanted frame, so this is fewer than before.
        n_frames = decoded
    raise unreadable(path, _NO_FRAME)


def _read_images(folder: str, choose: Choose) -> tuple[NDArray[np.uint8], int]:
    images = _list_images(folder)
    return _read_numbered(len(images), choose, lambda numbers: _pictures(images[number] for number in numbers))


def _read_decord(path: str, choose: Choose) -> tuple[NDArray[np.uint8], int]:
    # More threads fail on some VP9 files. The reader lives as short as can be: it hangs after a fork.
    video = _import("decord").VideoReader(path, num_threads=1)
    return _read_numbered(len(video), choose, lambda numbers: video.get_batch(numbers).asnumpy())


def _read_torchcodec(path: str, choose: Choose) -> tuple[NDArray[np.uint8], int]:
    video = _import("torchcodec.decoders").VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=1)
    return _read_numbered(
        len(video), choose, lambda numbers: video.get_frames_at(indices=numbers).data.permute(0, 2, 3, 1).numpy()
    )


def _read_numbered(
    n_frames: int, choose: Choose, read: Callable[[list[int]], Iterable[_Picture]]
) -> tuple[NDArray[np.uint8], int]:
    """Read the chosen frames of what gives frames by their numbers, once each and in order."""
    wanted = chosen_frames(choose, n_frames)
    numbers = sorted(set(wanted))
    return _stack(dict(zip(numbers, read(numbers), strict=True)), wanted), n_frames


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # the last two where FFmpeg's libraries are not found
        package = module.partition(".")[0]
        raise UserError(
            f"decoder {package!r} needs the package {package}, which cannot be imported: install it, or use 'auto'"
        ) from error


_READERS = {"auto": _read_pyav, "decord": _read_decord, "pyav": _read_pyav, "torchcodec": _read_torchcodec}


def _sample_pyav(path: str, rate: Fraction, fps: Fraction | None) -> Iterator[_Picture]:
    view: _View | None = None
    with as_video_error(path), _open(path, path) as (container, stream):
        frames = _frames(container, stream)
        stamped = timed(frames, container, stream, path) if fps is None else evenly_timed(frames, fps)
        for frame, count in count_samples(stamped, rate):
            view = view or _view(frame, matrix_orientation(frame))
            if count:
                yield from _repeat(_picture(frame, view), count)
    if view is None:
        raise unreadable(path, _NO_FRAME)


def _sample_images(images: Sequence[str], rate: Fraction, fps: Fraction) -> Iterator[_Picture]:
    shown = [(image, count) for image, count in count_samples(evenly_timed(images, fps), rate) if count]
    for picture, (_, count) in zip(_pictures(image for image, _ in shown), shown, strict=True):
        yield from _repeat(picture, count)


def _repeat(picture: _Picture, count: int) -> Iterator[_Picture]:
    """Yield copies of a picture, not as one clip: a slide may be shown for an hour."""
    for _ in range(count):
        yield picture.copy()


def _list_images(folder: str) -> list[str]:
    """List the paths of a folder's images in the order of their numbers."""
    names = _image_names(folder)
    if not names:
        raise unreadable(folder, f"the folder has no images ({', '.join(_IMAGES)})")
    try:
        return [os.path.join(folder, name) for name in order_images(names)]
    except UnclearOrderError as error:
        raise unreadable(folder, str(error)) from error


def _image_names(folder: str) -> list[str]:
    with as_video_error(folder), os.scandir(folder) as entries:
        # A leading dot marks what macOS and editors leave beside the images.
        return [e.name for e in entries if e.name.lower().endswith(_IMAGES) and e.name[0] != "." and e.is_file()]


def _pictures(images: Iterable[str]) -> Iterator[_Picture]:
    """Read images, each scaled to the size of the first."""
    size: tuple[int, int] | None = None  # as it is shown
    for path in images:
        with as_video_error(path):
            data = Path(path).read_bytes()
            # From memory: FFmpeg would take a name such as "img_%d.jpg" for a pattern.
            with _open(io.BytesIO(data), path) as (container, stream):
                frame = next(_frames(container, stream), None)
                if frame is None:
                    raise unreadable(path, "the image does not decode")
                view = _view(frame, exif_orientation(data))
                size = size or view.shown
                picture = _picture(frame, view._replace(shown=size))
        yield picture


@contextmanager
def _open(source: str | io.BytesIO, path: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    # Opening may decode a frame.
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file", **_LIMITS}
    try:
        # Old files carry titles in any encoding.
        container = av.open(source, "r", metadata_errors="replace", options=options)
    except av.ArgumentError as error:
        raise unreadable(path, "it is of no kind that is read here: text, sound or a playlist, perhaps") from error
    except av.FFmpegError as error:
        raise unreadable(path, f"it is not a video that FFmpeg knows ({error.strerror})") from error
    with container:
        stream = _main_stream(container)
        if stream is None:
            raise unreadable(path, "it has no video stream")
        context = stream.codec_context
        if context is None:
            raise unreadable(path, "there is no decoder for its codec")
        if context.width * context.height > MOST_PIXELS:
            size = f"{context.width} x {context.height} pixels"
        elif context.width == 0:  # where only decoding tells it, which the limits forbid
            size = excessive_size(source if isinstance(source, str) else io.BytesIO(source.getvalue()))
        else:
            size = ""
        if size:
            raise unreadable(path, f"it has {size}, and at most {_MOST} are decoded: scale it down")
        context.options = dict(_LIMITS)
        stream.thread_count = 1  # the workers are the parallelism
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise unreadable(path, f"a frame cannot be converted to RGB ({error.strerror})") from error


def _main_stream(container: InputContainer) -> VideoStream | None:
    """Choose the stream of a file that players show, which need not be the first: others are covers and previews."""
    streams = [s for s in container.streams.video if not s.disposition & _COVERS]
    if len(streams) < 2:
        return streams[0] if streams else None
    # FFmpeg's choice, but for one of more pixels where FFmpeg would take the first.
    best = container.streams.best("video")

    def rank(stream: VideoStream) -> tuple[int, ...]:
        is_best = best is not None and stream.index == best.index
        is_still = stream.frames == 1 or (stream.codec_context is not None and stream.codec_context.name in _STILLS)
        is_default = bool(stream.disposition & av.stream.Disposition.default)
        return is_default, is_best or not is_still, stream.width * stream.height, is_best

    return max(streams, key=rank)


def _decode_runs(path: str, packets: PacketTable, numbers: set[int]) -> dict[int, _Picture]:
    """Decode the numbered frames by seeking; some or all are left out if that is not safe or saves little."""
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
                    view = _view(frame, matrix_orientation(frame))
                if number in numbers:
                    pictures[number] = _picture(frame, view)
    return pictures


def _decode(path: str, numbers: set[int], *, to_end: bool = False) -> tuple[dict[int, _Picture], int, Orientation]:
    """Decode up to the last of the numbered frames, or to the end.

    Returns:
        Those of them that there are, how many frames were decoded, and how the first is meant to be seen.
    """
    pictures: dict[int, _Picture] = {}
    decoded, orientation = 0, Orientation()
    with _open(path, path) as (container, stream):
        frames = _frames(container, stream)
        for number, frame in enumerate(frames if to_end else itertools.islice(frames, max(numbers) + 1)):
            decoded = number + 1
            if number == 0:
                orientation = matrix_orientation(frame)
                view = _view(frame, orientation)
            if number in numbers:
                pictures[number] = _picture(frame, view)
    return pictures, decoded, orientation


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield what decodes, in the order of presentation."""
    is_picture = stream.codec_context.name in _STILLS  # whose tags PyAV does not know
    with suppress(av.FFmpegError):
        for packet in container.demux(stream):
            with suppress(av.FFmpegError):  # a broken packet costs its own frames, not those after it
                for frame in packet.decode():
                    if is_picture:
                        frame.opaque = exif_orientation(bytes(packet))
                    yield frame
        return
    # A truncated file ends without the empty packet that hands out the frames still held for reordering.
    with suppress(av.FFmpegError):
        yield from stream.decode(None)


class _View(NamedTuple):
    """How all frames of a video are shown; it is that of the first, as later ones may not repeat how it is turned."""

    orientation: Orientation
    shown: tuple[int, int]  # width and height


def _view(frame: VideoFrame, orientation: Orientation) -> _View:
    return _View(orientation, (frame.width, frame.height) if orientation.is_upright else (frame.height, frame.width))


def _picture(frame: VideoFrame, view: _View) -> _Picture:
    """Convert a frame to RGB, scaled and turned as it is shown."""
    width, height = view.shown if view.orientation.is_upright else view.shown[::-1]
    # By default PyAV starts a thread a core for each frame.
    array: Any = frame.reformat(width=width, height=height, format="rgb24", threads=1).to_ndarray()
    return view.orientation.apply(array)


def _stack(pictures: dict[int, _Picture], wanted: Sequence[int]) -> NDArray[np.uint8]:
    return np.stack([pictures[number] for number in wanted])


class ChoiceError(ValueError):
    """A frame was chosen that a video does not have: a mistake of the code that chose, not of the video."""


def chosen_frames(choose: Choose, n_frames: int) -> list[int]:
    """Ask for the numbers of the wanted frames, and check them.

    Raises:
        ChoiceError: If there are none, or one is not from 0 to ``n_frames - 1``.
    """
    wanted = [int(number) for number in choose(n_frames)]
    if not wanted or min(wanted) < 0 or max(wanted) >= n_frames:
        raise ChoiceError(f"choose({n_frames}) returned {wanted}, not frame numbers from 0 to {n_frames - 1}")
    return wanted


class VideoError(UserError):
    """A video that cannot be read; the message names the file and the reason.

    Attributes:
        path: The file, which may be an image of a folder.
        reason: The reason alone.
    """

    # Of a message alone, so that torch can raise it again from a worker's.
    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message

    def reason_for(self, video: str) -> str:
        """The reason, with the name of the file at fault where the video is a folder of images."""
        image = os.path.basename(self.path) if self.path != os.path.abspath(video) else ""
        return f"{image}: {self.reason}" if image else self.reason


def unreadable(path: str, reason: str) -> VideoError:
    """Return the error of a video that is to be made readable, removed or replaced."""
    message = f"cannot read the video {path}: {reason}; make it readable, remove it from the manifest or replace it"
    return VideoError(message, path=path, reason=reason)


@contextmanager
def as_video_error(path: str, decoder: str = "") -> Iterator[None]:
    """Turn what the system refuses, and whatever a damaged file does to a decoder, into an error of the video.

    Args:
        path: The video.
        decoder: A library whose messages are for its authors, and are left out.

    Raises:
        VideoError: In the place of any error but the package's own.
    """
    try:
        yield
    except (UserError, ChoiceError):
        raise
    except FileNotFoundError as error:
        raise unreadable(path, "there is no such file") from error
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from error
    except Exception as error:
        kind = type(error).__name__
        reason = f"{decoder} cannot read it ({kind})" if decoder else f"reading it fails: {kind}: {error}"
        raise unreadable(path, reason.partition("\n")[0]) from error
