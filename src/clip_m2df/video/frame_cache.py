"""The frame cache: frames of videos, resized and kept as JPEGs, which are read several times faster than the videos.

A cache is a folder of safetensors files, the shards ``frames-00000.safetensors`` and so on. Any reader of safetensors
and of JPEG can read them. Of video number i of a shard there are

- ``"<i>"``, uint8: the JPEGs of its frames, one after another;
- ``"<i>.ends"``, int64 ``(kept,)``: where each JPEG ends, in bytes from the start of the first;
- ``"<i>.crc32"``, int64 ``(kept,)``: the CRC-32 of each JPEG.

The shard's metadata, which are strings, tell

- ``format``: ``clip-m2df frames 1``;
- ``short_side``: pixels to which the short side was reduced; smaller videos keep their size;
- ``resize_mode``: how, see :func:`clip_m2df.video.transforms.resize_clip`; ``short_side`` where it is missing. Of
  ``squash`` the frames of every video are squares with that side;
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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clip_m2df.episode import ResizeMode
from clip_m2df.errors import UserError
from clip_m2df.files import Fingerprint, check_regular, fingerprint, relative_path, whole_file
from clip_m2df.video.reader import Choose, chosen_frames

if TYPE_CHECKING:
    from torch import Tensor

CACHE_FORMAT = "clip-m2df frames 1"
REMEDY = "delete the shard and run `clip-m2df cache` again"


class DamagedCacheError(UserError):
    """Frames of a cache that cannot be had; the video itself may be sound."""


class Settings(NamedTuple):
    """What the frames of one cache have in common.

    Attributes:
        short_side: pixels to which the short side was reduced.
        frames: how many were kept of a video, at most.
        quality: of the JPEGs.
        resize_mode: how they were resized.
    """

    short_side: int
    frames: int
    quality: int
    resize_mode: ResizeMode = "short_side"

    def __str__(self) -> str:
        """For messages and for checkpoints, whose earlier versions lacked the mode."""
        names = {name: value for name, value in self._asdict().items() if value != "short_side"}
        *first, last = (f"{name} {value}" for name, value in names.items())
        return f"{', '.join(first)} and {last}"


class CachedVideo(NamedTuple):
    """A video in a cache.

    Attributes:
        path: Absolute.
        fingerprint: Of the video when its frames were kept.
        n_frames: Of the video itself.
        height: Of the kept frames.
        width: Of the kept frames.
        shard: The file that has them.
        number: Which of the shard's videos it is.
    """

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
        videos: what is kept.

    Attributes:
        short_side: pixels to which the short side was reduced.
        frames: how many frames were kept of a video, at most.
        resize_mode: how they were resized.
    """

    def __init__(self, settings: Settings, videos: Iterable[CachedVideo]) -> None:
        self.settings = settings
        self.short_side, self.frames, _, self.resize_mode = settings
        self._videos = {video.path: video for video in videos}
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
        settings, videos = read_headers(Path(folder), root)
        if settings is None:
            raise UserError(
                f"there is no frame cache in {folder}: name its folder, or make one with `clip-m2df cache --manifest …"
                f" --output {folder}`"
            )
        return cls(settings, videos)

    @property
    def video_bytes(self) -> int:
        """Bytes of the videos themselves, when their frames were kept."""
        return sum(video.fingerprint.size for video in self._videos.values())

    def has(self, path: str, *, every_frame: bool = False) -> bool:
        """Whether a video's frames are kept, and are still the video's; true also if the video itself is gone.

        The video is looked at once, at the first question.

        Args:
            path: The video.
            every_frame: Whether all of its frames are wanted, and not some from all of its length.
        """
        path = os.path.abspath(path)
        if every_frame and path in self._videos and self._videos[path].n_frames > self.frames:
            return False
        if path not in self._current and path in self._videos:
            try:
                self._current[path] = fingerprint(path) == self._videos[path].fingerprint
            except (FileNotFoundError, NotADirectoryError):
                self._current[path] = True  # a cache can travel without its videos
            except OSError:
                self._current[path] = False
        return self._current.get(path, False)

    def read_frames(self, path: str, choose: Choose) -> tuple[Tensor, int] | None:
        """Read chosen frames of a video out of those that are kept, as :func:`clip_m2df.video.reader.read_frames` does.

        Args:
            path: The video.
            choose: From the number of kept frames to the wanted ones, in any order, repeats allowed.

        Returns:
            uint8 RGB pixels, shape ``(frames, 3, height, width)``, and how many frames there were to choose from; None
            if the cache doesn't have the video.

        Raises:
            DamagedCacheError: they cannot be had any more.
        """
        path = os.path.abspath(path)
        if not self.has(path):
            return None
        video = self._videos[path]
        n_kept = min(video.n_frames, self.frames)
        wanted = chosen_frames(choose, n_kept)
        numbers = sorted(set(wanted))
        try:
            if video.shard not in self._shards:
                self._shards[video.shard] = safe_open(video.shard, framework="numpy")
            clip = decode_jpegs(_read_jpegs(self._shards[video.shard], video.number, numbers))
            if clip.shape[-2:] != (video.height, video.width):
                raise ValueError("the size is another")
        except OSError as error:
            raise DamagedCacheError(f"cannot open the cache's shard {video.shard} ({error}): {REMEDY}") from error
        except (SafetensorError, ValueError) as error:
            raise DamagedCacheError(
                f"the frames of {path} in the cache's shard {video.shard} are damaged: {REMEDY}"
            ) from error
        if wanted != numbers:
            clip = clip[[numbers.index(number) for number in wanted]]
        return clip, n_kept

    def __repr__(self) -> str:
        """What decides the frames, for what is kept of them elsewhere."""
        default = self.resize_mode == "short_side"
        return f"FrameCache{tuple(self.settings)[:3] if default else tuple(self.settings)}"

    def __getstate__(self) -> dict[str, Any]:
        """All but the open files."""
        return {**self.__dict__, "_shards": {}}


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder, by number."""
    return sorted(folder.glob("frames-[0-9][0-9][0-9][0-9][0-9].safetensors"))


def read_headers(folder: Path, root: str | Path | None) -> tuple[Settings | None, list[CachedVideo]]:
    """The settings of a folder's shards, None if it has none, and their videos."""
    settings = None
    videos: list[CachedVideo] = []
    for shard in list_shards(folder):
        found, more = _read_header(shard, root)
        if settings not in (None, found):
            raise UserError(f"the cache's shard {shard} has other settings than those before it: {REMEDY}")
        settings = found
        videos += more
    return settings, videos


def _read_header(shard: Path, root: str | Path | None) -> tuple[Settings, list[CachedVideo]]:
    check_regular(shard, "cache's shard")
    videos = []
    try:
        with safe_open(shard, framework="numpy") as file:
            metadata = file.metadata()
            if metadata["format"] != CACHE_FORMAT:
                raise ValueError(f"its format is not {CACHE_FORMAT!r}")
            mode = metadata.get("resize_mode", "short_side")
            if mode not in get_args(ResizeMode):
                raise ValueError(f"there is no resize_mode {mode!r}")
            short_side, frames, quality = (int(metadata[name]) for name in ("short_side", "frames", "quality"))
            settings = Settings(short_side, frames, quality, mode)
            for number, row in enumerate(json.loads(metadata["videos"])):
                path = os.path.abspath(os.path.join(root or "", row["path"]))
                key = Fingerprint(*(int(row[name]) for name in Fingerprint._fields))
                n_frames, height, width = (int(row[name]) for name in ("n_frames", "height", "width"))
                videos.append(CachedVideo(path, key, n_frames, height, width, str(shard), number))
                for name in ("ends", "crc32"):
                    tensor = file.get_slice(f"{number}.{name}")
                    if tensor.get_dtype() != "I64" or tensor.get_shape() != [min(n_frames, settings.frames)]:
                        raise ValueError("its tables have other sizes than its header says")
    except OSError as error:
        raise UserError(
            f"cannot read the cache's shard {shard}: {error.strerror or error}; allow reading it"
        ) from error
    except (SafetensorError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"the cache's shard {shard} is damaged, or of another version: {REMEDY}") from error
    return settings, videos


def write_shard(
    folder: Path, root: str, settings: Settings, videos: Sequence[tuple[CachedVideo, Sequence[bytes]]]
) -> None:
    """Write a shard after those that are there.

    Args:
        folder: The cache.
        root: The manifest's folder, at which relative paths start.
        settings: Of all frames.
        videos: Each with the JPEGs of its frames.

    Raises:
        UserError: It cannot be written.
    """
    tensors, rows = {}, []
    for number, (video, jpegs) in enumerate(videos):
        tensors[f"{number}"] = np.frombuffer(b"".join(jpegs), np.uint8)
        tensors[f"{number}.ends"] = np.cumsum([len(jpeg) for jpeg in jpegs], dtype=np.int64)
        tensors[f"{number}.crc32"] = np.array([zlib.crc32(jpeg) for jpeg in jpegs], np.int64)
        size = {"n_frames": video.n_frames, "height": video.height, "width": video.width}
        rows.append({"path": relative_path(video.path, root), **video.fingerprint._asdict(), **size})
    metadata = {name: str(value) for name, value in settings._asdict().items()}
    if settings.resize_mode == "short_side":
        del metadata["resize_mode"]  # as earlier versions have it
    shards = list_shards(folder)
    number = int(shards[-1].stem.removeprefix("frames-")) + 1 if shards else 0
    with whole_file(folder / f"frames-{number:05}.safetensors", "cache's shard") as draft:
        draft.write_bytes(save(tensors, {"format": CACHE_FORMAT, **metadata, "videos": json.dumps(rows)}))


def _read_jpegs(shard: Any, number: int, frames: Iterable[int]) -> list[bytes]:
    """Some of a video's JPEGs, each held against its checksum."""
    pixels = shard.get_slice(f"{number}")
    ends = [0, *shard.get_tensor(f"{number}.ends").tolist()]
    sums = shard.get_tensor(f"{number}.crc32").tolist()
    jpegs = []
    for k in frames:
        if not 0 <= ends[k] < ends[k + 1]:
            raise ValueError("the frames are out of order")
        jpegs.append(pixels[ends[k] : ends[k + 1]].tobytes())
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
    import torch

    try:
        pictures = [np.asarray(Image.open(io.BytesIO(image), formats=["JPEG"]).convert("RGB")) for image in images]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError("a JPEG does not decode") from error
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
