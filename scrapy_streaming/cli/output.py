"""What verbs print: texts, rows, tables, JSON, errors and progress; and their exit codes.

What may live here: printing, for any verb. Rows are tab-separated, so that scripts can cut them; tables have
columns on a terminal. Nothing that is printed holds credentials or acts on the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

from scrapy_streaming.redaction import clean, escaped, write_lines

#: Called with the number of things done so far and their bytes.
Progress = Callable[[int, int], None]


class ExitCode(IntEnum):
    """What the command ends with; a usage error ends with 2, by Scrapy."""

    FINE = 0
    WRONG = 1
    UNFINISHED = 3
    FAILED = 4
    INTERRUPTED = 130


def write(text: str) -> None:
    """Print a text."""
    write_lines(sys.stdout, text)


def warn(text: str) -> None:
    """Print a line to standard error."""
    write_lines(sys.stderr, text)


def write_json(document: Any) -> None:
    """Print a JSON document."""
    write(json.dumps(document, indent=2))


def write_json_line(document: Any) -> None:
    """Print a JSON document on one line, as one of many."""
    write(json.dumps(document))


def write_row(*values: object) -> None:
    """Print a row, separated by tabs; no value can break it."""
    write("\t".join(escaped(cell_text(value)) for value in values))


def cell_text(value: object) -> str:
    """Return a value as it stands in a row: times in UTC, ``-`` for ``None``."""
    if isinstance(value, float):
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return "-" if value is None else str(value)


def is_for_people() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def write_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: columns on a terminal, numbers to the right; tab-separated without headers if piped."""
    found = [tuple(row) for row in rows]
    if not is_for_people():
        for row in found:
            write_row(*row)
        return
    lines = [tuple(headers), *found]
    widths = [max(len(line[at]) for line in lines) for at in range(len(headers))]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        write_row("  ".join(cells).rstrip())


def counted(number: int, what: str) -> str:
    """Return a number with its noun: ``1 file``, ``2 files``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def error_text(error: BaseException) -> str:
    """Return the message of an error on one line, without credentials."""
    return clean(" ".join(str(error).split()))


@contextmanager
def progress_of(verb: str, things: str = "blobs") -> Iterator[Progress | None]:
    """Give a callback that shows the progress in *things* and bytes; ``None`` without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(number: int, size: int) -> None:
        sys.stderr.write(f"\r{verb}: {number} {things}, {size >> 20} MiB ")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
