"""Finds the videos in a tree of files, whatever its depth."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

_VIDEOS = ".3gp .asf .avi .divx .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv"
VIDEO_EXTENSIONS = frozenset(_VIDEOS.split())
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
        names: dict[str, list[str]] = {"folder": [], "link": [], "video": [], "image": [], "": []}
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    names[_kind(entry)].append(entry.name)
        except OSError:
            tree.unreadable.append(path)
            continue
        if names["image"] and not (names["folder"] or names["link"] or names["video"]):
            if folder:
                tree.files.append(VideoFile(folder[:-1], folder[-1], stem_of(folder[-1])))
            else:
                tree.is_video = True
        for kind in ("folder", "link", "video"):
            tree.unusable += [os.path.join(path, name) for name in names[kind] if storable and not is_storable(name)]
            names[kind] = sorted(name for name in names[kind] if not storable or is_storable(name))
        tree.files += [VideoFile(folder, name, stem_of(name)) for name in names["video"]]
        pending += [(*folder, name) for name in reversed(names["folder"])]
        # Entered last, so that a folder that is also there without a link goes by its own name.
        pending[:0] = [(*folder, name) for name in names["link"]]
    return tree


def _kind(entry: os.DirEntry[str]) -> str:
    """What a name in a folder stands for: a folder, a link to one, a video, an image, or nothing of these."""
    try:
        if entry.name[0] != "." and entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if entry.name[0] != "." and entry.is_file():
            extension = os.path.splitext(entry.name)[1].lower()
            return "video" if extension in VIDEO_EXTENSIONS else "image" if extension in _IMAGE_EXTENSIONS else ""
    except OSError:  # a link to itself
        pass
    return ""


def is_storable(name: str) -> bool:
    """Whether a manifest can hold the name: UTF-8 without line breaks."""
    return not re.search(r"[\r\n\ud800-\udfff]", name)


def stem_of(name: str) -> str:
    """Return a file's name without its video extensions, however many (``x.mkv.mp4``), in Unicode's composed form."""
    while True:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in VIDEO_EXTENSIONS:
            return unicodedata.normalize("NFC", name)
        name = stem
