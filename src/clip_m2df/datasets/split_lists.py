"""Reads the split lists that people have, in the forms in circulation, and the files that name their classes."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_m2df.datasets.benchmarks import BENCHMARKS
from clip_m2df.datasets.manifest import SPLITS, class_key, two_splits
from clip_m2df.datasets.tree import VIDEO_EXTENSIONS, stem_of
from clip_m2df.errors import UserError, some
from clip_m2df.files import read_text

# No list of any data set comes near these.
MOST_BYTES = 64 << 20
_MOST_CHARACTERS = 4096

# What a manifest cannot hold: control characters and lone halves of characters.
_UNSOUND = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# "train8/78687" and "train0//videos/brush_hair/x.avi": the split, the number of the class in it, and a path.
_NUMBERED = re.compile(r"((train|val|test)\d{1,9})//?([^/].*)")

# What the lines of a list look like.
_FORMS = {"number": "train8/video or train8//class/video", "video": "class/video", "class": "a class"}

# The split as a word of a file's name: train.list, vallist03.txt, test_few_shot.txt.
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?:ing)?(?:list)?(?![a-z])")

_SSV2_FILES = "something-something-v2-train.json and something-something-v2-validation.json"


@dataclass(frozen=True)
class ListedVideo:
    """A video that a list names.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        label: Name of the class.
        line: The line as it stands in the list.
        stem: The video's name without folders and extension.
    """

    split: str
    label: str
    line: str
    stem: str


@dataclass(frozen=True)
class SplitLists:
    """What the lists of a data set say.

    Attributes:
        classes: The classes of each split, in the lists' order.
        videos: The listed ones; None where the lists name classes alone, each with all its videos.
    """

    classes: Mapping[str, tuple[str, ...]]
    videos: tuple[ListedVideo, ...] | None = None


@dataclass(frozen=True)
class _Line:
    """A line of a list, taken apart: what it does not have is empty."""

    file: Path
    number: int
    text: str
    split: str
    class_id: str
    folder: str
    name: str

    def __str__(self) -> str:
        """Where it is, for messages."""
        return f"line {self.number} of the list {self.file}"


def read_lists(path: Path, dataset: str, annotations: Sequence[Path] = ()) -> SplitLists:
    """Read the split lists of a data set.

    The forms, told apart by their lines: ``class/video``; ``train8/video`` and ``train8//path/class/video``, where the
    class has a number; and, one on a line, names of classes. The lists of a form that does not say the split have it in
    their names. Lists of SSv2 with numbers take the names of their classes from the annotations.

    Args:
        path: A folder with a list for each split, or one list.
        dataset: A name out of ``BENCHMARKS``, or ``folder``.
        annotations: Files with class names: SSv2's own, or CLIP-FSAR's ``class_names.json``.

    Returns:
        The classes, and the videos where the lists name them; a line that is there twice counts once.

    Raises:
        UserError: If a file cannot be read, a line makes no sense, a split has no list or two, a class has no name or
            lies in two splits, or the classes are not the data set's.
    """
    names = read_annotations(annotations, dataset)
    lines = _read_lines(path)
    listing_videos = {bool(line.name) for line in lines}
    if len(listing_videos) == 2:
        raise UserError(f"some lists in {path} name videos and some only classes: give lists of one kind")
    if listing_videos == {False} and dataset in BENCHMARKS and not BENCHMARKS[dataset].class_split:
        raise UserError(
            f"the lists in {path} name classes, but the splits of {dataset} are lists of videos: give those"
        )
    missing = [split for split in SPLITS if not any(line.split == split for line in lines)]
    if missing and dataset in BENCHMARKS:
        files = dict.fromkeys(line.file.name for line in lines)
        raise UserError(
            f"there is no list of the {missing[0]} split in {path}, only {some(files)}: "
            "give a folder with a list for each of train, val and test, named so"
        )
    classes: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
    videos: dict[tuple[str, str], ListedVideo] = {}
    for label, line in zip(_labels(lines, dataset, names), lines, strict=True):
        classes[line.split][label] = None
        stem = stem_of(line.name)
        videos.setdefault((label, stem), ListedVideo(line.split, label, line.text, stem))
    found = {split: tuple(labels) for split, labels in classes.items() if labels}
    return SplitLists(found, tuple(videos.values()) if listing_videos == {True} else None)


def read_annotations(paths: Iterable[Path], dataset: str) -> dict[str, str]:
    """Read files that name classes.

    Args:
        paths: SSv2's ``something-something-v2-{train,validation}.json``, or CLIP-FSAR's ``class_names.json``.
        dataset: Whose names to take where a file has those of several.

    Returns:
        The class of each video, by its name, and of each number such as ``train8``.

    Raises:
        UserError: If a file is none of these, or two of them contradict each other.
    """
    names: dict[str, str] = {}
    for path in paths:
        text = read_text(path, "annotations file")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the annotations {path} are no JSON ({error}): give {_SSV2_FILES}") from error
        if isinstance(content, list):
            found = _templates(content, path)
        elif isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
            found = _numbered_names(content, dataset, path)
        else:
            raise UserError(f"the annotations {path} don't say which video is of which class: give {_SSV2_FILES}")
        for name, label in found:
            if names.setdefault(name, label) != label:
                raise UserError(
                    f"the annotations {path} call {name!r} {label!r}, but it is {names[name]!r} as well: "
                    "give files that agree"
                )
    return names


# Files and lines
def _read_lines(path: Path) -> list[_Line]:
    """Read the lines of every list, split by split."""
    if not path.exists():
        raise UserError(f"there is no file or folder {path}: --lists names a folder with split lists")
    alone = not path.is_dir()
    try:
        candidates = [path] if alone else sorted(filter(_may_be_list, path.iterdir()))
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}; check its permissions") from error
    lines: list[_Line] = []
    file_of_split: dict[str, Path] = {}
    for file in candidates:
        for line in _read_list(file, required=alone):
            earlier = file_of_split.setdefault(line.split, file)
            if earlier is not file:
                raise UserError(
                    f"{earlier.name} and {file.name} in {path} are both lists of the {line.split} split: "
                    "give a folder with one list a split"
                )
            lines.append(line)
    if not lines:
        raise UserError(
            f"there is no split list in {path}: give a folder with lists such as train.txt, val.txt, test.txt"
        )
    return sorted(lines, key=lambda line: SPLITS.index(line.split))


def _may_be_list(file: Path) -> bool:
    is_other = file.name[0] == "." or file.suffix.lower() in {".json", *VIDEO_EXTENSIONS}
    return not is_other and file.is_file() and file.stat().st_size <= MOST_BYTES


def _read_list(file: Path, *, required: bool) -> list[_Line]:
    """Read the lines of a list; none of a file that isn't one, unless it has to be."""
    words = {"val" if word.startswith("val") else word for word in _SPLIT_WORD.findall(file.name.lower())}
    required = required or bool(words)
    if file.is_file() and file.stat().st_size > MOST_BYTES:
        raise UserError(
            f"the list {file} has more than {MOST_BYTES >> 20} MiB, too many for a split list: name another"
        )
    try:
        text = read_text(file, "list")
    except UserError as error:
        if isinstance(error.__cause__, UnicodeDecodeError) and not required:
            return []
        raise
    numbered = [(n, line.strip()) for n, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1)]
    numbered = [(n, line) for n, line in numbered if line]
    with_numbers = sum(_NUMBERED.fullmatch(line) is not None for _, line in numbered)
    if 2 * with_numbers > len(numbered):
        return [_take_apart(file, n, line, "number") for n, line in numbered]
    if not required:
        return []
    if not numbered:
        raise UserError(f"the list {file} is empty: give one with a video on each line")
    if len(words) != 1:
        raise UserError(
            f"the name of the list {file} says {' and '.join(sorted(words)) or 'no split'}: "
            "put train, val or test into it"
        )
    form = "video" if 2 * sum("/" in line for _, line in numbered) > len(numbered) else "class"
    return [_take_apart(file, n, line, form, *words) for n, line in numbered]


def _take_apart(file: Path, number: int, text: str, form: str, split: str = "") -> _Line:
    class_id, path = "", text
    if form == "number" and (match := _NUMBERED.fullmatch(text)):
        class_id, split, path = match.groups()
    *folders, name = path.split("/") if form != "class" else (text, "")
    folder, name = folders[-1].strip() if folders else "", name.strip()
    # What a list of the form has to have.
    whole = {"number": class_id and name, "video": folder and name, "class": "/" not in text}[form]
    if not whole or not _is_sound(text):
        shown = text if len(text) <= 80 else text[:80] + "…"
        raise UserError(
            f"line {number} of the list {file} is {shown!r}: it should be {_FORMS[form]}, as its other lines; mend or"
            " remove it"
        )
    return _Line(file, number, text, split, class_id, folder, name)


def _is_sound(text: str) -> bool:
    return len(text) <= _MOST_CHARACTERS and not _UNSOUND.search(text)


# Classes
def _labels(lines: Sequence[_Line], dataset: str, names: Mapping[str, str]) -> list[str]:
    """The class of each line, spelled as the benchmark does or else as first in the lists."""
    splits = BENCHMARKS[dataset].class_split.values() if dataset in BENCHMARKS else ()
    canonical = {class_key(label): label for labels in splits for label in labels}
    label_of_id = _labels_of_ids(lines, dataset, names)
    first: dict[str, tuple[str, _Line]] = {}
    labels = []
    for line in lines:
        label = label_of_id[line.class_id] if line.class_id else line.folder
        key = class_key(label)
        if canonical and key not in canonical:
            raise UserError(
                f"{line} has the class {label!r}, which {dataset} doesn't have: give its own lists, "
                "or prepare folder for other data"
            )
        spelled, earlier = first.setdefault(key, (canonical.get(key, label), line))
        if earlier.split != line.split:
            raise two_splits(label, f"{earlier.split} on {earlier}", f"{line.split} on {line}")
        if earlier.class_id != line.class_id:
            raise UserError(
                f"the class {label!r} has two numbers, {earlier.class_id} on {earlier} and {line.class_id} on "
                f"{line}: give it one"
            )
        labels.append(spelled)
    return labels


def _labels_of_ids(lines: Sequence[_Line], dataset: str, names: Mapping[str, str]) -> dict[str, str]:
    """The class of each number such as ``train8``: the folder in its paths, or what the annotations say."""
    known: dict[str, tuple[str, _Line]] = {}
    for line in lines:
        # SSv2's folders are no classes.
        label = "" if dataset.startswith("ssv2") else line.folder
        label = label or names.get(stem_of(line.name), "")
        if line.class_id and label:
            earlier, where = known.setdefault(line.class_id, (label, line))
            if class_key(earlier) != class_key(label):
                raise UserError(
                    f"the class {line.class_id} is {earlier!r} on {where} and {label!r} on {line}: "
                    "give the lists and annotations of one data set"
                )
    labels = {**names, **{class_id: label for class_id, (label, _) in known.items()}}
    if unnamed := [line for line in lines if line.class_id and line.class_id not in labels]:
        class_ids = some(dict.fromkeys(line.class_id for line in unnamed))
        files = _SSV2_FILES if dataset.startswith("ssv2") else "a class_names.json"
        raise UserError(
            f"nothing names the classes {class_ids} of the lists (first on {unnamed[0]}): "
            f"give {files} with --annotations"
        )
    return labels


# Annotations
def _templates(content: Sequence[Any], path: Path) -> Iterator[tuple[str, str]]:
    """The (video, template) pairs of an annotation file of SSv2."""
    label = None
    for number, item in enumerate(content, start=1):
        if not isinstance(item, dict) or not isinstance(item.get("id"), str | int):
            raise UserError(f"entry {number} of the annotations {path} has no id: give {_SSV2_FILES}")
        if "template" in item:
            label = _sound_label(item["template"], f"the template of entry {number} of the annotations {path}")
            yield str(item["id"]), label
    if label is None:
        raise UserError(f"the annotations {path} have no templates, as those of SSv2's test videos: give {_SSV2_FILES}")


def _numbered_names(content: Mapping[str, Any], dataset: str, path: Path) -> Iterator[tuple[str, str]]:
    """The (number, name) pairs of a data set in a ``class_names.json``, where ``ssv2`` is called ``ssv2_full``."""
    splits = content.get(dataset) or content.get(f"{dataset}_full") or {}
    for split, labels in splits.items():
        if not isinstance(labels, list):
            raise UserError(f"{split!r} of {dataset} in the annotations {path} is no list: give a list of class names")
        for number, label in enumerate(labels):
            where = f"name {number} of {split!r} of {dataset} in the annotations {path}"
            yield f"{split}{number}", _sound_label(label, where)


def _sound_label(label: Any, where: str) -> str:
    if not isinstance(label, str) or not label.strip() or not _is_sound(label):
        raise UserError(f"{where} is not the name of a class: give it a line of plain text")
    return label.strip()
