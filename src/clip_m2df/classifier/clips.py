"""What may be given as a clip, and how its frames are read."""

import itertools
import operator
import os
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.datasets.tree import VIDEO_EXTENSIONS, Tree, describe, scan
from clip_m2df.errors import UserError, require, some
from clip_m2df.files import file_of
from clip_m2df.nn.weights import check_finite
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.isolation import Unreadable, isolated_map
from clip_m2df.video.reader import VideoError, is_video
from clip_m2df.video.transforms import ClipReader

# A video file, a folder of numbered images, or uint8 RGB frames (frames, height, width, 3).
Clip: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | Tensor"
# One clip, a folder of clips, or several of either; also an array (clips, frames, height, width, 3).
Clips: TypeAlias = "Clip | Iterable[Clip]"

# Clips that are encoded together.
TOGETHER = 16
# What the visual tower computes in, by the names that Lightning has for it.
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Frames of a clip, and pixels of their short side, beyond which memory does not suffice.
MOST_FRAMES, MOST_SIDE = 1000, 4096
# Side of the small frames that are kept of a clip, in pixels.
SMALL_SIDE = 64


def list_clips(clips: Clips) -> tuple[list[Clip], bool]:
    """The clips that are meant, one by one.

    Args:
        clips: a clip, a folder, or several of either. A folder that holds images alone is a clip itself.

    Returns:
        The clips, those of folders in the order of their names, and whether it is one clip that was given.

    Raises:
        UserError: a folder without videos, or something that is no clip.
    """
    if isinstance(clips, str | os.PathLike):
        if not os.path.isdir(clips):
            return [clips], True
        found = videos_in(clips)
        return list(found), found == [os.fspath(clips)]
    if isinstance(clips, np.ndarray) and clips.dtype.kind in "OSU":  # of paths
        clips = clips.tolist()
    if isinstance(clips, np.ndarray | Tensor):
        if clips.ndim == 5:
            return list(clips), False
        return [clips], True
    if isinstance(clips, Mapping) or not isinstance(clips, Iterable):
        raise UserError(
            f"a value of type {type(clips).__name__} is no clip: give a path, an array (frames, height, width, 3), or a"
            " list of them"
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


def list_examples(support: Mapping[str, Clips] | str | os.PathLike[str]) -> dict[str, list[Clip]]:
    """The examples of each class.

    Args:
        support: by the class's name; or a folder with a folder for each class, whose name it has.

    Raises:
        UserError: there is no class, or a folder of a class has no videos.
    """
    if isinstance(support, Mapping):
        if not support:
            raise UserError("the support has no classes: give a few examples of each, by its name")
        return {label: list_clips(clips)[0] for label, clips in support.items()}
    if not isinstance(support, str | os.PathLike):
        raise UserError(
            f"the support is of type {type(support).__name__}: give the examples of each class by its name,"
            ' {"pour water": ["a.mp4", "b.mp4"]}, or a folder with a folder for each class'
        )
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
    return os.fspath(clip) if isinstance(clip, str | os.PathLike) else ""


def read_clip(clip: Clip, reader: ClipReader) -> Tensor:
    """Read the frames that the model sees: uint8 ``(frames, 3, size, size)``.

    Raises:
        UserError: the clip can't be read, or is no array of frames.
    """
    if isinstance(clip, str | os.PathLike):
        return reader.read(os.fspath(clip))[0]
    check_frames(clip)
    return reader.crop(as_frames(clip, reader.choose(len(clip))))


def check_frames(clip: NDArray[np.uint8] | Tensor) -> None:
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
        raise UserError(f"an array of shape {shape} is no clip: give (frames, height, width, 3), colours as RGB")
    if clip.dtype not in (np.uint8, torch.uint8):
        raise UserError(f"an array of {clip.dtype} is no clip: give uint8, colours from 0 to 255")


def as_frames(clip: NDArray[np.uint8] | Tensor, numbers: Sequence[int]) -> Tensor:
    """Some frames of an array ``(frames, height, width, 3)``: ``(n, 3, height, width)``, on the CPU."""
    # Copied, and no more than that: numpy's steps may be negative and its array read-only, which torch doesn't take.
    chosen = clip[list(numbers)]
    frames = chosen.cpu() if isinstance(chosen, Tensor) else torch.from_numpy(np.ascontiguousarray(chosen))
    return frames.permute(0, 3, 1, 2)


def read_clips(
    clips: Sequence[Clip], reader: ClipReader, *, workers: int = 0, timeout: float = 60.0
) -> Iterator[tuple[int, Tensor | Unreadable]]:
    """Read many clips.

    Args:
        clips: what to read.
        reader: how.
        workers: processes that read the files; 0 reads in this one. A file on which a process crashes or hangs is
            unreadable, and nothing else is lost; in this one it would take everything with it.
        timeout: seconds after which a file is given up, with workers.

    Yields:
        The index of each clip with its frames, uint8 ``(frames, 3, size, size)``, or why there are none, as they are
        ready.
    """
    tasks = [(reader, clip, index) for index, clip in enumerate(clips)]
    for_workers = [task for task in tasks if workers and name_of(task[1])]
    here = ((task, _read(task)) for task in tasks if not (workers and name_of(task[1])))
    with closing(isolated_map(_read, for_workers, workers=max(workers, 1), timeout=timeout)) as results:
        for (_, _, index), found in itertools.chain(here, results):
            yield index, found if isinstance(found, Unreadable) else torch.from_numpy(found)


def _read(task: tuple[ClipReader, Clip, int]) -> NDArray[np.uint8] | Unreadable:
    reader, clip, _ = task
    try:
        return read_clip(clip, reader).numpy()
    except VideoError as error:
        return Unreadable(error.reason_for(name_of(clip)))
    except UserError as error:
        return Unreadable(error)


class Encoded(NamedTuple):
    """A clip as the head sees it.

    Attributes:
        features: ``(frames, dim)``.
        thumbnail: uint8 ``(frames, 3, height, width)``, small frames.
    """

    features: Tensor
    thumbnail: Tensor


class ClipEncoder:
    """Reads clips and puts them through a model's tower.

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
        precision: str = "32-true",
        workers: int,
        timeout: float,
    ) -> None:
        size = model.model.backbone.image_size
        known: dict[str, Any] = model.reading or {"frames": 8, "resize": size, "resize_mode": model.resize_mode}
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
        if precision not in PRECISIONS:
            raise UserError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}")
        self.model = model
        self.precision = precision
        # Checkpoints of earlier versions lack both: there was one way.
        how = {"resize_mode": known.get("resize_mode", "short_side"), "sampling": known.get("sampling", "segments")}
        self.reader = ClipReader(frames=frames, resize=resize, size=size, **how)
        self.workers = int(workers)
        self.timeout = timeout

    def encode(self, clips: Sequence[Clip]) -> Iterator[list[tuple[int, Encoded | Unreadable]]]:
        """The index of each clip with what it looks like to the model, or why it can't be read; some at once."""
        held: list[tuple[int, Tensor]] = []
        read = read_clips(clips, self.reader, workers=self.workers, timeout=self.timeout)
        for number, (index, found) in enumerate(read, 1):
            if isinstance(found, Unreadable):
                yield [(index, found)]
            else:
                held.append((index, found))
            if held and (len(held) == TOGETHER or number == len(clips)):
                features = self.frames(torch.stack([frames for _, frames in held]))
                yield [(i, Encoded(f, _small(frames))) for (i, frames), f in zip(held, features, strict=True)]
                held = []

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
            features = self.model.model.encode_frames(frames.to(device))
        features = features.to(self.model.model.head.scale.dtype)
        check_finite(features, self.model.source)
        if not features.any():
            raise UserError(
                f"{self.model.source} sees nothing in any clip, all features are zero: its weights are damaged; give"
                " another checkpoint"
            )
        return features


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
