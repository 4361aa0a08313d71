"""Files: reading them, writing them whole or not at all, and telling whether they have changed."""

import csv
import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clip_m2df.errors import UserError


def read_bytes(path: str | Path, what: str) -> bytes:
    """Read a file.

    Args:
        path: The file.
        what: What messages call it.

    Raises:
        UserError: If there is none, it is no regular file, or it may not be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "no regular file"
        raise UserError(f"the {what} {path} is {kind}: name the file itself")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no {what} {path}: check the name; relative names start at {os.getcwd()}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"cannot read the {what} {path}: {reason}; check its name and permissions") from error


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
        raise UserError(f"line {line} of the {what} {path} is not UTF-8: save the file with that encoding") from error


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
        raise UserError(
            f"cannot write the {what} {path}: {error.strerror or error}; name a file in a folder that can be written"
        ) from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a draft to write to, which takes the file's place at the end; after an error nothing of it is left.

    Args:
        path: The file; its folder is made if need be.

    Yields:
        The draft's path.
    """
    draft = Path(f"{path}.{os.getpid()}.part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink()


def write_table(path: str | Path, what: str, rows: Iterable[Iterable[object]]) -> None:
    """Write a table as CSV in UTF-8, whole or not at all.

    Args:
        path: The file; its folder is made if need be.
        what: What the message calls it.
        rows: The cells of each row; the first row names the columns.

    Raises:
        UserError: If the file cannot be written.
    """
    with writing(path, what), whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


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


_ZIP = b"PK\3\4"


def check_archive(path: str | os.PathLike[str]) -> None:
    """Hold all of an archive against its checksums: damage in a tensor is a wrong number otherwise.

    A file that is no zip file, such as those of torch before 1.6, has none, and is left to ``torch.load``.

    Args:
        path: The file; it is read once, from one end to the other.

    Raises:
        ValueError: If it is damaged, or not as ``torch.save`` writes it: nothing in it is compressed or overlaps, so it
            takes no more memory than disk.
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed")
                if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                    raise ValueError("its members are larger than the whole")
                damaged = archive.testzip()
        except ValueError:
            raise
        except Exception as error:  # what zipfile makes of damage has no common class
            raise ValueError(f"it is no whole zip file: {error}") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")
