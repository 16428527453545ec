"""Files that killed processes leave behind while they write something aside.

What may live here: the value that describes such a file, and how a folder is searched for them. Each
module that writes aside names its own; when one is old enough to go is decided in ``maintenance``.
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
    """Something a killed process left: where it is, its bytes, its last change (seconds since the epoch).

    ``remove`` removes it and returns whether it was still there.
    """

    location: Path
    size: int
    changed_at: float
    remove: Callable[[], bool]


def leftovers_in(folder: Path, grammar: re.Pattern[str]) -> Iterator[Leftover]:
    """Give the regular files in *folder* whose whole name matches *grammar*."""
    for path, info in files_in(folder):
        if grammar.fullmatch(path.name) and stat.S_ISREG(info.st_mode):
            yield leftover(path, info)


def leftover(path: Path, info: os.stat_result) -> Leftover:
    """Return the leftover that is the file *path*; *info* is what ``lstat`` gives of it."""
    return Leftover(path, info.st_size, info.st_ctime, lambda: _unlinked(path))


def files_in(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Give what is in a folder, in order, each with its ``lstat``; nothing if there is no such folder."""
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
