"""Runs work on many videos in processes of their own: a decoder that crashes or hangs costs its file only."""

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class Unreadable(str):
    """Why there is nothing of a video: it can't be read, or the process crashed on it or took too long."""


def isolated_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int | None, timeout: float
) -> Generator[tuple[Item, Result | Unreadable], None, None]:
    """Apply a function to each item in worker processes, which are replaced when one is lost.

    Each worker computes on one thread, and what it prints to stderr is dropped.

    Args:
        function: At the top of a module, so that a new process finds it. An error that it raises is raised here.
        items: What to apply it to; they are taken as workers become free.
        workers: Processes; as many as there are cores by default.
        timeout: Seconds after which an item is given up and its process ended.

    Yields:
        Each item with its result, as they are ready, in any order.
    """
    remaining = iter(items)
    workers = workers or os.cpu_count() or 1
    # Not forked: a forked process inherits locks of threads that it doesn't have, and decord hangs.
    context = multiprocessing.get_context("spawn")
    with ProcessPool(max_workers=workers, context=context, initializer=_start_worker) as pool:
        running: dict[Future[Any], Item] = {}
        try:
            while True:
                for item in itertools.islice(remaining, 2 * workers - len(running)):
                    running[pool.schedule(function, args=[item], timeout=timeout)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _result_of(future, timeout)
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


def _start_worker() -> None:
    # The workers are the parallelism. This holds for torch once it is imported, and it may be already, by the script.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    # Decoders print what they think of a file, right across a progress bar.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def _result_of(future: Future[Result], timeout: float) -> Result | Unreadable:
    try:
        return future.result()
    except TimeoutError:
        return Unreadable(f"the decoder hangs: not done after {timeout:g} s")
    except ProcessExpired as error:
        code = error.exitcode or 0
        ending = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Unreadable(f"the decoder crashed ({ending})")
