"""Kinds of setting values: how a text becomes a value, and what is allowed in words.

What may live here: readers that know no setting by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True, slots=True)
class Kind:
    """How a value is read, what is allowed in words, and the unit it is in (``""`` for none).

    ``read`` raises ``ValueError``, ``TypeError`` or ``OverflowError`` for what is not allowed.
    """

    read: Callable[[Any], Any]
    allowed: str
    unit: str = ""


def _read_flag(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError


def number_of(kind: type[int | float], minimum: float, unit: str = "", zero: str = "") -> Kind:
    """Return a kind of numbers from *minimum* on; *zero* is the meaning of 0."""

    def read(value: Any) -> float:
        number = kind(value)
        if isinstance(value, bool) or not math.isfinite(number) or number < minimum:
            raise ValueError
        if isinstance(value, float) and number != value:  # half a byte, half a restart
            raise ValueError
        return number

    whole = f"a whole number of {unit}" if unit else "a whole number"
    bound = f"0 for {zero}" if zero else f"{minimum:.16g} or more"
    return Kind(read, f"{whole if kind is int else unit}, {bound}", unit)


def one_of(*allowed: str) -> Kind:
    """Return the kind of these words, in any case."""

    def read(value: object) -> str:
        text = str(value).strip().lower()
        if text not in allowed:
            raise ValueError
        return text

    return Kind(read, " or ".join(allowed) if len(allowed) == 2 else f"one of {', '.join(allowed)}")


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


def _optional_text(value: object) -> str | None:
    return None if value is None or value == "" else _text(value)


def _storable_text(value: object) -> str | None:
    text = _optional_text(value)
    if text is not None and "\0" in text:
        raise ValueError
    return None if text is None else text.encode("utf-8").decode("utf-8")


@dataclass(frozen=True, slots=True)
class RateRule:
    """``rate`` bytes a second (0: no limit) for a host, ``""`` for all, from ``start`` to ``end``.

    Both are minutes of the local day. An end before the start is on the next day; an end equal to the
    start is a whole day later.
    """

    host: str
    start: int
    end: int
    rate: int

    def holds(self, minute: int) -> bool:
        """Whether the rule applies at a minute of the day."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


_HOST = re.compile(r"[A-Za-z0-9._-]*[A-Za-z.][A-Za-z0-9._-]*|[0-9A-Fa-f]*(:[0-9A-Fa-f.]*){2,}", re.ASCII)
_TIME = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)


def _rate_rules(value: object) -> tuple[RateRule, ...] | None:
    """Return the rules of a text ``[HOST] [HH:MM-HH:MM] BYTES, …``, or of a number of bytes."""
    if value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return tuple(_rate_rule(each.strip()) for each in str(value).split(","))


def _rate_rule(text: str) -> RateRule:
    *words, rate = text.split()
    host, start, end = "", 0, 0
    if words and (found := _TIME.fullmatch(words[-1])) is not None:
        start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
        words.pop()
    if words:
        [host] = words
        if not _HOST.fullmatch(host):
            raise ValueError
    if not rate.isascii() or not rate.isdigit():
        raise ValueError
    return RateRule(host.lower(), start, end, int(rate))


def _database_url(value: object) -> str | None:
    text = _optional_text(value)
    if text is None or text.startswith(("postgresql://", "postgresql+psycopg://")):
        return text
    if text.removeprefix("sqlite:///") in (text, "", ":memory:"):
        raise ValueError
    return text


FLAG: Final = Kind(_read_flag, "True or False (1, 0, yes, no, on, off)")
PATH: Final = Kind(_optional_text, "a path")
ITEM_FIELD: Final = Kind(_optional_text, "the name of an item field")
DATABASE: Final = Kind(_database_url, "sqlite:///PATH or postgresql+psycopg://HOST/DATABASE")
RATES: Final = Kind(
    _rate_rules,
    "bytes a second, or rules [HOST] [HH:MM-HH:MM] BYTES with commas between them",
    "bytes a second",
)
STORABLE: Final = Kind(_storable_text, "a text without NUL and lone surrogates")
