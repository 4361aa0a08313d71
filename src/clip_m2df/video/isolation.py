"""Runs work on many videos in processes of their own: a decoder that crashes or hangs costs its file only."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

Item = TypeVar("Item")


Result = TypeVar("Result")


class Lost(str):
    """Why there is no result: the process crashed, or was ended because it took too long."""


def isolated_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, timeout: float
) -> Generator[tuple[Item, Result | Lost], None, None]:
    """Apply a function to each item in worker processes, which are replaced when one is lost.

    Args:
        function: at the top of a module, so that a new process finds it. An error that it raises is raised here.
        items: what to apply it to; they are taken as workers become free.
        workers: processes.
        timeout: seconds after which an item is given up and its process ended.

    Yields:
        Each item with its result, as they are ready, in any order.
    """
    remaining = iter(items)
    # Not forked: a forked process inherits locks of threads that it doesn't have, and decord hangs.
    with ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[Any], Item] = {}
        try:
            while True:
                for item in itertools.islice(remaining, 2 * workers - len(running)):
                    running[pool.schedule(function, args=[item], timeout=timeout)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _outcome(future, timeout)
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


def _outcome(future: Future[Result], timeout: float) -> Result | Lost:
    try:
        return future.result()
    except TimeoutError:
        return Lost(f"the decoder hangs: not done after {timeout:g} s")
    except ProcessExpired as error:
        return Lost(f"the decoder crashed ({_ending(error.exitcode)})")


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"
