"""Writes that survive a crash: syncs, locks, whole files, and the errors they raise.

What may live here: steps that parts, blobs, names and the store's own small files share. Nothing here
depends on what a file is for.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from scrapy_streaming.exceptions import WriteFailed

#: Errors for a full file system or an exhausted quota.
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Errors of a file system that cannot make a hard link.
NO_LINK: Final = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
)
#: Bytes of the longest text file that ``read_text`` reads.
LONGEST_TEXT: Final = 16 << 20

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


# -- errors ----------------------------------------------------------------------------------


def write_failed(what: str, error: OSError, reason: str = "write-failed") -> WriteFailed:
    """Return the error for a write that the system refused; a full disk has the reason ``no-space``."""
    msg = f"{what}: {error.strerror or error}"
    return WriteFailed(msg, reason="no-space" if error.errno in FULL else reason)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``, whose message begins with *what*."""
    try:
        yield
    except OSError as error:
        raise write_failed(what, error) from error


# -- syncs -----------------------------------------------------------------------------------


def sync(fd: int, what: str = "cannot make bytes durable") -> None:
    """Make a file or a folder durable; raise ``WriteFailed`` (``sync-failed``)."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise write_failed(what, error, reason="sync-failed") from error


def sync_data(fd: int, what: str) -> None:
    """Make a file's bytes and length durable, not its times; raise ``WriteFailed`` (``sync-failed``)."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        raise write_failed(what, error, reason="sync-failed") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; raise ``OSError``."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- locks -----------------------------------------------------------------------------------


def try_lock(fd: int) -> bool:
    """Lock a file through *fd* without waiting; return whether that succeeded.

    On file systems where locks have no effect, as on some network file systems, every call succeeds.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the file *path*, created if it is missing; wait while another process has it locked.

    Where locks have no effect, nothing is excluded. Raises ``OSError`` if the file cannot be opened.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# -- whole files -----------------------------------------------------------------------------


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of *data*; raise ``OSError``."""
    rest = memoryview(data)
    while rest:
        written = os.write(fd, rest)
        if written == 0:
            raise OSError(errno.EIO, "the file system accepted no bytes")
        rest = rest[written:]


def replace_file(path: Path, text: str, *, fsync: bool, mode: int = 0o600) -> None:
    """Write *text* to *path* as ``whole_file`` does; the last of several writers wins."""
    with whole_file(path, fsync=fsync, mode=mode) as stream:
        stream.write(text)


def create_file(path: Path, text: str, *, fsync: bool, mode: int = 0o600) -> None:
    """Write *text* to *path* unless that file exists: the first of several writers wins.

    On a file system without hard links the last one wins. *mode*, *fsync* and errors as for ``whole_file``.
    """
    with _file_aside(path, mode) as (temporary, stream):
        stream.write(text)
        _finish(stream, fsync=fsync)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another writer was first
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            os.rename(temporary, path)
    if fsync:
        sync_folder(path.parent)


@contextmanager
def whole_file(path: Path, *, fsync: bool, mode: int = 0o600) -> Iterator[TextIO]:
    """Yield a text stream, and replace *path* by it at the end: readers see the old file or the new.

    The file has *mode* without the bits of the umask. With *fsync* it is durable afterwards. Raises
    ``OSError``; after any error the old file is unchanged and the new one is removed.
    """
    with _file_aside(path, mode) as (temporary, stream):
        yield stream
        _finish(stream, fsync=fsync)
        os.replace(temporary, path)
    if fsync:
        sync_folder(path.parent)


@contextmanager
def _file_aside(path: Path, mode: int) -> Iterator[tuple[Path, TextIO]]:
    """Yield the path and the stream of a new file beside *path*; remove it afterwards unless it was moved."""
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, _CREATE, mode)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            yield temporary, stream
    finally:
        unlink(temporary)


def _finish(stream: TextIO, *, fsync: bool) -> None:
    """Write out what the stream buffers, and make it durable with *fsync*."""
    stream.flush()
    if fsync:
        os.fsync(stream.fileno())


def unlink(name: str | Path, folder: int | None = None) -> None:
    """Remove a file, relative to the directory descriptor *folder* if given; do nothing if it is missing."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def read_text(path: Path) -> str:
    """Return the text of a regular file of at most ``LONGEST_TEXT`` bytes.

    Raises ``OSError`` if it cannot be read, ``ValueError`` if it is not regular, too long or not UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not wait
    with open(fd, "rb") as stream:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > LONGEST_TEXT:
            msg = f"is not a regular file of at most {LONGEST_TEXT} bytes"
            raise ValueError(msg)
        return stream.read().decode("utf-8")
