"""``clip-m2df prepare``: finds a data set's videos on disk and writes their manifest."""

import csv
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clip_m2df.datasets.benchmarks import BENCHMARKS, N_WAY, NEEDED
from clip_m2df.datasets.importers import (
    Outcome,
    Problem,
    match_classes,
    match_entries,
    match_split_folders,
    nearest_class,
)
from clip_m2df.datasets.manifest import SPLITS, Manifest, Video, lies_under, readable
from clip_m2df.datasets.split_lists import SplitLists, read_lists
from clip_m2df.datasets.tree import Tree, is_storable, scan
from clip_m2df.errors import UserError, some
from clip_m2df.files import whole_file


def prepare(
    *, dataset: str, root: Path, lists: Path | None, annotations: Sequence[Path], output: Path, report: Path | None
) -> int:
    """Write the manifest of a data set from its files on disk, and print what was found.

    Args:
        dataset: A name out of ``BENCHMARKS``, or ``folder`` for a tree ``split/class/video`` or, with lists of class
            names, ``class/video``.
        root: The folder with the videos, or folders of frames, at any depth.
        lists: A folder with the split lists, or one list; HMDB51 and UCF101 do without.
        annotations: Files with class names, where the lists have numbers.
        output: The manifest to write.
        report: A CSV to write that names every missing and every ambiguous video.

    Returns:
        0 if every class has the videos of 5-way 5-shot episodes, 1 if not.

    Raises:
        UserError: If an input cannot be read or understood, an output cannot be written, or not one video is found.
    """
    for path in filter(None, (output, report)):
        _check_writable(path)
    if report is not None and report.absolute() == output.absolute():
        raise UserError(f"--output and --report are both {output}: give them two names")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --root names the folder with the videos")
    if not is_storable(os.path.abspath(root)):
        raise UserError(f"the path of the folder {str(root)!r} is not plain text in UTF-8: rename or move it")
    if annotations and lists is None:
        raise UserError("--annotations names the classes of --lists, and there are none: give both, or neither")
    known = _split_lists(dataset, lists, annotations)
    with Console(stderr=True).status(f"looking for videos in {root}"):
        tree = scan(root)
    outcome = _outcome(dataset, known, tree, root)
    if report is not None:
        _write_report(report, outcome.problems)
    _check_found(outcome, tree, root)
    manifest = Manifest(
        sorted(
            (
                Video(os.path.join(os.path.abspath(root), *file.folder, file.name), label, split, readable(label))
                for split, label, file in outcome.found
            ),
            key=lambda video: (SPLITS.index(video.split), video.label, video.path),
        )
    )
    manifest.write(output)
    return _print_outcome(dataset, outcome, tree, root, output, report)


def _split_lists(dataset: str, lists: Path | None, annotations: Sequence[Path]) -> SplitLists | None:
    if dataset != "folder" and dataset not in BENCHMARKS:
        raise UserError(f"there is no data set {dataset!r}: choose from {', '.join(BENCHMARKS)}, folder")
    if lists is not None:
        return read_lists(lists, dataset, annotations)
    if dataset == "folder":
        return None
    if not BENCHMARKS[dataset].class_split:
        raise UserError(f"{dataset} needs its split lists: name their folder with --lists")
    return SplitLists(BENCHMARKS[dataset].class_split)


def _outcome(dataset: str, known: SplitLists | None, tree: Tree, root: Path) -> Outcome:
    if known is None:
        return match_split_folders(tree.files, root)
    home = nearest_class(known.classes)
    if known.entries is None:
        # The names of a benchmark's videos are unique; in other trees only those of one folder are.
        return match_classes(known.classes, tree.files, home, unique_names=dataset in BENCHMARKS)
    return match_entries(known, tree.files, home, kinetics=dataset == "kinetics100")


def _check_writable(path: Path) -> None:
    """Find out before the work whether a file can be written."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: name a file in a folder that can be written")


def _write_report(path: Path, problems: Sequence[Problem]) -> None:
    try:
        with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["split", "label", "entry", "problem", "candidates"])
            for row in problems:
                candidates = " | ".join(candidate.inner_path for candidate in row.candidates)
                table.writerow([row.split, row.label, row.entry, row.problem, candidates])
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror}; name another file") from error


def _check_found(outcome: Outcome, tree: Tree, root: Path) -> None:
    """Refuse a tree in which not one video could be used."""
    if outcome.found:
        return
    if not tree.files:
        raise UserError(f"there is no video under {root}, nor a folder of images: --root names the folder with them")
    ambiguous = [problem for problem in outcome.problems if problem.problem == "ambiguous"]
    if ambiguous:
        names = some([repr(file.inner_path) for file in ambiguous[0].candidates], 2)
        raise UserError(
            f"not one video under {root} could be used: {ambiguous[0].entry!r} fits {names}; "
            "name a --root that holds each video once"
        )
    wanted = [problem.entry for problem in outcome.problems] or [
        f"{label}/…" for labels in outcome.classes.values() for label in labels
    ]
    raise UserError(
        f"none of the videos looked for is under {root}: looked for such as {wanted[0] if wanted else 'train/…'!r}, "
        f"found such as {tree.files[0].inner_path!r}; name the folder with the data set's videos as --root"
    )


def _print_outcome(dataset: str, outcome: Outcome, tree: Tree, root: Path, output: Path, report: Path | None) -> int:
    """Print what was found; the exit status."""
    console = Console(markup=False, emoji=False, highlight=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    found = Counter((split, label) for split, label, _ in outcome.found)
    short = [
        (split, label, found[split, label])
        for split, labels in outcome.classes.items()
        for label in sorted(labels)
        if found[split, label] < NEEDED[split]
    ]
    console.print(_table_of_splits(dataset, outcome, found, short))
    if short:
        table = Table(
            "split", "class", "has", "needs", title=f"classes short of videos for {N_WAY}-way 5-shot episodes"
        )
        for split, label, has in short:
            table.add_row(split, label, str(has), str(NEEDED[split]))
        console.print(table)
    wanting = _wanting_splits(outcome)
    for line in [*wanting, *_remarks(dataset, outcome, tree, report)]:
        say(line)
    say(f"the manifest is {output}, with {len(outcome.found)} videos; next, see that they open, and train:")
    manifest = shlex.quote(str(output))
    config = f"{dataset}_5way1shot.yaml" if dataset in BENCHMARKS else "CONFIG"
    beside = lies_under(os.path.abspath(root), os.path.dirname(os.path.abspath(output)))
    where = "" if beside else f"root {shlex.quote(str(root))}"
    say(f"  clip-m2df check --manifest {manifest}{where and f' --{where}'}")
    say(f"  clip-m2df fit --config {config} --data.manifest {manifest}{where and f' --data.{where}'}")
    return 1 if short or wanting else 0


def _table_of_splits(
    dataset: str, outcome: Outcome, found: Counter[tuple[str, str]], short: Sequence[tuple[str, str, int]]
) -> Table:
    table = Table("split", title=dataset)
    for name in ("classes", "listed", "found", "missing", "ambiguous", "short classes"):
        table.add_column(name, justify="right")
    problems = Counter((problem.split, problem.problem) for problem in outcome.problems)
    for split in SPLITS:
        if split not in outcome.classes:
            continue
        labels = outcome.classes[split]
        # Class splits list no videos, so none is known to be missing.
        listed = ("-", "-") if outcome.listed is None else (outcome.listed[split], problems[split, "missing"])
        numbers = [len(labels), listed[0], sum(found[split, label] for label in labels), listed[1]]
        numbers += [problems[split, "ambiguous"], sum(where == split for where, _, _ in short)]
        table.add_row(split, *map(str, numbers))
    return table


def _wanting_splits(outcome: Outcome) -> list[str]:
    """Lines on splits that can supply no episodes."""
    lines = []
    for split in SPLITS:
        n_classes = len(outcome.classes.get(split, ()))
        if not n_classes and split != "val":
            lines.append(f"there is no {split} split")
        elif 0 < n_classes < N_WAY:
            lines.append(f"the {split} split has {n_classes} classes, but {N_WAY}-way episodes take {N_WAY}")
    return lines


def _remarks(dataset: str, outcome: Outcome, tree: Tree, report: Path | None) -> list[str]:
    """Lines on all else that a person should know."""
    lines = []
    if "val" not in outcome.classes:
        lines.append("there is no val split: training cannot choose its best checkpoint by one")
    n_ambiguous = sum(problem.problem == "ambiguous" for problem in outcome.problems)
    if n_ambiguous:
        lines.append(
            f"{n_ambiguous} ambiguous: several files fit, and none is used; name a --root that holds each once"
        )
    if outcome.problems:
        where = report if report is not None else "--report FILE"
        lines.append(f"{where} names every missing and every ambiguous video")
    for names, what in (
        ([file.inner_path for file in outcome.outside], "lie in no folder of a class"),
        (tree.unusable, "have names that a manifest cannot hold: rename them"),
        (tree.unreadable, "cannot be read: check their permissions"),
    ):
        if names:
            lines.append(f"passed over {len(names)} that {what}: {some([repr(name) for name in names], 3)}")
    benchmark = BENCHMARKS.get(dataset)
    if benchmark is not None:
        n_classes = tuple(len(outcome.classes[split]) for split in SPLITS)
        counts = outcome.listed or Counter(split for split, _, _ in outcome.found)
        if (n_classes, tuple(counts[split] for split in SPLITS)) != (benchmark.n_classes, benchmark.n_videos):
            lines.append(
                f"the published split has {' / '.join(map(str, benchmark.n_classes))} classes and "
                f"{' / '.join(map(str, benchmark.n_videos))} videos"
            )
    return lines
