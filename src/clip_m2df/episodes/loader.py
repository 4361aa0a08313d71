"""Loads episodes in worker processes, and says which video it was where something goes wrong there."""

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clip_m2df.datasets.manifest import Split
from clip_m2df.episode import Episode
from clip_m2df.episodes.dataset import ReadEpisode
from clip_m2df.errors import UserError, some

# Of the message of a run that stops; each video has been named when it turned up.
MOST_NAMES = 100


class ReadingNow:
    """What each worker is reading, for the main process to see when a worker is lost.

    Args:
        workers: worker processes.
    """

    def __init__(self, workers: int) -> None:
        # Shared memory. A worker writes its own row only, a time and a process number in front of the name.
        self._rows = torch.zeros(workers, 4096, dtype=torch.uint8).share_memory_()

    def __call__(self, path: str) -> None:
        """Note that this worker starts to read a video; an empty path says that it has done."""
        worker = get_worker_info()
        if worker is None:
            return
        row = self._rows[worker.id]
        if not path:
            row[0] = ord("-")
            return
        note = f"+{time.monotonic()} {os.getpid()} {path}".encode(errors="surrogateescape")[: len(row) - 1] + b"\0"
        row[: len(note)] = torch.frombuffer(bytearray(note), dtype=torch.uint8)

    def paths(self) -> list[str]:
        """The videos being read, the longest waiting first."""
        return [path for reading, _, path in self._notes() if reading]

    def of(self, processes: Container[int]) -> str:
        """In words, what the first of certain processes that has read anything is reading, or has read last."""
        for reading, process, path in self._notes():
            if process in processes:
                return f"it was reading the video {path}" if reading else f"the last video that it read is {path}"
        return ""

    def _notes(self) -> list[tuple[bool, int, str]]:
        found = []
        for row in self._rows:
            note = bytes(row.tolist()).partition(b"\0")[0].decode(errors="surrogateescape")
            with suppress(ValueError):  # there is none yet, or its worker was killed while it wrote it
                start, process, path = note[1:].split(" ", 2)
                found.append((note[0] == "-", float(start), int(process), path))
        return [(not done, process, path) for done, _, process, path in sorted(found)]


class VideoLoader(DataLoader[Any]):
    """A ``DataLoader`` that ends with the video's name where a worker is stuck or killed.

    Args:
        dataset: it calls ``note`` with the path of each video, and with an empty one after it.
        note: what keeps these paths.
        receive: what to make of a batch in the main process.
        stuck_after: seconds without a batch after which a worker counts as stuck.
        num_workers: processes that decode.
        **options: of ``DataLoader``.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        note: ReadingNow,
        receive: Callable[[Any], Any],
        stuck_after: float,
        num_workers: int,
        **options: Any,
    ) -> None:
        super().__init__(
            dataset,
            num_workers=num_workers,
            timeout=stuck_after if num_workers else 0,
            worker_init_fn=_obey_parent_alone,
            **options,
        )
        self.receive = receive
        self.note = note

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches, as ``receive`` returns them.

        Raises:
            UserError: a worker is stuck or was killed.
        """
        batches: Any = None
        try:
            batches = super().__iter__()
            if self.num_workers:
                _ITERATORS[batches] = self.note
                _name_videos_of_killed_workers()
            yield from map(self.receive, batches)
        except UserError:
            _end_workers(batches)
            raise
        except Exception as error:  # a queue whose other end is gone fails in many ways
            batches = self._iterator if batches is None else batches
            processes = _processes(str(error))
            if not processes and isinstance(error, RuntimeError | OSError | EOFError | UnpicklingError):
                processes = {w.pid for w in getattr(batches, "_workers", []) if w.exitcode not in (None, 0)}
            if str(error).startswith("DataLoader timed out"):
                paths = self.note.paths()
                video = f"it was reading the video {paths[0]}" if paths else "it was reading no video"
                what = (
                    f"a worker hangs: nothing came for {self.timeout:g} s; {video}: {_FIND}; raise data.stuck_after if"
                    " it is only slow"
                )
            elif processes:
                what = _killed(processes, [self.note])
            else:
                raise
            _end_workers(batches)
            raise UserError(what) from error


_FIND = "clip-m2df check finds the videos that a decoder fails on"
# The loaders at work, by what torch iterates over.
_ITERATORS: WeakKeyDictionary[Any, ReadingNow] = WeakKeyDictionary()


def _processes(message: str) -> set[int]:
    """The workers that are gone by torch's own message; none if that says something else."""
    return set(map(int, re.findall(r"\d+", message))) if message.startswith("DataLoader worker (pid") else set()


def _killed(processes: Container[int], notes: Iterable[ReadingNow]) -> str:
    """What to say of workers that are gone, by what they read."""
    video = next((found for note in notes if (found := note.of(processes))), "it was reading no video")
    return f"a worker was killed; {video}: {_FIND}; lower data.num_workers if memory ran out"


def _name_videos_of_killed_workers() -> None:
    """Have the end of a worker raise a ``UserError``: torch's handler raises its own wherever the process just is."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    of_torch = signal.getsignal(signal.SIGCHLD)
    if not callable(of_torch) or isinstance(of_torch, _OnWorkersEnd):
        return
    signal.signal(signal.SIGCHLD, _OnWorkersEnd(of_torch))


class _OnWorkersEnd:
    """What is done where a child process has ended.

    Args:
        of_torch: torch's handler.
    """

    def __init__(self, of_torch: Callable[[int, Any], Any]) -> None:
        self.of_torch = of_torch

    def __call__(self, number: int, frame: Any) -> None:
        try:
            self.of_torch(number, frame)
        except RuntimeError as error:
            processes = _processes(str(error))
            for batches in list(_ITERATORS):
                if batches._shutdown and processes & {worker.pid for worker in batches._workers}:
                    return  # it was to end anyway
            if not processes:
                raise
            raise UserError(_killed(processes, list(_ITERATORS.values()))) from error


def _end_workers(batches: Any) -> None:
    """End the workers of a loader, so that their end is not a further error."""
    if hasattr(batches, "_workers"):
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.join(1)
            worker.kill()


def _obey_parent_alone(worker: int) -> None:
    """In a worker: what signals say is for the main process, which needs its workers until it has saved.

    Batch systems and Ctrl-C signal every process of a job.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class UnusableVideos:
    """The videos of a split that turned out unusable in a run: each said once, and an end if they are too many.

    Args:
        split: whose videos.
        limit: the share of them that may be unusable.
        instead: what becomes of such a video.
    """

    def __init__(self, split: Split, limit: float, instead: str = "another video of its class takes its place") -> None:
        self.split = split.name
        self.n_videos = sum(map(len, split.videos))
        self.limit = limit
        self.instead = instead
        self.reasons: dict[str, str] = {}
        self.said_short = False

    def receive(self, batch: ReadEpisode) -> Episode:
        """Take what the workers remarked on the videos out of a batch.

        Raises:
            UserError: see ``add``.
        """
        unusable, short = batch.pop("unusable"), batch.pop("short")  # type: ignore[misc]
        del batch["clips"]  # type: ignore[misc]
        self.say_short(short)
        self.add(unusable)
        return batch

    def say_short(self, short: Mapping[str, int]) -> None:
        """Say once that there are videos with fewer frames than wanted; their numbers of frames by path."""
        if short and not self.said_short:
            self.said_short = True
            path, length = next(iter(short.items()))
            warnings.warn(
                f"{path} has {length} frames, fewer than wanted: some are repeated. The same happens to any"
                " other short video, and is not said again.",
                stacklevel=2,
            )

    def add(self, unusable: Mapping[str, str], *, say: bool = True) -> None:
        """Count videos, and say each that is new.

        Args:
            unusable: why they are, by path.
            say: whether to; another rank may have said it.

        Raises:
            UserError: more of the split's videos are unusable than may be, with their names.
        """
        new = {path: reason for path, reason in unusable.items() if path not in self.reasons}
        self.reasons |= new
        if len(self.reasons) > self.limit * self.n_videos:
            raise UserError(
                f"{len(self.reasons)} of the {self.n_videos} videos of the {self.split} split are unusable, more than"
                f" the share {self.limit:g} that data.max_unusable allows: {some(self.reasons, MOST_NAMES)};"
                f" {next(iter(self.reasons.values()))}; clip-m2df check --fix writes a manifest without such videos"
            )
        for reason in new.values() if say else ():
            warnings.warn(f"{reason}; {self.instead}", stacklevel=2)
