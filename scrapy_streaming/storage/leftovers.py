"""Temporary files that killed processes leave behind.

What may live here: the value that describes such a file, and the search for them in a folder. Each module
that writes temporary files has the pattern of their names; ``maintenance`` decides when one is removed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Leftover:
    """A temporary file of a killed process.

    ``size`` in bytes, ``changed_at`` is its last change in seconds since the epoch. ``remove`` removes it
    and returns whether it existed.
    """

    location: Path
    size: int
    changed_at: float
    remove: Callable[[], bool]


def leftovers_in(folder: Path, grammar: re.Pattern[str]) -> Iterator[Leftover]:
    """Yield the regular files in *folder* whose whole name matches *grammar*."""
    for path, info in files_in(folder):
        if grammar.fullmatch(path.name) and stat.S_ISREG(info.st_mode):
            yield leftover(path, info)


def leftover(path: Path, info: os.stat_result) -> Leftover:
    """Return the file *path* as a leftover; *info* is its ``lstat``."""
    return Leftover(path, info.st_size, info.st_ctime, lambda: _unlinked(path))


def files_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the entries of a folder by name, each with its ``lstat``; none if there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for name in sorted(os.listdir(folder)):
            with suppress(FileNotFoundError):
                yield folder / name, os.lstat(folder / name)


def _unlinked(path: Path) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True
