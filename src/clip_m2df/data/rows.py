"""Tables in CSV: each row whole, with the line that it starts on, or an error that names the line."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from clip_m2df.errors import UserError
from clip_m2df.files import read_bytes


def read_rows(path: str | Path, what: str, required: Sequence[str]) -> tuple[list[dict[str, str]], list[int]]:
    """Read the rows of a table.

    Args:
        path: CSV in UTF-8 whose first line names the columns.
        what: What messages call it.
        required: The columns that it must have, and in which no cell may be empty.

    Returns:
        The cells of each row by column, without spaces around them but in ``path``; and the line that each starts on.

    Raises:
        UserError: If it cannot be read, or a row is at fault; the message names the line.
    """
    text = _read_text(path, what)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    while True:
        line = reader.line_num + 1
        where = f"line {line} of the {what} {path}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise UserError(f"{where} is not valid CSV ({error}): check its quotes and commas") from error
        if not cells:
            continue
        if any("\n" in cell or "\r" in cell for cell in cells):
            raise UserError(f"{where} has a line break inside a cell: close the quote, or take the line break out")
        if header is None:
            header = _header(cells, path, what, required)
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{where} has {counted(len(cells), 'cell')}, but the header has {len(header)}: "
                'put a cell that holds a comma in double quotes ("...")'
            )
        row = {name: cell if name == "path" else cell.strip() for name, cell in zip(header, cells, strict=True)}
        for name in required:
            if not row[name].strip():
                raise UserError(f"{where} has an empty {name}: fill it in or remove the row")
        rows.append(row)
        lines.append(line)
    if header is None:
        raise UserError(f"the {what} {path} is empty: it needs a header line with the columns {', '.join(required)}")
    return rows, lines


def _read_text(path: str | Path, what: str) -> str:
    data = read_bytes(path, what)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"line {line} of the {what} {path} is not UTF-8: save the file with that encoding") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"line {line} of the {what} {path} has a NUL character: save it as plain CSV in UTF-8")
    return text


def _header(cells: Sequence[str], path: str | Path, what: str, required: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(
            f"the {what} {path} has no column {' and no column '.join(map(repr, missing))}; its first line names "
            f"{', '.join(map(repr, header))}: name the columns there, separated by commas"
        )
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"the {what} {path} has the column {name!r} more than once: rename or remove one")
    return header


def counted(number: int, one: str, many: str | None = None) -> str:
    """Name a number of things: "1 cell", "2 cells"."""
    return f"{number} {one if number == 1 else many or one + 's'}"
