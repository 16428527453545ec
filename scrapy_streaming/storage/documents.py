"""Small files that people and tools read: written whole or not at all.

What may live here: how such a file gets into its place, and how one is read that anybody may have put there.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Bytes of a file that are read at most.
LONGEST: Final = 16 << 20


def replace_file(path: Path, text: str, *, fsync: bool) -> None:
    """Write *text* aside and move it to *path*: readers see the old file or the new one, whole.

    Of several writers the last wins. With *fsync* it is durable when this returns. Raises ``OSError``;
    nothing is left behind then.
    """
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            if fsync:
                os.fsync(fd)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):  # moved into place
            os.unlink(temporary)
    if fsync:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_file(path: Path) -> str:
    """Return the text of a plain file, of ``LONGEST`` bytes at most.

    Raises ``OSError`` if it cannot be read, ``ValueError`` if it is no plain file, too long or no UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
    with open(fd, "rb") as stream:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > LONGEST:
            msg = f"is no plain file of at most {LONGEST} bytes"
            raise ValueError(msg)
        return stream.read().decode("utf-8")
