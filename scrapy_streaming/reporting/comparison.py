"""Two metrics files: how each is read, and what differs between them.

What may live here: reading and comparing. ``scrapy streaming compare`` prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.reporting.metrics import FORMAT
from scrapy_streaming.storage.durable import read_text


@dataclass(frozen=True, slots=True)
class Change:
    """A value that differs; ``None`` where a file lacks it.

    ``ratio`` is *after* divided by *before*, ``None`` unless both are numbers and *before* is not 0.
    """

    name: str
    before: Any
    after: Any
    ratio: float | None


def load(path: Path) -> dict[str, Any]:
    """Return the contents of a metrics file.

    Raises ``StoreError``: ``metrics-missing``, ``metrics-unreadable``, ``metrics-format`` (written by a newer
    release).
    """
    try:
        document = json.loads(read_text(path))
    except FileNotFoundError as error:
        msg = f"there is no file {path}"
        raise StoreError(msg, reason="metrics-missing") from error
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path} cannot be read as metrics: {error}"
        raise StoreError(msg, reason="metrics-unreadable") from error
    found: dict[str, Any] = document if isinstance(document, dict) else {}
    number = found.get("format")
    if not isinstance(number, int) or not isinstance(found.get("stats"), dict):
        msg = f"{path} is no metrics file: it has no format and stats"
        raise StoreError(msg, reason="metrics-unreadable")
    if number > FORMAT:
        msg = f"{path} has format {number}, this release reads up to {FORMAT}: upgrade scrapy-streaming"
        raise StoreError(msg, reason="metrics-format")
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two documents, except times and workers.

    A statistic that one of them lacks counts as 0.
    """
    changes = []
    old, new = _flat(before), _flat(after)
    for name in [*old, *(name for name in new if name not in old)]:
        default = 0 if name in before["stats"] or name in after["stats"] else None
        one, other = old.get(name, default), new.get(name, default)
        if one != other:
            changes.append(Change(name, one, other, _ratio(one, other)))
    return changes


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return all values by name; those under ``streaming`` are among ``stats`` already."""
    found: dict[str, Any] = {
        name: document.get(name) for name in ("spider", "finish_reason", "elapsed_seconds")
    }
    versions, settings = document.get("versions"), document.get("settings")
    if isinstance(versions, Mapping):
        found |= {f"version of {name}": value for name, value in versions.items()}
    if isinstance(settings, Mapping):
        found |= settings
    found |= document["stats"]
    return found


def _ratio(before: Any, after: Any) -> float | None:
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after))
    return round(after / before, 3) if numeric and before else None
