"""Finds the videos in a tree of files, whatever its depth, and what else there is."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clip_m2df.errors import printable, some

_VIDEOS = """
    .3g2 .3gp .asf .avi .divx .f4v .flv .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpe .mpeg .mpg .mts .mxf .ogm .ogv .qt .ts
    .vob .webm .wmv .y4m"""
VIDEO_EXTENSIONS = frozenset(_VIDEOS.split())
# Those of files that may hold videos, and may not.
_VIDEOS_OR_NOT = frozenset(
    (".dv", ".gif", ".gxf", ".h264", ".hevc", ".ivf", ".mjpeg", ".mjpg", ".nut", ".obu", ".ogg", ".rm", ".wtv")
)
_IMAGE_EXTENSIONS = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))
# Files that are never opened, by what they are called when they are left out; the others say whether they are videos.
_LEFT_OUT = {
    "partial downloads": ".aria2 .crdownload .download .opdownload .part .partial .temp .tmp .ytdl",
    "archives": ".7z .bz2 .gz .lzma .rar .tar .tbz2 .tgz .txz .xz .zip .zst",
    "playlists": ".ffconcat .m3u .m3u8 .mpd .pls .xspf",
    "": """.ass .bin .csv .db .doc .docx .gitignore .gitkeep .h5 .hdf5 .htm .html .ini .ipynb .json .jsonl .lnk .lock
        .log .md .npy .npz .pdf .pickle .pkl .pt .pth .py .rst .safetensors .sh .srt .ssa .sub .toml .tsv .txt .url .vtt
        .xls .xlsx .xml .yaml .yml .aac .flac .m4a .mp3 .opus .wav .wma .avif .heic .heif .ico .jp2 .psd .svg .tif
        .tiff .xcf""",
}
_KINDS = {extension: kind or extension for kind, names in _LEFT_OUT.items() for extension in names.split()}
# So many files of an unknown extension are opened; if none is a video, the rest of that extension is not.
_TRIED = 100
# So many kinds of what is left out are named one by one.
_MOST_KINDS = 40


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
        left_out: paths from the root of all else, by what it is.
    """

    files: list[VideoFile] = field(default_factory=list)
    is_video: bool = False
    unusable: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, kind: str, folder: Sequence[str], name: str) -> None:
        """Add to what is left out."""
        self.left_out.setdefault(kind, []).append("/".join((*folder, name)))


def scan(root: Path, *, storable: bool = True) -> Tree:
    """Find the videos under a folder, in one pass.

    A video is a file with the extension of one, which is not opened; a file of another or no extension that turns out
    to be one; or a folder that holds images and neither videos nor folders. Hidden folders are passed over; links are
    followed, each folder is entered once.

    Args:
        root: The folder.
        storable: Take names that a manifest can't hold for unusable.

    Returns:
        The videos, and what could not be used or read, or is something else.
    """
    tree = Tree()
    tried: Counter[str] = Counter()
    pending: list[tuple[str, ...]] = [()]
    entered: set[tuple[int, int]] = set()
    while pending:
        folder = pending.pop()
        path = os.path.join(root, *folder)
        names: dict[str, list[str]] = {"folder": [], "link": [], "video": [], "image": [], "other": []}
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    names.setdefault(_kind(entry), []).append(entry.name)
        except OSError:
            tree.unreadable.append(path)
            continue
        frames = names["image"] and not (names["folder"] or names["link"] or names["video"])
        for name in sorted(names.pop("other")):
            kind = _KINDS.get(extension_of(name)) or ("" if frames else _unknown_kind(os.path.join(path, name), tried))
            if kind == "video":
                names["video"].append(name)
            else:
                tree.leave_out(kind or extension_of(name) or "without an extension", folder, name)
        if frames:
            if folder:
                tree.files.append(VideoFile(folder[:-1], folder[-1], stem_of(folder[-1])))
            else:
                tree.is_video = True
            names.pop("image")
        for kind in sorted(names.keys() - {"folder", "link", "video"}):
            for name in sorted(names[kind]):
                tree.leave_out("single images" if kind == "image" else kind, folder, name)
        for kind in ("folder", "link", "video"):
            tree.unusable += [os.path.join(path, name) for name in names[kind] if storable and not is_storable(name)]
            names[kind] = sorted(name for name in names[kind] if not storable or is_storable(name))
        tree.files += [VideoFile(folder, name, stem_of(name)) for name in names["video"]]
        pending += [(*folder, name) for name in reversed(names["folder"])]
        # Entered last, so that a folder that is also there without a link goes by its own name.
        pending[:0] = [(*folder, name) for name in names["link"]]
    return tree


def _kind(entry: os.DirEntry[str]) -> str:
    """What a name in a folder stands for: a folder, a link to one, a video, an image, another file, or none."""
    try:
        if entry.name[0] == ".":
            return "hidden"
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if entry.is_file():
            extension = extension_of(entry.name)
            return "video" if extension in VIDEO_EXTENSIONS else "image" if extension in _IMAGE_EXTENSIONS else "other"
        return "neither files nor folders" if os.path.exists(entry.path) else "broken links"
    except OSError:  # a link to itself
        return "broken links"


def _unknown_kind(path: str, tried: Counter[str]) -> str:
    """Whether a file is a ``video``, which is seen from its content; else empty."""
    from clip_m2df.video.reader import is_video  # which takes long to import

    extension = extension_of(path)
    if tried[extension] >= _TRIED:
        return ""
    if not os.access(path, os.R_OK):
        return "unreadable"
    if is_video(path):
        tried[extension] = -(1 << 62)
        return "video"
    tried[extension] += 1
    return ""


def extension_of(name: str) -> str:
    """The extension of a file's name, in small letters."""
    return os.path.splitext(name)[1].lower()


def describe(left_out: Mapping[str, Sequence[str]]) -> str:
    """What was not taken for a video, for a message: how much of each kind, with a name or two.

    Returns:
        Such as ``.txt: 3 (a.txt, b.txt and 1 more), archives: 1 (c.zip); unpack those with videos``.
    """
    kinds = sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0]))
    if rest := [name for _, names in kinds[_MOST_KINDS:] for name in names]:
        kinds[_MOST_KINDS:] = [(f"{len(kinds) - _MOST_KINDS} other kinds", rest)]
    counts = ", ".join(f"{printable(kind)}: {len(names)} ({some(names, 2)})" for kind, names in kinds)
    remedies = [r for kind, r in {"archives": "unpack", "partial downloads": "complete"}.items() if kind in left_out]
    return f"{counts}; {' and '.join(remedies)} those with videos" if remedies else counts


def is_storable(name: str) -> bool:
    """Whether a manifest can hold the name: UTF-8 without line breaks."""
    return not re.search(r"[\r\n\ud800-\udfff]", name)


def stem_of(name: str) -> str:
    """Return a file's name without its video extensions, however many (``x.mkv.mp4``), in Unicode's composed form."""
    while True:
        stem, extension = os.path.splitext(name)
        if extension.lower() not in VIDEO_EXTENSIONS | _VIDEOS_OR_NOT:
            return unicodedata.normalize("NFC", name)
        name = stem
