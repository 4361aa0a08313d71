"""Files: reading them, writing them whole or not at all, and telling whether they have changed."""

import csv
import difflib
import errno
import hashlib
import os
import stat
from collections.abc import Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, TextIO
from weakref import WeakSet

from filelock import lock_descriptor

from clip_m2df.errors import UserError

# Bytes of the longest name that a file can have, on all common file systems.
LONGEST_NAME = 255
# What the system says of a disk, a quota or a limit that is used up.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_regular(path: str | os.PathLike[str], what: str) -> None:
    """Refuse what is not a file before it is opened: a FIFO waits for ever, and a device may have no end.

    Args:
        path: The file; where there is none, nothing is said.
        what: What messages call it.

    Raises:
        UserError: It is a folder, or not a regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise UserError(f"the {what} {path} is {kind}: name the file itself")


def read_bytes(path: str | Path, what: str) -> bytes:
    """Read a file.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        UserError: If there is none, it is not a regular file, or it may not be read.
    """
    check_regular(path, what)
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} {path}: check the name; relative names start at {os.getcwd()}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot read the {what} {path}: {reason}; check its name and permissions") from error


def shipped_files(pattern: str) -> dict[str, Path]:
    """The files among the configs that come with the package, by name relative to their folder."""
    package = Path(__file__).parent
    # Inside a wheel they lie in the package; beside an editable install's sources at the top of the repository.
    folder = package / "configs" if (package / "configs").is_dir() else package.parents[1] / "configs"
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}


def read_text(path: str | Path, what: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        UserError: As :func:`read_bytes`, or the file is not UTF-8; names the first line that is not.
    """
    data = read_bytes(path, what)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} of the {what} {path} is not UTF-8: save the file with that encoding; or name another, if it"
            " is no text"
        ) from error


@contextmanager
def writing(path: str | Path, what: str) -> Iterator[None]:
    """Turn errors of the operating system, while a file is written, into one that names the file.

    Args:
        path: The file.
        what: What the message calls it.

    Raises:
        UserError: If the system refuses something.
    """
    try:
        yield
    except OSError as error:
        remedy = "name a file in a folder that can be written"
        if error.errno == errno.ENAMETOOLONG:
            remedy = "give a shorter name"
        elif error.errno in FULL:
            kept = "what was there before still is" if os.path.exists(path) else "nothing of it is kept"
            remedy = f"make room; {kept}"
        raise UserError(f"cannot write the {what} {path}: {error.strerror or error}; {remedy}") from error
    except ValueError as error:
        if "\0" not in str(path):
            raise
        raise UserError(f"cannot write the {what} {path!r}: no name may hold a NUL; give another name") from error


def near_by(path: str) -> str:
    """A question after the name that was meant, where nothing is at ``path`` and a name beside it is much alike."""
    folder, name = os.path.split(path.rstrip("/"))
    there: list[str] = []
    with suppress(OSError):
        there = [] if os.path.lexists(path) else os.listdir(folder or ".")
    near = difflib.get_close_matches(name, there, n=1)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""


def beside(path: str | Path, suffix: str) -> Path:
    """Name a neighbour of a file: its name with a suffix; a name too long for that is cut, and has a hash in it."""
    path = Path(path)
    name = os.fsencode(path.name)
    if len(name) + len(suffix) > LONGEST_NAME:
        digest = hashlib.sha256(name).hexdigest()[:16].encode()
        name = name[: LONGEST_NAME - len(suffix) - len(digest) - 1] + b"-" + digest
    return path.with_name(os.fsdecode(name) + suffix)


def check_output(path: str | Path, what: str) -> None:
    """Check before any work that a file can be written at its end; its folder is made.

    Args:
        path: The file.
        what: What the message calls it.

    Raises:
        UserError: It is a folder or not a regular file, its folder cannot be written, or it has a name that no file can
            have.
    """
    path = Path(path)
    with writing(path, what):
        if path.is_dir():
            raise UserError(f"cannot write the {what} {path}: it is a folder; name a file")
        check_regular(path, what)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with suppress(FileNotFoundError):
                os.lstat(path)
        except ValueError as error:  # a NUL character
            raise UserError(f"cannot write the {what} {path}: {error}; name another file") from error
        TemporaryFile(dir=path.parent).close()


@contextmanager
def whole_file(path: str | Path, what: str) -> Iterator[Path]:
    """Give a draft to write to, which takes the file's place at the end; after an error nothing of it is left.

    The draft is a new file: where a link has its name, the link goes, and what it leads to stays as it is.

    Args:
        path: The file; its folder is made if need be.
        what: What the message calls it.

    Yields:
        The draft's path.

    Raises:
        UserError: If it cannot be written, or is a device or another thing that a file would replace; what was there
            before still is.
    """
    if not os.path.isdir(path):  # which the system refuses to replace
        check_regular(path, what)
    draft = beside(path, f".{os.getpid()}.part")
    with writing(path, what):
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        try:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield draft
            draft.replace(path)
        finally:
            with suppress(OSError):
                draft.unlink()


def write_text(path: str | Path, what: str, text: str) -> None:
    """Write a text in UTF-8, whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        what: What the message calls it.
        text: What it is to hold; characters that UTF-8 cannot hold are written as escapes.

    Raises:
        UserError: If the file cannot be written.
    """
    with whole_file(path, what) as draft:
        draft.write_bytes(text.encode(errors="backslashreplace"))


def write_table(path: str | Path, what: str, rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV in UTF-8, whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        what: What the message calls it.
        rows: The cells of each row; the first row names the columns.

    Raises:
        UserError: If the file cannot be written.
    """
    with whole_file(path, what) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        plain_rows = csv.writer(file, lineterminator="\n")
        quoted_rows = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in map(list, rows):
            # Before Python 3.13 csv does not quote a carriage return, which ends the row for readers.
            (quoted_rows if any("\r" in str(cell) for cell in row) else plain_rows).writerow(row)


def for_spreadsheet(text: str) -> str:
    """Write a text so that no spreadsheet takes it for a formula, for cells of tables that people open.

    What begins like a formula, or with an apostrophe, after whatever is invisible, gets an apostrophe in front; to read
    such a cell back, drop one that it begins with.
    """
    seen = next((letter for letter in text if letter.isprintable() and letter != " "), "")
    starts = seen in tuple("=+-@'\uff1d\uff0b\uff0d\uff20") or text.startswith(("\t", "\r", "\n"))
    return f"'{text}" if starts else text


@contextmanager
def locked(path: str | Path, what: str, owner: str | Path) -> Iterator[TextIO]:
    """Open a file for this process alone, to be read and added to; at the end it is deleted if it is empty.

    The file itself is locked, and the system lets go of it when the process dies: no lock is ever left behind.

    Args:
        path: The file; it is made, with its folder, if need be.
        what: What messages call that which it guards.
        owner: That which it guards.

    Yields:
        The file, in UTF-8.

    Raises:
        UserError: Another process has it, it is a link or not a regular file, or it cannot be written.
    """
    path = Path(path)
    with writing(owner, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path, what, owner)
    _LOCKED.add(file)
    try:
        yield file
    finally:
        _LOCKED.discard(file)
        with writing(owner, what):
            file.flush()
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:  # else it is a forked process's, which owns nothing
                path.unlink(missing_ok=True)  # while it is locked, so that nobody else's is deleted
            file.close()


_LOCKED: WeakSet[TextIO] = WeakSet()


def _let_go_of_locks() -> None:
    """In a forked process: the lock is its parent's, and ends with that, however long this process lives.

    The files are not closed, which would write what the parent has yet to write; they lead nowhere from here on.
    """
    if _LOCKED:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for file in _LOCKED:
            os.dup2(nowhere, file.fileno(), inheritable=False)
        os.close(nowhere)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_locks)


def locked_folder(folder: str | Path, what: str) -> AbstractContextManager[TextIO]:
    """Let this process alone write into a folder, as :func:`locked` does for a file; readers are not concerned.

    Args:
        folder: The folder; it is made if need be.
        what: What messages call it.

    Raises:
        UserError: Another process writes into it, or it cannot be written.
    """
    return locked(Path(folder, ".lock"), what, folder)


def _open_locked(path: Path, what: str, owner: str | Path) -> TextIO:
    # Links are not followed, and a FIFO does not wait for a writer, where the system knows how.
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        refusal = UserError(f"cannot write the {what} {owner}: {path} is a link or not a regular file; delete it")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise refusal
        file = os.fdopen(os.open(path, flags, 0o666), "a+", encoding="utf-8", errors="replace")
        try:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise refusal
            free = True
            with suppress(OSError):  # a file system without locks
                free = lock_descriptor(file.fileno(), blocking=False)
            if not free:
                raise UserError(f"another process writes the {what} {owner}: wait for its end, or name another")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), found):
                    return file
            file.close()  # it was deleted by its owner meanwhile: the next one counts
        except BaseException:
            file.close()
            raise


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Fingerprint(NamedTuple):
    """What changes when a file does, or the files of a folder.

    Attributes:
        files: 1, or how many files the folder has.
        size: bytes of all.
        mtime_ns: when the latest was modified.
    """

    files: int
    size: int
    mtime_ns: int


def fingerprint(path: str) -> Fingerprint:
    """Take the fingerprint of a file or of a folder of files.

    Raises:
        OSError: there is no such file, or it may not be looked at.
    """
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            stats = [entry.stat() for entry in entries if entry.name[0] != "." and entry.is_file()]
    else:
        stats = [os.stat(path)]
    return Fingerprint(len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))


def file_of(path: str) -> Hashable:
    """What all names of a file share, links and spellings of its path."""
    with suppress(OSError, ValueError):  # it is not there, or has a name that no file can have
        status = os.stat(path)
        return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    return os.path.abspath(path)


def lies_under(path: str, folder: str) -> bool:
    """Tell from their names whether an absolute, normal path is a folder or lies in it, at any depth."""
    # pathlib is slow on many thousands.
    return path == folder or path.startswith(os.path.join(folder, ""))


def relative_path(path: str, root: str | None) -> str:
    """Name an absolute path from the root, with forward slashes, if it lies under it."""
    if root is None or not lies_under(path, root):
        return path
    return path.removeprefix(os.path.join(root, "")).replace(os.sep, "/")


def plain(text: str) -> str:
    """Text that UTF-8 can hold; names of files may have bytes that are none."""
    return text.encode(errors="backslashreplace").decode()


def fingerprint_text(path: str) -> str:
    """The fingerprint of a file or of a folder of files as a word for tables; empty if it is not there."""
    try:
        return ":".join(map(str, fingerprint(path)))
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return ""
