"""``clip-m2df check``: opens every video of a manifest as evaluation would, and tells which are broken."""

import csv
import dataclasses
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from clip_m2df.datasets.benchmarks import NEEDED
from clip_m2df.datasets.manifest import SPLITS, Manifest, Video, same_files
from clip_m2df.errors import UserError, console, require, say, some, some_lines
from clip_m2df.files import beside, check_output, fingerprint_text, locked, plain, relative_path, write_table, writing
from clip_m2df.video import Decoder
from clip_m2df.video.isolation import Unreadable, isolated_map

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATUSES = ("ok", "warning", "unusable")
MOST_NAMES = 20  # of the unusable, in print
MOST_GROUPS = 5
_SAME = "the same frames as"

# Videos cut from one recording mostly share a background, so that some of their frames look alike. A look says of each
# of 16 by 16 places of a frame whether it is darker than the next to the right, and than the next below. Two frames are
# alike if their looks are the same but for less than MOST_APART answers, two videos if ALIKE frames of each are: one or
# two may be titles of many. Chosen so that no two independent videos of motion_shapes are.
SIDE = 16
BITS = 2 * SIDE * SIDE
MOST_APART = 72
ALIKE = 3
_LOOKS = 8  # at most, of the frames of a video
_PLAIN = BITS // 8  # answers of one kind or the other: a frame that has fewer shows nothing
_TOGETHER = 256  # videos whose frames are compared at once


@dataclass(frozen=True)
class Finding:
    """What was found in a video. What is not known is None.

    Attributes:
        failure: Why not one frame can be had; empty if evaluation's frames can.
        frames: Frames that decode.
        promised: Frames that its header, index or packets tell of.
        width: Of the first frame as it is shown, in pixels.
        height: The same.
        fps: Frames per second on average.
        rotation: Degrees by which it is turned clockwise to be shown; a multiple of 90 is applied.
        variable_rate: 1 if the time from one frame to the next varies, else 0.
        digest: SHA-256 of evaluation's frames, in hexadecimal.
        sampled: Evaluation's number of frames.
        looks: Of some of these frames, by which videos that may be cut from one recording are found, in hexadecimal.
        fingerprint: The file's when it was read (``Fingerprint``); empty if the finding may not last.
        notes: What else a person should know of it; in the table a part of the reason.
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
    looks: str = ""
    fingerprint: str = ""
    notes: str = ""

    @property
    def ends_early(self) -> bool:
        """Whether more frames are missing than a duration that was rounded, or a header that counts one too many."""
        frames, promised = self.frames or 0, self.promised or 0
        return promised - frames > max(1.0, 0.02 * promised)

    def warnings(self) -> list[str]:
        """Return what a person should know of a video that can be used."""
        found = []
        frames = self.frames or 0
        if frames < self.sampled:
            found.append(f"shorter than {self.sampled} frames: it has {frames}")
        if self.ends_early:
            found.append(f"ends early: {frames} of {self.promised} frames")
        elif self.variable_rate:
            found.append("variable frame rate")
        if self.rotation:
            found.append(f"rotated by {self.rotation}°")
        if self.notes:
            found.append(self.notes)
        return found


# The columns of the table that are facts of a finding, and the types of their cells.
_FACTS = {
    f.name: (get_args(f.type) or (f.type,))[0]
    for f in dataclasses.fields(Finding)
    if f.name not in ("failure", "notes")
}

COLUMNS = ("path", "label", "split", "group", "status", "reason", *_FACTS)
"""Of the table."""
# Those of earlier versions, which did not look for videos cut from one recording.
_FORMER = tuple(name for name in COLUMNS if name not in ("group", "looks"))


def check_videos(
    *,
    manifest: Path,
    root: Path | None = None,
    output: Path | None = None,
    fix: Path | None = None,
    frames: int = 8,
    decoder: Decoder = "auto",
    workers: int | None = None,
    timeout: float = 120.0,
) -> int:
    """Open every video of a manifest as evaluation would, and write a table of what is wrong with which.

    Findings are added to ``<output>.part`` as they come, and the next check goes on from there. Those of an earlier
    table hold for the videos that have not changed since.

    Videos without a group are compared by their frames with all others of their split: those that look as if they were
    cut from one recording get a group in the table, the name of the first of them.

    Args:
        manifest: A CSV with the columns path, label and split; videos that are not there count as unusable.
        root: A folder outside the manifest's own in which its videos may lie too.
        output: The table, a CSV; beside the manifest, NAME.check.csv, by default.
        fix: Write a manifest without the unusable videos, and with the groups that were found.
        frames: Frames of each video at evaluation.
        decoder: As a run's data.decoder; the videos of which decord or torchcodec may give other frames than those that
            are shown count as unusable.
        workers: Processes that decode; as many as there are cores by default.
        timeout: Seconds after which a video is given up.

    Returns:
        The exit status: 0, or 1 if a video is unusable. If not one is there and no root is given, no table is written.

    Raises:
        UserError: If an option is out of range, the manifest cannot be read, a file cannot be written, or another
            process writes the table.
    """
    require(least=1, frames=frames, workers=workers)
    require(above=0, timeout=timeout)
    listed = Manifest.read(manifest, root, check_files=False)
    output = manifest.with_suffix(".check.csv") if output is None else output
    if os.path.abspath(output) in [os.path.abspath(other) for other in (manifest, fix) if other is not None]:
        raise UserError(f"the table would take the place of the manifest {output}: give it another name with --output")
    if root is None and not any(os.path.lexists(video.path) for video in listed.videos):
        # A table of them would take the place of what an earlier check with --root has found.
        say(f"not one video is there: paths start at {listed.root}; name the folder where they do with --root")
        if fix is not None:
            say(f"{fix} is not written: not one video is usable")
        return 1
    check_output(output, "table")
    if fix is not None:
        check_output(fix, "manifest")
    with locked(beside(output, ".part"), "table", output) as part, writing(output, "table"):
        findings = _find(listed, output, part, frames=frames, decoder=decoder, workers=workers, timeout=timeout)
        groups = find_groups(listed.videos, {path: f.looks for path, f in findings.items()}, listed.root)
        rows = _rows(listed, findings, groups)
        write_table(output, "table", [COLUMNS, *(row.values() for row in rows)])
        part.truncate(0)
    _print_summary(rows, output)
    unseen = sum(not finding.failure and not finding.looks for finding in findings.values())
    if unseen and not all(video.group for video in listed.videos):
        say(
            f"{unseen} videos were checked by an earlier version, and not compared with others that may be cut from the"
            f" same recording: delete {output} and check anew"
        )
    _print_groups(listed, groups, fix)
    if fix is not None:
        _write_fixed(listed, rows, fix, root)
    return int(any(row["status"] == "unusable" for row in rows))


def examine(task: tuple[str, int, str], decoder: Decoder = "auto") -> Finding:
    """Read the frames of a video that evaluation would, and all of it to count those that there are.

    Args:
        task: The video's path, evaluation's number of frames and the file's fingerprint.
        decoder: What a run is to read it with.
    """
    from clip_m2df.video import reader
    from clip_m2df.video.transforms import segment_indices

    path, frames, mark = task
    choose = partial(segment_indices, frames=frames)
    broken: list[str] = []
    beside: list[str] = []
    facts = None
    try:
        with reader.as_video_error(path):
            if doubt := reader.decoder_doubt(path, decoder):
                return Finding(failure=doubt, sampled=frames)  # another decoder reads it
            if os.path.isdir(path):
                pictures, n_frames = reader.read_pictures(path, choose)
                broken, beside = reader.examine_images(path)
            else:
                pictures, n_frames, facts = reader.examine_video(path, choose)
    except reader.VideoError as error:
        return Finding(failure=error.reason_for(path), sampled=frames, fingerprint=mark)
    clip = pictures.transpose(0, 3, 1, 2)
    shape = clip.shape
    finding = Finding(
        frames=n_frames - len(broken),
        width=shape[3],
        height=shape[2],
        digest=hashlib.sha256(repr(shape).encode() + clip.tobytes()).hexdigest(),
        sampled=frames,
        fingerprint=mark,
        looks=" ".join(look.tobytes().hex() for look in looks_of(clip)),
    )
    if facts is None:
        notes = [f"{len(broken)} of {n_frames} images can't be had, the first being {name}" for name in broken[:1]]
        notes += [f"{len(beside)} images beside its frames are left out, such as {name}" for name in beside[:1]]
        return dataclasses.replace(finding, notes="; ".join(notes))
    finding = dataclasses.replace(
        finding,
        frames=facts.frames,
        promised=facts.promised,
        fps=round(facts.fps, 3) if facts.fps else None,
        rotation=facts.rotation,
        variable_rate=int(facts.variable_rate),
    )
    notes, missing = [], n_frames - facts.frames
    if missing > 0 and not finding.ends_early:
        notes.append(f"{facts.frames} of {n_frames} announced frames decode: an evaluation's are at most {missing} off")
    if facts.left_out > facts.frames:
        stored = facts.frames + facts.left_out
        notes.append(f"shows {facts.frames} of the {stored} frames that it stores: its edit list may be damaged")
    if facts.mirrored:
        notes.append("mirrored")
    if facts.rotation % 90:
        notes.append("its rotation is not a multiple of 90°, and is not applied")
    if abs(facts.pixel_aspect - 1) > 0.02:
        notes.append(f"its pixels are {facts.pixel_aspect:.4g} times as wide as high, and are read as squares")
    return dataclasses.replace(finding, notes="; ".join(notes))


def looks_of(clip: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """The looks of some frames of a clip ``(frames, 3, height, width)``, ``(frames, 64)`` bytes."""
    import numpy as np
    from PIL import Image

    chosen = clip[np.unique(np.linspace(0, len(clip) - 1, _LOOKS).round().astype(int))]
    pictures = map(Image.fromarray, chosen.mean(1, dtype=np.float32))
    # Pillow antialiases, and starts faster than torch.
    resized = [picture.resize((SIDE + 1, SIDE + 1), Image.Resampling.BILINEAR) for picture in pictures]
    small = np.stack([np.asarray(picture) for picture in resized])
    here, right, below = small[:, :-1, :-1], small[:, :-1, 1:], small[:, 1:, :-1]
    return np.packbits(np.stack([here < right, here < below], axis=1).reshape(len(small), BITS), axis=1)


def find_groups(videos: Sequence[Video], looks: Mapping[str, str], root: str | None) -> dict[str, str]:
    """Find the groups of videos that have none, by what their frames look like.

    Args:
        videos: Of a manifest.
        looks: As ``Finding`` has them, by path; of a video without any nothing is found.
        root: The folder that the names of groups start at.

    Returns:
        The group by path, of those alone that have none in the manifest and look like others of their split: the first
        that such a one has, or else the name of the first of them.
    """
    import numpy as np

    found: dict[str, str] = {}
    for split in SPLITS:
        own = [video for video in videos if video.split == split and looks.get(video.path)]
        if all(video.group for video in own):
            continue
        parts = [np.frombuffer(bytes.fromhex(looks[v.path]), np.uint8).reshape(-1, BITS // 8) for v in own]
        first = list(range(len(own)))  # of those that look like it, as far as is known

        def of(index: int, first: list[int] = first) -> int:
            while first[index] != index:
                first[index] = index = first[first[index]]
            return index

        for a, b in _alike([np.unpackbits(part, axis=1) for part in parts]):
            if not (own[a].group and own[b].group):
                low, high = sorted((of(a), of(b)))
                first[high] = low
        together: dict[int, list[Video]] = {}
        for index, video in enumerate(own):
            together.setdefault(of(index), []).append(video)
        for members in together.values():
            name = next((v.group for v in members if v.group), plain(relative_path(members[0].path, root)))
            if len(members) > 1:
                found |= {video.path: name for video in members if not video.group}
    return found


def _alike(looks: "Sequence[NDArray[np.uint8]]") -> Iterator[tuple[int, int]]:
    """The pairs of videos that look alike, by the bits ``(frames, 512)`` of each."""
    import numpy as np

    blocks = []
    for start in range(0, len(looks), _TOGETHER):
        part = looks[start : start + _TOGETHER]
        bits = np.concatenate(part)
        owner = np.repeat(np.arange(start, start + len(part)), [len(one) for one in part])
        ones = bits.sum(1)
        shows = (ones >= _PLAIN) & (ones <= BITS - _PLAIN)
        blocks.append((owner[shows], (2.0 * bits[shows] - 1).astype(np.float32)))
    enough = np.array([min(ALIKE, len(one)) for one in looks])
    for (a, of_a), (b, of_b) in combinations_with_replacement(blocks, 2):
        # So many more answers are the same than are not.
        rows, columns = np.nonzero(of_a @ of_b.T > BITS - 2 * MOST_APART)
        counts = []
        for frames in (rows, columns):  # of the one video, those that the other has too
            pairs = np.unique(np.stack([a[rows], b[columns], frames]), axis=1)[:2]
            counts.append(np.unique(pairs, axis=1, return_counts=True))
        (pairs, in_a), (_, in_b) = counts
        for pair in pairs[:, (in_a >= enough[pairs[0]]) & (in_b >= enough[pairs[1]]) & (pairs[0] < pairs[1])].T:
            yield int(pair[0]), int(pair[1])


def _find(
    manifest: Manifest,
    output: Path,
    part: TextIO,
    *,
    frames: int,
    decoder: Decoder,
    workers: int | None,
    timeout: float,
) -> dict[str, Finding]:
    """Find what is wrong with each video, by path; what the table and its part know already is taken over."""
    from rich.progress import track

    table = csv.writer(part, lineterminator="\n")
    # Another decoder may give other frames, which the table does not tell.
    taken_over = _take_over(part, table)
    known = read_findings(output) | taken_over if decoder in ("auto", "pyav") else {}
    findings: dict[str, Finding] = {}
    tasks: dict[tuple[str, int, str], tuple[str, Video]] = {}
    # A link finds nothing of its own.
    same = same_files(video.path for video in manifest.videos)
    for video in manifest.videos:
        name, mark = relative_path(video.path, manifest.root), fingerprint_text(video.path)
        finding = known.get(name)
        if first := same.get(video.path):
            failure = f"the same file as {relative_path(first, manifest.root)}, by a link"
            findings[video.path] = Finding(failure=failure, sampled=frames)
        elif mark and finding is not None and (finding.fingerprint, finding.sampled) == (mark, frames):
            findings[video.path] = finding
        else:
            tasks[video.path, frames, mark] = (name, video)
    if unchanged := len(findings) - len(same):
        say(f"{unchanged} of {len(manifest.videos)} videos have not changed since they were checked")
    with closing(isolated_map(partial(examine, decoder=decoder), tasks, workers=workers, timeout=timeout)) as results:
        bar = track(results, "checking", total=len(tasks), console=console(error=True), disable=not tasks)
        for task, result in bar:
            # Without a fingerprint: another time, or with more of it, the video may well be read.
            finding = Finding(failure=str(result), sampled=frames) if isinstance(result, Unreadable) else result
            findings[task[0]] = finding
            table.writerow(_row(*tasks[task], finding).values())
            part.flush()
    return findings


def _take_over(part: TextIO, table: Any) -> dict[str, Finding]:
    """The findings of a run that was interrupted; what is damaged goes, and the part can be added to."""
    part.seek(0)
    content = part.read()
    rows = _read_rows(io.StringIO(content, newline=""))
    if len(rows) + 1 != content.count("\n") or not content.endswith("\n"):
        part.truncate(0)
        table.writerow(COLUMNS)
        table.writerows(row.values() for row, _ in rows)
        part.flush()
    return {row["path"]: finding for row, finding in rows}


def read_findings(table: Path) -> dict[str, Finding]:
    """Read the findings of a table by the videos' names in it.

    Rows that are damaged are left out; a file that is not there, or is no such table, has none.
    """
    if not table.is_file():  # opening a FIFO would wait for ever
        return {}
    with open(table, encoding="utf-8", errors="replace", newline="") as file:
        return {row["path"]: finding for row, finding in _read_rows(file)}


def _read_rows(lines: Iterable[str]) -> list[tuple[dict[str, str], Finding]]:
    rows: list[tuple[dict[str, str], Finding]] = []
    with suppress(csv.Error):  # of the rows before, those are left
        for found in csv.DictReader(lines):
            row = {name: found.get(name, "") for name in COLUMNS} if tuple(found) == _FORMER else found
            if finding := _parse(row):
                rows.append((row, finding))
    return rows


# What cells of a type look like.
_CELLS = {int: r"\d{1,18}", float: r"\d{1,18}(\.\d{1,18})?", str: ".*"}


def _parse(row: Mapping[str, Any]) -> Finding | None:
    """Make a finding of a row of the table; None if the row is damaged."""
    if tuple(row) != COLUMNS or None in row.values():
        return None
    usable = row["status"] in ("ok", "warning")
    forms = {name: f"({_CELLS[cell_type]})?" for name, cell_type in _FACTS.items()} | {
        "status": "|".join(STATUSES),
        "digest": "[0-9a-f]{64}" if usable else "",
        "frames": r"[1-9]\d{0,17}" if usable else r"\d{0,18}",
        "rotation": r"(-?\d{1,3}(\.\d{1,18})?)?",
        "variable_rate": "[01]?",
        "sampled": r"[1-9]\d{0,17}",
        "fingerprint": r"\d+(:\d+)+",
        "looks": "([0-9a-f]{128}( [0-9a-f]{128})*)?" if usable else "",
    }
    if not all(re.fullmatch(form, row[name], re.ASCII) for name, form in forms.items()):
        return None
    with suppress(ValueError):
        facts = {name: cell_type(row[name]) for name, cell_type in _FACTS.items() if row[name]}
        if not usable:
            return Finding(failure=row["reason"] or "unusable", **facts)
        finding = Finding(**facts)
        reasons = row["reason"].partition(_SAME)[0].split("; ")
        return dataclasses.replace(finding, notes="; ".join(r for r in reasons if r and r not in finding.warnings()))
    return None


def _rows(manifest: Manifest, findings: Mapping[str, Finding], groups: Mapping[str, str]) -> list[dict[str, Any]]:
    """Make the rows of the table, with what the videos have in common."""
    first: dict[str, Video] = {}
    rows = []
    for video in manifest.videos:
        finding = findings[video.path]
        # The first of several videos with the same frames is not at fault.
        same = first.setdefault(finding.digest, video) if finding.digest else video
        more = []
        if same is not video:
            whose = "" if same.label == video.label else f", of the class {same.label!r} in {same.split}"
            more = [f"{_SAME} {relative_path(same.path, manifest.root)}{whose}"]
        row = _row(relative_path(video.path, manifest.root), video, finding, more)
        rows.append(row | {"group": groups.get(video.path, video.group)})
    return rows


def _row(name: str, video: Video, finding: Finding, more: Sequence[str] = ()) -> dict[str, Any]:
    """Make a row of the table, with more warnings than the finding has by itself."""
    warnings = [*finding.warnings(), *more]
    return {
        "path": name,
        "label": video.label,
        "split": video.split,
        "group": video.group,
        "status": "unusable" if finding.failure else "warning" if warnings else "ok",
        # The name of an image may have bytes that are no UTF-8.
        "reason": plain(" ".join((finding.failure or "; ".join(warnings)).split())),
        **{name: getattr(finding, name) for name in _FACTS},
    }


def _print_summary(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    from rich.table import Table

    counts = Counter((row["split"], row["status"]) for row in rows)
    table = Table("split", *STATUSES)
    for split in SPLITS:
        if any(row["split"] == split for row in rows):
            table.add_row(split, *(str(counts[split, status]) for status in STATUSES))
    console().print(table)
    unusable = [f"{row['path']}: {row['reason']}" for row in rows if row["status"] == "unusable"]
    if unusable:
        say(f"unusable:{some_lines(unusable, MOST_NAMES)}")
    say(f"the table of all videos is {output}")


def _print_groups(manifest: Manifest, groups: Mapping[str, str], fix: Path | None) -> None:
    """Say which videos look as if they were cut from one recording."""
    if not groups:
        return
    sizes = Counter(groups.get(video.path, video.group) for video in manifest.videos)
    members: dict[str, list[str]] = {}
    for path, group in groups.items():
        members.setdefault(group, []).append(relative_path(path, manifest.root))
    names = [f"{some(own, 3)} ({sizes[group]} in all)" for group, own in members.items()]
    say(
        f"{len(groups)} videos without a group look as if they were cut from the same recording as others, of"
        f" {len(members)} recordings, and random episodes overstate what is measured on such:"
        f"{some_lines(names, MOST_GROUPS)}",
        f"their column group is filled in {fix}" if fix is not None else "--fix FILE fills in their column group",
    )


def _write_fixed(manifest: Manifest, rows: Sequence[Mapping[str, Any]], fix: Path, root: Path | None) -> None:
    """Write the manifest without the unusable videos, and with the groups that were found."""
    videos = [
        dataclasses.replace(video, extra={**video.extra, "group": row["group"]} if row["group"] else video.extra)
        for video, row in zip(manifest.videos, rows, strict=True)
        if row["status"] != "unusable"
    ]
    if not videos:
        say(f"{fix} is not written: not one video is usable")
        return
    Manifest(videos).write(fix, root)
    say(f"{fix} leaves out {len(rows) - len(videos)} of {len(rows)} videos")
    before, after = (Counter((v.label, v.split) for v in which) for which in (manifest.videos, videos))
    short = [
        f"{label!r} has {after[label, split]} of {NEEDED[split]}"
        for (label, split), count in sorted(before.items())
        if after[label, split] < min(count, NEEDED[split])
    ]
    if short:
        say(f"classes that are then short of videos for 5-way 5-shot episodes: {some(short, MOST_NAMES)}")
