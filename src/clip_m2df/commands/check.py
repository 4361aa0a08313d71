"""Opens every video of a manifest as evaluation would, and writes a table of what is wrong with which."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import track
from rich.table import Table

from clip_m2df.datasets.benchmarks import NEEDED
from clip_m2df.datasets.manifest import SPLITS, Manifest, Video, relative_path
from clip_m2df.errors import UserError, some
from clip_m2df.files import fingerprint_text, whole_file
from clip_m2df.video.isolation import Lost, isolated_map

STATUSES = ("ok", "warning", "unusable")


_NAMED = 20  # of the unusable, in print


@dataclass(frozen=True)
class Finding:
    """What was found in a video. What is not known is None.

    Attributes:
        failure: Why not one frame can be had; empty if evaluation's frames can.
        frames: Frames that it has.
        promised: Frames that its header or index tells of.
        width: Of the first frame as it is shown, in pixels.
        height: The same.
        fps: Frames per second on average.
        rotation: Degrees by which it is turned clockwise to be shown.
        variable_rate: 1 if the time from one frame to the next varies, else 0.
        digest: SHA-256 of evaluation's frames, in hexadecimal.
        sampled: Evaluation's number of frames.
        fingerprint: The file's when it was read (``Fingerprint``); empty if the finding may not last.
    """

    failure: str = ""
    frames: int | None = None
    promised: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    rotation: int | None = None
    variable_rate: int | None = None
    digest: str = ""
    sampled: int = 0
    fingerprint: str = ""

    def warnings(self) -> list[str]:
        """Return what a person should know of a video that can be used."""
        found = []
        frames, promised = self.frames or 0, self.promised or 0
        if frames < self.sampled:
            found.append(f"shorter than {self.sampled} frames: it has {frames}")
        # Durations are rounded, and some headers count one too many.
        if promised - frames > max(1.0, 0.02 * promised):
            found.append(f"ends early: {frames} of {promised} frames")
        elif self.variable_rate:
            found.append("variable frame rate")
        if self.rotation:
            found.append(f"rotated by {self.rotation}°")
        return found


_FACTS = [field.name for field in dataclasses.fields(Finding) if field.name != "failure"]


COLUMNS = ("path", "label", "split", "status", "reason", *_FACTS)
"""Of the table."""


def check_videos(
    *,
    manifest: Path,
    root: Path | None = None,
    output: Path | None,
    fix: Path | None,
    frames: int,
    workers: int,
    timeout: float,
) -> int:
    """Check every video of a manifest, write a table of the findings and print a summary.

    Findings are added to ``<output>.part`` as they come, and the next check goes on from there. Those of an earlier
    table hold for the videos that have not changed since.

    Args:
        manifest: A CSV; videos that are not there count as unusable.
        root: A folder outside the manifest's own in which its videos may lie too.
        output: The table, a CSV; ``<manifest>.check.csv`` by default.
        fix: Where to write a manifest without the unusable videos.
        frames: Frames of each video at evaluation.
        workers: Processes that decode.
        timeout: Seconds after which a video is given up.

    Returns:
        The exit status: 0, or 1 if a video is unusable.

    Raises:
        UserError: If an option is out of range, the manifest cannot be read, or a file cannot be written.
    """
    for option, value, least in (("frames", frames, 1), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"{option} is {value}: set it to {least} or more")
    if not timeout > 0:
        raise UserError(f"timeout is {timeout:g} seconds: set it to more than 0")
    listed = Manifest.read(manifest, root, check_files=False)
    output = manifest.with_suffix(".check.csv") if output is None else output
    if os.path.abspath(output) in [os.path.abspath(other) for other in (manifest, fix) if other is not None]:
        raise UserError(f"the table would take the place of the manifest {output}: give it another name with --output")
    part = Path(f"{output}.part")
    try:
        findings = _find(listed, output, part, frames=frames, workers=workers, timeout=timeout)
        rows = _rows(listed, findings)
        with whole_file(output) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
            _writer(file).writerows(rows)
        part.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write the table {output}: {error.strerror}; name a file in a folder that can be written"
        ) from error
    _print_summary(rows, output)
    if fix is not None:
        _write_fixed(listed, rows, fix)
    return int(any(row["status"] == "unusable" for row in rows))


def examine(task: tuple[str, int, str]) -> Finding:
    """Read the frames of a video that evaluation would, and what its file tells.

    Args:
        task: The video's path, evaluation's number of frames and the file's fingerprint.
    """
    from clip_m2df.video.reader import VideoError, probe, read_frames
    from clip_m2df.video.transforms import segment_indices

    path, frames, mark = task
    asked = [0]

    def choose(n_frames: int) -> Sequence[int]:
        asked.append(n_frames)
        return segment_indices(n_frames, frames)

    unusable = Finding(sampled=frames, fingerprint=mark)
    try:
        clip = read_frames(path, choose)
        facts = None if os.path.isdir(path) else probe(path)
    except VideoError as error:
        image = f"{os.path.basename(error.path)}: " if error.path != path and os.path.isdir(path) else ""
        return dataclasses.replace(unusable, failure=image + error.reason)
    except Exception as error:  # whatever a file does to a decoder, the others are still to be checked
        return dataclasses.replace(unusable, failure=f"reading it fails: {type(error).__name__}: {error}")
    shape = tuple(clip.shape)
    return Finding(
        frames=asked[-1],
        promised=facts.promised if facts else None,
        width=shape[3],
        height=shape[2],
        fps=round(facts.fps, 3) if facts and facts.fps else None,
        rotation=facts.rotation if facts else None,
        variable_rate=int(facts.variable_rate) if facts else None,
        digest=hashlib.sha256(repr(shape).encode() + clip.contiguous().numpy().tobytes()).hexdigest(),
        sampled=frames,
        fingerprint=mark,
    )


def _work(task: tuple[str, int, str]) -> Finding:
    """Examine a video in a worker."""
    import torch

    torch.set_num_threads(1)  # the workers are the parallelism
    # Decoders print what they think of a file, right across the progress bar.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    return examine(task)


def _find(
    manifest: Manifest, output: Path, part: Path, *, frames: int, workers: int, timeout: float
) -> dict[str, Finding]:
    """Find what is wrong with each video, by path; what the table and its part know already is taken over."""
    known = {**read_findings(output), **read_findings(part)}
    videos = {video.path: video for video in manifest.videos}
    marks = {path: fingerprint_text(path) for path in videos}
    findings: dict[str, Finding] = {}
    for path, mark in marks.items():
        finding = known.get(relative_path(path, manifest.root))
        if mark and finding is not None and (finding.fingerprint, finding.sampled) == (mark, frames):
            findings[path] = finding
    tasks = [(path, frames, mark) for path, mark in marks.items() if path not in findings]
    with whole_file(part) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        _writer(file).writerows(_row(videos[path], manifest, finding) for path, finding in findings.items())
    if findings:
        print(f"{len(findings)} of {len(videos)} videos have not changed since they were checked")
    with (
        open(part, "a", encoding="utf-8", newline="") as file,
        closing(isolated_map(_work, tasks, workers=workers, timeout=timeout)) as results,
    ):
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        bar = track(results, "checking", total=len(tasks), console=Console(stderr=True), disable=not tasks)
        for (path, _, _), result in bar:
            # Without a fingerprint: another time, or with more of it, the video may well be read.
            findings[path] = Finding(failure=str(result), sampled=frames) if isinstance(result, Lost) else result
            table.writerow(_row(videos[path], manifest, findings[path]))
            file.flush()
    return findings


def read_findings(table: Path) -> dict[str, Finding]:
    """Read the findings of a table, or of one that was broken off, by the videos' names in it.

    Rows that are damaged are left out; a file that is not there, or is no such table, has none.
    """
    findings = {}
    try:
        with open(table, encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                finding = _parse(row)
                if finding is not None:
                    findings[row["path"]] = finding
    except (FileNotFoundError, csv.Error):
        pass
    return findings


def _parse(row: Mapping[str, str | None]) -> Finding | None:
    if tuple(row) != COLUMNS or None in row.values():
        return None
    cells = {name: cell or "" for name, cell in row.items()}
    usable = cells["status"] in ("ok", "warning")
    forms = {
        "status": "|".join(STATUSES),
        "digest": "[0-9a-f]{64}" if usable else "",
        "fingerprint": r"\d+(:\d+)+",
    }
    if not all(re.fullmatch(form, cells[name]) for name, form in forms.items()):
        return None
    try:
        return Finding(
            failure="" if usable else cells["reason"],
            frames=_number(cells["frames"]),
            promised=_number(cells["promised"]),
            width=_number(cells["width"]),
            height=_number(cells["height"]),
            fps=float(cells["fps"]) if cells["fps"] else None,
            rotation=_number(cells["rotation"]),
            variable_rate=_number(cells["variable_rate"]),
            digest=cells["digest"],
            sampled=int(cells["sampled"]),
            fingerprint=cells["fingerprint"],
        )
    except ValueError:
        return None


def _number(cell: str) -> int | None:
    return int(cell) if cell else None


def _writer(file: TextIO) -> csv.DictWriter[str]:
    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    table.writeheader()
    return table


def _row(video: Video, manifest: Manifest, finding: Finding, more: Sequence[str] = ()) -> dict[str, Any]:
    """Make a row of the table, with more warnings than the finding has by itself."""
    warnings = [*finding.warnings(), *more]
    reason = " ".join((finding.failure or "; ".join(warnings)).split())
    return {
        "path": relative_path(video.path, manifest.root),
        "label": video.label,
        "split": video.split,
        "status": "unusable" if finding.failure else "warning" if warnings else "ok",
        # The name of an image may have bytes that are no UTF-8.
        "reason": reason.encode(errors="backslashreplace").decode(),
        **{name: getattr(finding, name) for name in _FACTS},
    }


def _rows(manifest: Manifest, findings: Mapping[str, Finding]) -> list[dict[str, Any]]:
    """Make the table, in the manifest's order; the first of several videos with the same frames is not at fault."""
    first: dict[str, str] = {}
    rows = []
    for video in manifest.videos:
        finding = findings[video.path]
        name = relative_path(video.path, manifest.root)
        same = first.setdefault(finding.digest, name) if finding.digest else name
        rows.append(_row(video, manifest, finding, [] if same == name else [f"the same frames as {same}"]))
    return rows


def _print_summary(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    counts = Counter((row["split"], row["status"]) for row in rows)
    table = Table("split", *STATUSES)
    for split in SPLITS:
        if any(counts[split, status] for status in STATUSES):
            table.add_row(split, *(str(counts[split, status]) for status in STATUSES))
    Console().print(table)
    unusable = [f"{row['path']}: {row['reason']}" for row in rows if row["status"] == "unusable"]
    if unusable:
        print("unusable:", *unusable[:_NAMED], sep="\n  ")
    if len(unusable) > _NAMED:
        print(f"  and {len(unusable) - _NAMED} more in {output}")
    print(f"the table of all videos is {output}")


def _write_fixed(manifest: Manifest, rows: Sequence[Mapping[str, Any]], fix: Path) -> None:
    """Write the manifest without the unusable videos."""
    videos = [video for video, row in zip(manifest.videos, rows, strict=True) if row["status"] != "unusable"]
    if not videos:
        print(f"{fix} is not written: not one video is usable")
        return
    Manifest(videos).write(fix)
    print(f"{fix} leaves out {len(rows) - len(videos)} of {len(rows)} videos")
    counts = Counter(video.label for video in videos)
    split_of = {video.label: video.split for video in manifest.videos}
    short = [
        f"{label!r} has {counts[label]} of {NEEDED[split]}"
        for label, split in sorted(split_of.items())
        if counts[label] < NEEDED[split] and counts[label] < sum(video.label == label for video in manifest.videos)
    ]
    if short:
        print(f"classes that are now short of videos for 5-way 5-shot episodes: {some(short, _NAMED)}")
