"""``clip-m2df predict``: labels videos and writes a table; a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from clip_m2df.__about__ import __version__
from clip_m2df.errors import Stopped, UserError, say, some, some_lines
from clip_m2df.files import (
    beside,
    check_output,
    fingerprint_text,
    locked,
    plain,
    sha256_of,
    write_table,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from clip_m2df.classifier.classifier import FewShotClassifier, Prediction
    from clip_m2df.classifier.segments import Segment
    from clip_m2df.report.predictions import Row

# How a clip is compared with the examples where nothing is trained.
UntrainedHead = Literal["otam", "nearest_prototype", "bi_mhm", "zero_shot"]
TABLE_FORMATS = (".csv", ".jsonl")
# Of the broken videos that are named in print.
MOST_NAMED = 5
# What the first line of a part says.
PART_FORMAT = "clip-m2df predictions 1"


def predict_videos(
    *,
    ckpt_path: str | None = None,
    backbone: str | None = None,
    head: UntrainedHead | None = None,
    support: Path | None = None,
    videos: Sequence[str],
    output: Path,
    report: Path | None = None,
    reject: bool = False,
    segments: bool = False,
    window: float | None = None,
    stride: float | None = None,
    smoothing: float | None = None,
    fps: float | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
) -> int:
    """Label videos from a few examples of each class.

    Rows are added to ``<output>.part`` as they come, those of clips that the model sees together at once, and the next
    run of the same goes on from there. At the end the table is written and a summary printed.

    Args:
        ckpt_path: A trained model: a .ckpt file, a folder that save_pretrained wrote, or a name on the hub; or a folder
            that FewShotClassifier.save wrote, which has its classes. Either this or --backbone.
        backbone: CLIP's own weights instead, nothing trained: a name on the hub, a folder, rn50 or tiny.
        head: How a clip is compared with the examples, with --backbone; otam by default.
        support: A folder with a folder of examples for each class; not with a saved classifier.
        videos: Files, folders with videos at any depth, folders of numbered images.
        output: The table, .csv or .jsonl; a run that was interrupted goes on.
        report: A page for a browser, .html: each video with its frames, and why.
        reject: Say "none of these" of what is too far from every class.
        segments: What happens when in long videos, which are read in this process.
        window: With --segments: length of a window in seconds, about that of the examples; 2 by default.
        stride: With --segments: seconds from one window to the next; a quarter of the window by default.
        smoothing: With --segments: seconds over which scores are averaged; half the window by default.
        fps: With --segments: frames a second; folders of images need it, a file's own times give way to it.
        workers: Processes that decode, as many as there are cores by default; 0: this one, which a broken file may take
            with it.
        timeout: Seconds after which a video is given up, with workers.

    Returns:
        The exit status: 0, or 1 if a video can't be read or a folder has none.

    Raises:
        UserError: Options that don't go together or are out of range, no model or support, no file of its own to write.
        Stopped: By SIGTERM; what has been found is kept.
    """
    from clip_m2df.report.page import check_page
    from clip_m2df.report.predictions import write_predictions

    if (ckpt_path is None) == (backbone is None):
        raise UserError("give either --ckpt_path, a trained model, or --backbone, CLIP's own weights")
    if head is not None and ckpt_path is not None:
        raise UserError("--head goes with --backbone: a trained model has a head of its own; leave it out")
    if output.suffix not in TABLE_FORMATS:
        raise UserError(f"--output is {output}: give it a name that ends in {' or '.join(TABLE_FORMATS)}")
    if report is not None:
        check_page(report)
    given = {"window": window, "stride": stride, "smoothing": smoothing, "fps": fps}
    sliding = {name: value for name, value in given.items() if value is not None}
    if sliding and not segments:
        raise UserError(f"--{next(iter(sliding))} is of --segments: give that too, or leave it out")
    paths, empty = _list_videos(videos)
    reading = {"workers": os.cpu_count() if workers is None else workers, "timeout": timeout}
    with _terminable(), open_part(output) as part:
        classifier, support_facts = _make_classifier(ckpt_path, backbone, head or "otam", support, **reading)
        labeller = _Labeller(classifier, reject, {"window": 2.0, **sliding} if segments else None)
        fingerprints = {key: fingerprint_text(path) for key, path in paths.items()}
        found = part.take_over(labeller.digest(support_facts), fingerprints, list(labeller.blank))
        if found:
            print(f"{len(found)} of {len(paths)} videos were labelled before the last run was interrupted")
        found |= {key: [labeller.broken_row("the folder has no videos")] for key in empty}
        left = [key for key in paths if key not in found]
        # Closed, so that workers end at once when the run does.
        with closing(labeller.label([paths[key] for key in left])) as results:
            bar = track(results, "labelling", total=len(left), console=Console(stderr=True), disable=not left)
            for index, rows in bar:
                found[left[index]] = rows
                part.add(left[index], fingerprints[left[index]], rows)
        table = {path: found[key] for key, path in paths.items()}
        _write_predictions(output, ["path", *labeller.blank], table)
        if report is not None:
            model = str(ckpt_path or backbone)
            write_predictions(report, classifier, table, model, support, reject=reject, segments=segments)
        part.clear()
    return _print_summary(table, "segments" if segments else "videos", output)


def _list_videos(arguments: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """The videos by their absolute paths, each as it was named first, and the folders among them that have none."""
    from clip_m2df.classifier.clips import videos_in

    listed: dict[str, str] = {}
    empty = set()
    for argument in arguments:
        try:
            with _said_warnings():
                paths = videos_in(argument) if os.path.isdir(argument) else [argument]
        except UserError as error:
            say(f"clip-m2df: warning: {error}", error=True)
            paths = [argument]
            empty.add(os.path.abspath(argument))
        for path in paths:
            listed.setdefault(os.path.abspath(path), path)
    return listed, empty


def _make_classifier(
    ckpt_path: str | None, backbone: str | None, head: str, support: Path | None, **reading: Any
) -> tuple[FewShotClassifier, object]:
    """The classifier that is asked for, and what tells its support from another.

    That is the files and not their features, whose last digits depend on the batches in which they happened to be
    encoded.
    """
    from clip_m2df.classifier.classifier import FewShotClassifier
    from clip_m2df.classifier.clips import list_examples, name_of, placed
    from clip_m2df.classifier.saving import TABLE
    from clip_m2df.training.module import CLIPM2DF

    if ckpt_path is not None and (table := Path(ckpt_path, TABLE)).is_file():
        if support is not None:
            raise UserError(f"{ckpt_path} is a saved classifier, which has its classes: leave --support out")
        return FewShotClassifier.load(ckpt_path, **reading), sha256_of(table)
    if support is None:
        raise UserError(
            f"{ckpt_path or backbone} knows no classes: give --support, a folder with a folder of examples for each"
        )
    with _said_warnings():
        examples = list_examples(support)  # before the model, which takes longer
    names = [(label, name_of(clip)) for label, clips in examples.items() for clip in clips]
    marks = [(label, os.path.relpath(name, support), fingerprint_text(name)) for label, name in names]
    if ckpt_path is not None:
        classifier = FewShotClassifier.from_checkpoint(ckpt_path, **reading)
    else:
        model = CLIPM2DF(backbone=str(backbone), head=head, freeze_backbone=True)
        classifier = FewShotClassifier(placed(model, None), **reading)
    with _said_warnings() as left_out:
        classifier.fit(examples)
    return classifier, [marks, left_out]


@contextmanager
def _said_warnings() -> Iterator[list[str]]:
    """Print warnings as lines of the command; those are given at the end."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield messages
    for warning in caught:
        messages.append(str(warning.message))
        say(f"clip-m2df: warning: {messages[-1]}", error=True)


class _Labeller:
    """Labels videos, as rows of the table without their path.

    Args:
        classifier: What labels them.
        reject: Whether they may show none of the classes.
        sliding: Options of ``FewShotClassifier.segments``, where segments are wanted.

    Raises:
        UserError: An option is out of its range, or there is nothing to reject by; each video would fail.
    """

    def __init__(self, classifier: FewShotClassifier, reject: bool, sliding: dict[str, float] | None) -> None:
        from clip_m2df.classifier.segments import Windows
        from clip_m2df.video.timing import exact_rate

        if sliding is not None:
            lengths = [sliding.get(name) for name in ("stride", "smoothing")]
            Windows.of(classifier.encoder.reader.frames, sliding["window"], *lengths)
            exact_rate("fps", sliding.get("fps", 1.0))
        if reject and classifier.threshold_ is None:
            raise UserError("--reject can't tell by one example of one class: give it more examples, or another class")
        self.classifier, self.reject, self.sliding = classifier, reject, sliding
        times = [] if sliding is None else ["start", "end"]
        columns = [f"p_{plain(name)}" for name in classifier.classes_.tolist()]
        self.blank: Row = dict.fromkeys([*times, "label", "probability", *columns, "error"])

    def label(self, paths: Sequence[str]) -> Generator[tuple[int, list[Row]], None, None]:
        """The index of each video and its rows, as they are ready."""
        from clip_m2df.video.reader import VideoError

        if self.sliding is None:
            for index, found in self.classifier.classify(paths, reject=self.reject):
                yield index, [self.broken_row(found.error) if found.label is None else self._row(found)]
            return
        for index, path in enumerate(paths):
            try:
                segments = self.classifier.segments(path, reject=self.reject, **self.sliding)
            except UserError as error:
                reason = error.reason_for(path) if isinstance(error, VideoError) else str(error)
                yield index, [self.broken_row(reason)]
            else:
                yield index, [self._row(s) | {"start": round(s.start, 3), "end": round(s.end, 3)} for s in segments]

    def broken_row(self, error: str) -> Row:
        """Of what can't be read."""
        return self.blank | {"error": plain(" ".join(error.split()))}

    def _row(self, found: Prediction | Segment) -> Row:
        probabilities = {f"p_{plain(name)}": round(value, 6) for name, value in found.probabilities.items()}
        probability = None if math.isnan(found.probability) else round(found.probability, 6)
        return self.blank | probabilities | {"label": plain(str(found.label)), "probability": probability}

    def digest(self, support: object) -> str:
        """SHA-256 of all that a row depends on, but for the video; ``support`` tells the examples from others."""
        from clip_m2df.evaluation.bank import digest_of

        model, reader = self.classifier.model, self.classifier.encoder.reader
        facts = {
            "version": __version__,
            "model": {name: model.hparams[name] for name in ("head", "head_options", "template")},
            "tower": model.model.backbone.description(),
            "text_fusion": model.text_fusion,
            "selection": getattr(model.model.head, "selection", None),
            "classes": self.classifier.classes_.tolist(),
            "support": support,
            "reader": [reader.frames, reader.resize, reader.size],
            "question": [self.reject, self.sliding],
        }
        return digest_of(json.dumps(facts, sort_keys=True), model.model)


@contextmanager
def _terminable() -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C: by way of all that is to be closed, workers among it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, "the same command goes on where it was")

    if threading.current_thread() is not threading.main_thread():  # where no handler may be set
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None where it was not set by Python


def _write_predictions(output: Path, columns: Sequence[str], table: Mapping[str, Sequence[Row]]) -> None:
    rows = [{"path": plain(path), **row} for path, of_video in table.items() for row in of_video]
    if output.suffix == ".jsonl":
        write_text(output, "predictions", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    digits = {"start": 3, "end": 3}
    cells = (
        [f"{v:.{digits.get(name, 6)}f}" if isinstance(v, int | float) else v for name, v in row.items()] for row in rows
    )
    write_table(output, "predictions", [columns, *cells])


def _print_summary(table: Mapping[str, Sequence[Row]], counted: str, output: Path) -> int:
    """Print how much there is of each label and what can't be read; the exit status."""
    counts = Counter(row["label"] for rows in table.values() for row in rows if row["label"] is not None)
    summary = Table("label", counted)
    for label, count in counts.most_common():
        summary.add_row(Text(label), str(count))
    Console().print(summary)
    if nothing := [plain(path) for path, rows in table.items() if not rows]:
        print(f"none of these from beginning to end, and no row: {some(nothing, MOST_NAMED)}")
    broken = [f"{plain(path)}: {row['error']}" for path, rows in table.items() for row in rows if row["error"]]
    if broken:
        print(f"{len(broken)} of {len(table)} videos can't be read:{some_lines(broken, MOST_NAMED)}")
    print(f"the predictions are in {plain(str(output))}")
    return int(bool(broken))


@contextmanager
def open_part(output: Path) -> Iterator[PartFile]:
    """Open ``<output>.part`` for one run alone; at the end it is left behind if there is something in it.

    Args:
        output: The table, which is to be written beside it.

    Raises:
        UserError: It can't be written, or another run has it open.
    """
    check_output(output, "predictions")
    with locked(beside(output, ".part"), "predictions", output) as file:
        yield PartFile(output, file)


class PartFile:
    """A line of JSON that says which run it is of, and then one for each video; see :func:`open_part`.

    Args:
        output: The table.
        file: Opened to be read and added to.
    """

    def __init__(self, output: Path, file: TextIO) -> None:
        self._output = output
        self._file = file

    def take_over(self, digest: str, fingerprints: Mapping[str, str], columns: Sequence[str]) -> dict[str, list[Row]]:
        """Begin, with the rows of videos that an earlier run of the same has labelled and that haven't changed since.

        Lines that are torn are passed over. Videos that could not be read are tried again: with more time they may be.
        What another run left is dropped, which is said.

        Args:
            digest: Of all that a row depends on, but for the video.
            fingerprints: By video, what changes when it does; empty if it is not there.
            columns: Of a row.

        Returns:
            The rows by video.

        Raises:
            UserError: The file can't be read or written.
        """
        header = {"format": PART_FORMAT, "digest": digest}
        with writing(self._output, "predictions"):
            self._file.seek(0)
            text = self._file.read()
            lines = [_parsed(line) for line in text.splitlines()]
            if not lines or lines[0] != header:
                if lines:
                    part = beside(self._output, ".part")
                    say(f"{part} is of a run with another model, support or options: starting anew")
                self._file.truncate(0)
                self._add(header)
                return {}
            if not text.endswith("\n"):  # the next line is to stand alone
                self._file.write("\n")
        found = {}
        for line in lines[1:]:
            video, rows = str(line.get("video")), line.get("rows", ())
            unchanged = fingerprints.get(video) and line.get("mark") == fingerprints[video]
            if unchanged and all(list(row) == columns and row["error"] is None for row in rows):
                found[video] = rows
        return found

    def add(self, video: str, fingerprint: str, rows: Sequence[Row]) -> None:
        """Keep the rows of a video.

        Raises:
            UserError: They can't be written.
        """
        with writing(self._output, "predictions"):
            self._add({"video": video, "mark": fingerprint, "rows": rows})

    def clear(self) -> None:
        """Forget everything: the table is written."""
        with writing(self._output, "predictions"):
            self._file.truncate(0)

    def _add(self, content: Mapping[str, Any]) -> None:
        # All in ASCII: a name with bytes that are no UTF-8 can be read back.
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _parsed(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
