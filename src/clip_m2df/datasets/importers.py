"""Matches videos in a tree with split lists, class splits or folders: what makes up a manifest, and what is wanting."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from clip_m2df.datasets.manifest import SPLITS, class_key, fold, same_files, two_splits
from clip_m2df.datasets.split_lists import ListedVideo, SplitLists
from clip_m2df.datasets.tree import VideoFile
from clip_m2df.errors import UserError

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}

# A Kinetics video is known by its id; its time stamps are sometimes left out, and files get endings of their own.
_LISTED_ID = re.compile(r"([\w-]{11})(?:_\d+_\d+)?", re.ASCII)
_FILE_ID = re.compile(r"([\w-]{11})(?![0-9A-Za-z-])", re.ASCII)

Home = Callable[[VideoFile], str | None]
"""From a video to the class in whose folder it lies, if in any."""


@dataclass(frozen=True)
class Problem:
    """A video that could not be found, or not be told from others; one row of the report."""

    split: str
    label: str
    entry: str
    problem: str
    candidates: tuple[VideoFile, ...] = ()


def _order(problem: Problem) -> tuple[int, str, str]:
    return SPLITS.index(problem.split), problem.label, problem.entry


@dataclass
class Outcome:
    """Which videos the manifest is made of, and what is wanting.

    Attributes:
        classes: The classes of each split.
        found: The split, the label and the file of each video.
        problems: The videos that are left out.
        listed: How many videos the lists name of each split; None without lists of videos.
        outside: Videos in no folder of a class.
        links: Videos that are others of their class under another name.
    """

    classes: Mapping[str, Sequence[str]]
    found: list[tuple[str, str, VideoFile]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    listed: Counter[str] | None = None
    outside: list[VideoFile] = field(default_factory=list)
    links: list[VideoFile] = field(default_factory=list)

    def leave_out_links(self, root: str) -> None:
        """Use each file once: under the first of its names in a class, and not at all if it is of two classes."""
        rows = {os.path.join(root, *file.folder, file.name): (split, label, file) for split, label, file in self.found}
        owners: dict[str, list[str]] = {}
        for later, earlier in same_files(sorted(rows)).items():
            owners.setdefault(earlier, [earlier]).append(later)
        for paths in owners.values():
            if len({rows[path][1] for path in paths}) == 1:
                self.links += [rows.pop(path)[2] for path in paths[1:]]
                continue
            files = tuple(rows[path][2] for path in paths)
            for split, label, file in map(rows.pop, paths):
                self.problems.append(Problem(split, label, file.inner_path, "ambiguous", files))
        self.found = list(rows.values())
        self.problems.sort(key=_order)


def match_entries(known: SplitLists, files: Sequence[VideoFile], home: Home, *, kinetics: bool) -> Outcome:
    """Find the file of each listed video by what their names share.

    A file in the folder of another class never stands in for a missing one: names such as ``1.mp4`` recur. Of several,
    the one in a folder named like the class wins, then the one spelled like the entry; what is still several is
    ambiguous, and so is one file for several entries.

    Args:
        known: The lists.
        files: The videos in the tree.
        home: The class in whose folder a video lies.
        kinetics: Whether the first 11 characters are what names share.

    Returns:
        The outcome; a missing video's candidates are a few files of its name in the folders of other classes.
    """
    by_name: dict[str, list[VideoFile]] = {}
    for file in files:
        shared = {fold(file.stem)}
        if kinetics and (match := _FILE_ID.match(file.stem)):
            shared.add(fold(match[1]))
        for name in shared:
            by_name.setdefault(name, []).append(file)
    videos = known.videos or ()
    outcome = Outcome(known.classes, listed=Counter(video.split for video in videos))

    def leave_out(video: ListedVideo, problem: str, candidates: Sequence[VideoFile]) -> None:
        outcome.problems.append(Problem(video.split, video.label, video.line, problem, tuple(candidates)))

    claims: dict[VideoFile, list[tuple[ListedVideo, tuple[bool, ...]]]] = {}
    for video in videos:
        match = _LISTED_ID.fullmatch(video.stem) if kinetics else None
        shared_name = match[1] if match else video.stem
        same_name = by_name.get(fold(shared_name), [])
        fitting = [file for file in same_name if home(file) == video.label]
        fitting = fitting or [file for file in same_name if home(file) is None]
        # How much a file is spelled like the entry. First of all, ids that differ in case alone are told apart.
        fits = [
            (file.stem.startswith(shared_name), fold(file.stem) == fold(video.stem), file.stem == video.stem)
            for file in fitting
        ]
        fitting = [file for file, fit in zip(fitting, fits, strict=True) if fit == max(fits)]
        if len(fitting) == 1:
            claims.setdefault(fitting[0], []).append((video, max(fits)[::2]))
        elif fitting:
            leave_out(video, "ambiguous", fitting)
        else:
            leave_out(video, "missing", same_name[:3])
    for file, claimants in claims.items():
        claimed = [fit for _, fit in claimants]
        for video, fit in claimants:
            if fit < max(claimed):
                leave_out(video, "missing", [file])
            elif claimed.count(fit) > 1:
                leave_out(video, "ambiguous", [file])
            else:
                outcome.found.append((video.split, video.label, file))
    outcome.problems.sort(key=_order)
    return outcome


def match_classes(
    classes: Mapping[str, Sequence[str]], files: Sequence[VideoFile], home: Home, *, unique_names: bool
) -> Outcome:
    """Give each video to the class whose folder it lies in.

    Args:
        classes: The classes of each split.
        files: The videos in the tree.
        home: The class in whose folder a video lies.
        unique_names: Whether videos of one name in one class are copies, wherever they lie; otherwise only those in one
            folder are.

    Returns:
        The outcome; copies are ambiguous.
    """
    split_of = {label: split for split, labels in classes.items() for label in labels}
    outcome = Outcome(classes)
    copies: dict[tuple[str, tuple[str, ...], str], list[VideoFile]] = {}
    for file in files:
        label = home(file)
        if label is None:
            outcome.outside.append(file)
        else:
            copies.setdefault((label, () if unique_names else file.folder, fold(file.stem)), []).append(file)
    for (label, _, _), same in copies.items():
        if len(same) == 1:
            outcome.found.append((split_of[label], label, same[0]))
        else:
            entry = f"{label}/{same[0].stem}"
            outcome.problems.append(Problem(split_of[label], label, entry, "ambiguous", tuple(same)))
    return outcome


def match_split_folders(files: Sequence[VideoFile], root: Path) -> Outcome:
    """Read splits and classes off a tree ``split/class/video``.

    Args:
        files: The videos in the tree.
        root: The tree's folder, for messages.

    Returns:
        The outcome.

    Raises:
        UserError: If a folder at the top is no split, or a class lies in two splits.
    """
    folder_of_split: dict[str, str] = {}
    known: dict[str, tuple[str, str]] = {}
    for folder in dict.fromkeys(file.folder[:2] for file in files if file.folder):
        split = _SPLIT_FOLDERS.get(folder[0].lower())
        if split is None:
            raise UserError(
                f"the folder {folder[0]!r} in {root} is no split: name the folders there train, val and test, with a "
                "folder for each class in them, or give --lists with the classes of each split"
            )
        if folder_of_split.setdefault(split, folder[0]) != folder[0]:
            raise UserError(
                f"the folders {folder_of_split[split]!r} and {folder[0]!r} in {root} are both the {split} split: "
                "make them one"
            )
        if len(folder) < 2:
            continue
        earlier, _ = known.setdefault(class_key(folder[1]), (split, folder[1].strip()))
        if earlier != split:
            raise two_splits(folder[1], earlier, f"{split} in {root}")
    classes = {split: [label for where, label in known.values() if where == split] for split in folder_of_split}
    return match_classes(
        classes,
        files,
        lambda file: known[class_key(file.folder[1])][1] if len(file.folder) > 1 else None,
        unique_names=False,
    )


def nearest_class(classes: Mapping[str, Sequence[str]]) -> Home:
    """Find the class that the nearest folder around a video is named like."""
    label_of_key = {class_key(label): label for labels in classes.values() for label in labels}

    @cache  # a folder holds many videos
    def of_folder(folder: tuple[str, ...]) -> str | None:
        keys = map(class_key, reversed(folder))
        return next((label_of_key[key] for key in keys if key in label_of_key), None)

    return lambda file: of_folder(file.folder)
