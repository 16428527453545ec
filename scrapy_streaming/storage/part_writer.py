"""One open part: appending to it, its hash, and the checkpoints that make its bytes durable.

What may live here: what happens between opening a part and closing it. Resuming depends on the order of
writes: bytes, ``fdatasync``, *then* the sidecar that says how many of them are durable.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from scrapy_streaming.exceptions import IntegrityError, PartCorrupt, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.sidecar import PartName, StoredPart

if TYPE_CHECKING:
    from hashlib import _Hash

#: How the messages of errors begin.
WRITE: str = "cannot write the part"


class PartFolder(Protocol):
    """What a writer needs of the store of parts."""

    directory: Path
    fsync: bool
    checkpoint_bytes: int
    checkpoint_seconds: float

    def write_sidecar(self, name: PartName, state: PartState) -> None:
        """Replace a part's sidecar atomically."""

    def remove(self, name: PartName) -> None:
        """Remove one part."""


class PartWriter:
    """Appends to one part and hashes what it appends; used by one thread at a time.

    In bytes: ``length`` is the part's, ``kept`` what it was when the part was opened, ``limit`` the most
    that it may become (``None``: no limit). While the writer is ``provisional``, no checkpoint is made:
    what is written may belong to another representation.
    """

    def __init__(self, store: PartFolder, name: PartName, fd: int, state: PartState, hasher: _Hash) -> None:
        self.name = name
        self.state = state
        self.length = self.kept = state.length
        self.limit = state.total
        self.provisional = False
        self._store = store
        self._fd = fd
        self._hasher = hasher
        self._broken = False
        self._why_broken = WriteFailed.reason
        self._checkpointed_at = time.monotonic()

    @property
    def path(self) -> Path:
        """Where the bytes are."""
        return self._store.directory / self.name.part

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes so far, 64 hex digits."""
        return self._hasher.copy().hexdigest()

    def describe(self, state: PartState) -> None:
        """Replace the description of the bytes by that of a new response; durable at the next checkpoint."""
        self.state = dataclasses.replace(
            state, length=self.state.length, prefix_sha256=self.state.prefix_sha256
        )
        self.limit = self.state.total

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append *data* and hash it; checkpoint when one is due.

        Raises ``IntegrityError`` beyond ``limit`` (R35) and ``WriteFailed`` if writing fails; after that the
        part ends at its last checkpoint.
        """
        if self.limit is not None and self.length + len(data) > self.limit:
            msg = f"more bytes than the {self.limit} that were declared"
            raise IntegrityError(msg, reason="length-mismatch")
        with self._using():
            durable.write_all(self._fd, data)
        if self._store.fsync:
            _begin_write_back(self._fd, self.length, len(data))
        self._hasher.update(data)
        self.length += len(data)
        failpoint("part-written")
        if not self.provisional and (
            self.length - self.state.length >= self._store.checkpoint_bytes
            or time.monotonic() - self._checkpointed_at >= self._store.checkpoint_seconds
        ):
            self.checkpoint()

    def read(self, offset: int, size: int) -> bytes:
        """Return *size* bytes from *offset*, or fewer at the end of the first ``kept`` bytes.

        Raises ``WriteFailed`` if they cannot be read.
        """
        with durable.writing(WRITE):
            return os.pread(self._fd, min(size, self.kept - offset), offset)

    def checkpoint(self) -> None:
        """Make all bytes so far durable, then the sidecar that counts them (storage rule 5).

        Raises ``WriteFailed``, also for a writer that failed before.
        """
        with self._using():
            if self._store.fsync:
                durable.sync_data(self._fd, WRITE)
            failpoint("part-synced")
            state = dataclasses.replace(self.state, length=self.length, prefix_sha256=self.hexdigest())
            self._store.write_sidecar(self.name, state)
        self.state = state
        self._checkpointed_at = time.monotonic()

    def finish(self) -> CompletePart:
        """Return the complete part: its length is now the representation's complete length.

        The writer is closed, also after an error. Raises ``WriteFailed`` as ``checkpoint`` does.
        """
        self.state = dataclasses.replace(self.state, total=self.length)
        try:
            self.checkpoint()
        finally:
            self._close()
        return CompletePart(self.state, self.length, Digest(self.state.prefix_sha256), self.path)

    def close(self) -> int:
        """Close the part and keep it for a later attempt; return how many bytes of it are durable.

        Provisional bytes are cut off: they may be of another representation (R64, R74).
        """
        try:
            if self.provisional:
                self._cut_back()
            elif not self._broken and self.length > self.state.length:
                self.checkpoint()
        except WriteFailed:
            pass  # the part now ends at its last checkpoint, which is what is returned
        finally:
            self._close()
        return self.state.length

    def _cut_back(self) -> None:
        with suppress(OSError):  # the sidecar says where the part ends; this only frees the space
            os.ftruncate(self._fd, self.state.length)

    def abandon(self) -> None:
        """Close the part and remove it."""
        self._close()
        self._store.remove(self.name)

    def _close(self) -> None:
        """Close the descriptor, once: the system gives its number to other files later."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Guard one use of the file: after a failure the file is never used again (storage rule 10)."""
        if self._broken:
            msg = f"part {self.name.part} failed before and is not written again"
            raise WriteFailed(msg, reason=self._why_broken)
        self._broken = True  # until the use succeeds: after a failure the file's content is not known
        try:
            with durable.writing(WRITE):
                yield
        except WriteFailed as error:
            self._why_broken = error.reason
            raise
        self._broken = False


def _begin_write_back(fd: int, offset: int, length: int) -> None:
    """Advise the kernel to start to write to the disk, so that the next checkpoint waits for less."""
    with suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


# -- the durable prefix ----------------------------------------------------------------------


def prefix_chunks(fd: int, stored: StoredPart) -> Iterator[bytes]:
    """Yield the part's first ``state.length`` bytes, or as many as there are.

    Raises ``PartCorrupt`` if they cannot be read.
    """
    offset, length = 0, stored.state.length
    while offset < length:
        try:
            chunk = os.pread(fd, min(READ_SIZE, length - offset), offset)
        except OSError as error:
            msg = f"part {stored.name.part} cannot be read: {error.strerror}"
            raise PartCorrupt(msg) from error
        if not chunk:
            return
        offset += len(chunk)
        yield chunk


def hash_prefix(fd: int, stored: StoredPart) -> _Hash:
    """Return the hash of the part's first ``state.length`` bytes (R3, I10).

    Raises ``PartCorrupt`` if they cannot be read, or do not have the hash in the sidecar.
    """
    hasher = hashlib.sha256()
    for chunk in prefix_chunks(fd, stored):
        hasher.update(chunk)
    if hasher.hexdigest() != stored.state.prefix_sha256:
        raise wrong_hash(stored)
    return hasher


def wrong_hash(stored: StoredPart) -> PartCorrupt:
    """Return the error for a part whose bytes do not have the hash in its sidecar."""
    return PartCorrupt(f"part {stored.name.part} does not have the hash in its sidecar")
