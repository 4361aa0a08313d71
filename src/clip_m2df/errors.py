"""The one kind of error that a person can mend, and how its messages name things; a run that was asked to end."""

import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the person running the program can mend.

    The message names the file, class or option at fault and says what to do; the command line prints it as it stands,
    without a traceback, and ends with status 2.
    """


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run was asked to end, and did.

    Args:
        signum: the signal that asked.
        step: the optimiser step that was saved last.
        rank: of this process.

    Attributes:
        status: what the process should end with: 128 and the signal's number, 0 on other ranks than the first.
    """

    def __init__(self, signum: signal.Signals, step: int, rank: int) -> None:
        super().__init__(
            f"stopped by {signum.name}; optimiser step {step} is saved, and --ckpt_path last goes on from it"
        )
        self.rank = rank
        self.status = 0 if rank else 128 + signum


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are, for a message."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
