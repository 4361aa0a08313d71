"""Finds the videos in a tree of files, whatever its depth."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

_IMAGE_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A video in the tree: a file, or a folder of frames.

    Attributes:
        folder: The names of the folders from the root down to it.
        name: Its own name.
        stem: The name without video extensions.
    """

    folder: tuple[str, ...]
    name: str
    stem: str

    @property
    def inner_path(self) -> str:
        """Path from the root, with forward slashes."""
        return "/".join((*self.folder, self.name))


@dataclass
class Tree:
    """What a pass over the tree finds: the videos, and names that had to be passed over.

    Attributes:
        files: the videos.
        is_video: whether the root is a video itself: it holds images, and neither videos nor folders.
        unusable: paths of names that a manifest can't hold.
        unreadable: folders that can't be read.
    """

    files: list[VideoFile] = field(default_factory=list)
    is_video: bool = False
    unusable: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def scan(root: Path, *, storable: bool = True) -> Tree:
    """Find the videos under a folder, in one pass that opens none.

    A video is a file with the extension of one, or a folder that holds images and neither videos nor folders. Hidden
    names are passed over; links are followed, each folder is entered once.

    Args:
        root: The folder.
        storable: Take names that a manifest can't hold for unusable.

    Returns:
        The videos, and what could not be used or read.
    """
    tree = Tree()
    pending: list[tuple[str, ...]] = [()]
    entered: set[tuple[int, int]] = set()
    while pending:
        folder = pending.pop()
        path = os.path.join(root, *folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                folders, links, videos, has_images = _sort_out(entries)
        except OSError:
            tree.unreadable.append(path)
            continue
        if has_images and not (folders or links or videos):
            if folder:
                tree.files.append(VideoFile(folder[:-1], folder[-1], stem_of(folder[-1])))
            else:
                tree.is_video = True
        for names in (folders, links, videos):
            tree.unusable += [os.path.join(path, name) for name in names if storable and not is_storable(name)]
            names[:] = sorted(name for name in names if not storable or is_storable(name))
        tree.files += [VideoFile(folder, name, stem_of(name)) for name in videos]
        pending += [(*folder, name) for name in reversed(folders)]
        # Entered last, so that a folder that is also there without a link goes by its own name.
        pending[:0] = [(*folder, name) for name in links]
    return tree


def _sort_out(entries: Iterable[os.DirEntry[str]]) -> tuple[list[str], list[str], list[str], bool]:
    """The names of a folder's folders, linked folders and videos, and whether it has images."""
    folders: list[str] = []
    links: list[str] = []
    videos: list[str] = []
    has_images = False
    for entry in entries:
        if entry.name[0] == ".":
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        if is_folder:
            (links if entry.is_symlink() else folders).append(entry.name)
        elif is_file:
            extension = os.path.splitext(entry.name)[1].lower()
            if extension in VIDEO_EXTENSIONS:
                videos.append(entry.name)
            has_images = has_images or extension in _IMAGE_EXTENSIONS
    return folders, links, videos, has_images


def is_storable(name: str) -> bool:
    """Whether a manifest can hold the name: UTF-8 without line breaks."""
    if name.isprintable():
        return True
    return not any(c in "\r\n" or "\ud800" <= c <= "\udfff" for c in name)


_EXTENSIONS = ".3gp .asf .avi .divx .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"


VIDEO_EXTENSIONS = frozenset(_EXTENSIONS.split())


def stem_of(name: str) -> str:
    """Return a file's name without its video extensions, however many (``x.mkv.mp4``), in Unicode's composed form."""
    while True:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in VIDEO_EXTENSIONS:
            return unicodedata.normalize("NFC", name)
        name = stem
