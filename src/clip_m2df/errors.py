"""The one kind of error that a person can mend, and how its messages name things."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something that the person running the program can mend.

    The message names the file, class or option at fault and says what to do; the command line prints it as it stands,
    without a traceback, and ends with status 2.
    """


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
