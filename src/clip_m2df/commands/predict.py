"""Labels many videos and writes a table of what is in them; a run that was broken off goes on where it was."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from types import FrameType
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from clip_m2df.__about__ import __version__
from clip_m2df.classifier.classifier import FewShotClassifier
from clip_m2df.classifier.clips import list_examples, name_of, placed, videos_in
from clip_m2df.classifier.saving import TABLE
from clip_m2df.classifier.segments import Windows
from clip_m2df.errors import Stopped, UserError, some
from clip_m2df.files import fingerprint_text, plain, whole_file
from clip_m2df.report.page import check_page
from clip_m2df.report.predictions import Row, write_predictions
from clip_m2df.training.module import CLIPM2DF
from clip_m2df.video.reader import VideoError
from clip_m2df.video.timing import exact_rate

FORMATS = (".csv", ".jsonl")


_NAMED = 5  # of the broken videos, in print


class Question(NamedTuple):
    """What is asked of the videos.

    Attributes:
        reject: whether they may show none of the classes.
        sliding: options of ``FewShotClassifier.segments``, where segments are wanted.
    """

    reject: bool
    sliding: dict[str, float] | None

    def columns(self, classes: Sequence[str]) -> tuple[str, ...]:
        """Of the table."""
        times = () if self.sliding is None else ("start", "end")
        return ("path", *times, "label", "probability", *(f"p_{plain(name)}" for name in classes), "error")

    def broken_row(self, classes: Sequence[str], error: str) -> Row:
        """Of what can't be read."""
        times = {} if self.sliding is None else {"start": None, "end": None}
        return times | _row(classes, None, math.nan, {}, error)

    def check(self, classifier: FewShotClassifier) -> None:
        """Refuse what would fail on each video.

        Raises:
            UserError: an option out of its range, or nothing to reject by.
        """
        if self.sliding is not None:
            lengths = {name: self.sliding.get(name) for name in ("stride", "smoothing")}
            Windows.of(classifier.encoder.reader.frames, self.sliding["window"], **lengths)
            if "fps" in self.sliding:
                exact_rate("fps", self.sliding["fps"])
        if self.reject and classifier.threshold_ is None:
            raise UserError("--reject can't tell by one example of one class: give it more examples, or another class")


def predict_videos(
    *,
    ckpt_path: str | None,
    backbone: str | None,
    head: str | None,
    support: Path | None,
    videos: Sequence[str],
    output: Path,
    reject: bool,
    segments: bool,
    window: float | None,
    stride: float | None,
    smoothing: float | None,
    fps: float | None,
    workers: int,
    timeout: float,
    report: Path | None = None,
) -> int:
    """Label videos, write a table and print a summary.

    Rows are added to ``<output>.part`` as they come, those of clips that the model sees together at once, and the next
    run of the same goes on from there.

    Args:
        ckpt_path: a checkpoint, a folder of ``save_pretrained``, a name on the hub, or a saved classifier.
        backbone: CLIP's weights in its place, for a head that has nothing to train.
        head: that head; ``otam`` by default.
        support: a folder with a folder of examples for each class; not with a saved classifier.
        videos: files, folders of videos, folders of numbered images.
        output: the table, ``.csv`` or ``.jsonl``.
        reject: say ``none of these`` of what is too far from every class.
        segments: what happens when, instead of one label a video.
        window: see :meth:`FewShotClassifier.segments`; only with segments, as the next three.
        stride: the same.
        smoothing: the same.
        fps: the same.
        workers: processes that read files; 0 reads in this one.
        timeout: seconds after which a video is given up, with workers.
        report: a page of it for a browser, if one is wanted.

    Returns:
        The exit status: 0, or 1 if a video can't be read or a folder has none.

    Raises:
        UserError: options that don't go together or are out of range, no model or support, no file of its own to write.
        Terminated: by SIGTERM.
    """
    _check_options(output, report, ckpt_path, head)
    question = Question(reject, _sliding(segments, window=window, stride=stride, smoothing=smoothing, fps=fps))
    listed, empty = _list_videos(videos)
    with _terminable(), open_part(output) as part:
        classifier, known_by = _make_classifier(ckpt_path, backbone, head, support, workers=workers, timeout=timeout)
        question.check(classifier)
        found = _find(classifier, question, listed, empty, output, part, _digest(classifier, known_by, question))
        _write_table(output, question.columns(classifier.classes_.tolist()), found)
        if report is not None:
            model = str(ckpt_path or backbone)
            write_predictions(report, classifier, found, model, support, reject=reject, segments=segments)
        part.clear()
    return _print_summary(found, segments, output)


def _sliding(segments: bool, **given: float | None) -> dict[str, float] | None:
    """Options of ``FewShotClassifier.segments``, where segments are wanted."""
    sliding = {name: value for name, value in given.items() if value is not None}
    if sliding and not segments:
        raise UserError(f"--{next(iter(sliding))} is of --segments: give that too, or leave it out")
    for name, value in sliding.items():
        if not math.isfinite(value):
            raise UserError(f"--{name} is {value}: give a number that is not infinite")
    return {"window": 2.0, **sliding} if segments else None


def _check_options(output: Path, report: Path | None, ckpt_path: str | None, head: str | None) -> None:
    if output.suffix not in FORMATS:
        raise UserError(f"--output is {output}: give it a name that ends in {' or '.join(FORMATS)}")
    if report is not None:
        check_page(report)
    if head is not None and ckpt_path is not None:
        raise UserError("--head goes with --backbone: a trained model has a head of its own; leave it out")


def _list_videos(arguments: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The videos by their absolute paths, each as it was named first, and the folders among them that have none."""
    listed: dict[str, str] = {}
    empty = set()
    for argument in arguments:
        try:
            paths = videos_in(argument) if os.path.isdir(argument) else [argument]
        except UserError:
            paths = [argument]
            empty.add(os.path.abspath(argument))
        for path in paths:
            listed.setdefault(os.path.abspath(path), path)
    return listed, empty


def _make_classifier(
    ckpt_path: str | None, backbone: str | None, head: str | None, support: Path | None, **reading: Any
) -> tuple[FewShotClassifier, object]:
    """The classifier that is asked for, and what its support is known by.

    That is the files and not their features, whose last digits depend on the batches in which they happened to be
    encoded.
    """
    if ckpt_path is not None and (table := Path(ckpt_path, TABLE)).is_file():
        if support is not None:
            raise UserError(f"{ckpt_path} is a saved classifier, which has its classes: leave --support out")
        return FewShotClassifier.load(ckpt_path, **reading), hashlib.sha256(table.read_bytes()).hexdigest()
    if support is None:
        raise UserError(
            f"{ckpt_path or backbone} knows no classes: give --support, a folder with a folder of examples for each"
        )
    with _plain_warnings():
        examples = list_examples(support)  # before the model, which takes longer
    names = [(label, name_of(clip)) for label, clips in examples.items() for clip in clips]
    marks = [(label, os.path.relpath(name, support), fingerprint_text(name)) for label, name in names]
    if ckpt_path is not None:
        classifier = FewShotClassifier.from_checkpoint(ckpt_path, **reading)
    else:
        model = CLIPM2DF(backbone=str(backbone), head=head or "otam", freeze_backbone=True)
        classifier = FewShotClassifier(placed(model, None), **reading)
    with _plain_warnings() as said:
        classifier.fit(examples)
    return classifier, [marks, said]  # examples that were left out are among what was said


def _digest(classifier: FewShotClassifier, known_by: object, question: Question) -> str:
    """SHA-256 of all that a prediction depends on, but for the video."""
    model, reader = classifier.model, classifier.encoder.reader
    facts = {
        "version": __version__,
        "model": {name: model.hparams[name] for name in ("head", "head_options", "template")},
        "tower": model.model.backbone.description(),
        "text_fusion": model.text_fusion,
        "selection": getattr(model.model.head, "selection", None),
        "classes": classifier.classes_.tolist(),
        "support": known_by,
        "reader": [reader.frames, reader.resize, reader.size],
        "question": question,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weights in model.model.state_dict().items():
        digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        digest.update(weights.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _find(
    classifier: FewShotClassifier,
    question: Question,
    listed: Mapping[str, str],
    empty: Collection[str],
    output: Path,
    part: PartFile,
    digest: str,
) -> dict[str, list[Row]]:
    """The rows of each video by its path; what the part knows already is taken over."""
    names = classifier.classes_.tolist()
    marks = {key: fingerprint_text(path) for key, path in listed.items()}
    found = part.take_over(digest, marks, question.columns(names)[1:])
    if found is None:
        print(f"{plain(str(output))}.part is of a run with another model, support or options: starting anew")
        found = {}
    elif found:
        print(f"{len(found)} of {len(listed)} videos were labelled before the last run was broken off")
    found |= {key: [question.broken_row(names, "the folder has no videos")] for key in empty}
    left = [key for key in listed if key not in found]
    # Closed, so that workers end at once when the run does.
    with closing(_label(classifier, question, [listed[key] for key in left])) as results:
        bar = track(results, "labelling", total=len(left), console=Console(stderr=True), disable=not left)
        for place, rows in bar:
            found[left[place]] = rows
            part.add(left[place], marks[left[place]], rows)
    return {path: found[key] for key, path in listed.items()}


def _label(
    classifier: FewShotClassifier, question: Question, paths: Sequence[str]
) -> Generator[tuple[int, list[Row]], None, None]:
    """The place of each video and its rows, as they are ready."""
    names = classifier.classes_.tolist()
    if question.sliding is None:
        for place, p in classifier.classify(paths, reject=question.reject):
            yield place, [_row(names, p.label, p.probability, p.probabilities, p.error)]
        return
    for place, path in enumerate(paths):
        try:
            found = classifier.segments(path, reject=question.reject, **question.sliding)
        except UserError as error:
            reason = error.reason_for(path) if isinstance(error, VideoError) else str(error)
            yield place, [question.broken_row(names, reason)]
        else:
            times = [{"start": round(s.start, 3), "end": round(s.end, 3)} for s in found]
            rows = [_row(names, s.label, s.probability, s.probabilities) for s in found]
            yield place, [time | row for time, row in zip(times, rows, strict=True)]


def _row(
    names: Sequence[str], label: str | None, probability: float, probabilities: Mapping[str, float], error: str = ""
) -> Row:
    return {
        "label": None if label is None else plain(label),
        "probability": _rounded(probability),
        **{f"p_{plain(name)}": _rounded(probabilities.get(name, math.nan)) for name in names},
        "error": plain(" ".join(error.split())) or None,
    }


def _rounded(probability: float) -> float | None:
    return None if math.isnan(probability) else round(probability, 6)


@contextmanager
def _plain_warnings() -> Iterator[list[str]]:
    """Say warnings as the command line says errors, and give what was said."""
    said: list[str] = []

    def say(message: Warning | str, *_: object, **__: object) -> None:
        said.append(str(message))
        print(f"clip-m2df: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = say
        yield said


class Terminated(Stopped):
    """A run was asked to end by SIGTERM; what it has found is kept."""

    def __str__(self) -> str:
        return "stopped by SIGTERM; the same command goes on where it was"


@contextmanager
def _terminable() -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C: by way of all that is to be closed, workers among it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated(number)

    if threading.current_thread() is not threading.main_thread():  # where no handler may be set
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None where it was not set by Python


def _write_table(output: Path, columns: Sequence[str], found: Mapping[str, Sequence[Row]]) -> None:
    rows = [{"path": plain(path), **row} for path, of_video in found.items() for row in of_video]
    with writing(output), whole_file(output) as draft, open(draft, "w", encoding="utf-8", newline="") as file:
        if output.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows([_cell(name, row[name]) for name in columns] for row in rows)


def _cell(column: str, value: str | float | None) -> str:
    if isinstance(value, int | float):
        return f"{value:.3f}" if column in ("start", "end") else f"{value:.6f}"
    return value or ""


def _print_summary(found: Mapping[str, Sequence[Row]], segments: bool, output: Path) -> int:
    """Print how much there is of each label and what can't be read; the exit status."""
    counts = Counter(row["label"] for rows in found.values() for row in rows if row["label"] is not None)
    table = Table("label", "segments" if segments else "videos")
    for label, count in counts.most_common():
        table.add_row(Text(label), str(count))
    Console().print(table)
    if nothing := [plain(path) for path, rows in found.items() if not rows]:
        print(f"none of these from beginning to end, and no row: {some(nothing, _NAMED)}")
    broken = [f"{plain(path)}: {row['error']}" for path, rows in found.items() for row in rows if row["error"]]
    if broken:
        print(f"{len(broken)} of {len(found)} videos can't be read:", *broken[:_NAMED], sep="\n  ")
        if len(broken) > _NAMED:
            print(f"  and {len(broken) - _NAMED} more")
    print(f"the predictions are in {plain(str(output))}")
    return int(bool(broken))


if sys.platform != "win32":
    import fcntl


# First in the file.
FORMAT = "clip-m2df predictions 1"


class PartFile:
    """A line of JSON that says which run it is of, and then one for each video; see :func:`open_part`.

    Args:
        output: the table.
        file: opened to be read and added to.
    """

    def __init__(self, output: Path, file: TextIO) -> None:
        self._output = output
        self._file = file

    def take_over(self, digest: str, marks: Mapping[str, str], columns: Sequence[str]) -> dict[str, list[Row]] | None:
        """Begin, with the rows of videos that an earlier run of the same has labelled and that haven't changed since.

        Lines that are torn are passed over. Videos that could not be read are tried again: with more time they may be.

        Args:
            digest: of all that a prediction depends on, but for the video.
            marks: by video, what changes when it does; empty if it is not there.
            columns: of a row.

        Returns:
            The rows by video; None where the file was of another run, whose rows are gone.

        Raises:
            UserError: the file can't be read or written.
        """
        header = {"format": FORMAT, "digest": digest}
        with writing(self._output):
            self._file.seek(0)
            text = list(self._file)
            lines = list(map(_parsed, text))
            if not lines or lines[0] != header:
                self._file.truncate(0)
                self._add(header)
                return None if lines else {}
            if not text[-1].endswith("\n"):  # the next line is to stand alone
                self._file.write("\n")
        found: dict[str, list[Row]] = {}
        for line in lines[1:]:
            key, rows = str(line.get("video")), line.get("rows", ())
            if not marks.get(key) or line.get("mark") != marks[key]:  # of another run's videos, or changed
                continue
            if all(tuple(row) == tuple(columns) and row["error"] is None for row in rows):
                found[key] = rows
        return found

    def add(self, video: str, mark: str, rows: Sequence[Row]) -> None:
        """Keep the rows of a video.

        Raises:
            UserError: they can't be written.
        """
        with writing(self._output):
            self._add({"video": video, "mark": mark, "rows": rows})

    def clear(self) -> None:
        """Forget everything: the table is written."""
        with writing(self._output):
            self._file.truncate(0)

    def _add(self, content: Mapping[str, Any]) -> None:
        # All in ASCII: a name with bytes that are no UTF-8 can be read back.
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


@contextmanager
def open_part(output: Path) -> Iterator[PartFile]:
    """Open ``<output>.part`` for one run alone; at the end it is left behind if there is something in it.

    Args:
        output: the table, which is held to be written beside it.

    Raises:
        UserError: it can't be written, or another run has it open.
    """
    path = Path(f"{output}.part")
    if output.is_dir():
        raise UserError(f"cannot write the predictions {output}: it is a folder; name a file in it")
    if path.is_dir():
        raise UserError(f"cannot write the predictions {output}: {path} is a folder; name another file")
    with ExitStack() as stack:
        with writing(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()
            file = stack.enter_context(open(path, "a+", encoding="utf-8", errors="replace"))
        _lock(file, output)
        try:
            yield PartFile(output, file)
        finally:
            with writing(output):
                empty = os.fstat(file.fileno()).st_size == 0
                file.close()
                if empty:
                    path.unlink(missing_ok=True)


def _lock(file: TextIO, output: Path) -> None:
    """Hold the file until it is closed; the system lets go of it too when the process dies."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is at work on the predictions {output}: wait for its end, or name another file"
        ) from error
    except OSError:  # a file system without locks
        pass


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the table."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the predictions {output}: {error.strerror or error}; name a file in a folder that can be"
            " written"
        ) from error


def _parsed(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
