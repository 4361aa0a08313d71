"""All runs of a study: those that are not done yet, and what they have in common before them."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, as_completed, wait
from contextlib import contextmanager
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from clip_m2df.errors import UserError
from study.play import encode_videos, play, render_videos
from study.results import Cell, Record, append, chosen_rate, read_results
from study.settings import Run, Settings, knobs_of

# The parts whose heads train on features that are kept.
FROZEN = ("main", "heads")


def run_study(settings: Settings, results: Path, store: Path, pool: Executor) -> None:
    """Run what is not done yet. Each run is written down when it is done, so that a study that was stopped goes on.

    Args:
        settings: what to run.
        results: the file of results, which is made if need be.
        store: a folder for features and weights that runs share.
        pool: where to run it.
    """
    records = read_results(results) if results.exists() else []
    if to_do(settings, records):
        with _alone(results):
            _run(settings, records, results, store, pool)


@contextmanager
def _alone(results: Path) -> Iterator[None]:
    """Two studies that write one file would do all twice, and lose lines."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another study is writing {results}: wait for its end, or end it") from error
        yield


def _run(settings: Settings, records: list[Record], results: Path, store: Path, pool: Executor) -> None:
    # What is done needs no videos.
    waiting = {run.part for run in to_do(settings, records)}
    parts = {name: part for name, part in settings.parts.items() if name in waiting}
    render_videos(dataclasses.replace(settings, parts=parts))
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        videos = [video for name in FROZEN if name in parts for video in _videos(settings, name)]
        task = progress.add_task("encoding videos", total=len(videos))
        for encoded in as_completed([pool.submit(encode_videos, run, settings, store, test) for run, test in videos]):
            encoded.result()
            progress.advance(task)
        task = progress.add_task("runs", total=settings.count())
        pending: dict[Future[list[Record]], Run] = {}
        # What there is to measure follows from the choices.
        while runs := to_do(settings, records):
            progress.update(task, completed=len([*_runs(settings, records)]) - len(runs))
            pending |= {pool.submit(play, run, settings, store): run for run in runs if run not in pending.values()}
            for finished in wait(pending, return_when=FIRST_COMPLETED).done:
                del pending[finished]
                for record in finished.result():
                    append(results, record)
                    records.append(record)
        progress.update(task, completed=settings.count())


def _videos(settings: Settings, name: str) -> list[tuple[Run, str]]:
    """Runs of a frozen tower that between them see all videos, in training (an empty name) and in the tests."""
    part = settings.parts[name]
    row = next(iter(part.knob_rows), next(iter(part.rows)))
    # The first of the tests that play the same videos.
    tests: dict[frozenset[tuple[str, float]], str] = {}
    for test, options in part.tests(row).items():
        tests.setdefault(frozenset(knobs_of(options).items()), test)
    return [
        (Run(name, "measure", family, row, seed, part.learning_rates[0]), test)
        for family in part.families
        for seed, test in [
            *((seed, "") for seed in settings.seeds),
            *((settings.seeds[0], test) for test in tests.values()),
        ]
    ]


def to_do(settings: Settings, records: Sequence[Record]) -> list[Run]:
    """The runs of which a record is missing; the measuring ones of a row only once its learning rate is chosen."""
    known = {_key(record) for record in records}
    return [run for run in _runs(settings, records) if not known.issuperset(_keys(run, settings))]


def current(settings: Settings, records: Sequence[Record]) -> list[Record]:
    """The records of these settings' own runs, in the order of the rows: others have been left behind by changes."""
    latest = {_key(record): record for record in records}
    keys = [key for run in _runs(settings, records) for key in _keys(run, settings)]
    return [latest[key] for key in keys if key in latest]


def _runs(settings: Settings, records: Sequence[Record]) -> Iterator[Run]:
    for part_name, part in settings.parts.items():
        for family in part.families:
            for name in part.own(family):
                if not part.trains(name):
                    yield Run(part_name, "measure", family, name, settings.seeds[0], None)
                    continue
                grid = [
                    Run(part_name, "choose", family, name, settings.choosing_seed, rate) for rate in part.learning_rates
                ]
                yield from grid
                keys = {key for run in grid for key in _keys(run, settings)}
                tried = [record for record in records if _key(record) in keys]
                if len({record.lr for record in tried}) == len(grid):
                    rate = chosen_rate(tried, Cell(part_name, family, part.n_shots[0], name))
                    for seed in settings.seeds:
                        yield Run(part_name, "measure", family, name, seed, rate)


def _key(record: Record) -> tuple[str, Cell, int, str]:
    return record.purpose, record.cell, record.seed, record.settings


def _keys(run: Run, settings: Settings) -> list[tuple[str, Cell, int, str]]:
    """Of all records that a run makes."""
    digest = run.digest(settings)
    return [
        (run.purpose, Cell(run.part, run.family, n_shot, row), run.seed, digest) for n_shot, row in run.tested(settings)
    ]
