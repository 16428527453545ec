"""Content-Range: its grammar, and what the values of an answer say of its body.

What may live here: arithmetic of offsets in bytes. RFC 9110 §14.4 is behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from scrapy_streaming.protocol.fields import MAX_FIELD

# RFC 9110 §14.4
_CONTENT_RANGE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (?:(\d+)-(\d+)|(\*))/(\d+|\*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """A byte Content-Range (RFC 9110 §14.4): inclusive ``first`` and ``last``, in bytes.

    ``first`` and ``last`` are ``None`` for the unsatisfied form ``bytes */N``; ``total`` is
    ``None`` for ``/*``.
    """

    first: int | None
    last: int | None
    total: int | None

    @classmethod
    def parse(cls, value: str) -> ContentRange | None:
        """Return the range, or ``None`` for another unit or anything invalid.

        Invalid: last < first, total ≤ last, ``*/*``, more than ``MAX_FIELD`` characters.
        """
        if len(value) > MAX_FIELD or (match := _CONTENT_RANGE.fullmatch(value)) is None:
            return None
        unit, first, last, unsatisfied, complete = match.groups()
        if unit.lower() != "bytes":
            return None
        total = None if complete == "*" else int(complete)
        if unsatisfied:
            return None if total is None else cls(None, None, total)
        if int(first) > int(last) or (total is not None and total <= int(last)):
            return None
        return cls(int(first), int(last), total)

    def __str__(self) -> str:
        span = "*" if self.first is None else f"{self.first}-{self.last}"
        return f"bytes {span}/{'*' if self.total is None else self.total}"

    @property
    def end(self) -> int:
        """The offset behind the last byte; only a satisfied range has one."""
        assert self.last is not None
        return self.last + 1

    @property
    def is_complete(self) -> bool:
        """Whether the range spans the whole representation."""
        return self.first == 0 and self.total == self.end


def satisfied(values: Sequence[str], length: int | None) -> ContentRange | None:
    """Return the one valid, satisfied Content-Range that agrees with Content-Length (R21).

    *values* are all values of the field, *length* is the Content-Length in bytes, if known.
    """
    span = ContentRange.parse(values[0]) if len(values) == 1 else None
    if span is None or span.first is None:
        return None
    return None if length not in (None, span.end - span.first) else span


def piece(values: Sequence[str], length: int | None) -> ContentRange | None:
    """Return the Content-Range of a 200 if the body must be taken for that piece (R23).

    ``None`` if it spans everything, or if Content-Length contradicts it. Without a Content-Length only
    the end of the body could show it, so the body counts as the piece.
    """
    span = satisfied(values, length)
    return None if span is None or (span.first == 0 and span.total in (None, span.end)) else span


def complete_length(values: Sequence[str], length: int | None) -> int | None:
    """Return the complete length if the one Content-Range spans the whole representation (R16)."""
    span = satisfied(values, length)
    return span.total if span is not None and span.is_complete else None


def unsatisfied_length(values: Sequence[str]) -> int | None:
    """Return the complete length that a 416 names in its one Content-Range (``bytes */N``)."""
    span = ContentRange.parse(values[0]) if len(values) == 1 else None
    return span.total if span is not None and span.first is None else None
