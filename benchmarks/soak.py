"""Kills a training run again and again, starts it again, and compares its end with that of one left alone.

``kill -9`` comes at random moments of a life, from its start-up on, and one in three times while a checkpoint is being
written. Each life goes on from ``last``, or starts anew where nothing has been saved yet.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Case, report
from clip_m2df.training.checkpoints import BEST, FOLDER, LAST, PREVIOUS, read_checkpoint

# Some 20 s on two cores, half of it training: dropout, PPS's draws, augmentation, accumulation, a schedule.
RUN = (
    "--config=demo_5way1shot.yaml",
    "--data.batch_size=2",
    "--data.n_query=1",
    "--data.validate_every=9",
    "--data.val_episodes=50",
    "--model.milestones=[20]",
    "--checkpoint.every=2",
    "--trainer.max_steps=60",
    "--trainer.enable_progress_bar=false",
)
WORKERS = (0, 2)


def cases(kills: int = 20, run: Sequence[str] = RUN, *, seed: int = 0) -> Iterator[Case]:
    """A case a number of workers; within the bar if the tensors are equal bit for bit.

    Args:
        kills: how often a run is killed.
        run: options of ``fit``.
        seed: of the moments.
    """
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name) / "alone"
        started = time.perf_counter()
        with start(alone, run, WORKERS[0]) as process:
            wait_for(process, (alone / FOLDER / LAST).exists)
            first = time.perf_counter() - started
            if process.wait():
                raise SystemExit("the run that is left alone failed")
        whole = time.perf_counter() - started
        for workers in WORKERS:
            folder = Path(name) / f"killed_{workers}"
            rng = np.random.default_rng([seed, workers])
            began = time.perf_counter()
            deaths = [kill_one(folder, run, workers, rng, first, whole) for _ in range(kills)]
            # The last of them may have come after the end.
            status = 0 if ended(folder, alone) else finish(folder, run, workers)
            different = differences(alone, folder)
            yield report(
                f"{kills} kills, {workers} workers",
                time.perf_counter() - began,
                whole,
                kills=kills,
                while_writing=sum(writing for writing, _ in deaths),
                steps=" ".join(str(step) for _, step in deaths),
                different=", ".join(different[:5]) or "nothing",
                within_bar=not different and not status,
            )


def start(folder: Path, run: Sequence[str], workers: int) -> "subprocess.Popen[bytes]":
    """Start a life of the run in a folder."""
    options = [*run, f"--data.num_workers={workers}", f"--trainer.default_root_dir={folder}"]
    if any((folder / FOLDER / name).exists() for name in (LAST, PREVIOUS)):
        options.append("--ckpt_path=last")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "clip_m2df", "fit", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(folder: Path, run: Sequence[str], workers: int) -> int:
    """Leave a run alone until its end; its status."""
    with start(folder, run, workers) as process:
        return process.wait()


def ended(folder: Path, alone: Path) -> bool:
    """Whether a run has come to the end of the one that was left alone."""
    last = folder / FOLDER / LAST
    return last.exists() and not compare(*(read_checkpoint(path) for path in (last, alone / FOLDER / LAST)))


def wait_for(process: "subprocess.Popen[bytes]", event: Callable[[], bool]) -> None:
    """Wait for something, or for the end of the process."""
    while process.poll() is None and not event():
        time.sleep(0.001)


def writes(folder: Path) -> bool:
    """Whether a checkpoint is being written, or its writer was killed."""
    return any((folder / FOLDER).glob("*.part"))


def kill_one(
    folder: Path, run: Sequence[str], workers: int, rng: np.random.Generator, first: float, whole: float
) -> tuple[bool, int]:
    """Let a run live for a while and kill it.

    Args:
        folder: the run's.
        run: options of ``fit``.
        workers: processes that decode.
        rng: draws the moment.
        first: seconds until the first checkpoint of the run that is left alone.
        whole: seconds of all of it.

    Returns:
        Whether a checkpoint was being written, and the step of the last one.
    """
    aimed = rng.random() < 1 / 3
    # A life in which nothing can be saved yet is no use; one that comes to its end is started again, to no effect.
    moment = rng.uniform(0.3 * first, first + 0.2 * (whole - first))
    with start(folder, run, workers) as process:
        if aimed:
            # Not the first that comes: a run of such deaths would stand still.
            for _ in range(int(rng.integers(2, 5))):
                wait_for(process, lambda: not writes(folder))
                wait_for(process, lambda: writes(folder))
        else:
            end = time.perf_counter() + moment
            wait_for(process, lambda: time.perf_counter() > end)
        process.kill()
        process.wait()
    last = folder / FOLDER / LAST
    return writes(folder), int(read_checkpoint(last)["global_step"]) if last.exists() else 0


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between the last and the best checkpoints of two runs."""
    return [
        f"{name}{key}"
        for name in (LAST, BEST)
        for key in compare(*(read_checkpoint(folder / FOLDER / name) for folder in (one, other)))
    ]


def compare(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two checkpoints differ in weights, optimiser, schedule, step, or the best validation so far."""
    flat = [dict(flatten(wanted(checkpoint))) for checkpoint in (one, other)]
    names = flat[0].keys() | flat[1].keys()
    return sorted(name for name in names if not same(flat[0].get(name), flat[1].get(name)))


def wanted(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same of a checkpoint."""
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("RunCheckpoint"))
    found = {name: state[name] for name in ("best_model_score", "validated")}
    return found | {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    }


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tables and lists, with their names."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from flatten(part, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for key, part in enumerate(value):
            yield from flatten(part, f"{name}/{key}")
    else:
        yield name, value


def same(one: Any, other: Any) -> bool:
    """Equal bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    return type(one) is type(other) and bool(one == other)
