"""The frame cache: frames of videos, resized and kept as JPEGs, which are read several times faster than the videos.

A cache is a folder of safetensors files, the shards ``frames-00000.safetensors`` and so on. Any reader of safetensors
and of JPEG can read them. Of video number i of a shard there are

- ``"<i>"``, uint8: the JPEGs of its frames, one after another;
- ``"<i>.ends"``, int64 ``(kept,)``: where each JPEG ends, in bytes from the start of the first;
- ``"<i>.crc32"``, int64 ``(kept,)``: the CRC-32 of each JPEG.

The shard's metadata, which are strings, tell

- ``format``: ``clip-m2df frames 1``;
- ``short_side``: pixels to which the short side was reduced; smaller videos keep their size;
- ``frames``: how many frames were kept of a video, the middle of each of as many equal segments; all of a shorter one;
- ``quality``: of the JPEGs, on libjpeg's scale; their chroma is 4:2:0;
- ``videos``: a JSON list with an object for each video: ``path``, with forward slashes from the manifest's folder if it
  lies under it, else absolute; ``files``, ``size`` and ``mtime_ns``, by which a changed video is known (see
  :class:`Fingerprint`); ``n_frames``, frames of the video itself; ``height`` and ``width`` of the kept frames.

There is no other index. Shards are written whole and never changed; of several entries for a video the last counts.

At quality 95, 1/f noise that went through H.264 (CRF 23, 340 x 256 pixels) comes back with a PSNR of 40.3 dB; it takes
68 kB a frame, smoother pictures less.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_m2df.errors import UserError
from clip_m2df.files import Fingerprint, fingerprint
from clip_m2df.video.reader import Choose

FORMAT = "clip-m2df frames 1"


AGAIN = "delete the shard and run `clip-m2df cache` again"


class DamagedCacheError(UserError):
    """Frames of a cache that cannot be had; the video itself may be sound."""


class Settings(NamedTuple):
    """What the frames of one cache have in common.

    Attributes:
        short_side: pixels to which the short side was reduced.
        frames: how many were kept of a video, at most.
        quality: of the JPEGs.
    """

    short_side: int
    frames: int
    quality: int


@dataclass(frozen=True)
class Entry:
    """A video in a cache: number ``number`` of a shard. Its path is absolute in memory."""

    path: str
    fingerprint: Fingerprint
    n_frames: int
    height: int
    width: int
    shard: str = ""
    number: int = 0


class FrameCache:
    """Gives frames of videos as ``clip-m2df cache`` kept them.

    It can be handed to worker processes, forked or spawned.

    Args:
        settings: of all frames.
        entries: what is kept.

    Attributes:
        short_side: pixels to which the short side was reduced.
        frames: how many frames were kept of a video, at most.
    """

    def __init__(self, settings: Settings, entries: Iterable[Entry]) -> None:
        self.settings = settings
        self.short_side = settings.short_side
        self.frames = settings.frames
        self._entries = {entry.path: entry for entry in entries}
        self._current: dict[str, bool] = {}
        self._shards: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, root: str | Path | None) -> FrameCache:
        """Read what a cache holds.

        Args:
            folder: the cache.
            root: the manifest's folder, at which relative paths start.

        Raises:
            UserError: there is no cache, or a shard is damaged or unlike the others.
        """
        settings, entries = read_headers(Path(folder), root)
        if settings is None:
            raise UserError(
                f"there is no frame cache in {folder}: name its folder, or make one with `clip-m2df cache --manifest …"
                f" --output {folder}`"
            )
        return cls(settings, entries)

    @property
    def video_bytes(self) -> int:
        """Bytes of the videos themselves, when their frames were kept."""
        return sum(entry.fingerprint.size for entry in self._entries.values())

    def has(self, path: str) -> bool:
        """Whether a video's frames are kept, and are still the video's; true also if the video itself is gone.

        The video is looked at once, at the first question.
        """
        path = os.path.abspath(path)
        if path not in self._current:
            self._current[path] = path in self._entries and _is_current(self._entries[path])
        return self._current[path]

    def read_frames(self, path: str, choose: Choose) -> Tensor | None:
        """Read chosen frames of a video out of those that are kept, as :func:`clip_m2df.video.reader.read_frames` does.

        Args:
            path: The video.
            choose: From the number of kept frames to the wanted ones, in any order, repeats allowed.

        Returns:
            uint8 RGB pixels, shape ``(frames, 3, height, width)``, or None if the cache doesn't have the video.

        Raises:
            DamagedCacheError: they cannot be had any more.
        """
        path = os.path.abspath(path)
        if not self.has(path):
            return None
        entry = self._entries[path]
        n_kept = min(entry.n_frames, self.frames)
        wanted = [int(number) for number in choose(n_kept)]
        numbers = sorted(set(wanted))
        if not numbers or numbers[0] < 0 or numbers[-1] >= n_kept:
            raise ValueError(f"choose({n_kept}) returned {wanted}, not frame numbers from 0 to {n_kept - 1}")
        shard = self._open_shard(entry.shard)
        try:
            clip = decode_jpegs(_jpegs(shard, entry.number, numbers))
            if clip.shape[-2:] != (entry.height, entry.width):
                raise ValueError("the size is another")
        except (SafetensorError, ValueError) as error:
            raise DamagedCacheError(
                f"the frames of {path} in the cache's shard {entry.shard} are damaged: {AGAIN}"
            ) from error
        return clip if wanted == numbers else clip[[numbers.index(number) for number in wanted]]

    def _open_shard(self, path: str) -> Any:
        if path not in self._shards:
            try:
                self._shards[path] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise DamagedCacheError(f"cannot open the cache's shard {path} ({error}): {AGAIN}") from error
        return self._shards[path]

    def __repr__(self) -> str:
        """What decides the frames, for what is kept of them elsewhere."""
        return f"FrameCache{tuple(self.settings)}"

    def __getstate__(self) -> dict[str, Any]:
        """All but the open files."""
        return {**self.__dict__, "_shards": {}}


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder, by number."""
    return sorted(folder.glob("frames-[0-9][0-9][0-9][0-9][0-9].safetensors"))


def read_headers(folder: Path, root: str | Path | None) -> tuple[Settings | None, list[Entry]]:
    """The settings of a folder's shards, None if it has none, and their entries."""
    settings = None
    entries: list[Entry] = []
    for shard in list_shards(folder):
        found, more = _read_header(shard, root)
        if settings not in (None, found):
            raise UserError(f"the cache's shard {shard} has other settings than those before it: {AGAIN}")
        settings = found
        entries += more
    return settings, entries


def _read_header(shard: Path, root: str | Path | None) -> tuple[Settings, list[Entry]]:
    try:
        with safe_open(shard, framework="numpy") as file:
            metadata = file.metadata()
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            settings = Settings(*(int(metadata[name]) for name in Settings._fields))
            entries = [
                replace(_entry(row, root), shard=str(shard), number=number)
                for number, row in enumerate(json.loads(metadata["videos"]))
            ]
            for entry in entries:
                per_frame = [min(entry.n_frames, settings.frames)]
                for name in ("ends", "crc32"):
                    tensor = file.get_slice(f"{entry.number}.{name}")
                    if tensor.get_dtype() != "I64" or tensor.get_shape() != per_frame:
                        raise ValueError("its tables have other sizes than its header says")
    except OSError as error:
        raise UserError(
            f"cannot read the cache's shard {shard}: {error.strerror or error}; allow reading it"
        ) from error
    except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"the cache's shard {shard} is damaged, or of another version: {AGAIN}") from error
    return settings, entries


def _entry(row: Any, root: str | Path | None) -> Entry:
    """From a row of a shard's list of videos."""
    key = Fingerprint(*(int(row[name]) for name in Fingerprint._fields))
    path = os.path.abspath(os.path.join(root or "", row["path"]))
    return Entry(path, key, int(row["n_frames"]), int(row["height"]), int(row["width"]))


def _is_current(entry: Entry) -> bool:
    try:
        return fingerprint(entry.path) == entry.fingerprint
    except (FileNotFoundError, NotADirectoryError):
        return True  # a cache can travel without its videos
    except OSError:
        return False


def _jpegs(shard: Any, number: int, frames: Iterable[int]) -> list[bytes]:
    """Some of a video's JPEGs, each held against its checksum."""
    pixels = shard.get_slice(f"{number}")
    ends = [0, *shard.get_tensor(f"{number}.ends").tolist()]
    sums = shard.get_tensor(f"{number}.crc32").tolist()
    jpegs = []
    for k in frames:
        start, end = ends[k], ends[k + 1]
        if not 0 <= start < end:
            raise ValueError("the frames are out of order")
        jpegs.append(pixels[start:end].tobytes())
        if zlib.crc32(jpegs[-1]) != sums[k]:
            raise ValueError(f"frame {k} has another checksum")
    return jpegs


def encode_jpeg(frame: Tensor, quality: int) -> bytes:
    """Compress a frame, uint8 ``(3, height, width)``, into a JPEG."""
    file = io.BytesIO()
    # 4:2:0 chroma, as nearly all videos have.
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    return file.getvalue()


def decode_jpegs(images: Iterable[bytes]) -> Tensor:
    """Decode JPEGs of one size: uint8 ``(images, 3, height, width)``; a ``ValueError`` where that can't be done."""
    try:
        pictures = [np.asarray(Image.open(io.BytesIO(image), formats=["JPEG"]).convert("RGB")) for image in images]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("a JPEG does not decode") from error
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
