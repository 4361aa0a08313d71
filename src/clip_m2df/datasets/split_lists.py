"""Reads the split lists that people have, in the forms in circulation, and the files that name their classes."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
_FORMS = {
    "number": "train8/video or train8//class/video",
    "video": "class/video",
    "class": "a class",
    "row": "a path, its start and end or number of frames if any, and the number or name of its class",
    "table": "a cell for each column",
}
# Whose lists these are; their splits share classes, if they were not made for few shots.
_WHOLE = {"row": "as those of MMAction2 and TSN", "table": "as Kinetics' own"}

# Columns of a table, by what they hold.
_COLUMNS = {
    "label": ("label", "class", "class_name", "action", "activity"),
    "id": ("youtube_id", "ytid", "yt_id"),
    "path": ("path", "video_path", "video", "video_name", "filename", "file_name", "file", "video_id", "id", "name"),
    "start": ("time_start", "start", "start_time", "start_frame"),
    "end": ("time_end", "end", "end_time", "end_frame"),
    "split": ("split", "subset"),
}
_YOUTUBE_ID = re.compile(r"[\w-]{11}", re.ASCII)

# "a/b c.mp4 12 40 3" and "a/b c.mp4,3": after a file's name up to three numbers and the class.
_FILE = re.compile(rf"(.+(?:{'|'.join(map(re.escape, sorted(VIDEO_EXTENSIONS)))}))[\"']?[\s,;]+(?=\S)", re.IGNORECASE)
_AFTER_FILE = re.compile(r"((?:-?\d+(?:\.\d+)?[\s,;]+){0,3})(.+)")
# "a/b 163 3": a folder of frames, and at its end numbers.
_NUMBER = r"(?<![\s,;])[\s,;]++\d++"  # in time that grows with the line, whatever it is
_AFTER_FOLDER = re.compile(rf"(.+?)((?:{_NUMBER}){{1,3}})")

# "100218;Something falling like a rock", as in the lists of Something-Something.
_ID_AND_TEMPLATE = re.compile(r"(\d+);\s*(\S.*)")

# The split as a word of a file's name: train.list, vallist03.txt, test_few_shot.txt.
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|valid|validate|validation|dev|test)(?:ing)?(?:list)?(?![a-z])")

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
        by_id: Whether videos go by the first 11 characters of their names, as those of Kinetics.
        remarks: What a person should know of the lists.
    """

    classes: Mapping[str, tuple[str, ...]]
    videos: tuple[ListedVideo, ...] | None = None
    by_id: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Line:
    """A line of a list, taken apart: what it does not have is empty, and one that names no video has no name."""

    file: Path
    number: int
    text: str
    split: str
    class_id: str
    folder: str
    name: str
    form: str = ""
    cut: bool = False  # a part of a video

    def __str__(self) -> str:
        """Where it is, for messages."""
        return f"line {self.number} of the list {self.file}"


def read_lists(
    path: Path, dataset: str, annotations: Sequence[Path] = (), folder_of: Callable[[str], str] = lambda stem: ""
) -> SplitLists:
    """Read the split lists of a data set.

    The forms, told apart by their lines: ``class/video``; ``train8/video`` and ``train8//path/class/video``, where the
    class has a number; ``path number``, ``path frames number`` and ``path start end number``; tables with a header,
    such as Kinetics' ``label,youtube_id,time_start,time_end,split``; and, one on a line, names of classes. The lists of
    a form that does not say the split have it in their names. Numbers take the names of their classes from the
    annotations, else from the folders of their videos.

    Args:
        path: A folder with a list for each split, or one list.
        dataset: A name out of ``BENCHMARKS``, or ``folder``.
        annotations: Files with class names: SSv2's own, CLIP-FSAR's ``class_names.json``, or a class index.
        folder_of: From the name of a video to the folder that it lies in, for lists that name neither.

    Returns:
        The classes, and the videos where the lists name them; a line that is there twice counts once.

    Raises:
        UserError: If a file cannot be read, a line makes no sense, a split has no list or two, a class has no name or
            lies in two splits, or the classes are not the data set's.
    """
    names = read_annotations(annotations, dataset)
    lines = _read_lines(path)
    destroyed = [line for line in lines if line.form == "table" and not line.name]
    lines = [line for line in lines if line.name or line.form != "table"]
    forms = {line.form for line in lines}
    if not lines:
        raise UserError(f"{destroyed[0]} has no id of a video, and so have all others: give the list as it was made")
    listing_videos = {bool(line.name) for line in lines}
    if len(listing_videos) == 2:
        raise UserError(f"some lists in {path} name videos and some only classes: give lists of one kind")
    if listing_videos == {False} and dataset in BENCHMARKS and not BENCHMARKS[dataset].class_split:
        raise UserError(
            f"the lists in {path} name classes, but the splits of {dataset} are lists of videos: give those"
        )
    missing = [split for split in SPLITS if not any(line.split == split for line in lines)]
    if missing and dataset in BENCHMARKS and not forms & _WHOLE.keys():
        files = dict.fromkeys(line.file.name for line in lines)
        raise UserError(
            f"there is no list of the {missing[0]} split in {path}, only {some(files)}: "
            "give a folder with a list for each of train, val and test, named so"
        )
    classes: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
    videos: dict[tuple[str, str], ListedVideo] = {}
    for label, line in zip(_labels(lines, dataset, names, folder_of), lines, strict=True):
        classes[line.split][label] = None
        stem = stem_of(line.name)
        videos.setdefault((label, stem), ListedVideo(line.split, label, line.text, stem))
    found = {split: tuple(labels) for split, labels in classes.items() if labels}
    remarks = []
    if destroyed:
        remarks.append(
            f"passed over {len(destroyed)} lines without the id of a video, which a spreadsheet may have destroyed: "
            f"{some([f'{line.text!r} on {line}' for line in destroyed], 2)}"
        )
    if any(line.cut for line in lines):
        remarks.append("the lists give starts and ends: their videos are taken whole")
    by_id = "table" in forms and all(map(_YOUTUBE_ID.match, (stem_of(line.name) for line in lines)))
    return SplitLists(
        found, tuple(videos.values()) if listing_videos == {True} else None, by_id=by_id, remarks=tuple(remarks)
    )


def read_annotations(paths: Iterable[Path], dataset: str) -> dict[str, str]:
    """Read files that name classes.

    Args:
        paths: SSv2's ``something-something-v2-{train,validation}.json``, CLIP-FSAR's ``class_names.json``, or a class
            index: a name on each line, counted from 0, or with its number before or after it; the same as JSON.
        dataset: Whose names to take where a file has those of several.

    Returns:
        The class of each video, by its name, and of each number such as ``train8`` or, of an index, ``number 8``.

    Raises:
        UserError: If a file is none of these, or two of them contradict each other.
    """
    names: dict[str, str] = {}
    for path in paths:
        text = read_text(path, "annotations file")
        found: Iterable[tuple[str, str]]
        try:
            is_json = path.suffix.lower() == ".json" or text.lstrip().startswith(("[", "{"))
            content = json.loads(text) if is_json else text
        except (ValueError, RecursionError) as error:
            raise UserError(f"the annotations {path} are no JSON ({error}): give {_SSV2_FILES}") from error
        index = _class_index(content)
        if index:
            found = [
                (f"number {number}", _sound_label(label, f"class number {number} of the annotations {path}"))
                for number, label in index.items()
            ]
        elif isinstance(content, list):
            found = _templates(content, path)
        elif isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
            found = _numbered_names(content, dataset, path)
        else:
            raise UserError(f"the annotations {path} don't say which video is of which class: give {_SSV2_FILES}")
        for name, label in found:
            if class_key(names.setdefault(name, label)) != class_key(label):
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
    words = _splits_in(file.name)
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
    numbered = [(n, line) for n, line in numbered if line and not line.startswith("# ")]
    with_numbers = sum(_NUMBERED.fullmatch(line) is not None for _, line in numbered)
    if 2 * with_numbers > len(numbered):
        return [_take_apart(file, n, line, "number") for n, line in numbered]
    columns = _columns(numbered[0][1]) if numbered else {}
    if not required and "split" not in columns:
        return []
    if len(numbered) <= bool(columns):  # no more than a header
        raise UserError(f"the list {file} is empty: give one with a video on each line")
    if len(words) != 1 and "split" not in columns:
        raise UserError(
            f"the name of the list {file} says {' and '.join(sorted(words)) or 'no split'}: "
            "put train, val or test into it"
        )
    split = next(iter(words), "")
    if columns:
        return _read_table(file, numbered, columns, split)
    if rows := _rows([line for _, line in numbered]):
        return [_take_row(file, n, line, row, split) for (n, line), row in zip(numbered, rows, strict=True)]
    form = "video" if 2 * sum("/" in line for _, line in numbered) > len(numbered) else "class"
    return [_take_apart(file, n, line, form, split) for n, line in numbered]


def _columns(header: str) -> dict[str, int]:
    """Which column of a table holds what, by the names in its first line; none if that is not a header."""
    names = [cell.strip().strip("\"'").lower() for cell in re.split("[,;\t]", header)]
    found = {}
    for what, known in _COLUMNS.items():
        if matching := [name for name in known if name in names]:
            found[what] = names.index(matching[0])
    return found if len(names) > 1 and ("id" in found or {"label", "path"} <= found.keys()) else {}


def _read_table(file: Path, numbered: Sequence[tuple[int, str]], columns: Mapping[str, int], split: str) -> list[_Line]:
    """Read the lines of a table, a video each."""
    header = numbered[0][1]
    if "label" not in columns:
        raise UserError(
            f"the list {file} has the columns {header!r:.200}, but none with the class, as Kinetics' list of test "
            "videos: give one that has"
        )
    delimiter = next(character for character in ",;\t" if character in header)
    lines = []
    for number, text in numbered[1:]:
        try:
            cells = [cell.strip() for cell in next(csv.reader([text], delimiter=delimiter, strict=True))]
        except (csv.Error, StopIteration):
            cells = []
        if len(cells) <= max(columns.values()) or not cells[columns["label"]]:
            raise _no_line(file, number, text, "table")
        row = {what: cells[column] for what, column in columns.items()}
        own = _splits_in(row["split"]) if row.get("split") else {split}
        if len(own) != 1:
            raise UserError(
                f"line {number} of the list {file} has the split {row['split']!r}: it can be train, val, test"
            )
        if "id" in row:
            name = row["id"] if _YOUTUBE_ID.fullmatch(row["id"]) else ""
            times = [row[what] for what in ("start", "end") if re.fullmatch(r"\d{1,6}(\.0*)?", row.get(what, ""))]
            path, numbers = "_".join([name, *(f"{int(float(time)):06d}" for time in times)]) if name else "", []
        else:
            path, numbers = row["path"], [row[what] for what in ("start", "end") if row.get(what)]
        lines.append(_take_row(file, number, text, (path, numbers, row["label"]), own.pop(), "table"))
    return lines


def _splits_in(text: str) -> set[str]:
    """The splits whose words a text has."""
    return {"val" if word.startswith(("val", "dev")) else word for word in _SPLIT_WORD.findall(text.lower())}


_Row = tuple[str, Sequence[str], str]
"""A path, the numbers after it, and the class."""

_NO_ROW: _Row = ("", (), "")


def _rows(lines: Sequence[str]) -> list[_Row]:
    """Take a list of paths with their classes apart; nothing if that is not what most of its lines are."""
    files = [_FILE.match(line) for line in lines]
    after = [_AFTER_FILE.fullmatch(line, file.end()) if file else None for line, file in zip(lines, files, strict=True)]
    if 2 * sum(match is not None for match in after) > len(lines):
        return [
            (file[1].strip("\"'"), re.split(r"[\s,;]+", rest[1])[:-1], rest[2].strip(" \t\"'"))
            if file and rest
            else _NO_ROW
            for file, rest in zip(files, after, strict=True)
        ]
    if all(match := [_ID_AND_TEMPLATE.fullmatch(line) for line in lines]):
        return [(found[1], (), found[2]) for found in match if found]
    matches = [match for match in map(_AFTER_FOLDER.fullmatch, lines) if match]
    if len(matches) < len(lines):
        return []
    # A name may end in numbers too: as many are taken off as all lines have, or fewer if that keeps the paths apart.
    most = min(len(re.findall(r"\d+", match[2])) for match in matches)
    for count in range(most, 0, -1):
        tokens = [re.findall(_NUMBER, line)[-count:] for line in lines]
        paths = [line.removesuffix("".join(numbers)) for line, numbers in zip(lines, tokens, strict=True)]
        if distinct := len(set(paths)) == len(paths):
            break
    rows: list[_Row] = [
        (path, [token.strip(" \t,;") for token in numbers[:-1]], numbers[-1].strip(" \t,;"))
        for path, numbers in zip(paths, tokens, strict=True)
    ]
    folders = [path.rpartition("/")[0] for path, _, _ in rows]
    if count == 1:
        # "eat/eat 1" is a class and a video, unless each folder has a number of its own, for several videos.
        pairs = set(zip(folders, (label for _, _, label in rows), strict=True))
        own = len(pairs) == len({folder for folder, _ in pairs}) == len({label for _, label in pairs})
        return rows if all(folders) and own and len(pairs) < len(rows) else []
    return rows if all(folders) or (distinct and not any(re.search(r"\s", path) for path in paths)) else []


def _take_row(file: Path, number: int, text: str, row: _Row, split: str, form: str = "row") -> _Line:
    path, numbers, label = row
    *folders, name = re.split(r"[/\\]", path.rstrip("/\\"))
    if not label or not _is_sound(text.replace("\t", " ")) or (form == "row" and not name.strip()):
        raise _no_line(file, number, text, form)
    is_number = re.fullmatch(r"\d{1,9}", label) is not None
    folder = (folders[-1].strip() if folders else "") if is_number else label
    class_id = f"number {int(label)}" if is_number else ""
    return _Line(file, number, text, split, class_id, folder, name.strip(), form, len(numbers) > 1)


def _no_line(file: Path, number: int, text: str, form: str) -> UserError:
    shown = text if len(text) <= 80 else text[:80] + "…"
    return UserError(
        f"line {number} of the list {file} is {shown!r}: it should be {_FORMS[form]}, as its other lines; mend or"
        " remove it"
    )


def _take_apart(file: Path, number: int, text: str, form: str, split: str = "") -> _Line:
    class_id, path = "", text
    if form == "number" and (match := _NUMBERED.fullmatch(text)):
        class_id, split, path = match.groups()
    *folders, name = path.split("/") if form != "class" else (text, "")
    folder, name = folders[-1].strip() if folders else "", name.strip()
    # What a list of the form has to have.
    whole = {"number": class_id and name, "video": folder and name, "class": "/" not in text}[form]
    if not whole or not _is_sound(text):
        raise _no_line(file, number, text, form)
    return _Line(file, number, text, split, class_id, folder, name, form)


def _is_sound(text: str) -> bool:
    return len(text) <= _MOST_CHARACTERS and not _UNSOUND.search(text)


# Classes
def _labels(
    lines: Sequence[_Line], dataset: str, names: Mapping[str, str], folder_of: Callable[[str], str]
) -> list[str]:
    """The class of each line, spelled as the benchmark does or else as first in the lists."""
    splits = BENCHMARKS[dataset].class_split.values() if dataset in BENCHMARKS else ()
    canonical = {class_key(label): label for labels in splits for label in labels}
    label_of_id = _labels_of_ids(lines, dataset, names, folder_of)
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
            error = two_splits(label, f"{earlier.split} on {earlier}", f"{line.split} on {line}")
            if whose := _WHOLE.get(line.form):
                raise UserError(f"{error}; lists {whose} divide videos and not classes, if not made for few shots")
            raise error
        if earlier.class_id != line.class_id:
            raise UserError(
                f"the class {label!r} has two numbers, {earlier.class_id} on {earlier} and {line.class_id} on "
                f"{line}: give it one"
            )
        labels.append(spelled)
    return labels


def _labels_of_ids(
    lines: Sequence[_Line], dataset: str, names: Mapping[str, str], folder_of: Callable[[str], str]
) -> dict[str, str]:
    """The class of each number: of ``train8`` the folder in its paths, or what the annotations say; of others those."""
    index = {class_id: name for class_id, name in names.items() if class_id.startswith("number ")}
    used = {line.class_id for line in lines}
    if "number 0" in index and "number 0" not in used and f"number {len(index)}" in used:  # they count from 1
        index = {f"number {number + 1}": index[f"number {number}"] for number in range(len(index))}
    own = {class_key(name): name for name in index.values()}
    numbers_in: dict[str, set[str]] = {}
    for line in lines:
        numbers_in.setdefault(line.folder, set()).add(line.class_id)
    known: dict[str, tuple[str, _Line]] = {}
    for line in lines:
        # SSv2's folders are no classes.
        label = "" if dataset.startswith("ssv2") else line.folder
        if line.form in _WHOLE and line.class_id:
            named = index.get(line.class_id, "")
            if named and own.get(class_key(label), named) != named:
                raise UserError(
                    f"the class {line.class_id} is {named!r} in the annotations, and {label!r} on {line}: "
                    "give the class index of these lists"
                )
            # A folder with several classes is none.
            label = named or (label if len(numbers_in[line.folder]) == 1 else "") or folder_of(stem_of(line.name))
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
        files = "a class index, a name on each line," if unnamed[0].form in _WHOLE else files
        raise UserError(
            f"nothing names the classes {class_ids} of the lists (first on {unnamed[0]}): "
            f"give {files} with --annotations"
        )
    return labels


# Annotations
def _class_index(content: Any) -> dict[int, Any]:
    """The names of a class index by their numbers; nothing if it is none."""
    if isinstance(content, list) and all(isinstance(item, str) for item in content):
        return dict(enumerate(content))
    if isinstance(content, dict):
        pairs = [(str(key), value) for key, value in content.items() if isinstance(value, str | int)]
        pairs = pairs if len(pairs) == len(content) else []
        if all(key.isdecimal() for key, _ in pairs):
            return {int(key): value for key, value in pairs}
        return {int(value): key for key, value in pairs} if all(str(v).isdecimal() for _, v in pairs) else {}
    if not isinstance(content, str):
        return {}
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    for form in (
        r"(?P<number>\d{1,9})[\s,;:]+(?P<name>.*\S)",
        r"(?P<name>.+?)(?<![\s,;:])[\s,;:]++(?P<number>\d{1,9})",
    ):
        matches = [re.fullmatch(form, line) for line in lines]
        if len(matches) > 1 and not matches[0]:  # a header
            matches = matches[1:]
        found = {int(match["number"]): match["name"].strip("\"'") for match in matches if match}
        if found and len(found) == len(matches):
            return found
    return dict(enumerate(lines))


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
