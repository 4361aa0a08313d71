"""Renders tiny videos whose pictures tell their own frame number, and reads the numbers back."""

import io
import os
import random
import struct
import wave
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import OutputContainer
from numpy.typing import NDArray
from torch import Tensor

WIDTH, HEIGHT = 96, 64
ROWS, COLUMNS = 2, 4  # one block for each bit of the number, so 256 frames can be told apart
ON, OFF = (250, 200, 60), (20, 20, 20)  # orange, so that red and blue cannot be mistaken for each other


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """The picture of a frame number, (height, width, 3): block b is lit where bit b is set."""
    pixels = np.empty((height, width, 3), np.uint8)
    for bit in range(ROWS * COLUMNS):
        row, column = divmod(bit, COLUMNS)
        rows = slice(row * height // ROWS, (row + 1) * height // ROWS)
        columns = slice(column * width // COLUMNS, (column + 1) * width // COLUMNS)
        pixels[rows, columns] = ON if number >> bit & 1 else OFF
    return pixels


def numbers(clip: Tensor) -> list[int]:
    """The frame numbers that the pictures of a clip, (frames, 3, height, width), tell."""
    height, width = clip.shape[-2:]
    found = [0] * len(clip)
    for bit in range(ROWS * COLUMNS):
        row, column = divmod(bit, COLUMNS)
        y, x = (2 * row + 1) * height // (2 * ROWS), (2 * column + 1) * width // (2 * COLUMNS)
        for k, lit in enumerate((clip[:, 1, y, x] > 110).tolist()):
            found[k] |= lit << bit
    return found


def render(
    path: Path,
    n_frames: int = 40,
    codec: str = "libx264",
    *,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    audio: int = 0,
    tag: str | None = None,
) -> Path:
    """Render a video; the file's name says its format.

    Args:
        path: The file.
        n_frames: How many pictures it has, numbered from 0.
        codec: The video's codec.
        options: The codec's options.
        container_options: The muxer's options.
        times: When each frame is shown, in 24ths of a second; every second one by default.
        size: Width and height in pixels.
        audio: Length of a silent sound track, which comes first, in frames of 0.128 seconds; none by default.
        tag: Four letters by which the file names the codec.

    Returns:
        The path.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        sound = container.add_stream("aac", rate=8000) if audio else None
        stream = container.add_stream(codec, rate=12, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if tag is not None:
            stream.codec_context.codec_tag = tag
        stream.codec_context.time_base = Fraction(1, 24) if times else Fraction(1, 12)
        for number in range(n_frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = times[number] if times else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_silence(container, sound, audio)
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # SVT-AV1 leaves root's thread at a real-time priority: two processes that encode VP8 then keep its own threads
        # from running, and wait for them without end.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def render_sound(path: Path) -> Path:
    """Render a file that has a sound track and no picture."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=8000))
    return path


def _write_silence(container: OutputContainer, stream: av.AudioStream, n_frames: int = 1) -> None:
    for number in range(n_frames):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        frame.pts = 1024 * number
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def save_image(path: Path, number: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Save the picture of a number as one image; the file's name says its format."""
    codec, layout = {".jpg": ("mjpeg", "yuvj420p"), ".jpeg": ("mjpeg", "yuvj420p"), ".png": ("png", "rgb24")}.get(
        path.suffix.lower(), (path.suffix[1:].lower(), "bgr24" if path.suffix.lower() == ".bmp" else "yuv420p")
    )
    encoder = av.CodecContext.create("libwebp" if codec == "webp" else codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height = size
    encoder.pix_fmt = layout
    encoder.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24").reformat(format=layout)
    frame.pts = 0
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    return path


def save_images(folder: Path, count: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Save the pictures of the numbers from 0 as the images 0.png, 1.png, … of a folder."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        save_image(folder / f"{number}.png", number, size)
    return folder


def rotate(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """Write a rotation into an mp4's only track header: the display matrix (a, b, c, d)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(entry * (1 << 16)) for entry in matrix)
    struct.pack_into(">9i", data, start, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def cut_start(path: Path, n_frames: int) -> Path:
    """Move the start of an mp4's only edit list: frames before it are stored, but not shown, as a lossless cut does."""
    data = bytearray(path.read_bytes())
    media = data.index(b"mdhd") + 4
    (timescale,) = struct.unpack_from(">I", data, media + 12)
    edit = data.index(b"elst") + 4
    version, entries, _, start = struct.unpack_from(">IIIi", data, edit)
    assert (version, entries) == (0, 1)
    struct.pack_into(">i", data, edit + 12, start + n_frames * timescale // 12)
    path.write_bytes(data)
    return path


def truncate(path: Path) -> Path:
    """Leave the first 70 % of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])
    return path


def lose_packet(path: Path, number: int) -> None:
    """Overwrite one of a video's packets, so that its frame does not decode."""
    with av.open(str(path)) as container:
        packet = bytes([*container.demux(video=0)][number])
    data = path.read_bytes()
    assert data.count(packet) == 1
    path.write_bytes(data.replace(packet, packet[:1] + bytes(len(packet) - 1)))


class StandIn:
    """One of PyAV's objects, but for some of its attributes."""

    def __init__(self, original: Any, **changed: Any) -> None:
        self.__dict__.update(changed, original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)

    def __bytes__(self) -> bytes:
        return bytes(self.original)

    def __enter__(self) -> "StandIn":
        self.original.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.original.__exit__(*error)


def alter_decoding(patch: pytest.MonkeyPatch, alter: Callable[[Iterable[Any]], Iterable[Any]], **changed: Any) -> None:
    """Let whoever opens a video with PyAV get other frames.

    Args:
        patch: What undoes it.
        alter: From the frames that a packet decodes to, to those that it seems to decode to.
        **changed: Other attributes of the container.
    """
    opened = av.open

    def altered(*args: Any, **options: Any) -> StandIn:
        container = opened(*args, **options)

        def demux(*streams: Any) -> Iterator[StandIn]:
            for packet in container.demux(*streams):
                yield StandIn(packet, decode=lambda packet=packet: alter(packet.decode()))

        return StandIn(container, demux=demux, **changed)

    patch.setattr(av, "open", altered)


def count_conversions(patch: pytest.MonkeyPatch) -> list[int]:
    """Count the frames that are converted to RGB from now on: a list that gets an item for each."""
    converted: list[int] = []

    def convert(frame: Any) -> Callable[..., Any]:
        def reformat(**options: Any) -> Any:
            converted.append(1)
            return frame.reformat(**options)

        return reformat

    alter_decoding(patch, lambda frames: (StandIn(frame, reformat=convert(frame)) for frame in frames))
    return converted


def fail_conversions(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let the conversion of frames to RGB raise an error."""

    def fail(**_: object) -> None:
        raise error

    alter_decoding(patch, lambda frames: (StandIn(frame, reformat=fail) for frame in frames))


def note_times(patch: pytest.MonkeyPatch) -> list[int | None]:
    """Note the times of the frames that are decoded from now on: a list that gets them as they are."""
    times: list[int | None] = []

    def note(frames: Iterable[Any]) -> Iterator[Any]:
        for frame in frames:
            times.append(frame.pts)
            yield frame

    alter_decoding(patch, note)
    return times


@dataclass(frozen=True)
class Damaged:
    """A file that was made from a video, or that is none.

    Attributes:
        path: The file.
        how: What was done: ``whole``, ``renamed``, ``truncated``, ``flipped``, ``foreign`` or ``empty``.
        n_frames: Frames of the video that it was made from.
    """

    path: Path
    how: str
    n_frames: int = 0


def damage(folder: Path, seed: int = 0) -> list[Damaged]:
    """Make 300 files of H.264, VP9 and MPEG-4 ASP videos, whole and damaged in many ways, and of what is no video."""
    rng = random.Random(seed)
    n_frames, size = 16, (48, 32)
    b_frames, fast = {"bf": "2", "g": "8"}, {"movflags": "faststart"}
    sources = [
        render(folder / "h264.mp4", n_frames, options=b_frames, size=size),
        render(folder / "h264_faststart.mp4", n_frames, options=b_frames, container_options=fast, size=size),
        render(folder / "vp9.webm", n_frames, "libvpx-vp9", options={"cpu-used": "8", "g": "8"}, size=size),
        render(folder / "asp.avi", n_frames, "mpeg4", options=b_frames, size=size),
    ]
    files = [Damaged(path, "whole", n_frames) for path in sources]

    def save(name: str, content: bytes | bytearray, how: str, n_frames: int = 0) -> None:
        (folder / name).write_bytes(content)
        files.append(Damaged(folder / name, how, n_frames))

    for path in sources:
        whole = path.read_bytes()
        for suffix in sorted({".mp4", ".webm", ".avi", ".mkv"} - {path.suffix}):
            save(f"{path.stem}_renamed{suffix}", whole, "renamed", n_frames)
        for k in range(28):
            save(f"{path.stem}_truncated{k}{path.suffix}", whole[: rng.randrange(1, len(whole))], "truncated", n_frames)
        for k in range(28):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 2, 8, 64, 512])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            save(f"{path.stem}_flipped{k}{path.suffix}", data, "flipped", n_frames)
    foreign = _foreign(folder, rng)
    for k in range(296 - len(files)):
        kind = list(foreign)[k % len(foreign)]
        suffix = (".mp4", ".webm", ".avi")[k % 3]
        save(f"{kind}{k}{suffix}", foreign[kind], "foreign")
    for suffix in (".mp4", ".webm", ".avi", ".mkv"):
        save(f"empty{suffix}", b"", "empty")
    return files


def _foreign(folder: Path, rng: random.Random) -> dict[str, bytes]:
    """Contents that are no video, by kind."""
    archive, sound = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("video.mp4", rng.randbytes(500))
    with wave.open(sound, "wb") as track:
        track.setparams((1, 2, 8000, 0, "NONE", ""))
        track.writeframes(rng.randbytes(8000))
    return {
        "text": b"<html><body>404: this video was removed</body></html>\n" * 20,
        "jpeg": save_image(folder / "picture.jpg", 5).read_bytes(),
        "png": save_image(folder / "picture.png", 5).read_bytes(),
        "zip": archive.getvalue(),
        "wav": sound.getvalue(),
        "m4a": render_sound(folder / "sound.m4a").read_bytes(),
        "noise": rng.randbytes(3000),
        "zeros": bytes(3000),
    }
