"""Workers: their ids, and which of them still run.

What may live here: the files in ``workers/``. Each open store has one, which its process keeps locked.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from scrapy_streaming.storage import durable
from scrapy_streaming.storage.leftovers import Leftover, leftovers_in

_WORKER: Final = re.compile(r"[^.].*-[0-9]+-[0-9a-f]{16}", re.ASCII)
_ASIDE: Final = re.compile(r"\..+-[0-9]+-[0-9a-f]{16}\.tmp", re.ASCII)


def register_worker(folder: Path, held: ExitStack) -> str:
    """Return a new worker's id; its file is locked until *held* is closed.

    The file gets its name after it is locked: other processes take a worker whose file is not locked for
    one that has ended. Raises ``OSError``.
    """
    worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
    path, temporary = folder / worker_id, folder / f".{worker_id}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    held.callback(os.close, fd)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(temporary, path)
    return worker_id


def same_process(worker: str, other: str) -> bool:
    """Return whether two workers' ids, which begin with host name and process id, are of one process."""
    return worker.rpartition("-")[0] == other.rpartition("-")[0]


def dead_workers(folder: Path, mine: str) -> list[str]:
    """Return the workers of this machine, other than *mine*, whose files are not locked: they have ended.

    To know them only saves the wait for their leases to expire; correctness depends on fences alone.
    Raises ``OSError``.
    """
    names = (name for name in os.listdir(folder) if name != mine and _is_of_this_machine(name))
    return [name for name in names if _has_ended(folder / name)]


def running_workers(folder: Path, mine: str | None = None) -> list[str]:
    """Return the workers, other than *mine*, that may still run.

    Of this machine those whose files are locked; of other machines all, since their locks may not be
    visible here.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    workers = (name for name in names if _WORKER.fullmatch(name) is not None)
    return [name for name in workers if name != mine and _may_run(folder / name)]


def leftovers(folder: Path) -> Iterator[Leftover]:
    """Yield the files of workers that were killed before their file had its name."""
    return leftovers_in(folder, _ASIDE)


def _is_of_this_machine(name: str) -> bool:
    return name.rsplit("-", 2)[0] == socket.gethostname()


def _has_ended(path: Path) -> bool:
    fd = _opened(path, os.O_RDWR)
    if fd is None:
        return False
    try:
        return durable.try_lock(fd)
    finally:
        os.close(fd)


def _may_run(path: Path) -> bool:
    if not _is_of_this_machine(path.name):
        return True
    fd = _opened(path, os.O_RDONLY)
    if fd is None:
        return False
    try:
        return not durable.try_lock(fd)
    finally:
        os.close(fd)


def _opened(path: Path, mode: int) -> int | None:
    """Return a descriptor of a worker's file, ``None`` if it cannot be opened."""
    try:
        return os.open(path, mode | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
