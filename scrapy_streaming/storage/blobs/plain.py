"""Plain files of the local file system: opened through no link, hashed, stamped, copied.

What may live here: functions of one file or one folder. None knows what the file is for.
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

#: How a folder is opened: never through a link.
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: How a file is opened to read: never through a link, and a pipe is not waited for.
READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
#: How a file is made that is moved into place later.
ASIDE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Errors of opening a file where there is none, or something else (F24).
NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
#: Errors of a file system that cannot clone a file.
NO_CLONE: Final = frozenset(
    {errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM}
)
_FICLONE: Final = 0x40049409
_STAMP: Final = struct.Struct(">QQQ")
_64_BITS: Final = (1 << 64) - 1  # times before 1970 are negative, and some file systems know no end of time
_WRITTEN: Final = slice(0, 16)


def stamp_of(info: os.stat_result) -> bytes:
    """Return a file's stamp, 24 bytes: inode, times of modification and of change in nanoseconds (R77).

    The kernel sets the time of change at each write, link, rename and change of mode, and no program can
    set it back: a file with the noted stamp has the bytes that it had then.
    """
    return _STAMP.pack(info.st_ino & _64_BITS, info.st_mtime_ns & _64_BITS, info.st_ctime_ns & _64_BITS)


def is_unwritten(stamp: bytes, info: os.stat_result) -> bool:
    """Return whether the stamp's file was only linked, renamed or unlinked since, not written to."""
    return stamp[_WRITTEN] == stamp_of(info)[_WRITTEN]


def open_plain(path: Path | str, folder: int | None = None) -> int | None:
    """Return a descriptor of a regular file, ``None`` if there is none in that place (F24)."""
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
    """Return what a regular file's bytes hash to, and its state from before they were read.

    ``None`` for a file that is not there or cannot be read.
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
    """Return what ``lstat`` says of a name in an open folder, ``None`` if there is no such name."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what is in a folder, in order; nothing if there is none."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def keep_copy(name: str, folder: int, target: Path) -> bool:
    """Copy a file; return whether it has bytes: a link or a pipe has none to keep."""
    fd = open_plain(name, folder)
    if fd is None:
        return False
    with open(fd, "rb") as source, open(target, "xb") as copy:
        shutil.copyfileobj(source, copy)
    return True


def clone_bytes(source: int, target: int) -> None:
    """Make *target* share the extents of *source*; raise ``OSError`` where that cannot be."""
    fcntl.ioctl(target, _FICLONE, source)


def copy_bytes(source: int, target: int) -> None:
    """Copy the bytes of one open file to another."""
    with open(source, "rb", closefd=False) as read, open(target, "wb", closefd=False) as write:
        while chunk := read.read(READ_SIZE):
            write.write(chunk)


def set_time_to_now(fd: int) -> None:
    """Set a file's times to now, to the nanosecond: within the kernel's own tick a write would not show."""
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0o077)  # the only way to read it; a file made in between is private, not public
    os.umask(mask)
    return mask


def is_open_for_writing(fd: int) -> bool:
    """Return whether a process has a file open for writing, as far as Linux says, of one's own files.

    A lease is refused then. A lease that is given is given back at once; if a process opens the file to
    write in between, the kernel sends this one a signal that is ignored.
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
