"""The one kind of error that a person can mend, and how names are printed; a run that was asked to end.

rich is imported where something is drawn, because most commands' errors need none.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Options by the names that they had in earlier versions, and by those of today. What these versions saved is read by
# this table; a person who gives a former name is told the new one.
RENAMED_OPTIONS = {
    "data.train_views": "data.train_augmentations",
    "model.head_options.heads": "model.head_options.num_heads",
}


class UserError(ValueError):
    """Something that the person running the program can mend.

    The message names the file, class or option at fault and says what to do; the command line prints it as it stands,
    without a traceback, and ends with status 2.
    """


class Stopped(BaseException):
    """A run was asked to end, and did; no error, so that what handles errors on the way leaves it alone.

    Args:
        signum: the signal that asked.
        saved: what is kept, and how to go on.
        silent: leave it to another process to say so, and to tell by its status.

    Attributes:
        status: what the process should end with: 128 and the signal's number, or 0.
    """

    def __init__(self, signum: int, saved: str = "nothing has been saved", *, silent: bool = False) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {saved}")
        self.silent = silent
        self.status = 0 if silent else 128 + signum


@contextmanager
def ended_by_sigterm(saved: str = "nothing has been saved") -> Iterator[None]:
    """End at SIGTERM by :class:`Stopped`, which closes all that is open, workers among it.

    Args:
        saved: what is kept, and how to go on.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise Stopped(number, saved)
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from it ends as any other does
        os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # where no handler may be set
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None where it was not set by Python


# Invisible, but part of the spelling of words in some languages, and of emoji.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """A text without what a terminal obeys or hides: control characters, marks of direction, lone surrogates.

    Args:
        text: a name, or a message with names.
        keep: characters to leave as they are, such as a message's line breaks.

    Returns:
        The text, each such character as Python escapes it.
    """
    if text.isprintable():
        return text
    kept = keep + _JOINERS
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(*lines: str, error: bool = False) -> None:
    """Print what a command has to say, without obeying what the names in it hold.

    Args:
        *lines: what to print, a line each; line breaks within one are kept.
        error: print to stderr.
    """
    for line in lines:
        print(printable(line, keep="\n"), file=sys.stderr if error else sys.stdout)


def console(*, error: bool = False) -> "Console":
    """What draws tables and progress bars: no text in them is markup, and names are printed as by :func:`say`.

    Args:
        error: draw on stderr.
    """
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # every cell, title and description goes through it
            return super().render_str(printable(text), **options)

        def on_broken_pipe(self) -> None:  # rich's ends the process with status 1
            raise

    return PlainConsole(stderr=error, markup=False, emoji=False, highlight=False)


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        return printable(super().getMessage().expandtabs(), keep="\n")  # tables of the profiler have tabs


@contextmanager
def names_as_data() -> Iterator[None]:
    """Print warnings in words, and them and log lines of all libraries without obeying what the names in them hold."""

    def in_words(message: Warning | str, *_: Any, **options: Any) -> str:
        return f"clip-m2df: warning: {printable(str(message), keep=chr(10))}\n"

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        # Only now, as Lightning sets its own when it is imported. What records warnings is not kept from it.
        warnings.formatwarning = in_words
        shown(message, category, filename, lineno, file, line)

    formatted, record = warnings.formatwarning, logging.getLogRecordFactory()
    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        logging.setLogRecordFactory(_PrintableRecord)
        try:
            yield
        finally:
            warnings.formatwarning = formatted
            logging.setLogRecordFactory(record)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are, for a message."""
    names = [printable(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def some_lines(lines: Sequence[str], most: int) -> str:
    """The first few of many lines, indented, and how many more there are, to be printed after a heading."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {printable(line)}" for line in [*lines[:most], *more])


def require(
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    **options: float | None,
) -> None:
    """Refuse options that are out of their range; one that is None is not given, and passed over.

    Args:
        least: the smallest value that an option may have.
        above: what an option has to exceed.
        most: the largest value.
        below: what an option may not reach.
        **options: values by the names of their options.

    Raises:
        UserError: names the first option, its value and the range.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    for option, value in options.items():
        if value is None:
            continue
        try:  # written so that NaN is refused
            within = (
                (least is None or value >= least)
                and (above is None or value > above)
                and (most is None or value <= most)
                and (below is None or value < below)
            )
        except TypeError as error:
            raise UserError(f"{option} is {value!r:.80}; it must be a number, {wanted}") from error
        if not within:
            raise UserError(f"{option} is {value}; it must be {wanted}")
