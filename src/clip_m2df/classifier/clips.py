"""What may be given as a clip, and how its frames are read."""

import copy
import itertools
import operator
import os
import warnings
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.datasets.feature_tables import is_feature_table, read_feature_table
from clip_m2df.datasets.tree import VIDEO_EXTENSIONS, Tree, describe, scan
from clip_m2df.errors import UserError, require, some
from clip_m2df.files import file_of
from clip_m2df.nn.weights import check_finite
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.isolation import Unreadable, isolated_map, read_ahead
from clip_m2df.video.reader import VideoError, as_clip, is_video
from clip_m2df.video.transforms import ClipReader, read_isolated


@dataclass(frozen=True, eq=False)
class TableRow:
    """A clip of a feature table.

    Attributes:
        path: what the table calls it.
        label: its class there.
        features: ``(frames, dim)``.
        prompt: ``(dim)``, the embedding of its class; None where the table has none.
        table: the file.
    """

    path: str
    label: str
    features: Tensor
    prompt: Tensor | None
    table: str


# A video file, a folder of numbered images, uint8 RGB frames (frames, height, width, 3), floating features (frames,
# dim), or a row of a feature table.
Clip: TypeAlias = "str | os.PathLike[str] | NDArray[Any] | Tensor | TableRow"
# One clip, a folder of clips, a feature table, or several of either; also an array (clips, frames, height, width, 3) or
# (clips, frames, dim).
Clips: TypeAlias = "Clip | Iterable[Clip]"

# Clips that are scored together.
TOGETHER = 16
# Images that go through the tower together, on a CPU and on any other device. What 8 of a ViT-B/16 compute stays in a
# CPU's caches; of 128 it does not.
IMAGES_ON_CPU, IMAGES = 8, 128
# Files a worker from which on it resizes them itself, for which it imports torch.
WORTH_TORCH = 500
# What the visual tower computes in, by the names that Lightning has for it.
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Frames of a clip, and pixels of their short side, beyond which memory does not suffice.
MOST_FRAMES, MOST_SIDE = 1000, 4096
# Side of the small frames that are kept of a clip, in pixels.
SMALL_SIDE = 64


def list_clips(clips: Clips) -> tuple[list[Clip], bool]:
    """The clips that are meant, one by one.

    Args:
        clips: a clip, a folder, a feature table, or several of either. A folder that holds images alone is a clip
            itself.

    Returns:
        The clips, those of folders in the order of their names and those of tables in that of their rows, and whether
        it is one clip that was given.

    Raises:
        UserError: a folder without videos, a table that can't be read, or something that is no clip.
    """
    if isinstance(clips, TableRow):
        return [clips], True
    if isinstance(clips, str | os.PathLike):
        if is_feature_table(clips):
            return list(table_rows(clips)), False
        if not os.path.isdir(clips):
            return [clips], True
        found = videos_in(clips)
        return list(found), found == [os.fspath(clips)]
    if isinstance(clips, np.ndarray) and clips.dtype.kind in "OSU":  # of paths
        clips = clips.tolist()
    if isinstance(clips, np.ndarray | Tensor):
        if clips.ndim == 5 or (clips.ndim == 3 and _is_floating(clips)):
            return list(clips), False
        return [clips], True
    if isinstance(clips, Mapping) or not isinstance(clips, Iterable):
        raise UserError(
            f"a value of type {type(clips).__name__} is no clip: give a path, an array (frames, height, width, 3) or"
            " (frames, dim), or a list of them"
        )
    return [clip for several in clips for clip in list_clips(several)[0]], False


def videos_in(folder: str | os.PathLike[str]) -> list[str]:
    """The videos in a folder at any depth, in the order of their names; the folder itself if it holds images alone.

    A folder that may not be read stands for its videos: whoever reads it is told why. What is not a video is counted
    and named in a warning.

    Raises:
        UserError: there are none.
    """
    tree = scan(Path(folder), storable=False)
    found = _found(folder, tree)
    _warn_of_left_out(folder, tree.left_out)
    return found


def _found(folder: str | os.PathLike[str], tree: Tree) -> list[str]:
    """The paths of a tree's videos, see :func:`videos_in`."""
    if tree.is_video:
        return [os.fspath(folder)]
    found = [os.path.join(folder, *file.folder, file.name) for file in tree.files]
    if not found and not tree.unreadable:
        left_out = f"; it has {describe(tree.left_out)}" if tree.left_out else ""
        raise UserError(f"{os.fspath(folder)} holds no videos: name a folder with some, at any depth{left_out}")
    return sorted(found + tree.unreadable)


def _warn_of_left_out(folder: str | os.PathLike[str], left_out: Mapping[str, Sequence[str]]) -> None:
    if left_out:
        warnings.warn(f"not taken for videos in {os.fspath(folder)}: {describe(left_out)}", stacklevel=4)


def table_rows(table: str | os.PathLike[str]) -> list[TableRow]:
    """The clips of a feature table, in its order; of several augmentations of a video the first.

    Raises:
        UserError: it can't be read.
    """
    found = read_feature_table(table)
    return [
        TableRow(
            video.path,
            video.label,
            found.features[found.rows[video.path, 0]],
            found.class_embeddings.get(video.label),
            found.source,
        )
        for video in found.manifest.videos
    ]


def the_clip(clip: Clip) -> Clip:
    """A clip where one is taken: a feature table of one row stands for that row.

    Raises:
        UserError: it is a table of several.
    """
    if not isinstance(clip, str | os.PathLike) or not is_feature_table(clip):
        return clip
    rows = table_rows(clip)
    if len(rows) > 1:
        raise UserError(f"{os.fspath(clip)} has {len(rows)} clips: give the features (frames, dim) of one of them")
    return rows[0]


def list_examples(support: Mapping[str, Clips] | str | os.PathLike[str]) -> dict[str, list[Clip]]:
    """The examples of each class.

    Args:
        support: by the class's name; a folder with a folder for each class, whose name it has; or a feature table.

    Raises:
        UserError: there is no class, a folder of a class has no videos, or a table can't be read.
    """
    if isinstance(support, Mapping):
        if not support:
            raise UserError("the support has no classes: give a few examples of each, by its name")
        return {label: list_clips(clips)[0] for label, clips in support.items()}
    if not isinstance(support, str | os.PathLike):
        raise UserError(
            f"the support is of type {type(support).__name__}: give the examples of each class by its name,"
            ' {"pour water": ["a.mp4", "b.mp4"]}, a folder with a folder for each class, or the path of a'
            " feature table"
        )
    if is_feature_table(support):
        by_label: dict[str, list[Clip]] = {}
        for row in table_rows(support):
            by_label.setdefault(row.label, []).append(row)
        return by_label
    folder = Path(support)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that has a folder of examples for each class")
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    labels = [path.name for path in entries if path.is_dir()]
    if not labels:
        raise UserError(f"{folder} has no folders: put the examples of each class into a folder of its name")
    files = [path for path in entries if path.name not in labels]
    if beside := [path.name for path in files if path.suffix.lower() in VIDEO_EXTENSIONS or is_video(os.fspath(path))]:
        raise UserError(f"{folder} has videos beside the folders of its classes: move {some(beside)} into one")
    trees = {label: scan(folder / label, storable=False) for label in labels}
    left_out = {"beside the folders": [path.name for path in files]} if files else {}
    for label, tree in trees.items():
        for kind, names in tree.left_out.items():
            left_out.setdefault(kind, []).extend(f"{label}/{name}" for name in names)
    examples: dict[str, list[Clip]] = {label: list(_found(folder / label, tree)) for label, tree in trees.items()}
    _warn_of_left_out(folder, left_out)
    return examples


def unique(clips: Sequence[Clip], known: Iterable[str] = ()) -> list[Clip]:
    """The clips without files that come twice, or are known already; links to the same file are one."""
    known_files = {file_of(path) for path in known if path}
    by_file: dict[Hashable, Clip] = {}
    for index, clip in enumerate(clips):
        by_file.setdefault(file_of(name_of(clip)) if name_of(clip) else index, clip)
    return [clip for file, clip in by_file.items() if file not in known_files]


def name_of(clip: object) -> str:
    """The path of a clip, or nothing for what is in memory."""
    if isinstance(clip, TableRow):
        return clip.path
    return os.fspath(clip) if isinstance(clip, str | os.PathLike) else ""


def _is_floating(array: NDArray[Any] | Tensor) -> bool:
    return array.is_floating_point() if isinstance(array, Tensor) else np.issubdtype(array.dtype, np.floating)


def has_features(clip: Clip) -> bool:
    """Whether a clip comes as features, without pixels."""
    if isinstance(clip, np.ndarray | Tensor):
        return clip.ndim == 2 and _is_floating(clip)
    return isinstance(clip, TableRow)


def as_features(clip: Clip) -> Tensor:
    """The features of a clip that comes as such: float32 ``(frames, dim)``, detached.

    Raises:
        UserError: there are none, they are not finite, or all of a frame are zero, which compares with nothing.
    """
    given = clip.features if isinstance(clip, TableRow) else clip
    if isinstance(given, Tensor):
        features = given.detach().float()
    else:
        with np.errstate(over="ignore"):  # what float32 can't hold is infinite, and told below
            features = torch.from_numpy(np.array(given, dtype=np.float32))
    if not features.numel():
        raise UserError(f"its features are empty, {tuple(features.shape)}: give (frames, dim)")
    good = {"not finite (NaN or infinite)": features.isfinite().all(-1), "all zero": features.any(-1)}
    for fault, frames in good.items():
        if not frames.all():
            frame = int((~frames).nonzero()[0]) + 1
            raise UserError(f"its features of frame {frame} are {fault}: compute them anew")
    return features


def read_clip(clip: Clip, reader: ClipReader) -> Tensor:
    """Read the frames that the model sees: uint8 ``(frames, 3, size, size)``.

    Raises:
        UserError: the clip can't be read, or is no array of frames.
    """
    if isinstance(clip, str | os.PathLike):
        return reader.read(os.fspath(clip))[0]
    frames = check_frames(clip)
    return reader.crop(as_frames(frames, reader.choose(len(frames))))


def check_frames(clip: object) -> NDArray[np.uint8] | Tensor:
    """Refuse what is no array of frames ``(frames, height, width, 3)``.

    Raises:
        UserError: it is something else, or has another shape or type.
    """
    if not isinstance(clip, np.ndarray | Tensor):
        raise UserError(
            f"a value of type {type(clip).__name__} is no clip: give a path, or an array (frames, height, width, 3)"
        )
    shape = tuple(clip.shape)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(
            f"an array of shape {shape} is no clip: give (frames, height, width, 3), colours as RGB, or floating"
            " features (frames, dim)"
        )
    if clip.dtype not in (np.uint8, torch.uint8):
        raise UserError(f"an array of {clip.dtype} is no clip: give uint8, colours from 0 to 255")
    return clip


def as_frames(clip: NDArray[np.uint8] | Tensor, numbers: Sequence[int]) -> Tensor:
    """Some frames of an array ``(frames, height, width, 3)``: ``(n, 3, height, width)``, on the CPU."""
    # Copied, and no more than that: numpy's steps may be negative and its array read-only, which torch doesn't take.
    chosen = clip[list(numbers)]
    frames = chosen.cpu() if isinstance(chosen, Tensor) else torch.from_numpy(np.ascontiguousarray(chosen))
    return frames.permute(0, 3, 1, 2)


def read_clips(
    clips: Sequence[Clip], reader: ClipReader, *, workers: int = 0, timeout: float = 60.0, ahead: int = 4
) -> Generator[tuple[int, Tensor | Unreadable], None, None]:
    """Read many clips, beside what is done with them.

    Args:
        clips: what to read.
        reader: how.
        workers: processes that read the files, no more than there are; 0 reads in a thread of this one. A file on which
            a process crashes or hangs is unreadable, and nothing else is lost; in this one it would take everything
            with it.
        timeout: seconds after which a file is given up, with workers.
        ahead: clips that may have been read before anybody asks for them.

    Yields:
        The index of each clip with its frames, uint8 ``(frames, 3, size, size)``, or why there are none, as they are
        ready.
    """
    files = [(index, name_of(clip)) for index, clip in enumerate(clips) if workers and name_of(clip)]
    here = ((index, _read(clip, reader)) for index, clip in enumerate(clips) if not (workers and name_of(clip)))
    if len(files) < len(clips):
        with closing(read_ahead(here, ahead)) as found:
            yield from found
    if not files:
        return
    workers = min(workers, len(files))
    crop = len(files) >= WORTH_TORCH * workers
    read_file = partial(read_isolated, reader, crop=crop)
    with closing(isolated_map(read_file, files, workers=workers, timeout=timeout, ahead=ahead)) as results:
        for (index, _), read in results:
            if isinstance(read, Unreadable):
                yield index, read
            else:
                pictures, is_cropped = read
                yield index, torch.from_numpy(pictures) if is_cropped else reader.crop(as_clip(pictures))


def _read(clip: Clip, reader: ClipReader) -> Tensor | Unreadable:
    try:
        return read_clip(clip, reader)
    except VideoError as error:
        return Unreadable(error.reason_for(name_of(clip)))
    except UserError as error:
        return Unreadable(error)


class Encoded(NamedTuple):
    """A clip as the head sees it.

    Attributes:
        features: ``(frames, dim)``.
        thumbnail: uint8 ``(frames, 3, height, width)``, small frames; None of a clip that came as features.
    """

    features: Tensor
    thumbnail: Tensor | None


class ClipEncoder:
    """Reads clips and puts them through a model's tower, but for those that come as features.

    Args:
        model: in eval mode.
        frames: see :class:`clip_m2df.FewShotClassifier`.
        resize: the same.
        precision: the same.
        workers: the same.
        timeout: the same.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        model: CLIPM2DF,
        *,
        frames: int | None,
        resize: int | None,
        precision: str | None = None,
        workers: int = 0,
        timeout: float = 60.0,
    ) -> None:
        if not model.image_size and resize is not None:
            raise UserError(
                f"resize is {resize!r:.40}, but {model.source} has no tower, and sees no frames: leave it out"
            )
        size = max(model.image_size, 1)
        known: dict[str, Any] = model.reading or {"frames": 8, "resize": size, "resize_mode": model.resize_mode}
        # Whether somebody has said how many frames there are; otherwise features tell.
        self._told = frames is not None or model.reading is not None
        frames = known["frames"] if frames is None else frames
        resize = known["resize"] if resize is None else resize
        with suppress(TypeError):  # numpy's whole numbers too
            frames, resize = operator.index(frames), operator.index(resize)
        whole = isinstance(frames, int) and isinstance(resize, int)
        if not (whole and 1 <= frames <= MOST_FRAMES and size <= resize <= MOST_SIDE):
            raise UserError(
                f"frames is {frames!r:.40} and resize {resize!r:.40}: set them to whole numbers, frames to 1 or more,"
                f" at most {MOST_FRAMES}, and resize to {size}, the side that the tower takes, or more, at most"
                f" {MOST_SIDE}"
            )
        require(least=0, workers=workers)
        if workers != int(workers):
            raise UserError(f"workers is {workers}: give a whole number")
        require(above=0, timeout=timeout)
        if precision is not None and precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}")
        self.model = model
        self._precision = precision
        # Checkpoints of earlier versions lack both: there was one way.
        how = {"resize_mode": known.get("resize_mode", "short_side"), "sampling": known.get("sampling", "segments")}
        self.reader = ClipReader(frames=frames, resize=resize, size=size, **how)
        self.workers = int(workers)
        self.timeout = timeout

    @property
    def precision(self) -> str:
        """What the visual tower computes in, where the model is now; see :class:`clip_m2df.FewShotClassifier`."""
        return self._precision or default_precision(self.model.device)

    def settled(self, clips: Iterable[Clip]) -> Self:
        """The same for as many frames as the first clip has that comes as features, where nobody has said how many.

        Args:
            clips: the examples of a classifier's first classes.
        """
        first = None if self._told else next((clip for clip in clips if has_features(clip)), None)
        if first is None:
            return self
        frames = len(as_features(first))
        require(most=MOST_FRAMES, **{"frames of a clip's features": frames})
        settled = copy.copy(self)
        settled.reader = replace(self.reader, frames=frames)
        return settled

    def encode(self, clips: Sequence[Clip]) -> Iterator[list[tuple[int, Encoded | Unreadable]]]:
        """The index of each clip with what it looks like to the model, or why it can't be read; some at once.

        Raises:
            UserError: there is no tower for a clip that needs one, or a table's features are not the model's.
        """
        self.check(clips)
        read = [index for index, clip in enumerate(clips) if not has_features(clip)]
        with_features = ((i, self._known(clip)) for i, clip in enumerate(clips) if has_features(clip))
        block = min(TOGETHER, max(1, self._n_images() // self.reader.frames))
        options: dict[str, Any] = {"workers": self.workers, "timeout": self.timeout, "ahead": max(block, 4)}
        encoded: list[tuple[int, Encoded | Unreadable]] = []
        waiting: list[tuple[int, Tensor]] = []
        # Closed, so that nobody reads on for an error of the tower.
        with closing(read_clips([clips[index] for index in read], self.reader, **options)) as frames:
            every = itertools.chain(with_features, ((read[i], found) for i, found in frames))
            for number, (index, found) in enumerate(every, 1):
                if isinstance(found, Unreadable):
                    yield [(index, found)]
                elif isinstance(found, Encoded):
                    encoded.append((index, found))
                else:
                    waiting.append((index, found))
                n_held = len(encoded) + len(waiting)
                full = n_held == TOGETHER or number == len(clips)
                if waiting and (full or len(waiting) == block):
                    features = self.frames(torch.stack([clip for _, clip in waiting]))
                    encoded += [(i, Encoded(f, _small(clip))) for (i, clip), f in zip(waiting, features, strict=True)]
                    waiting = []
                if n_held and full:
                    yield encoded
                    encoded = []

    def _n_images(self) -> int:
        """How many images go through the tower together."""
        return IMAGES_ON_CPU if self.model.device.type == "cpu" else IMAGES

    def _known(self, clip: Clip) -> Encoded | Unreadable:
        """A clip that comes as features, or why they are of no use."""
        try:
            return Encoded(self.features_of(clip), None)
        except UserError as error:
            return Unreadable(error)

    def features_of(self, clip: Clip, *, any_length: bool = False) -> Tensor:
        """The features of a clip that comes as such, ``(frames, dim)``, on the model's device.

        Args:
            clip: the clip.
            any_length: they may be of any number of frames, as of a long video.

        Raises:
            UserError: they are of no use, see :func:`as_features`, or not as wide or as many as the model takes.
        """
        features = as_features(clip)
        if wrong := self._mismatch(features, any_length=any_length):
            raise UserError(f"its features {wrong}")
        return features.to(self.model.device, self.model.model.head.scale.dtype)

    def _mismatch(self, features: Tensor, *, any_length: bool = False) -> str:
        """What is wrong with the shape of a clip's features, if anything is."""
        dim, frames = self.model.model.backbone.dim, self.reader.frames
        if features.shape[-1] == dim and (any_length or len(features) == frames):
            return ""
        return (
            f"are {len(features)} frames of width {features.shape[-1]}, and {self.model.source} takes {frames} of width"
            f" {dim}: compute them with the tower that the model knows, and as many frames a clip"
        )

    def check(self, clips: Sequence[Clip], *, any_length: bool = False) -> None:
        """Refuse clips that are of no use as a whole.

        Args:
            clips: to be encoded.
            any_length: features may have any number of frames.

        Raises:
            UserError: there is no tower for a clip that needs one, or a table's features are not the model's.
        """
        read = next((clip for clip in clips if not has_features(clip)), None)
        if read is not None and not self.model.image_size:
            raise UserError(
                f"{self.model.source} has no tower, and can't see {name_of(read) or 'frames in memory'}: give features,"
                " as a table (clip-m2df encode makes one of videos) or as arrays (frames, dim)"
            )
        for table, features in {clip.table: clip.features for clip in clips if isinstance(clip, TableRow)}.items():
            if wrong := self._mismatch(features, any_length=any_length):
                raise UserError(f"the features in {table} {wrong}")

    def encode_one(self, clip: Clip) -> Encoded:
        """The same of one clip.

        Raises:
            UserError: it can't be read.
        """
        (((_, found),),) = self.encode([clip])
        if isinstance(found, Unreadable):
            raise UserError(f"the clip {name_of(clip) or 'in memory'} can't be read: {found}")
        return found

    def encode_frames(self, frames: Tensor) -> Encoded:
        """Encode a clip that has been read, uint8 ``(frames, 3, size, size)`` as :func:`read_clips` gives it."""
        return Encoded(self.frames(frames), _small(frames))

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        """Features of uint8 frames ``(…, 3, size, size)``: ``(…, dim)``, on the model's device.

        Raises:
            UserError: they are not finite, or all are zero.
        """
        device, half = self.model.device, PRECISIONS[self.precision]
        with torch.autocast(device.type, half, enabled=half is not None):
            blocks = frames.reshape(-1, *frames.shape[-3:]).split(self._n_images())
            encoded = torch.cat([self.model.model.encode_frames(block.to(device)) for block in blocks])
        features = encoded.to(self.model.model.head.scale.dtype).reshape(*frames.shape[:-3], -1)
        check_finite(features, self.model.source)
        if not features.any():
            raise UserError(
                f"{self.model.source} sees nothing in any clip, all features are zero: its weights are damaged; give"
                " another checkpoint"
            )
        return features


def default_precision(device: torch.device) -> str:
    """What a tower computes in on a device if nobody says: on CUDA the half precision that it is made for."""
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def _small(frames: Tensor) -> Tensor:
    """Frames ``(n, 3, size, size)`` of at most ``SMALL_SIDE`` pixels a side."""
    if frames.shape[-1] <= SMALL_SIDE:
        return frames
    return F.interpolate(frames, size=(SMALL_SIDE, SMALL_SIDE), mode="bilinear", antialias=True)


def placed(model: CLIPM2DF, device: str | None) -> CLIPM2DF:
    """Put a model where it is to run: by default on CUDA where there is any.

    Raises:
        UserError: there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing is computed there")
        return model.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {device!r} can't be used: {str(error).splitlines()[0]}") from error
