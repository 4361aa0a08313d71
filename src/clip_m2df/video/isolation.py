"""Runs work on many videos beside what needs its results: in a thread, or in processes of their own.

In a process a decoder that crashes or hangs costs its file only.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class Unreadable(str):
    """Why there is nothing of a video: it can't be read, or the process crashed on it or took too long."""


def isolated_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int | None,
    timeout: float,
    ahead: int = 0,
) -> Generator[tuple[Item, Result | Unreadable], None, None]:
    """Apply a function to each item in worker processes, which are replaced when one is lost.

    Each worker computes on one thread, and what it prints to stderr is dropped.

    Args:
        function: At the top of a module, so that a new process finds it. An error that it raises is raised here.
        items: What to apply it to; they are taken as workers become free.
        workers: Processes; as many as there are cores by default.
        timeout: Seconds after which an item is given up and its process ended.
        ahead: How many results may wait, beside those that the workers are at: with as many as are taken together, the
            workers go on while nobody asks.

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
                for item in itertools.islice(remaining, 2 * workers + ahead - len(running)):
                    running[pool.schedule(function, args=[item], timeout=timeout)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), _result_of(future, timeout)
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


def isolated_stream(
    function: Callable[[], Iterable[Result]], *, timeout: float
) -> Generator[Result | Unreadable, None, None]:
    """Yield what a function's iterable yields, in order, from a process of its own.

    The process is one item ahead, and ends when this generator does. What it prints to stderr is dropped.

    Args:
        function: As for :func:`isolated_map`, so too what it raises.
        timeout: Seconds without an item after which the process is ended.

    Yields:
        The items; and last the reason, if the process crashed or took too long.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_items, args=(function, sender), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        kind, found = _receive(receiver, None)  # once everything is imported
        while kind != "end":
            kind, found = _receive(receiver, timeout)
            if kind == "error":
                raise found
            if kind == "item":
                yield found
    except TimeoutError:
        yield Unreadable(_hangs(timeout))
    except EOFError:
        process.join()
        yield Unreadable(_crashed(process.exitcode))
    finally:
        process.kill()
        process.join()
        receiver.close()


def _receive(receiver: Connection, timeout: float | None) -> tuple[str, Any]:
    if not receiver.poll(timeout):
        raise TimeoutError
    try:
        found: tuple[str, Any] = receiver.recv()
    except OSError as error:  # it ended in the middle of an item
        raise EOFError from error
    return found


def _send_items(function: Callable[[], Iterable[Any]], sender: Connection) -> None:
    _start_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the main process, which ends this one
    sender.send(("start", None))
    try:
        for item in function():
            sender.send(("item", item))
    except Exception as error:
        sender.send(("error", error))
    else:
        sender.send(("end", None))


def read_ahead(items: Iterable[Item], most: int) -> Generator[Item, None, None]:
    """What an iterable yields, taken from it in a thread of its own before anybody asks.

    An error that it raises is raised here, after all that came before it. When this ends early, the thread ends with
    the item that it is at, and nothing waits for that: it may be a file on which a decoder hangs.

    Args:
        items: Taken in the thread alone.
        most: How many items may wait.
    """
    ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
    free = threading.Semaphore(most)
    ended = threading.Event()

    def take() -> None:
        try:
            for item in items:
                free.acquire()
                if ended.is_set():
                    return
                ready.put((True, item))
            ready.put((False, None))
        except BaseException as error:  # an interruption too
            ready.put((False, error))

    threading.Thread(target=take, daemon=True).start()
    try:
        while (found := ready.get())[0]:
            free.release()
            yield found[1]
        if found[1] is not None:
            raise found[1]
    finally:
        ended.set()
        free.release()


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
        return Unreadable(_hangs(timeout))
    except ProcessExpired as error:
        return Unreadable(_crashed(error.exitcode))


def _hangs(timeout: float) -> str:
    return f"the decoder hangs: not done after {timeout:g} s"


def _crashed(exitcode: int | None) -> str:
    code = exitcode or 0
    ending = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"the decoder crashed ({ending})"
