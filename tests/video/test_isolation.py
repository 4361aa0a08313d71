import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from clip_m2df.video.isolation import Unreadable, isolated_map, isolated_stream, read_ahead


def double(item: int) -> int:
    return 2 * item


def double_or_worse(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 5:
        threading.Event().wait()
    if item == 7:
        os._exit(3)
    return 2 * item


def refuse(item: int) -> int:
    raise ValueError(f"no {item}")


def note(item: tuple[int, str]) -> int:
    with open(item[1], "ab", buffering=0) as pipe:
        pipe.write(b".")
    return item[0]


def count_or_worse(end: int, then: int) -> Iterator[int]:
    yield from range(end)
    yield double_or_worse(then)


def count_then_refuse(end: int) -> Iterator[int]:
    yield from range(end)
    refuse(end)


def note_each(pipe: str) -> Iterator[bytes]:
    for number in itertools.count():
        note((number, pipe))
        yield bytes(1 << 20)


def say_and_count_threads(item: int) -> int:
    import torch

    os.write(2, b"what a decoder thinks of a file")
    return torch.get_num_threads()


@pytest.mark.parametrize(("workers", "count"), [(1, 20), (2, 20), (2, 0)])
def test_every_item_comes_with_its_result(workers: int, count: int) -> None:
    results = dict(isolated_map(double, range(count), workers=workers, timeout=60))
    assert results == {item: 2 * item for item in range(count)}


def test_a_worker_is_silent_and_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert dict(isolated_map(say_and_count_threads, [0, 1], workers=1, timeout=60)) == {0: 1, 1: 1}
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_what_crashes_or_hangs_costs_that_item_only() -> None:
    results = dict(isolated_map(double_or_worse, range(12), workers=2, timeout=1))
    lost = {item: str(result) for item, result in results.items() if isinstance(result, Unreadable)}
    assert lost == {
        3: "the decoder crashed (SIGKILL)",
        5: "the decoder hangs: not done after 1 s",
        7: "the decoder crashed (exit status 3)",
    }
    assert {item: results[item] for item in results.keys() - lost} == {
        item: 2 * item for item in range(12) if item not in lost
    }


def test_an_error_is_raised_here() -> None:
    with pytest.raises(ValueError, match="no 4"):
        list(isolated_map(refuse, [4], workers=1, timeout=60))
    assert not multiprocessing.active_children()


def test_closing_ends_the_workers() -> None:
    results = isolated_map(double_or_worse, [0, 5], workers=2, timeout=600)
    assert next(results) == (0, 0)
    results.close()
    assert not multiprocessing.active_children()


def test_items_are_taken_as_workers_become_free() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    results = isolated_map(double, items(), workers=1, timeout=60)
    got = dict(itertools.islice(results, 10))
    assert len(got) == 10
    assert all(result == 2 * item for item, result in got.items())
    assert len(taken) <= 12
    results.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_workers_go_on_while_nobody_asks(tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    taken = []

    def items() -> Iterator[tuple[int, str]]:
        for number in itertools.count():
            taken.append(number)
            yield number, pipe

    with open(os.open(pipe, os.O_RDWR), "rb", buffering=0) as told:
        results = isolated_map(note, items(), workers=1, timeout=60, ahead=5)
        first = next(results)[1]
        for _ in range(7):  # two for the worker and five ahead; this waits for the last of them
            assert told.read(1) == b"."
        assert len(taken) == 7
        assert first in taken
        results.close()


# As a stream


def test_a_stream_is_what_the_function_yields() -> None:
    assert list(isolated_stream(partial(range, 100), timeout=60)) == list(range(100))
    assert list(isolated_stream(partial(range, 0), timeout=60)) == []
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (3, "the decoder crashed (SIGKILL)"),
        (5, "the decoder hangs: not done after 1 s"),
        (7, "the decoder crashed (exit status 3)"),
    ],
)
@pytest.mark.parametrize("before", [0, 3])
def test_a_stream_that_crashes_or_hangs_ends_with_the_reason(then: int, reason: str, before: int) -> None:
    found = list(isolated_stream(partial(count_or_worse, before, then), timeout=1))
    assert found == [*range(before), reason]
    assert isinstance(found[-1], Unreadable)
    assert not multiprocessing.active_children()


def test_an_error_of_a_stream_is_raised_here_after_what_came_before() -> None:
    stream = isolated_stream(partial(count_then_refuse, 2), timeout=60)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="no 2"):
        next(stream)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs there")
def test_a_stream_is_one_item_ahead_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    stream = isolated_stream(partial(note_each, pipe), timeout=60)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    assert len(next(stream)) == 1 << 20
    assert len(next(stream)) == 1 << 20
    (process,) = multiprocessing.active_children()
    stream.close()
    assert not process.is_alive()
    assert 2 <= len(os.read(reader, 100)) <= 3
    os.close(reader)


# In a thread


def test_what_is_read_ahead_comes_in_its_order() -> None:
    assert list(read_ahead(range(100), 3)) == list(range(100))
    assert list(read_ahead([], 3)) == []


def test_items_are_read_while_nobody_asks_and_no_more_than_may_wait() -> None:
    reached = threading.Semaphore(0)
    taken = []

    def items() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            reached.release()
            yield item

    results = read_ahead(items(), 3)
    assert next(results) == 0
    for _ in range(5):  # the first, three that wait, and one that finds no place
        assert reached.acquire(timeout=60)
    assert taken == list(range(5))
    assert next(results) == 1
    assert reached.acquire(timeout=60)
    results.close()
    assert taken == list(range(6))


@pytest.mark.parametrize("error", [ValueError("no 4"), KeyboardInterrupt()])
def test_an_error_comes_after_what_was_read_before_it(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise error

    results = read_ahead(items(), 2)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(type(error)) as raised:
        next(results)
    assert raised.value is error


def test_an_end_waits_for_nothing_that_hangs() -> None:
    stuck, free = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        stuck.set()
        free.wait(60)
        yield 1

    results = read_ahead(items(), 4)
    assert next(results) == 0
    assert stuck.wait(60)
    results.close()
    assert not free.is_set()
    free.set()
