"""What is said of a video that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager

from clip_m2df.errors import UserError


class VideoError(UserError):
    """A video that cannot be read; the message names the file and the reason.

    Attributes:
        path: The file, which may be an image of a folder.
        reason: The reason alone.
    """

    def __init__(self, message: str, *, path: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason or message


def unreadable(path: str, reason: str) -> VideoError:
    """Return the error of a video that is to be removed or replaced."""
    message = f"cannot read the video {path}: {reason}; remove it from the manifest or replace it"
    return VideoError(message, path=path, reason=reason)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Turn the operating system's refusals into errors that name the video."""
    try:
        yield
    except FileNotFoundError as error:
        raise unreadable(path, "there is no such file") from error
    except PermissionError as error:
        reason = "no permission; allow reading it"
        raise VideoError(f"cannot read the video {path}: {reason}", path=path, reason=reason) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unreadable(path, str(error)) from error


@contextmanager
def blaming(path: str) -> Iterator[None]:
    """Turn whatever a damaged file does to a decoder into an error of the file."""
    try:
        yield
    except ValueError:  # the package's own errors, and those of a choice out of range
        raise
    except Exception as error:
        raise unreadable(path, f"reading it fails: {type(error).__name__}: {error}") from error
