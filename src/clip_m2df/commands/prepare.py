"""``clip-m2df prepare``: finds a data set's videos on disk and writes their manifest."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from clip_m2df.datasets.benchmarks import BENCHMARKS, N_WAY, NEEDED
from clip_m2df.datasets.importers import Outcome, match_classes, match_entries, match_split_folders, nearest_class
from clip_m2df.datasets.manifest import SPLITS, Manifest, Video, readable
from clip_m2df.datasets.split_lists import SplitLists, read_lists
from clip_m2df.datasets.tree import Tree, VideoFile, describe, is_storable, scan
from clip_m2df.errors import UserError, console, say, some
from clip_m2df.files import check_output, for_spreadsheet, lies_under, write_table

DataSet = Literal["kinetics100", "ssv2", "ssv2_small", "hmdb51", "ucf101", "folder"]


def prepare(
    dataset: DataSet,
    *,
    root: Path,
    lists: Path | None = None,
    annotations: Sequence[Path] = (),
    output: Path,
    report: Path | None = None,
    group: str | None = None,
) -> int:
    """Write the manifest of a data set from its files on disk, and print what was found.

    The column ``group`` says what each video was cut from, where names tell: the data set's by a rule that is printed.

    Args:
        dataset: The data set; folder: a tree split/class/video, or class/video with --lists.
        root: Folder with the videos, or folders of frames, at any depth.
        lists: Folder with the split lists, or a list (hmdb51 and ucf101: their splits are built in).
        annotations: Files with class names, such as something-something-v2-train.json, or a class index, a name a line.
        output: The manifest, a CSV.
        report: A CSV that names every missing and every ambiguous video.
        group: What a video was cut from, as a regular expression that is searched for in its path from the root without
            the extension: what its parentheses match, or all of it. In the place of the data set's own rule.

    Returns:
        0 if every class has the videos of 5-way 5-shot episodes, 1 if not.

    Raises:
        UserError: If an input cannot be read or understood, an output cannot be written, or not one video is found, or
            a group of none.
    """
    if report is not None and report.absolute() == output.absolute():
        raise UserError(f"--output and --report are both {output}: give them two names")
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: --root names the folder with the videos")
    if not is_storable(os.path.abspath(root)):
        raise UserError(f"the path of the folder {str(root)!r} is not plain text in UTF-8: rename or move it")
    if annotations and lists is None:
        raise UserError("--annotations names the classes of --lists, and there are none: give both, or neither")
    if dataset != "folder" and dataset not in BENCHMARKS:
        raise UserError(f"there is no data set {dataset!r}: choose from {', '.join(BENCHMARKS)}, folder")
    rule = BENCHMARKS[dataset].group if dataset in BENCHMARKS else ""
    try:
        pattern = re.compile(rule if group is None else group)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"--group {group!r} is no regular expression: {error}; mend it") from error
    check_output(output, "manifest")
    if report is not None:
        check_output(report, "report")
    known = None

    @cache
    def looked_for() -> Tree:
        with console(error=True).status(f"looking for videos in {root}"):
            return scan(root)

    @cache
    def folders() -> dict[str, str]:
        return {file.stem: file.folder[-1] for file in looked_for().files if file.folder}

    if lists is not None:
        known = read_lists(lists, dataset, annotations, lambda stem: folders().get(stem, ""))
    elif dataset != "folder":
        known = SplitLists(BENCHMARKS[dataset].class_split)
        if not known.classes:
            raise UserError(f"{dataset} needs its split lists: name their folder with --lists")
    tree = looked_for()
    folder = os.path.abspath(root)
    outcome = _match(dataset, known, tree, root)
    outcome.leave_out_links(folder)
    if report is not None:
        rows = [
            (p.split, p.label, p.entry, p.problem, " | ".join(file.inner_path for file in p.candidates))
            for p in outcome.problems
        ]
        write_table(
            report,
            "report",
            [("split", "label", "entry", "problem", "candidates"), *(map(for_spreadsheet, row) for row in rows)],
        )
    if not outcome.found:
        raise _nothing_found(outcome, tree, root)
    paths = {file: "/".join((*file.folder, file.stem)) for _, _, file in outcome.found}
    groups = {file: _group(pattern, path) if pattern.pattern else "" for file, path in paths.items()}
    if group is not None and not any(groups.values()):
        raise UserError(
            f"--group {group!r} finds nothing in paths such as {next(iter(paths.values()))!r}: it is searched for in"
            " the path from the root without the extension; mend it, or leave it out"
        )
    videos = [
        Video(
            os.path.join(folder, *file.folder, file.name),
            label,
            split,
            readable(label),
            {"group": groups[file]} if groups[file] else {},
        )
        for split, label, file in outcome.found
    ]
    videos.sort(key=lambda video: (SPLITS.index(video.split), video.label, video.path))
    Manifest(videos).write(output, root)
    remarks = [*(known.remarks if known else ()), *_group_remarks(dataset, group, groups)]
    return _print_outcome(dataset, outcome, tree, root, output, report, remarks)


def _group(pattern: re.Pattern[str], path: str) -> str:
    """What a video was cut from, by its path; empty if that does not tell."""
    match = pattern.search(path)
    parts = (match.groups(default="") or (match[0],)) if match else ()
    return " ".join(" ".join(parts).split())


def _group_remarks(dataset: str, own: str | None, groups: Mapping[VideoFile, str]) -> list[str]:
    """A line that says by which rule videos have groups, and how many."""
    sizes = Counter(group for group in groups.values() if group)
    unknown = [repr(file.inner_path) for file, group in groups.items() if not group]
    rule = f"what '{own}' finds in its path" if own is not None else ""
    if own is None and dataset in BENCHMARKS:
        rule = BENCHMARKS[dataset].group_rule
    if not rule or not sizes:
        return []
    lines = [
        f"the column group says what a video was cut from, {rule}: {len(sizes)} groups of {sizes.total()} videos, the"
        f" largest of {max(sizes.values())}"
    ]
    if unknown:
        lines.append(f"{len(unknown)} videos have no group, as their names do not follow that: {some(unknown, 3)}")
    return lines


def _match(dataset: str, known: SplitLists | None, tree: Tree, root: Path) -> Outcome:
    if known is None:
        return match_split_folders(tree.files, root)
    home = nearest_class(known.classes)
    if known.videos is None:
        # The names of a benchmark's videos are unique; in other trees only those of one folder are.
        return match_classes(known.classes, tree.files, home, unique_names=dataset in BENCHMARKS)
    return match_entries(known, tree.files, home, kinetics=known.by_id or dataset == "kinetics100")


def _nothing_found(outcome: Outcome, tree: Tree, root: Path) -> UserError:
    """The error of a tree in which not one video could be used."""
    if not tree.files:
        left_out = f"; it has {describe(tree.left_out)}" if tree.left_out else ""
        return UserError(
            f"there is no video under {root}, nor a folder of images: --root names the folder with them{left_out}"
        )
    ambiguous = [problem for problem in outcome.problems if problem.problem == "ambiguous"]
    if ambiguous:
        names = some([repr(file.inner_path) for file in ambiguous[0].candidates], 2)
        return UserError(
            f"not one video under {root} could be used: {ambiguous[0].entry!r} fits {names}; "
            "name a --root that holds each video once"
        )
    wanted = [problem.entry for problem in outcome.problems]
    wanted += [f"{label}/…" for labels in outcome.classes.values() for label in labels] or ["train/…"]
    return UserError(
        f"none of the videos looked for is under {root}: looked for such as {wanted[0]!r}, "
        f"found such as {tree.files[0].inner_path!r}; name the folder with the data set's videos as --root"
    )


def _print_outcome(
    dataset: str,
    outcome: Outcome,
    tree: Tree,
    root: Path,
    output: Path,
    report: Path | None,
    remarks: Sequence[str],
) -> int:
    """Print what was found; the exit status."""
    from rich.table import Table

    found = Counter((split, label) for split, label, _ in outcome.found)
    problems = Counter((problem.split, problem.problem) for problem in outcome.problems)
    table = Table("split", title=dataset)
    for name in ("classes", "listed", "found", "missing", "ambiguous", "short classes"):
        table.add_column(name, justify="right")
    short = Table("split", "class", "has", "needs", title=f"classes short of videos for {N_WAY}-way 5-shot episodes")
    wanting = []
    for split in SPLITS:
        labels = outcome.classes.get(split, ())
        if not labels and split != "val":
            wanting.append(f"there is no {split} split")
        elif 0 < len(labels) < N_WAY:
            wanting.append(f"the {split} split has {len(labels)} classes, but {N_WAY}-way episodes take {N_WAY}")
        if split not in outcome.classes:
            continue
        scarce = [label for label in sorted(labels) if found[split, label] < NEEDED[split]]
        for label in scarce:
            short.add_row(split, label, str(found[split, label]), str(NEEDED[split]))
        # Class splits list no videos, so none is known to be missing.
        listed = ("-", "-") if outcome.listed is None else (outcome.listed[split], problems[split, "missing"])
        numbers = [len(labels), listed[0], sum(found[split, label] for label in labels), listed[1]]
        table.add_row(split, *map(str, [*numbers, problems[split, "ambiguous"], len(scarce)]))
    console().print(table)
    if short.row_count:
        console().print(short)
    lines = [*wanting, *remarks, *_remarks(dataset, outcome, tree, report)]
    lines.append(f"the manifest is {output}, with {len(outcome.found)} videos; next, see that they open, and train:")
    manifest = shlex.quote(str(output))
    config = f"{dataset}_5way1shot.yaml" if dataset in BENCHMARKS else "CONFIG"
    beside = lies_under(os.path.abspath(root), os.path.dirname(os.path.abspath(output)))
    check_root, fit_root = ("", "") if beside else (f" --{data}root {shlex.quote(str(root))}" for data in ("", "data."))
    lines.append(f"  clip-m2df check --manifest {manifest}{check_root}")
    lines.append(f"  clip-m2df fit --config {config} --data.manifest {manifest}{fit_root}")
    say(*lines)
    return 1 if short.row_count or wanting else 0


def _remarks(dataset: str, outcome: Outcome, tree: Tree, report: Path | None) -> list[str]:
    """Lines on all else that a person should know."""
    lines = []
    if "val" not in outcome.classes:
        lines.append("there is no val split: training cannot choose its best checkpoint by one")
    if n_ambiguous := sum(problem.problem == "ambiguous" for problem in outcome.problems):
        lines.append(
            f"{n_ambiguous} ambiguous: several files fit, and none is used; name a --root that holds each once"
        )
    if outcome.problems:
        lines.append(f"{report or '--report FILE'} names every missing and every ambiguous video")
    for names, what in (
        ([file.inner_path for file in outcome.outside], "lie in no folder of a class"),
        ([file.inner_path for file in outcome.links], "are links to others that are taken"),
        (tree.unusable, "have names that a manifest cannot hold: rename them"),
        (tree.unreadable, "cannot be read: check their permissions"),
    ):
        if names:
            lines.append(f"passed over {len(names)} that {what}: {some([repr(name) for name in names], 3)}")
    if tree.left_out:
        lines.append(f"not taken for videos: {describe(tree.left_out)}")
    if benchmark := BENCHMARKS.get(dataset):
        counts = outcome.listed or Counter(split for split, _, _ in outcome.found)
        sizes = [(len(outcome.classes.get(split, ())), counts[split]) for split in SPLITS]
        if sizes != list(zip(benchmark.n_classes, benchmark.n_videos, strict=True)):
            n_classes, n_videos = (" / ".join(map(str, sizes)) for sizes in (benchmark.n_classes, benchmark.n_videos))
            lines.append(f"the published split has {n_classes} classes and {n_videos} videos")
    return lines
