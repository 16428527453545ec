"""Links, pipes and the like where the store expects a regular file (E2, F24).

What may live here: what kind of file a path is, found out without opening it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import StoreError

_KINDS: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISREG, ""),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def planted_kind(path: Path) -> str:
    """Return the kind of *path* in words; ``""`` for a regular file, a missing one, or if ``lstat`` fails."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return ""
    return next((kind for matches, kind in _KINDS if matches(mode)), "no plain file")


def refuse_planted(*paths: Path) -> None:
    """Raise ``StoreError`` (``store-unsafe``) for the first of *paths* that exists and is not a regular file.

    To open a pipe would wait for its other end; to open a link would read or write its target.
    """
    for path in paths:
        if kind := planted_kind(path):
            msg = f"{path} is {kind}, not a plain file: it was not opened; remove it"
            raise StoreError(msg, reason="store-unsafe")
