"""A part at a path that the caller chose, for code that has no store of parts.

What may live here: the files of one part. The bytes are at the path itself, the sidecar beside it
(``<path>.json``, in the format of all sidecars). A new representation is written to ``<path>.new``
and moved over the old part once it is whole, or longer.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import PartCorrupt, StoreError, WriteFailed
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.parts import PartStore
from scrapy_streaming.storage.sidecar import PartName, StoredPart

#: The job key in such a sidecar, which belongs to no job.
KEY: Final = "0" * 64
_OPEN: Final = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, order=True)
class _FileName(PartName):
    """The name of such a part; ``serial`` 0 is the part, 1 its replacement while that is written."""

    file: str = ""

    @property
    def part(self) -> str:
        return f"{self.file}.new" if self.serial else self.file

    @property
    def sidecar(self) -> str:
        return f"{self.part}.json"


class PartFile(PartStore):
    """The part at *path*, used by one process at a time. All calls block.

    The caller makes the checkpoints. Raises ``WriteFailed`` if the folder cannot be used.
    """

    def __init__(self, path: Path, *, fsync: bool = True) -> None:
        self._path = path
        self._own, self._new = (_FileName(KEY, 0, serial, path.name) for serial in (0, 1))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            super().__init__(
                path.parent, fsync=fsync, checkpoint_bytes=sys.maxsize, checkpoint_seconds=float("inf")
            )
        except OSError as error:
            msg = f"cannot write parts in {path.parent}: {error.strerror}"
            raise WriteFailed(msg) from error

    @property
    def path(self) -> Path:
        """Where the bytes are."""
        return self._path

    def current(self) -> StoredPart | None:
        """Return the part if its sidecar is sound, or its replacement if a crash left that longer.

        Raises ``StoreError`` (``part-busy``) while another process writes the part.
        """
        self.check_free()
        found = self.find(KEY)
        if found and found[0].name == self._new:
            self._move(found[0].state)
            found = self.find(KEY)
        self.remove(self._new)
        return found[0] if found else None

    def check_free(self) -> None:
        """Raise ``StoreError`` (``part-busy``) if another writer, in any process, has the part locked."""
        for name in (self._own, self._new):
            with suppress(FileNotFoundError, IsADirectoryError):
                fd = os.open(name.part, os.O_RDONLY | _OPEN, dir_fd=self._dir)
                try:
                    if not durable.try_lock(fd):
                        raise self._busy()
                finally:
                    os.close(fd)

    def _busy(self) -> StoreError:
        msg = f"{self._path} is being written by another process: one part has one writer, give another path"
        return StoreError(msg, reason="part-busy")

    def keep_longer(self) -> None:
        """Keep the longer of the part and its replacement; remove the other."""
        found = self.find(KEY)
        if found and found[0].name == self._new:
            self._move(found[0].state)
        self.remove(self._new)

    def whole(self, complete: CompletePart) -> CompletePart:
        """Move a complete part to the path, over the old part; return it with its new path."""
        if complete.path == self.directory / self._new.part:
            self._move(complete.state)
        return replace(complete, path=self._path)

    def tail(self, length: int, size: int) -> bytes:
        """Return the last *size* of the first *length* bytes; raise ``PartCorrupt`` if there are fewer."""
        try:
            fd = os.open(self._own.part, os.O_RDONLY | _OPEN, dir_fd=self._dir)
            try:
                found = os.pread(fd, size, length - size)
            finally:
                os.close(fd)
        except OSError as error:
            msg = f"part {self._path} cannot be read: {error.strerror}"
            raise PartCorrupt(msg) from error
        if len(found) != size:
            msg = f"part {self._path} is shorter than its sidecar says"
            raise PartCorrupt(msg)
        return found

    def write_state(self, state: PartState) -> None:
        """Write *state* into the part's sidecar."""
        try:
            self.write_sidecar(self._own, state)
        except OSError as error:
            msg = f"cannot write the part's sidecar: {error.strerror}"
            raise WriteFailed(msg) from error

    def remove_files(self) -> None:
        """Remove the part and its replacement."""
        self.remove(self._own)
        self.remove(self._new)

    def _move(self, state: PartState) -> None:
        """Move the replacement over the part; a crash leaves one of the two with its right sidecar."""
        try:
            self.write_sidecar(self._own, state)
            os.rename(self._new.part, self._own.part, src_dir_fd=self._dir, dst_dir_fd=self._dir)
            durable.unlink(self._new.sidecar, self._dir)
            self._sync_directory()
        except OSError as error:
            msg = f"cannot move {self._new.part} to {self._own.part}: {error.strerror}"
            raise WriteFailed(msg) from error

    # -- overridden: the two names are fixed -------------------------------------------------

    def _names(self, key: str = "") -> set[PartName]:
        return {self._own, self._new}

    def _new_file(self, key: str, fence: int) -> tuple[PartName, int]:
        name = self._new if self._info(self._own.part) is not None else self._own
        self.remove(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN
        fd = os.open(name.part, flags, 0o600, dir_fd=self._dir)
        durable.try_lock(fd)
        return name, fd

    def _copy(self, source: int, stored: StoredPart, fence: int) -> PartWriter:
        raise self._busy()
