"""The rows of a run that is under way, in a file beside its table, from which the next run goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO, TypeAlias

from clip_m2df.errors import UserError

if sys.platform != "win32":
    import fcntl

# First in the file.
FORMAT = "clip-m2df predictions 1"

# A row of the table by its columns, but for the path: text, numbers as they are printed, or None.
Row: TypeAlias = "dict[str, Any]"


class PartFile:
    """A line of JSON that says which run it is of, and then one for each video; see :func:`open_part`.

    Args:
        output: the table.
        file: opened to be read and added to.
    """

    def __init__(self, output: Path, file: TextIO) -> None:
        self._output = output
        self._file = file

    def take_over(self, digest: str, marks: Mapping[str, str], columns: Sequence[str]) -> dict[str, list[Row]] | None:
        """Begin, with the rows of videos that an earlier run of the same has labelled and that haven't changed since.

        Lines that are torn are passed over. Videos that could not be read are tried again: with more time they may be.

        Args:
            digest: of all that a prediction depends on, but for the video.
            marks: by video, what changes when it does; empty if it is not there.
            columns: of a row.

        Returns:
            The rows by video; None where the file was of another run, whose rows are gone.

        Raises:
            UserError: the file can't be read or written.
        """
        header = {"format": FORMAT, "digest": digest}
        with writing(self._output):
            self._file.seek(0)
            text = list(self._file)
            lines = list(map(_parsed, text))
            if not lines or lines[0] != header:
                self._file.truncate(0)
                self._add(header)
                return None if lines else {}
            if not text[-1].endswith("\n"):  # the next line is to stand alone
                self._file.write("\n")
        found: dict[str, list[Row]] = {}
        for line in lines[1:]:
            key, rows = str(line.get("video")), line.get("rows", ())
            if not marks.get(key) or line.get("mark") != marks[key]:  # of another run's videos, or changed
                continue
            if all(tuple(row) == tuple(columns) and row["error"] is None for row in rows):
                found[key] = rows
        return found

    def add(self, video: str, mark: str, rows: Sequence[Row]) -> None:
        """Keep the rows of a video.

        Raises:
            UserError: they can't be written.
        """
        with writing(self._output):
            self._add({"video": video, "mark": mark, "rows": rows})

    def clear(self) -> None:
        """Forget everything: the table is written."""
        with writing(self._output):
            self._file.truncate(0)

    def _add(self, content: Mapping[str, Any]) -> None:
        # All in ASCII: a name with bytes that are no UTF-8 can be read back.
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


@contextmanager
def open_part(output: Path) -> Iterator[PartFile]:
    """Open ``<output>.part`` for one run alone; at the end it is left behind if there is something in it.

    Args:
        output: the table, which is held to be written beside it.

    Raises:
        UserError: it can't be written, or another run has it open.
    """
    path = Path(f"{output}.part")
    if output.is_dir():
        raise UserError(f"cannot write the predictions {output}: it is a folder; name a file in it")
    if path.is_dir():
        raise UserError(f"cannot write the predictions {output}: {path} is a folder; name another file")
    with ExitStack() as stack:
        with writing(output):
            path.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=path.parent).close()
            file = stack.enter_context(open(path, "a+", encoding="utf-8", errors="replace"))
        _lock(file, output)
        try:
            yield PartFile(output, file)
        finally:
            with writing(output):
                empty = os.fstat(file.fileno()).st_size == 0
                file.close()
                if empty:
                    path.unlink(missing_ok=True)


def _lock(file: TextIO, output: Path) -> None:
    """Hold the file until it is closed; the system lets go of it too when the process dies."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is at work on the predictions {output}: wait for its end, or name another file"
        ) from error
    except OSError:  # a file system without locks
        pass


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the table."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the predictions {output}: {error.strerror or error}; name a file in a folder that can be"
            " written"
        ) from error


def _parsed(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
