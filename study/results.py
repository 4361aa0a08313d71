"""The study's results: lines of JSON, and what is estimated from them.

A line is what a run says of one row and number of shots; the file is only ever appended to. Where two lines are of the
same, the later one counts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import sem, t

from clip_m2df.errors import UserError
from clip_m2df.evaluation.metrics import Z_95
from clip_m2df.files import read_bytes

P = ParamSpec("P")
T = TypeVar("T")

PARTS = {
    "main": "frozen tower",
    "tower": "tower trained too",
    "adapters": "adapters compared",
    "heads": "further heads and prompts",
}
PURPOSES = ("choose", "measure")
CLEAN = "clean"
# What the differences are against, by part.
REFERENCE = "CLIP-M²DF"
REFERENCES = {"main": REFERENCE, "tower": REFERENCE, "adapters": "LoRA", "heads": REFERENCE}
SHARES = ("pps_accuracy", "view_agreement", "local_accuracy", "global_accuracy")
# Tests beside the clean one and those with a knob and its level.
OPEN, TWINS, GROUPED = "open set", "twins, random", "twins, grouped"
TESTS = (OPEN, TWINS, GROUPED)
# What further metrics of a test begin with, and those of the validation that chooses a score.
METRICS = ("auroc/", "oscr/", "fpr95/", "twin_share", "accuracy_twins", "accuracy_without_twins")
ON_VAL = "val/auroc/"
# Of what is measured of sets, the 95 % intervals over draws.
INTERVALS = {
    "coverage": "interval",
    "unknown_coverage": "unknown_interval",
    "false_rejection": "false_rejection_interval",
}


class NotMeasuredError(UserError):
    """What was asked for has not been measured, or not with all seeds."""


class Cell(NamedTuple):
    """What seeds are repetitions of."""

    part: str
    family: str
    n_shot: int
    row: str

    def __str__(self) -> str:
        return f"{self.row!r} on {self.family}, {shots(self.n_shot)}, {PARTS.get(self.part, self.part)}"


@dataclass(frozen=True)
class Point:
    """A validation on the way.

    Attributes:
        episodes: trained on until then.
        accuracy: on val.
    """

    episodes: int
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What a test gave; accuracies and agreement are shares of 1.

    Attributes:
        correct: a digit an episode, how many of its queries were classified rightly.
        n_queries: of an episode.
        pps_accuracy: how often PPS chose the query's own class.
        view_agreement: how often both views predicted the same class.
        local_accuracy: of the local view alone.
        global_accuracy: of the global view alone.
        metrics: further ones of the test by their names there, such as ``auroc/distance``, and with unknown queries
            those of val by theirs, such as ``val/auroc/distance``.
        options: of the test, on top of those of its row.
    """

    correct: str
    n_queries: int
    pps_accuracy: float | None = None
    view_agreement: float | None = None
    local_accuracy: float | None = None
    global_accuracy: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    options: str = ""

    def __post_init__(self) -> None:
        _require(type(self.n_queries) is int and 0 < self.n_queries < 10, "n_queries is not from 1 to 9")
        _require(isinstance(self.correct, str) and self.correct.isascii(), "correct is no text of digits")
        _require(self.correct.isdigit(), "correct is not one digit an episode")
        _require(int(max(self.correct)) <= self.n_queries, "more queries are correct than there are")
        for name in SHARES:
            value = getattr(self, name)
            _require(value is None or _is_number(value, most=1), f"{name} is no share")
        for name, value in self.metrics.items():
            _require(name.startswith((*METRICS, ON_VAL)) and _is_number(value, most=1), f"metric {name} is no share")


@dataclass(frozen=True)
class Record:
    """What a run says of one row and number of shots.

    Attributes:
        part: of the study, see ``PARTS``.
        purpose: ``choose``, one rate of the grid, known by its accuracy on val; or ``measure``, with tests.
        family: of the embedded benchmark.
        n_shot: support videos a class.
        row: which method.
        seed: of the training.
        lr: the learning rate; None where nothing was trained.
        command: that repeats it: the training, or where nothing is trained the clean test.
        versions: of the packages.
        seconds: that it took.
        settings: a digest of what it depends on.
        curve: its validations, in order; empty where nothing was trained, or with another number of shots.
        tests: by name: ``clean``, a knob and its level, such as ``noise=0.2``, or one of ``TESTS``.
        weights_of: the row whose training it was tested from; None: its own.
        test_command: that repeats the clean test after ``command``, if that is a training.
    """

    part: str
    purpose: str
    family: str
    n_shot: int
    row: str
    seed: int
    lr: float | None
    command: str
    versions: Mapping[str, str]
    seconds: float
    settings: str
    curve: Sequence[Point] = ()
    tests: Mapping[str, Outcome] = field(default_factory=dict)
    weights_of: str | None = None
    test_command: str = ""

    def __post_init__(self) -> None:
        _require(self.part in PARTS, f"part {self.part!r} is none of {', '.join(PARTS)}")
        _require(self.purpose in PURPOSES, f"purpose {self.purpose!r} is none of {', '.join(PURPOSES)}")
        for name in ("family", "row", "command", "settings"):
            _require(isinstance(getattr(self, name), str), f"{name} is no text")
        _require(isinstance(self.versions, dict), "versions are not by package")
        for name, least in (("n_shot", 1), ("seed", 0)):
            value = getattr(self, name)
            _require(type(value) is int and value >= least, f"{name} is no whole number from {least}")
        _require(_is_number(self.seconds), "seconds are no number")
        _require(self.lr is None or _is_number(self.lr), "lr is no number")
        _require(all(_is_number(p.episodes) and _is_number(p.accuracy, most=1) for p in self.curve), "a curve is odd")
        if self.purpose == "choose":
            _require(self.lr is not None and bool(self.curve), "a choice needs lr and a curve")
        else:
            _require(CLEAN in self.tests, f"a measurement needs the test {CLEAN!r}")
        for test in self.tests:
            known = test in (CLEAN, *TESTS) or bool(_KNOB.fullmatch(test))
            _require(known, f"test {test!r} is none of {', '.join(TESTS)}, and no knob and level")

    @property
    def cell(self) -> Cell:
        """What it is a repetition of."""
        return Cell(self.part, self.family, self.n_shot, self.row)

    @property
    def repeats(self) -> bool:
        """Whether seeds make a difference to it."""
        return self.lr is not None or self.weights_of is not None


@dataclass(frozen=True)
class Coverage:
    """How often sets of labels hold the truth: what ``python -m study coverage`` says of one setting; shares of 1.

    Attributes:
        family: of the embedded benchmark.
        n_way: classes of an episode.
        n_shot: support videos a class.
        error: the rate at which a set may miss the truth.
        draws: of classes for calibration and test.
        seed: of the draws.
        coverage: how often the set of a query of a known class holds it.
        interval: half the width of its 95 % interval, over the draws.
        unknown_coverage: how often the set of a query of an unknown class holds "none of these".
        unknown_interval: as ``interval``.
        set_size: labels in a set, on average.
        full_share: of sets with all labels.
        empty_share: of sets without any.
        false_rejection: how often the set of a query of a known class is "none of these" alone.
        false_rejection_interval: as ``interval``.
        command: that repeats it.
        versions: of the packages.
    """

    family: str
    n_way: int
    n_shot: int
    error: float
    draws: int
    seed: int
    coverage: float
    interval: float
    unknown_coverage: float
    unknown_interval: float
    set_size: float
    full_share: float
    empty_share: float
    false_rejection: float
    false_rejection_interval: float
    command: str
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        for name in ("family", "command"):
            _require(isinstance(getattr(self, name), str), f"{name} is no text")
        for name in ("n_way", "n_shot", "draws"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, f"{name} is no whole number from 1")
        _require(_is_number(self.set_size), "set_size is no number")
        for name, value in asdict(self).items():
            if name in ("error", "coverage") or name.endswith(("interval", "_coverage", "_share", "_rejection")):
                _require(_is_number(value, most=1), f"{name} is no share")


class Estimate(NamedTuple):
    """A mean over seeds and episodes; shares of 1.

    Attributes:
        mean: over both.
        interval: half the width of the 95 % interval: over episodes, ``1.96 σ / √n`` of the means over the seeds; of a
            difference over the seeds too, ``t s / √seeds`` of their own means, the squares added.
        lowest: of the seeds' own means.
        highest: of the seeds' own means.
        seeds: how many.
        episodes: how many.
    """

    mean: float
    interval: float
    lowest: float
    highest: float
    seeds: int
    episodes: int

    @property
    def established(self) -> bool:
        """Of a difference: it is larger than its interval."""
        return abs(self.mean) > self.interval


def read_results(path: Path) -> list[Record]:
    """Read all lines but a last one without its end, which an interrupted run left.

    Raises:
        UserError: there is no such file, or another line is broken.
    """
    return _read(path, _record)


def read_coverage(path: Path) -> list[Coverage]:
    """As :func:`read_results`, the lines on how often sets hold the truth; the later of two of a setting counts."""
    lines = _read(path, lambda entry: Coverage(**entry))
    return list({(line.family, line.n_way, line.n_shot, line.error): line for line in lines}.values())


def _read(path: Path, of: Callable[[Any], T]) -> list[T]:
    lines = []
    whole, _, _ = read_bytes(path, "file of results").rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            lines.append(of(json.loads(line.replace(b"data.train_views", b"data.train_augmentations"))))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is broken ({error}): remove it, and run the study again") from error
    return lines


def append(path: Path, record: Record) -> None:
    """Write a line, and wait until it is on the disk. One process at a time may do so.

    Args:
        path: of the file, which is made if need be.
        record: the line.
    """
    entry = {key: value for key, value in asdict(record).items() if key not in ("weights_of", "test_command") or value}
    for test in entry["tests"].values():
        for name in (*SHARES, "metrics", "options"):
            if test[name] in (None, {}, ""):
                del test[name]
    line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        # What an interrupted run left would become part of this line.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def rates(records: Iterable[Record], cell: Cell) -> dict[float, float]:
    """The accuracy on val by learning rate, from the smallest, a mean where a rate was tried with several seeds.

    Of a training it is the mean over the second half of its validations: one alone differs from the next by more than
    rates do.
    """
    tried: dict[float, dict[int, float]] = {}
    for record in records:
        if record.purpose == "choose" and record.cell == cell:
            assert record.lr is not None
            late = [point.accuracy for point in record.curve[len(record.curve) // 2 :]]
            tried.setdefault(record.lr, {})[record.seed] = sum(late) / len(late)
    return {lr: sum(by_seed.values()) / len(by_seed) for lr, by_seed in sorted(tried.items())}


def chosen_rate(records: Iterable[Record], cell: Cell) -> float:
    """The learning rate with the highest accuracy on val; of equal ones the smallest.

    Raises:
        NotMeasuredError: none was tried.
    """
    tried = rates(records, cell)
    if not tried:
        raise NotMeasuredError(f"no learning rate was tried for {cell}: run the study to its end")
    return max(tried, key=tried.__getitem__)  # the first of equal ones


def measured(records: Iterable[Record], cell: Cell) -> dict[int, Record]:
    """The measurements of a cell by seed, from the smallest."""
    found = {record.seed: record for record in records if record.purpose == "measure" and record.cell == cell}
    return dict(sorted(found.items()))


def accuracy(records: Sequence[Record], cell: Cell, test: str = CLEAN) -> Estimate:
    """The accuracy of a cell.

    Raises:
        NotMeasuredError: a seed is missing, or the test.
        UserError: the seeds have other numbers of episodes.
    """
    return _estimate(*_correct(records, cell, test))


def difference(records: Sequence[Record], cell: Cell, test: str = CLEAN) -> Estimate:
    """By how much a row is more accurate than its part's reference, paired by episode and by seed.

    Where there is nothing to train, its one run is compared with each of the reference's.

    Args:
        records: of the study.
        cell: the row's.
        test: of both.

    Raises:
        NotMeasuredError: a seed is missing, or the test.
        UserError: the two have other numbers of episodes.
    """
    ours, n_queries = _correct(records, cell, test)
    reference = REFERENCES[cell.part]
    theirs, of_theirs = _correct(records, cell._replace(row=reference), test)
    if (ours.shape[1], n_queries) != (theirs.shape[1], of_theirs):
        raise UserError(
            f"{cell} was tested ({test}) on {ours.shape[1]} episodes of {n_queries} queries, {reference!r} on "
            f"{theirs.shape[1]} of {of_theirs}: remove the lines of one of them, and run the study again"
        )
    found = _estimate(ours - theirs, n_queries)
    return found._replace(interval=math.hypot(found.interval, _over_seeds((ours - theirs).mean(1) / n_queries)))


def between_tests(records: Sequence[Record], cell: Cell, test: str, against: str) -> Estimate:
    """By how much a row is more accurate in one test than in another, whose episodes are others; paired by seed.

    Args:
        records: of the study.
        cell: the row's.
        test: the one.
        against: the other.

    Raises:
        NotMeasuredError: a seed is missing, or a test.
    """
    (ours, n_queries), (theirs, of_theirs) = (_correct(records, cell, name) for name in (test, against))
    here, there = _estimate(ours, n_queries), _estimate(theirs, of_theirs)
    by_seed = ours.mean(1) / n_queries - theirs.mean(1) / of_theirs
    over_episodes = math.hypot(here.interval, there.interval)
    interval = math.hypot(over_episodes, _over_seeds(by_seed))
    mean = here.mean - there.mean
    return Estimate(mean, interval, float(by_seed.min()), float(by_seed.max()), here.seeds, here.episodes)


def metric(records: Sequence[Record], cell: Cell, test: str, name: str) -> tuple[float, float, float]:
    """The mean over the seeds of one of ``SHARES`` or a test's further metrics, and the lowest and highest of them.

    Raises:
        NotMeasuredError: a seed is missing, or the test, or it has no such metric.
    """
    found = [getattr(o, name) if name in SHARES else o.metrics.get(name) for o in _outcomes(records, cell, test)]
    values: list[float] = [value for value in found if value is not None]
    if len(values) < len(found):
        raise NotMeasuredError(f"{cell} has no {name} in the test {test!r}: ask for another, or for a row that has")
    return sum(values) / len(values), min(values), max(values)


class ChosenScore(NamedTuple):
    """The score that tells known from unknown queries best on val, by the mean AUROC over the seeds.

    Attributes:
        name: of the score.
        auroc: its, on val.
        lead: by how much that is above the next score's.
    """

    name: str
    auroc: float
    lead: float


def chosen_score(records: Sequence[Record], cell: Cell) -> ChosenScore:
    """Of a cell with unknown queries in a test.

    Raises:
        NotMeasuredError: there is no such test, or a seed is missing.
    """
    outcomes = _outcomes(records, cell, OPEN)
    names = [name for name in outcomes[0].metrics if name.startswith(ON_VAL)]
    found = {name.removeprefix(ON_VAL): metric(records, cell, OPEN, name)[0] for name in names}
    if len(found) < 2:
        raise NotMeasuredError(f"{cell} has no scores on val to choose from: run the study again")
    best, second = sorted(found, key=found.__getitem__, reverse=True)[:2]  # the first of equal ones
    return ChosenScore(best, found[best], found[best] - found[second])


def if_measured(estimate: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """An estimate; None where something that it needs was not measured."""
    try:
        return estimate(*args, **kwargs)
    except NotMeasuredError:
        return None


def knobs(records: Iterable[Record]) -> dict[str, list[str]]:
    """The tests by knob, in order of first appearance, each from the lowest level; without ``clean``."""
    found: dict[str, set[str]] = {}
    for record in records:
        for test in record.tests:
            if _KNOB.fullmatch(test):
                found.setdefault(test.partition("=")[0], set()).add(test)
    return {knob: sorted(tests, key=level) for knob, tests in found.items()}


def level(test: str) -> float:
    """Of the knob; 0 of the test ``clean``."""
    return float(test.partition("=")[2] or 0)


def shots(n_shot: int) -> str:
    """In words."""
    return f"{n_shot} shot{'s' if n_shot != 1 else ''}"


# A knob and its level.
_KNOB = re.compile(r"\w+=\d+(\.\d+)?")


def _outcomes(records: Sequence[Record], cell: Cell, test: str) -> list[Outcome]:
    """Of a test, a seed each; all seeds of the study's part, or one where there is nothing to train."""
    found = measured(records, cell)
    if not found:
        raise NotMeasuredError(f"nothing was measured of {cell}: check the names, or run the study to its end")
    wanted = {r.seed for r in records if r.purpose == "measure" and r.part == cell.part and r.repeats}
    alone = len(found) == 1 and not any(record.repeats for record in found.values())
    missing = sorted(wanted - found.keys())
    if missing and not alone:
        raise NotMeasuredError(f"{cell} was not measured with seed {missing[0]}: run the study to its end")
    for seed, record in found.items():
        if test not in record.tests:
            raise NotMeasuredError(
                f"{cell} has no test {test!r} with seed {seed}: ask for another, or run the study again"
            )
    return [record.tests[test] for record in found.values()]


def _correct(records: Sequence[Record], cell: Cell, test: str) -> tuple[NDArray[np.int64], int]:
    """How many queries of each episode, ``(seeds, episodes)``, and of how many."""
    outcomes = _outcomes(records, cell, test)
    if len({(len(outcome.correct), outcome.n_queries) for outcome in outcomes}) > 1:
        raise UserError(f"the seeds of {cell} had other episodes ({test}): remove its lines, and run the study again")
    digits = np.array([np.frombuffer(outcome.correct.encode(), np.uint8) for outcome in outcomes])
    return digits.astype(np.int64) - ord("0"), outcomes[0].n_queries


def _estimate(counts: NDArray[np.int64], n_queries: int) -> Estimate:
    """From ``(seeds, episodes)``. Whole numbers until the last division, so that equal runs differ by 0."""
    seeds, episodes = counts.shape
    by_seed = counts.sum(1) / (episodes * n_queries)
    by_episode = counts.sum(0)
    # The square of the number of episodes times the variance.
    scatter = episodes * int((by_episode**2).sum()) - int(by_episode.sum()) ** 2
    interval = Z_95 * math.sqrt(scatter) / episodes / (seeds * n_queries) / math.sqrt(episodes)
    mean = float(counts.sum() / (counts.size * n_queries))
    return Estimate(mean, interval, float(by_seed.min()), float(by_seed.max()), seeds, episodes)


def _over_seeds(by_seed: NDArray[np.float64]) -> float:
    """Half the width of the seeds' two-sided 95 % interval, by Student's distribution; 0 of one."""
    return float(t.ppf(0.975, len(by_seed) - 1) * sem(by_seed)) if len(by_seed) > 1 else 0.0


def _record(entry: Any) -> Record:
    curve = tuple(Point(**point) for point in entry["curve"])
    tests = {name: Outcome(**outcome) for name, outcome in entry.get("tests", {}).items()}
    return Record(**{**entry, "curve": curve, "tests": tests})


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _is_number(value: object, most: float = math.inf) -> bool:
    """Whether it is a finite one from 0 to ``most``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most and value != math.inf
