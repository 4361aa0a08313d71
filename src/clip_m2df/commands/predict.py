"""``clip-m2df predict``: labels videos and writes a table; a run that was interrupted goes on where it was."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.progress import track
from rich.table import Column, Table

from clip_m2df.__about__ import __version__
from clip_m2df.errors import UserError, console, ended_by_sigterm, require, say, some, some_lines
from clip_m2df.files import (
    beside,
    check_output,
    fingerprint_text,
    for_spreadsheet,
    locked,
    near_by,
    plain,
    sha256_of,
    write_table,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from clip_m2df.classifier.classifier import FewShotClassifier, Prediction
    from clip_m2df.classifier.clips import Clip
    from clip_m2df.classifier.segments import Segment
    from clip_m2df.report.predictions import Row

# How a clip is compared with the examples where nothing is trained.
UntrainedHead = Literal["otam", "nearest_prototype", "bi_mhm", "zero_shot", "linear_probe", "tip_adapter"]
# As Lightning calls them.
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
# The ways to pick a prompt by which predictions repeat.
Repeatable = Literal["argmax", "expectation", "each"]
TABLE_FORMATS = (".csv", ".jsonl")
# Of the broken videos that are named in print.
MOST_NAMED = 5
# Of a number in a table, seconds among them.
LONGEST = 1e9
# What the first line of a part says.
PART_FORMAT = "clip-m2df predictions 1"

# Options that take NAME=VALUE, each with an example for messages.
NAMED_VALUES = {"head_options": "smoothing=0.1", "backbone_options": "activation=gelu"}


def predict_videos(
    *,
    ckpt_path: str | None = None,
    backbone: str | None = None,
    backbone_options: Sequence[str] | None = None,
    head: UntrainedHead | None = None,
    head_options: Sequence[str] | None = None,
    template: Sequence[str] | None = None,
    selection: Repeatable | None = None,
    support: Path | None = None,
    texts: Path | None = None,
    videos: Sequence[str],
    output: Path | None = None,
    report: Path | None = None,
    reject: bool = False,
    threshold: float | None = None,
    error: float | None = None,
    segments: bool = False,
    window: float | None = None,
    stride: float | None = None,
    smoothing: float | None = None,
    fps: float | None = None,
    frames: int | None = None,
    resize: int | None = None,
    device: str | None = None,
    precision: Precision | None = None,
    workers: int | None = None,
    timeout: float = 60.0,
) -> int:
    """Label videos from a few examples of each class.

    Rows are added to ``<output>.part`` as they come, those of clips that the model sees together at once, and the next
    run of the same goes on from there. At the end the table is written and a summary printed.

    Args:
        ckpt_path: A trained model: a .ckpt file, a folder that save_pretrained wrote, or a name on the hub; or a folder
            that FewShotClassifier.save wrote, which has its classes. Either this or --backbone; both with a checkpoint
            of CLIP-M²DF's published code, which lacks the text tower, and with a folder whose adapters are apart.
        backbone: Weights of towers instead, nothing trained: a name on the hub, a folder, a file, rn50 or tiny; or
            "features", where support and videos are feature tables.
        backbone_options: What a file of weights doesn't tell, as in activation=gelu head_width=80; and tokenizer, mean,
            std, image_size, dtype.
        head: How a clip is compared with the examples, with --backbone; otam by default.
        head_options: Options of that head, as in smoothing=0.1.
        template: The prompt, with {} where the class goes, or several; by default the model's own.
        selection: How queries get their prompts, as model.selection of a test; argmax by default. A model that was
            calibrated with another one makes sets of labels with that one alone.
        support: A folder with a folder of examples for each class, or a feature table, each row of which is an example
            of its label; not with a saved classifier.
        texts: What prompts say of classes, where that is not their names: a CSV with the columns label and text.
        videos: Files, folders with videos at any depth, folders of numbered images; feature tables, each row of which
            is a video.
        output: The table, .csv or .jsonl; a run that was interrupted goes on. Without it the table is printed, unless
            there is a report.
        report: A page for a browser, .html: each video with its frames, and why.
        reject: Say "none of these" of what is too far from every class; the table has the distances.
        threshold: With --reject: the distance from which on; by default what the examples tell.
        error: Give each video a set of labels too, "none of these" among them, that misses the truth at this rate at
            most, such as 0.1; for that the classes must be such as those of the calibration, with which fit ends.
        segments: What happens when in long videos.
        window: With --segments: length of a window in seconds, about that of the examples; 2 by default.
        stride: With --segments: seconds from one window to the next; a quarter of the window by default.
        smoothing: With --segments: seconds over which scores are averaged; half the window by default.
        fps: With --segments: frames a second; folders of images need it, a file's own times give way to it.
        frames: Frames of a clip that the model sees; as many as in its training by default, or 8.
        resize: Short side of the frames in pixels before the crop; as in training by default, or the crop's side.
        device: Where the model runs, such as cpu or cuda:1; on CUDA by default where there is any.
        precision: What the visual tower computes in; 32-true by default, and on CUDA bf16-mixed, or 16-mixed where the
            device has no bf16. Half precision is faster, and changes the last digits.
        workers: Processes that decode, as many as there are cores by default; 0: this one, which a broken file may take
            with it.
        timeout: Seconds after which a video is given up, with workers; with --segments after so many without a frame.

    Returns:
        The exit status: 0, or 1 if a video can't be read or a folder has none.

    Raises:
        UserError: Options that don't go together or are out of range, no model or support, no file of its own to write.
        Stopped: By SIGTERM; what has been found is kept.
    """
    from clip_m2df.classifier.clips import name_of
    from clip_m2df.classifier.saving import TABLE
    from clip_m2df.hub import has_adapters_apart
    from clip_m2df.report.page import check_page
    from clip_m2df.report.predictions import write_predictions

    path = os.path.expanduser(ckpt_path or "")
    is_file = os.path.isfile(path)
    if (ckpt_path is None) == (backbone is None) and not (is_file or (path and has_adapters_apart(path))):
        missing = "" if ckpt_path is None else f", and {ckpt_path} is no file"
        raise UserError(
            "give either --ckpt_path, a trained model, or --backbone, CLIP's own weights; both with the file of a"
            f" published checkpoint{missing}"
        )
    if head is not None and ckpt_path is not None:
        raise UserError("--head goes with --backbone: a trained model has a head of its own; leave it out")
    if head_options is not None and backbone is None:
        raise UserError("--head_options goes with --backbone: a trained model has those of its training; leave it out")
    if backbone_options is not None and backbone is None:
        raise UserError("--backbone_options goes with --backbone: a trained model has its towers; leave it out")
    if threshold is not None and not reject:
        raise UserError("--threshold is of --reject: give that too, or leave it out")
    if error is not None and segments:
        raise UserError("--error is of whole videos, and --segments looks for parts: leave out one of them")
    require(above=0, below=1, error=error)
    if output is not None and output.suffix not in TABLE_FORMATS:
        raise UserError(f"--output is {output}: give it a name that ends in {' or '.join(TABLE_FORMATS)}")
    if report is not None:
        check_page(report)
    given = {"window": window, "stride": stride, "smoothing": smoothing, "fps": fps}
    sliding = {name: value for name, value in given.items() if value is not None}
    if sliding and not segments:
        raise UserError(f"--{next(iter(sliding))} is of --segments: give that too, or leave it out")
    clips, empty = _list_videos(videos)
    own = {"head": head or "otam", "head_options": parse_options("head_options", head_options or [])}
    own["backbone_options"] = parse_options("backbone_options", backbone_options or [])
    told: dict[str, Any] = {
        "support": support,
        "texts": texts,
        "frames": frames,
        "resize": resize,
        "template": template,
        "selection": selection,
    }
    reading: dict[str, Any] = {"device": device, "precision": precision, "threshold": threshold, "timeout": timeout}
    reading["workers"] = os.cpu_count() if workers is None else workers
    with (
        ended_by_sigterm(*[] if output is None else ["the same command goes on where it was"]),
        nullcontext() if output is None else open_part(output) as part,
    ):
        if ckpt_path is not None and os.path.isfile(os.path.join(ckpt_path, TABLE)):
            classifier, support_facts = _load_classifier(ckpt_path, told, reading)
        else:
            classifier, support_facts = _fit_classifier(ckpt_path, backbone, own, told, reading)
        labeller = _Labeller(classifier, reject, {"window": 2.0, **sliding} if segments else None, error)
        fingerprints = {key: _fingerprint(clip) for key, clip in clips.items()}
        digest, columns = labeller.digest(support_facts), list(labeller.blank)
        found = {} if part is None else part.take_over(digest, fingerprints, columns)
        if found:
            say(f"{len(found)} of {len(clips)} videos were labelled before the last run was interrupted")
        found |= {key: [labeller.broken_row("the folder has no videos")] for key in empty}
        left = [key for key in clips if key not in found]
        # Closed, so that workers end at once when the run does.
        with closing(labeller.label([clips[key] for key in left])) as results:
            bar = track(results, "labelling", total=len(left), console=console(error=True), disable=not left)
            for index, rows in bar:
                found[left[index]] = rows
                if part is not None:
                    part.add(left[index], fingerprints[left[index]], rows)
        table = {name_of(clip): found[key] for key, clip in clips.items()}
        if output is not None:
            _write_predictions(output, ["path", *columns], table)
        elif report is None:
            _print_predictions(table, columns)
        if report is not None:
            model, by_name = str(ckpt_path or backbone), {name_of(clip): clip for clip in clips.values()}
            asked: dict[str, Any] = {"reject": reject, "segments": segments, "error": error}
            write_predictions(report, classifier, table, by_name, model, support, **asked)
        if part is not None:
            part.clear()
    status = _print_summary(table, "segments" if segments else "videos", output)
    if classifier.model.image_size:
        say(f"the visual tower computed in {classifier.encoder.precision} on {classifier.model.device}")
    return status


def _list_videos(arguments: Sequence[str]) -> tuple[dict[str, Clip], set[str]]:
    """The videos by their absolute paths, each as it was named first, and the folders among them that have none.

    Raises:
        UserError: A feature table can't be read, or a video comes by its features and otherwise, or in two tables.
    """
    from clip_m2df.classifier.clips import TableRow, name_of, table_rows, videos_in
    from clip_m2df.datasets.feature_tables import is_feature_table

    listed: dict[str, Clip] = {}
    empty = set()
    for argument in dict.fromkeys(arguments):
        clips: Sequence[Clip] = [argument]
        if is_feature_table(argument):
            clips = table_rows(argument)
        elif os.path.isdir(argument):
            try:
                clips = videos_in(argument)
            except UserError as error:
                say(f"clip-m2df: warning: {error}", error=True)
                empty.add(os.path.abspath(argument))
        for clip in clips:
            known = listed.setdefault(os.path.abspath(name_of(clip)), clip)
            if known is not clip and (isinstance(clip, TableRow) or isinstance(known, TableRow)):
                first, then = (c.table if isinstance(c, TableRow) else "--videos" for c in (known, clip))
                raise UserError(f"{name_of(clip)} is there twice, in {first} and in {then}: leave one out")
    return listed, empty


def _fingerprint(clip: Clip) -> str:
    """What changes when a video does, or the feature table that it is in; empty if it is not there."""
    from clip_m2df.classifier.clips import TableRow, name_of

    return fingerprint_text(clip.table if isinstance(clip, TableRow) else name_of(clip))


def parse_options(option: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Options of a head or of weights from ``NAME=VALUE``: numbers, true and false, lists, and else text.

    Raises:
        UserError: One without a name.
    """
    options = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name or not equals:
            raise UserError(f"--{option} has {argument!r}: give NAME=VALUE, as in {NAMED_VALUES[option]}")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _load_classifier(
    folder: str, told: Mapping[str, object], reading: Mapping[str, Any]
) -> tuple[FewShotClassifier, object]:
    """A saved classifier, and what tells its support from another; of what it has itself nothing may be told."""
    from clip_m2df.classifier.classifier import FewShotClassifier
    from clip_m2df.classifier.saving import TABLE

    for name, value in told.items():
        if value is not None:
            raise UserError(f"{folder} is a saved classifier, which has its classes: leave --{name} out")
    return FewShotClassifier.load(folder, **reading), sha256_of(Path(folder, TABLE))


def _fit_classifier(
    ckpt_path: str | None,
    backbone: str | None,
    own: Mapping[str, Any],
    told: Mapping[str, Any],
    reading: Mapping[str, Any],
) -> tuple[FewShotClassifier, object]:
    """The classifier that is asked for, and what tells its support from another.

    That is the files and not their features, whose last digits depend on the batches in which they happened to be
    encoded.
    """
    from clip_m2df.classifier.classifier import FewShotClassifier
    from clip_m2df.classifier.clips import TableRow, list_examples, name_of, placed
    from clip_m2df.datasets.manifest import read_class_texts
    from clip_m2df.training.module import CLIPM2DF

    support: Path | None = told["support"]
    if support is None:
        raise UserError(
            f"{ckpt_path or backbone} knows no classes: give --support, a folder with a folder of examples for each, or"
            " a feature table" + near_by(ckpt_path or "")
        )
    examples = list_examples(support)  # before the model, which takes longer
    texts = {} if told["texts"] is None else read_class_texts(told["texts"], examples, "the support")
    every = [(label, clip) for label, clips in examples.items() for clip in clips]
    marks = [(label, os.path.relpath(name_of(clip), support), _fingerprint(clip)) for label, clip in every]
    rows = [clip for _, clip in every if isinstance(clip, TableRow)]
    prompts = [(row.label, row.prompt.tolist()) for row in rows if row.prompt is not None]
    options: dict[str, Any] = {} if told["template"] is None else {"template": list(told["template"])}
    options |= {} if told["selection"] is None else {"selection": told["selection"]}
    reading = {"frames": told["frames"], "resize": told["resize"], **reading}
    if ckpt_path is not None:
        # Of a published checkpoint, which keeps none of them, and of the CLIP that its training began with.
        options |= {name: own[name] for name in ("head_options", "backbone_options") if own[name]}
        classifier = FewShotClassifier.from_checkpoint(ckpt_path, clip=backbone, **reading, **options)
    else:
        if backbone == "features" and not rows:
            raise UserError(
                f"--backbone features is no tower, and {support} has videos: give --support a feature table"
            )
        if backbone == "features" and "dim" not in own["backbone_options"]:
            width = rows[0].features.shape[-1]
            say(f"the model takes features of {width} numbers a frame, as {support} has them")
            own = {**own, "backbone_options": own["backbone_options"] | {"dim": width}}
        model = CLIPM2DF(backbone=str(backbone), freeze_backbone=True, **own, **options)
        classifier = FewShotClassifier(placed(model, reading.pop("device")), **reading)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        classifier.fit(examples, texts)
    left_out = [str(warning.message) for warning in caught]
    for message in left_out:
        say(f"clip-m2df: warning: {message}", error=True)
    return classifier, [marks, left_out, texts, dict(prompts)]


class _Labeller:
    """Labels videos, as rows of the table without their path.

    Args:
        classifier: What labels them.
        reject: Whether they may show none of the classes.
        sliding: Options of ``FewShotClassifier.segments``, where segments are wanted.
        error: The rate at which sets of labels may miss the truth, where they are wanted.

    Raises:
        UserError: An option is out of its range, or there is nothing to reject or to make sets by; each video would
            fail.
    """

    def __init__(
        self,
        classifier: FewShotClassifier,
        reject: bool,
        sliding: dict[str, float] | None,
        error: float | None = None,
    ) -> None:
        from clip_m2df.classifier.segments import SLOWEST, Windows
        from clip_m2df.video.timing import exact_rate

        if sliding is not None:
            lengths = [sliding.get(name) for name in ("stride", "smoothing")]
            Windows.of(classifier.encoder.reader.frames, sliding["window"], *lengths)
            exact_rate("fps", sliding.get("fps", 1.0))
            require(least=SLOWEST, fps=sliding.get("fps"))
        if reject and classifier.threshold_ is None:
            raise UserError(
                "--reject can't tell by one example of one class: give it more examples, another class, or --threshold"
            )
        self.classifier, self.reject, self.sliding, self.error = classifier, reject, sliding, error
        if error is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                classifier.check_sets(error)
            for warning in caught:
                say(f"clip-m2df: warning: {warning.message}", error=True)
        times = [] if sliding is None else ["start", "end"]
        distance = ["distance"] if reject and sliding is None else []
        sets = [] if error is None else ["set"]
        columns = [f"p_{plain(name)}" for name in classifier.classes_.tolist()]
        self.blank: Row = dict.fromkeys([*times, "label", "probability", *distance, *sets, *columns, "error"])

    def label(self, clips: Sequence[Clip]) -> Generator[tuple[int, list[Row]], None, None]:
        """The index of each video and its rows, as they are ready."""
        from clip_m2df.classifier.clips import name_of
        from clip_m2df.video.reader import VideoError

        if self.sliding is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # said at the start
                results = self.classifier.classify(clips, reject=self.reject, error=self.error)
            for index, found in results:
                yield index, [self.broken_row(found.error) if found.label is None else self._row(found)]
            return
        self.classifier.encoder.check(clips, any_length=True)
        for index, clip in enumerate(clips):
            try:
                segments = self.classifier.segments(clip, reject=self.reject, **self.sliding)
            except UserError as error:
                reason = error.reason_for(name_of(clip)) if isinstance(error, VideoError) else str(error)
                yield index, [self.broken_row(reason)]
            else:
                yield index, [self._row(s) | {"start": round(s.start, 3), "end": round(s.end, 3)} for s in segments]

    def broken_row(self, error: str) -> Row:
        """Of what can't be read."""
        return self.blank | {"error": plain(" ".join(error.split()))}

    def _row(self, found: Prediction | Segment) -> Row:
        from clip_m2df.classifier.segments import Segment

        probabilities = {f"p_{plain(name)}": round(value, 6) for name, value in found.probabilities.items()}
        probability = None if math.isnan(found.probability) else round(found.probability, 6)
        row = self.blank | probabilities | {"label": plain(str(found.label)), "probability": probability}
        if not isinstance(found, Segment) and "distance" in row:
            row["distance"] = round(found.distance, 6)
        if not isinstance(found, Segment) and found.labels is not None:
            row["set"] = [plain(label) for label in found.labels]
        return row

    def digest(self, support: object) -> str:
        """SHA-256 of all that a row depends on, but for the video; ``support`` tells the examples from others."""
        from clip_m2df.weight_files import digest_of

        model, reader = self.classifier.model, self.classifier.encoder.reader
        facts = {
            "version": __version__,
            "model": {name: model.hparams[name] for name in ("head", "head_options", "template", "adapters")},
            "tower": model.model.backbone.description(),
            "text_fusion": model.text_fusion,
            "selection": getattr(model.model.head, "selection", None),
            "classes": self.classifier.classes_.tolist(),
            "support": support,
            "reader": [reader.frames, reader.resize, reader.size, reader.resize_mode, reader.sampling],
            "precision": self.classifier.encoder.precision,
            "question": [self.reject, self.sliding, self.classifier.threshold],
        }
        weights = model.model.state_dict()
        if self.error is not None and (calibration := self.classifier.calibration) is not None:
            facts["sets"] = [self.error, calibration.score]
            weights = {**weights, "calibration": calibration.thresholds}
        return digest_of(weights, json.dumps(facts, sort_keys=True))


def _write_predictions(output: Path, columns: Sequence[str], table: Mapping[str, Sequence[Row]]) -> None:
    rows = [{"path": plain(path), **row} for path, of_video in table.items() for row in of_video]
    if output.suffix == ".jsonl":
        write_text(output, "predictions", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    digits = {"start": 3, "end": 3}
    cells = (
        [
            for_spreadsheet(v) if isinstance(v, str) else v if v is None else f"{v:.{digits.get(name, 6)}f}"
            for name, v in (row | ({"set": _set_text(row["set"])} if "set" in row else {})).items()
        ]
        for row in rows
    )
    write_table(output, "predictions", [columns, *cells])


def _set_text(labels: list[str] | None) -> str | None:
    """A set of labels in a cell: a list as JSON has it, since names may hold whatever would separate them."""
    return None if labels is None else json.dumps(labels, ensure_ascii=False)


def _print_predictions(table: Mapping[str, Sequence[Row]], columns: Sequence[str]) -> None:
    """Print what a table would say, but for the probabilities of the other classes."""
    digits = {"start": 2, "end": 2, "probability": 3, "distance": 2}
    shown = [name for name in columns if name in digits or name in ("label", "set")]
    printed = Table(*(Column(name, overflow="fold") for name in ("path", *shown)))
    for path, rows in table.items():
        for row in rows:
            said = row | ({"label": f"({row['error']})"} if row["error"] else {})
            if said.get("set") is not None:
                said["set"] = ", ".join(said["set"]) or "(empty)"
            cells = [(name, said[name]) for name in shown]
            texts = [
                f"{cell:.{digits[name]}f}" if isinstance(cell, int | float) else cell or "" for name, cell in cells
            ]
            printed.add_row(plain(path), *texts)
    console().print(printed)


def _print_summary(table: Mapping[str, Sequence[Row]], counted: str, output: Path | None) -> int:
    """Print how much there is of each label and what can't be read; the exit status."""
    counts = Counter(row["label"] for rows in table.values() for row in rows if row["label"] is not None)
    summary = Table("label", counted)
    for label, count in counts.most_common():
        summary.add_row(label, str(count))
    console().print(summary)
    if nothing := [plain(path) for path, rows in table.items() if not rows]:
        say(f"none of these throughout, and no row: {some(nothing, MOST_NAMED)}")
    broken = [f"{plain(path)}: {row['error']}" for path, rows in table.items() for row in rows if row["error"]]
    if broken:
        say(f"{len(broken)} of {len(table)} videos can't be read:{some_lines(broken, MOST_NAMED)}")
    if output is not None:
        say(f"the predictions are in {output}")
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

        Lines that are torn, or no rows as a run writes them, are passed over. Videos that could not be read are tried
        again: with more time they may be. What another run left is dropped, which is said.

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
        found: dict[str, list[Row]] = {}
        doubtful = set()
        for line in lines[1:]:
            video, rows = str(line.get("video")), line.get("rows", ())
            unchanged = fingerprints.get(video) and line.get("mark") == fingerprints[video]
            if unchanged and _are_rows(rows, columns):
                doubtful |= {video} & found.keys()
                found[video] = rows
        return {video: rows for video, rows in found.items() if video not in doubtful}

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
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _are_rows(rows: object, columns: Sequence[str]) -> bool:
    """Whether this is what a run writes of a video that can be read: one row, or its segments in their order."""
    if not isinstance(rows, list) or not all(_is_row(row, columns) for row in rows):
        return False
    if "start" not in columns:
        return len(rows) == 1
    times = [row[name] for row in rows for name in ("start", "end")]
    in_order = all(first <= then for first, then in itertools.pairwise(times))
    return in_order and all(0 <= row["start"] < row["end"] <= LONGEST for row in rows)


def _is_set(labels: object, known: set[str]) -> bool:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return False
    return len(set(labels)) == len(labels) and known.issuperset(labels)


def _is_row(row: object, columns: Sequence[str]) -> bool:
    from clip_m2df.classifier.support import NONE_OF_THESE

    if not isinstance(row, dict) or list(row) != list(columns) or row["error"] is not None:
        return False
    shares = {name.removeprefix("p_"): row[name] for name in columns if name.startswith("p_")}
    numbers = [*shares.values(), *(row[name] for name in ("start", "end", "distance") if name in row)]
    label, probability = row["label"], row["probability"]
    if not all(type(number) in (int, float) and abs(number) < LONGEST for number in numbers):
        return False
    if "set" in row and not _is_set(row["set"], {*shares, NONE_OF_THESE}):
        return False
    rounding = 1e-6 * (len(shares) + 10)
    if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > rounding:
        return False
    if not isinstance(label, str) or label not in shares:
        return label == NONE_OF_THESE and probability is None and "distance" in row
    return type(probability) in (int, float) and probability == shares[label] >= max(shares.values()) - rounding
