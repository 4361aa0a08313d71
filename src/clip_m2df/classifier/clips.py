"""What may be given as a clip, and how its frames are read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_m2df.data.episodes import ClipReader
from clip_m2df.data.isolation import Lost, isolated_map
from clip_m2df.data.transforms import resize_and_crop, segment_indices
from clip_m2df.data.video import VideoError
from clip_m2df.data.video_tree import scan
from clip_m2df.errors import UserError, some

# A video file, a folder of numbered images, or uint8 RGB frames (frames, height, width, 3).
Clip: TypeAlias = "str | os.PathLike[str] | NDArray[np.uint8] | Tensor"
# One clip, a folder of clips, or several of either; also an array (clips, frames, height, width, 3).
Clips: TypeAlias = "Clip | Iterable[Clip]"


class Unreadable(str):
    """Why a clip can't be read."""


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
    if isinstance(clips, np.ndarray | Tensor):
        if clips.ndim == 5:
            return list(clips), False
        return [clips], True
    if isinstance(clips, Mapping) or not isinstance(clips, Iterable):
        raise UserError(
            f"{_kind(clips)} is no clip: give a path, an array (frames, height, width, 3), or a list of them"
        )
    return [clip for several in clips for clip in list_clips(several)[0]], False


def videos_in(folder: str | os.PathLike[str]) -> list[str]:
    """The videos in a folder at any depth, in the order of their names; the folder itself if it holds images alone.

    Raises:
        UserError: there are none.
    """
    tree = scan(Path(folder))
    if tree.unusable or tree.unreadable:
        warnings.warn(
            f"left out, names or folders that can't be read: {some(tree.unusable + tree.unreadable)}", stacklevel=3
        )
    if tree.is_video:
        return [os.fspath(folder)]
    if not tree.files:
        raise UserError(f"{os.fspath(folder)} holds no videos: name a folder with some, at any depth")
    return sorted(os.path.join(folder, *file.folder, file.name) for file in tree.files)


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
    folder = Path(support)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that has a folder of examples for each class")
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not labels:
        raise UserError(f"{folder} has no folders: put the examples of each class into a folder of its name")
    return {label: list(videos_in(folder / label)) for label in labels}


def name_of(clip: Clip) -> str:
    """The path of a clip, or nothing for frames in memory."""
    return os.fspath(clip) if isinstance(clip, str | os.PathLike) else ""


def read_clip(clip: Clip, reader: ClipReader) -> Tensor:
    """Read the frames that the model sees: uint8 ``(frames, 3, size, size)``.

    Raises:
        UserError: the clip can't be read, or is no array of frames.
    """
    if isinstance(clip, str | os.PathLike):
        return reader.read(os.fspath(clip))[0]
    frames = as_frames(clip)
    chosen = frames[segment_indices(len(frames), reader.frames)]
    return resize_and_crop(chosen, resize=reader.resize, size=reader.size)


def as_frames(clip: NDArray[np.uint8] | Tensor) -> Tensor:
    """Frames in memory ``(frames, height, width, 3)`` as a tensor ``(frames, 3, height, width)``.

    Raises:
        UserError: they have another shape or type.
    """
    if not isinstance(clip, np.ndarray | Tensor):
        raise UserError(f"{_kind(clip)} is no clip: give a path, or an array (frames, height, width, 3)")
    shape = tuple(clip.shape)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"an array of shape {shape} is no clip: give (frames, height, width, 3), colours as RGB")
    if clip.dtype not in (np.uint8, torch.uint8):
        raise UserError(f"an array of {clip.dtype} is no clip: give uint8, colours from 0 to 255")
    # A copy where numpy's steps are negative or the array is read-only, which torch doesn't take.
    frames = clip if isinstance(clip, Tensor) else torch.from_numpy(np.array(clip))
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
        The place of each clip with its frames, uint8 ``(frames, 3, size, size)``, or why there are none, as they are
        ready.
    """
    paths = {place: os.fspath(c) for place, c in enumerate(clips) if workers and isinstance(c, str | os.PathLike)}
    for place, clip in enumerate(clips):
        if place not in paths:
            yield place, _read((reader, clip))
    tasks = [(reader, path, place) for place, path in paths.items()]
    with closing(isolated_map(_read_in_worker, tasks, workers=max(workers, 1), timeout=timeout)) as results:
        for (_, _, place), result in results:
            if isinstance(result, Lost):
                yield place, Unreadable(result)
            else:
                yield place, result if isinstance(result, Unreadable) else torch.from_numpy(result)


def _read(task: tuple[ClipReader, Clip]) -> Tensor | Unreadable:
    reader, clip = task
    try:
        return read_clip(clip, reader)
    except VideoError as error:
        # An image of a folder is named too.
        at_fault = os.path.basename(error.path) if error.path != os.path.abspath(name_of(clip)) else ""
        return Unreadable(f"{at_fault}: {error.reason}" if at_fault else error.reason)
    except UserError as error:
        return Unreadable(error)


def _read_in_worker(task: tuple[ClipReader, str, int]) -> NDArray[np.uint8] | Unreadable:
    torch.set_num_threads(1)  # the workers are the parallelism
    # Decoders print what they think of a file, right across a progress bar.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    frames = _read(task[:2])
    return frames if isinstance(frames, Unreadable) else frames.numpy()


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
