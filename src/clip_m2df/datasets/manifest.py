"""The one table of videos: reading, checking and writing it."""

import csv
import gc
import hashlib
import io
import itertools
import os
import re
import shlex
import unicodedata
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

from clip_m2df.errors import UserError, some
from clip_m2df.files import file_of, lies_under, read_text, relative_path, shipped_files, write_table

SPLITS = ("train", "val", "test")
"""The names that a split may have, in the order in which they are listed."""

TABLE_SUFFIXES = (".safetensors", ".parquet")
"""How the names of feature tables end, which have no videos (:mod:`clip_m2df.datasets.feature_tables`)."""

_REQUIRED = ("path", "label", "split")


@dataclass(frozen=True, slots=True)
class Video:
    """One row of a manifest.

    Attributes:
        path: Absolute path of a video file, or of a folder of numbered images.
        label: Name of the class.
        split: ``train``, ``val`` or ``test``.
        text: What a prompt says of the class: plain words.
        extra: The row's other columns, by name.
    """

    path: str
    label: str
    split: str
    text: str
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def group(self) -> str:
        """What the video was cut from, the row's column ``group``; empty if that is not known."""
        return self.extra.get("group", "")


@dataclass(frozen=True)
class Split:
    """The videos of one split, by class; class number c is entry c of each table.

    Attributes:
        name: ``train``, ``val`` or ``test``.
        class_names: The labels, sorted.
        class_texts: What a prompt says of each class.
        videos: The videos of each class, in the manifest's order.
    """

    name: str
    class_names: tuple[str, ...]
    class_texts: tuple[str, ...]
    videos: tuple[tuple[Video, ...], ...]


class Manifest:
    """The videos of a data set, each with its class and its split.

    Args:
        videos: The rows, in order.
        root: The folder that relative paths start at. It decides how ``digest`` names the videos under it.
        source: What messages call the list.
        lines: The line of each row, for messages; by default rows are counted from 1.

    Attributes:
        videos: The rows, in order.
        root: The folder, or None.

    Raises:
        UserError: If there are no videos, a split is unknown, a video is listed twice, or a class lies in two splits,
            or has two spellings or two texts.
    """

    def __init__(
        self,
        videos: Iterable[Video],
        *,
        root: str | Path | None = None,
        source: str = "the list of videos",
        lines: Sequence[int] | None = None,
    ) -> None:
        self.videos = tuple(videos)
        self.root = None if root is None else os.path.abspath(root)
        if not self.videos:
            raise UserError(f"{source} has no videos: add a row for each video")
        kinds = _check(self.videos, lambda number: f"line {lines[number]}" if lines else f"row {number + 1}", source)
        self._source = source
        self._splits = {}
        for name in SPLITS:
            own = sorted((label, text, tuple(rows)) for (label, split, text), rows in kinds.items() if split == name)
            if own:
                self._splits[name] = Split(name, *zip(*own, strict=True))

    @classmethod
    def read(cls, path: str | Path, root: str | Path | None = None, *, check_files: bool = True) -> "Manifest":
        """Read a manifest and check it.

        The file is CSV in UTF-8 with the columns ``path``, ``label`` and ``split`` and optionally ``text``: what a
        prompt says of the class, its label where empty; and ``group``: what the video was cut from, the same for all
        cuts of it. Other columns are kept. Relative paths start at its folder; if
        there is no video of them, and all paths are relative, at ``root``, as ``clip-m2df prepare`` writes them.

        A manifest can come from anybody, so it can't name any file of this machine: its videos have to lie in its
        folder, or in one that a person names. Symbolic links there may lead elsewhere; whoever made them wanted it.

        Args:
            path: The CSV file.
            root: A folder outside the manifest's own in which its videos may lie too.
            check_files: Whether to refuse a manifest whose videos are not all there, or that lists a file twice.

        Returns:
            The manifest.

        Raises:
            UserError: If the file cannot be read, a row is at fault (the message names the line), or videos lie in
                neither folder.
        """
        if os.fspath(path).lower().endswith(TABLE_SUFFIXES):
            raise UserError(
                f"the manifest {path} is a feature table by its name, and has no videos: give a CSV with their paths"
            )
        with _no_collections():
            manifest = cls._read(path, root)
        if check_files:
            manifest.check_files()
        return manifest

    @classmethod
    def _read(cls, path: str | Path, root: str | Path | None) -> "Manifest":
        source, folder = f"the manifest {path}", os.path.dirname(os.path.abspath(path))
        rows = _read_cells(path, "manifest", _REQUIRED)
        _, header = next(rows)
        path_at = header.index("path")
        of_kind = itemgetter(*(header.index(name) for name in ("label", "split", "text") if name in header))
        others = [number for number, name in enumerate(header) if name not in (*_REQUIRED, "text")]
        # A million rows have few classes: what rows have in common is checked once, and kept once.
        kinds: dict[tuple[str, ...], list[str]] = {}  # label, split and text
        extras: dict[tuple[str, ...], dict[str, str]] = {(): {}}
        paths, kind_of, extra_of, lines = [], [], [], array("Q")
        for line, cells in rows:
            name = cells[path_at]
            kind = kinds.get(key := of_kind(cells))
            if kind is None or not name.strip():
                row = _named(header, cells, _REQUIRED, f"line {line} of {source}")
                kind = kinds[key] = [row["label"], row["split"], row.get("text", "")]
            more = tuple([cells[number] for number in others]) if others else ()
            if more not in extras:
                extras[more] = {header[number]: cells[number].strip() for number in others}
            paths.append(name)
            kind_of.append(kind)
            extra_of.append(extras[more])
            lines.append(line)
        # Of several texts of a class the first; that it has only one is checked below.
        texts = {label: text for label, _, text in reversed(kinds.values()) if text}
        for kind in kinds.values():
            kind[2] = kind[2] or texts.get(kind[0], kind[0])
        join, normal = os.path.join, os.path.normpath
        start = join(_start(paths, folder, root), "")
        videos = [
            # What begins with a letter or a digit, and names no drive, is relative: to join it takes long.
            Video(
                normal(start + name if name[0].isalnum() and ":" not in name else join(start, name)),
                label,
                split,
                text,
                extra,
            )
            for name, (label, split, text), extra in zip(paths, kind_of, extra_of, strict=True)
        ]
        del paths, kind_of, extra_of
        manifest = cls(videos, root=folder, source=source, lines=lines)
        folders = [folder] if root is None else [folder, os.path.abspath(root)]
        inside = tuple(os.path.join(allowed, "") for allowed in folders)
        outside = [v.path for v in videos if not v.path.startswith(inside) and v.path not in folders]
        if outside:
            common = os.path.commonpath([os.path.dirname(path) for path in outside])
            raise UserError(
                f"{len(outside)} of the {len(videos)} videos in {source} lie outside {' and '.join(folders)}, the first"
                f" is {outside[0]}: if you trust the manifest with what is there, allow it with"
                f" --data.root {shlex.quote(common)} (clip-m2df check and cache: --root)"
            )
        return manifest

    def check_files(self, is_there: Callable[[str], bool] = os.path.exists) -> None:
        """Check that all videos are there, and that each is a file of its own.

        Args:
            is_there: Tells it of a path.

        Raises:
            UserError: If some are not there, or two are one file by a link or another spelling of its path.
        """
        missing = [relative_path(video.path, self.root) for video in self.videos if not is_there(video.path)]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(self.videos)} videos in {self._source} are not there: "
                f"{some(map(repr, missing))}; relative paths start at {self.root}: put the videos there, mend the "
                "paths, remove the rows, or name the folder that they start at with --data.root"
            )
        by_path = {video.path: video for video in self.videos}
        for later, earlier in same_files(by_path).items():
            first, second = (
                f"{relative_path(path, self.root)!r} ({by_path[path].label!r}, {by_path[path].split})"
                for path in (earlier, later)
            )
            raise UserError(
                f"{self._source} lists one file twice, as {first} and as {second}: remove one, or let "
                "clip-m2df check --fix leave it out"
            )

    def with_texts(self, files: str | Path | Sequence[str | Path]) -> "Manifest":
        """Return this manifest with other texts for its classes.

        Args:
            files: See :func:`read_class_texts`; classes that they don't name keep their text.

        Raises:
            UserError: If one cannot be read, or gives a class two texts, or if none names a class of the manifest.
        """
        texts = read_class_texts(files, (video.label for video in self.videos), self._source)
        videos = [replace(video, text=texts.get(video.label, video.text)) for video in self.videos]
        return Manifest(videos, root=self.root, source=self._source)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that have videos, by name."""
        return dict(self._splits)

    def split(self, name: str) -> Split:
        """Return the split of this name.

        Raises:
            UserError: If the manifest has no video in it.
        """
        if name not in self._splits:
            raise UserError(
                f"{self._source} has no {name!r} split: it has {', '.join(self._splits)}; add rows with that split"
            )
        return self._splits[name]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what decides episodes: splits, classes, texts, videos and their groups.

        Videos under the root count by their path from there, so a data set that is moved as a whole keeps its digest.
        """
        state = hashlib.sha256()
        for split in self._splits.values():
            for label, text, videos in zip(split.class_names, split.class_texts, split.videos, strict=True):
                cells = [split.name, label, text, *(relative_path(video.path, self.root) for video in videos)]
                if any(video.group for video in videos):  # no split starts with "="
                    cells += ["", *(f"={video.group}" for video in videos)]
                # No cell holds a NUL or is empty, so an empty one ends a class.
                state.update("".join(cell + "\0" for cell in [*cells, ""]).encode())
        return state.hexdigest()

    def write(self, path: str | Path, root: str | Path | None = None) -> None:
        """Write the manifest as CSV, whole or not at all.

        Videos under the file's folder are named by their path from there. Where some are not, but all are under
        ``root``, all are named from there, so that the manifest can be moved; else those outside by absolute paths.

        Args:
            path: The CSV file; one that is there is replaced.
            root: The folder that will be named with the manifest when it is read.

        Raises:
            UserError: If it cannot be written.
        """
        start = os.path.dirname(os.path.abspath(path))
        if root is not None and not all(lies_under(video.path, start) for video in self.videos):
            folder = os.path.abspath(root)
            start = folder if all(lies_under(video.path, folder) for video in self.videos) else start
        extras = list(dict.fromkeys(name for video in self.videos for name in video.extra))
        rows = (
            [relative_path(v.path, start), v.label, v.split, v.text, *(v.extra.get(name, "") for name in extras)]
            for v in self.videos
        )
        write_table(path, "manifest", itertools.chain([[*_REQUIRED, "text", *extras]], rows))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from looking for cycles among a million rows, which have none, again and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def same_files(paths: Iterable[str]) -> dict[str, str]:
    """Find paths that lead to the file, or folder, of an earlier one, by a link or by another spelling.

    Returns:
        The earlier path by the later one.
    """
    first: dict[Hashable, str] = {}
    same = {}
    for path in paths:
        if (earlier := first.setdefault(file_of(path), path)) != path:
            same[path] = earlier
    return same


def _start(paths: Sequence[str], folder: str, root: str | Path | None) -> str:
    """The folder that the relative paths of a manifest start at: its own, or the one that a person named."""
    # Beside absolute ones, or such that lead out of the folder, relative ones were written for the folder.
    if root is None or any(os.path.isabs(path) or os.pardir in path.split("/") for path in paths):
        return folder
    return folder if any(os.path.lexists(os.path.join(folder, path)) for path in paths) else os.path.abspath(root)


def _check(
    videos: Sequence[Video], row_of: Callable[[int], str], source: str
) -> dict[tuple[str, str, str], list[Video]]:
    """Refuse an unknown split, a video listed twice and a class with two splits, spellings or texts.

    Returns:
        The videos of each class, by its label, split and text.
    """
    paths: set[str] = set()
    kinds: dict[tuple[str, str, str], list[Video]] = {}
    first_of_class: dict[str, tuple[Video, str]] = {}
    case, normal = os.path.normcase, os.path.normpath
    for number, video in enumerate(videos):
        # Equal on this file system, even where its names ignore case. The video's own string takes no memory.
        path = case(normal(video.path))
        paths.add(video.path if path == video.path else path)
        kind = video.label, video.split, video.text
        if kind in kinds and len(paths) > number:
            kinds[kind].append(video)
            continue
        row = row_of(number)
        if video.split not in SPLITS:
            raise UserError(f"{row} of {source} has the split {video.split!r}: it can be {', '.join(SPLITS)}")
        if len(paths) == number:
            earlier = row_of(next(n for n, other in enumerate(videos) if case(normal(other.path)) == path))
            raise UserError(f"{source} lists the video {video.path} twice, on {earlier} and on {row}: remove one")
        known, where = first_of_class.setdefault(class_key(video.label), (video, row))
        if known.split != video.split:
            named = "" if known.label == video.label else f" as {spelled(known.label, video.label)}"
            raise two_splits(video.label, f"{known.split} on {where}{named}", f"{video.split} on {row} of {source}")
        if known.label != video.label:
            raise UserError(
                f"one class has two spellings in {source}, {spelled(known.label, video.label)} on {where} and "
                f"{spelled(video.label, known.label)} on {row}: keep one"
            )
        if known.text != video.text:
            raise UserError(
                f"the class {video.label!r} has two texts in {source}, {known.text!r} on {where} and {video.text!r} "
                f"on {row}: give it one"
            )
        kinds[kind] = [video]
    return kinds


def two_splits(label: str, first: str, second: str) -> UserError:
    """The error of a class that lies in two splits; ``first`` and ``second`` say in which, and where."""
    return UserError(
        f"the class {label!r} is in two splits, {first} and {second}: few-shot splits share no class, so keep it in one"
    )


def read_rows(path: str | Path, what: str, required: Sequence[str]) -> dict[int, dict[str, str]]:
    """Read the rows of a table.

    Args:
        path: CSV in UTF-8 whose first line names the columns.
        what: What messages call it.
        required: The columns that it must have, and in which no cell may be empty.

    Returns:
        By the line that a row starts on, its cells by column, without spaces around them but in ``path``.

    Raises:
        UserError: If it cannot be read, or a row is at fault; the message names the line.
    """
    rows = _read_cells(path, what, required)
    _, header = next(rows)
    return {line: _named(header, cells, required, f"line {line} of the {what} {path}") for line, cells in rows}


def _read_cells(path: str | Path, what: str, required: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Read a table as :func:`read_rows` does, and yield the line that a row starts on with its cells as they are.

    The first row is the header, without spaces around its names.
    """
    text = read_text(path, what)
    may_have_nul = "\0" in text
    # Not io.StringIO, which takes four bytes a letter.
    lines = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="")
    del text
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            last = reader.line_num
            if last > line or (may_have_nul and any("\0" in cell for cell in cells)):
                raise UserError(
                    f"line {line} of the {what} {path} has a line break or a NUL character in a cell: close the quote,"
                    " or remove it"
                )
            if len(cells) == len(header) > 0:
                yield line, cells
            elif cells and not header:
                header = [cell.strip() for cell in cells]
                if missing := [name for name in required if name not in header]:
                    raise UserError(
                        f"the {what} {path} has no column {' and no column '.join(map(repr, missing))}; its first line"
                        f" names {', '.join(map(repr, header))}: name the columns there, separated by commas"
                    )
                if twice := [name for name in header if header.count(name) > 1]:
                    raise UserError(f"the {what} {path} has the column {twice[0]!r} more than once: keep one")
                yield line, header
            elif cells:
                raise UserError(
                    f"line {line} of the {what} {path} has another number of cells than the header, {len(cells)} and"
                    f' not {len(header)}: put a cell that holds a comma in double quotes ("...")'
                )
            line = last + 1
    except csv.Error as error:
        raise UserError(
            f"line {line} of the {what} {path} is not valid CSV ({error}): check its quotes and commas"
        ) from error
    if not header:
        raise UserError(f"the {what} {path} is empty: it needs a header line with the columns {', '.join(required)}")


def _named(header: Sequence[str], cells: Sequence[str], required: Sequence[str], where: str) -> dict[str, str]:
    """A row's cells by column, without spaces around them but in ``path``; ``required`` ones may not be empty."""
    row = {name: cell if name == "path" else cell.strip() for name, cell in zip(header, cells, strict=True)}
    if empty := [name for name in required if not row[name].strip()]:
        raise UserError(f"{where} has an empty {empty[0]}: fill it in or remove the row")
    return row


# A capital after a small letter or a digit, and the last capital of a run: HandstandPushups, TVShow.
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def read_class_texts(files: str | Path | Sequence[str | Path], labels: Iterable[str], whose: str) -> dict[str, str]:
    """Read what prompts say of classes.

    Args:
        files: CSV in UTF-8 with the columns ``label`` and ``text``; it may name other classes too. Or several; of two
            texts of a class the later file's holds. One that is not there is looked for among the configs that come
            with the package, in which ``texts`` has some.
        labels: The classes, whose names are compared by :func:`class_key`.
        whose: What has them, for messages.

    Returns:
        The text of each class that a file names.

    Raises:
        UserError: If one cannot be read, or gives a class two texts, or if none names any of the classes.
    """
    files = [files] if isinstance(files, str | Path) else list(files)
    texts: dict[str, str] = {}
    for file in files:
        own: dict[str, str] = {}
        for line, row in read_rows(_texts_file(file), "list of class texts", ("label", "text")).items():
            if own.setdefault(class_key(row["label"]), row["text"]) != row["text"]:
                raise UserError(
                    f"line {line} of the list of class texts {file} gives the class {row['label']!r} a second text: "
                    "keep one"
                )
        texts |= own
    labels = dict.fromkeys(labels)
    found = {label: texts[class_key(label)] for label in labels if class_key(label) in texts}
    if not found:
        raise UserError(
            f"the list of class texts {some(map(str, files))} names no class of {whose}, such as "
            f"{next(iter(labels))!r}: use its labels, or leave the texts out by --data.class_texts null"
        )
    return found


def _texts_file(name: str | Path) -> Path:
    """The file of class texts of this name: in the working directory first, else among those of the package."""
    if os.path.lexists(name):
        return Path(name)
    shipped = shipped_files("texts/**/*.csv")
    if (known := Path(name).as_posix()) not in shipped:
        raise UserError(
            f"there is no list of class texts {name}: check the name; relative names start at {os.getcwd()}, and"
            f" {some(shipped, most=len(shipped))} come with the package"
        )
    return shipped[known]


def readable(label: str) -> str:
    """Return a class name as a prompt says it: plain lower-case words.

    ``HandstandPushups`` becomes "handstand pushups", ``draw_sword`` "draw sword", ``hurling (sport)`` "hurling sport"
    and ``Pouring [something] into [something]`` "pouring something into something". A name without any word is
    returned as it is.
    """
    words = label.replace("_", " ")
    if " " not in words:
        words = _CAMEL_CASE.sub(" ", words)
    words = re.sub(r"[\[(]|[\])](?=\w)", " ", words)
    words = re.sub(r"[\])]", "", words)
    return " ".join(words.lower().split()) or label


def fold(name: str) -> str:
    """Return what spellings of a file's name share: its letters whatever their case and encoding, a space as ``_``."""
    if name.isascii():
        return name.lower().replace(" ", "_")
    folded = unicodedata.normalize("NFC", name).casefold()
    return unicodedata.normalize("NFC", folded).replace(" ", "_")


# What a reader does not see: control characters, what Unicode calls default ignorable, and the blank of Braille.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
_SEPARATORS = r"[\s_\-\u2010-\u2015\u2212]+"
_BETWEEN_DIGITS = re.compile(rf"(?<=\d){_SEPARATORS}(?=\d)")
_MINUS = re.compile(r"(?<![^\s_(\[=,;:/])[-\u2212](?=\d)")
# Quotes are curly or not by the keyboard, and Turkish writes the dot of a small i on the capital too.
_QUOTES = str.maketrans("\u2018\u2019\u02bc\u201c\u201d", "'''\"\"")


@lru_cache(maxsize=1 << 16)
def class_key(label: str) -> str:
    """Return what spellings of a class share; the one comparison of class names.

    ``draw_sword``, ``Draw sword``, ``draw-sword`` and ``DrawSword`` have one key, whatever the form in Unicode and with
    invisible characters or without. Digits stay apart (``1 1`` is not ``11``), and a minus before a number counts
    (``turn -90`` is not ``turn 90``).
    """
    key = label
    if not key.isascii():
        key = unicodedata.normalize("NFKC", _INVISIBLE.sub("", key)).casefold()
        key = unicodedata.normalize("NFKC", key.replace("i\u0307", "i")).translate(_QUOTES)
    key = _INVISIBLE.sub("", key).lower().strip()
    key = _BETWEEN_DIGITS.sub("/", _MINUS.sub("~", key))
    return re.sub(_SEPARATORS, "", key) or label


def spelled(label: str, other: str) -> str:
    """A class's name for a message that has another spelling too; as escapes where the two would look the same."""
    alike = unicodedata.normalize("NFKC", label) == unicodedata.normalize("NFKC", other)
    return ascii(label) if alike else repr(label)
