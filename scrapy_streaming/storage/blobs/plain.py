"""Regular files of the local file system: opened, hashed, stamped and copied, never through a link.

What may live here: functions of one file or one folder. None depends on what the file is for.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import struct
import time
from pathlib import Path
from typing import Final

from scrapy_streaming.storage.complete_part import READ_SIZE

#: Flags to open a folder, never through a link.
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Flags to open a file for reading, never through a link, and without waiting if it is a pipe.
READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
#: Flags to create a file under a temporary name.
ASIDE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Errors of opening a path that is missing, or not a regular file (F24).
NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
#: Errors of a file system that cannot clone a file.
NO_CLONE: Final = frozenset(
    {errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM}
)
_FICLONE: Final = 0x40049409
_STAMP: Final = struct.Struct(">QQQ")
_64_BITS: Final = (1 << 64) - 1  # times before 1970 are negative, and some file systems allow huge ones
_WRITTEN: Final = slice(0, 16)


def stamp_of(info: os.stat_result) -> bytes:
    """Return a file's stamp, 24 bytes: inode, times of modification and of change in nanoseconds (R77).

    The kernel sets the time of change at each write, link, rename and change of mode, and no program can
    set it back: a file with a recorded stamp has the bytes that it had then.
    """
    return _STAMP.pack(info.st_ino & _64_BITS, info.st_mtime_ns & _64_BITS, info.st_ctime_ns & _64_BITS)


def is_unwritten(stamp: bytes, info: os.stat_result) -> bool:
    """Return whether *info* is of the file of *stamp*, which was not written to since (perhaps linked)."""
    return stamp[_WRITTEN] == stamp_of(info)[_WRITTEN]


def open_plain(path: Path | str, folder: int | None = None) -> int | None:
    """Return a descriptor of a regular file, ``None`` if there is none (F24); raise ``OSError``."""
    try:
        fd = os.open(path, READ, dir_fd=folder)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def hash_of(path: Path | str, folder: int | None = None) -> tuple[str | None, os.stat_result | None]:
    """Return the SHA-256 of a regular file, 64 hex digits, and its state from before it was read.

    Both are ``None`` for a file that is missing, not regular or not readable. Raises ``OSError``.
    """
    try:
        fd = open_plain(path, folder)
    except PermissionError:
        fd = None
    if fd is None:
        return None, None
    try:
        info = os.fstat(fd)
        with open(fd, "rb", closefd=False) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest(), info
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None, None
    finally:
        os.close(fd)


def info_of(name: str, folder: int) -> os.stat_result | None:
    """Return the ``lstat`` of a name in an open folder, ``None`` if there is no such name."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name; none if there is no such folder."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def keep_copy(name: str, folder: int, target: Path) -> bool:
    """Copy a regular file to *target*; return false for anything else."""
    fd = open_plain(name, folder)
    if fd is None:
        return False
    with open(fd, "rb") as source, open(target, "xb") as copy:
        shutil.copyfileobj(source, copy)
    return True


def clone_bytes(source: int, target: int) -> None:
    """Make *target* share the extents of *source*; raise ``OSError`` where that is not possible."""
    fcntl.ioctl(target, _FICLONE, source)


def copy_bytes(source: int, target: int) -> None:
    """Copy the bytes of one open file to another."""
    with open(source, "rb", closefd=False) as read, open(target, "wb", closefd=False) as write:
        while chunk := read.read(READ_SIZE):
            write.write(chunk)


def set_time_to_now(fd: int) -> None:
    """Set a file's times to now, to the nanosecond.

    The kernel's own times are coarser: a second write within one tick would not change the stamp.
    """
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0o077)  # the only way to read it; a file created in between is private, not public
    os.umask(mask)
    return mask


def is_open_for_writing(fd: int) -> bool:
    """Return whether any process has a file open for writing, found out on Linux and for own files only.

    The kernel then refuses a read lease on the file. A lease that it grants is released at once; if another
    process opens the file for writing in between, this one gets a SIGURG, which is ignored by default.
    """
    if not hasattr(fcntl, "F_SETLEASE") or not hasattr(fcntl, "F_SETSIG"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False
