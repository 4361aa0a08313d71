"""All that this project claims or aims at on a GPU, in one run of 8 minutes at most: a row of a table each.

These are the cases of the other benchmarks on CUDA, and whether two trainings from one start agree. A case begins with
the name of its benchmark, whose docstring says what its columns are. A part that fails is a row with its error, and the
others go on; after 8 minutes no further part is begun. Without a GPU everything runs in small on the CPU, which shows
that it works and nothing more. Of the package's dependencies decord, wandb and jsonargparse are not needed.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import adapters, evaluation, evaluation_head, matching, predict, train_step
from benchmarks.clips import KINETICS
from benchmarks.timing import Case, report
from benchmarks.train_step import ON_CPU, ON_CUDA, TOWERS, RandomCLIP, Setting, Step, random_batch, time_steps

MOST_SECONDS = 480.0


def cases(most_seconds: float = MOST_SECONDS if torch.cuda.is_available() else math.inf) -> Iterator[Case]:
    """The machine, what each part finds, and how long all took.

    Args:
        most_seconds: after which no part is begun.
    """
    # cuBLAS repeats its results only with this, and reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    started = time.perf_counter()
    on_cuda = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_cuda else "no GPU, all in small"
    yield {"case": f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}"}
    for name, measure in parts(on_cuda):
        if time.perf_counter() - started > most_seconds:
            yield {"case": name, "error": f"not begun after {most_seconds:.0f} s", "within_bar": False}
            continue
        try:
            for case in measure():
                yield case | {"case": f"{name}: {case['case']}"}
        except Exception as error:  # of whatever kind: the machine may be lent once
            yield {"case": name, "error": f"{type(error).__name__}: {error!s:.300}", "within_bar": False}
    took = time.perf_counter() - started
    yield {"case": "all of it", "ours": took, "within_bar": took <= most_seconds}


def parts(on_cuda: bool) -> list[tuple[str, Callable[[], Iterable[Case]]]]:
    """What is measured, by the names of the benchmarks; what has an aim of its own on a GPU comes first."""
    device, setting = ("cuda", ON_CUDA) if on_cuda else ("cpu", ON_CPU)
    episode: dict[str, Any] = {"n_shot": 5, "n_query": setting.n_query, "frames": setting.frames}
    less: dict[str, Any] = {} if on_cuda else {"n_episodes": 50, "sample": 3}
    otam: dict[str, Any] = {} if on_cuda else {"frames": [8], "repeat": 1}
    clips: dict[str, Any] = {"kinds": [KINETICS], "n_clips": 32, "repeat": 2, "workers": os.cpu_count()}
    if not on_cuda:
        few = {"n_clips": 2, "n_short": 2, "n_overlap": 20, "sleep": 0.001, "size": setting.size}
        clips = {"kinds": [predict.SHORT], "repeat": 1, **few}
    return [
        *(("train_step", partial(_alone, measure)) for measure in train_step.tasks()),
        *(("determinism", partial(_alone, partial(two_runs, tower, setting))) for tower in TOWERS),
        ("adapters, 5-way 5-shot", partial(adapters.cases, setting.size, **episode)),
        ("matching", partial(matching.cases, device=device, **otam)),
        ("evaluation_head", partial(evaluation_head.cases, device=device, **less)),
        ("predict", partial(predict.cases, device=device, **clips)),
        ("evaluation", partial(evaluation.cases, **less)),
    ]


def _alone(measure: Callable[[], Case]) -> Iterator[Case]:
    yield measure()


def two_runs(tower: str, setting: Setting, repeat: int = 5) -> Case:
    """Train twice from one start, with torch's deterministic algorithms and with its usual ones.

    ``ours`` is a step's time with the former, ``plain`` with the latter; ``off`` and ``plain_off`` are the largest
    differences of a weight between the two runs, of which the former has to be 0.
    """
    setting = replace(setting, repeat=repeat)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        ours, off = _run_twice(tower, setting)
        torch.use_deterministic_algorithms(False)
        plain, plain_off = _run_twice(tower, setting)
    finally:
        torch.use_deterministic_algorithms(before)
    return report(f"{tower}, {repeat + 1} steps", ours, plain, off=off, plain_off=plain_off, within_bar=off == 0)


def _run_twice(tower: str, setting: Setting) -> tuple[float, float]:
    """Seconds of a step in the second run, and the largest difference of a weight."""
    weights: list[dict[str, Tensor]] = []
    seconds = 0.0
    for _ in range(2):
        step = Step(RandomCLIP(tower, setting), setting.device, setting.dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of dropout
            seconds, _ = time_steps(step, random_batch(setting), setting.repeat)
        weights.append({name: weight.cpu() for name, weight in step.model.state_dict().items()})
    first, second = weights
    return seconds, max(float((weight - second[name]).abs().max()) for name, weight in first.items())
