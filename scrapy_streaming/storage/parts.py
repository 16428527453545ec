"""Parts: unfinished representations on disk, each with its sidecar.

What may live here: files under ``parts/`` and nothing else. The order of writes is the rule
everything rests on: bytes, ``fdatasync``, *then* the sidecar that vouches for them.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrapy_streaming.exceptions import IntegrityError, PartCorrupt, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.resume import Keep, PartState, judge_part
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.finished import READ_SIZE, FinishedPart

if TYPE_CHECKING:
    from hashlib import _Hash

FORMAT: Final = 1
_NAME = re.compile(r"([0-9a-f]{64})\.([0-9]{1,18})-([0-9]{1,9})\.(part|json)", re.ASCII)
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True, order=True)
class PartName:
    """The name of a part: whose it is (``fence``) and which of that claim's (``serial``)."""

    key: str
    fence: int
    serial: int

    @classmethod
    def parse(cls, name: str) -> PartName | None:
        """Return the name, or ``None`` if it is not of our grammar (E12)."""
        match = _NAME.fullmatch(name)
        return None if match is None else cls(match[1], int(match[2]), int(match[3]))

    @property
    def part(self) -> str:
        """The file with the bytes."""
        return f"{self.key}.{self.fence}-{self.serial}.part"

    @property
    def sidecar(self) -> str:
        """The file that vouches for them."""
        return f"{self.key}.{self.fence}-{self.serial}.json"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part found on disk, as its sidecar describes it; nothing of it is verified yet."""

    name: PartName
    state: PartState


# -- sidecars --------------------------------------------------------------------------------


def _encode(name: PartName, state: PartState) -> bytes:
    validators = state.validators
    document = {
        "format": FORMAT,
        "job_key": name.key,
        "fence": name.fence,
        "url": state.url,
        "etag": None if validators.etag is None else str(validators.etag),
        "last_modified": validators.last_modified,
        "date": validators.date,
        "length": state.length,
        "prefix_sha256": state.prefix_sha256,
        "total": state.total,
        "content_encoding": state.content_encoding,
        "vary": state.vary,
        "selecting": state.selecting,
        "repr_digest": None if state.repr_digest is None else str(state.repr_digest),
        "ranges_refused": state.ranges_refused,
        "media_type": state.media_type,
    }
    return json.dumps(document, sort_keys=True).encode()


def _decode(name: PartName, text: bytes) -> PartState | None:
    """Return what a sidecar says, or ``None`` if it is damaged, newer, or another part's (R4)."""
    try:
        document: dict[str, Any] = json.loads(text)
        if document["format"] != FORMAT or document["job_key"] != name.key:
            return None
        etag = document["etag"]
        digest = document["repr_digest"]
        return PartState(
            url=document["url"],
            validators=Validators(
                None if etag is None else EntityTag.parse(etag),
                document["last_modified"],
                document["date"],
            ),
            length=int(document["length"]),
            prefix_sha256=document["prefix_sha256"],
            total=document["total"],
            content_encoding=document["content_encoding"],
            vary=tuple(document["vary"]),
            selecting=document["selecting"],
            repr_digest=None if digest is None else Digest.parse(digest),
            ranges_refused=bool(document["ranges_refused"]),
            media_type=document["media_type"],
        )
    except (ValueError, KeyError, TypeError):
        return None


# -- the store -------------------------------------------------------------------------------


class PartStore:
    """The parts of one store. All calls block; none may run on an event loop."""

    def __init__(
        self,
        directory: Path,
        *,
        fsync: bool = True,
        checkpoint_bytes: int = 16 << 20,
        checkpoint_seconds: float = 5.0,
    ) -> None:
        self.directory = directory
        self.fsync = fsync
        self.checkpoint_bytes = checkpoint_bytes
        self.checkpoint_seconds = checkpoint_seconds
        self._dir = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _OPEN)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._dir)

    def find(self, key: str) -> list[StoredPart]:
        """Return the parts of a job that a sidecar vouches for, the longest first."""
        found = []
        for name in self._names(key):
            with suppress(FileNotFoundError):
                state = _decode(name, self._read(name.sidecar))
                if state is not None and self._size(name.part) is not None:
                    found.append(StoredPart(name, state))
        return sorted(found, key=lambda p: (p.state.length, p.name), reverse=True)

    def create(self, key: str, fence: int, state: PartState) -> PartWriter:
        """Return a writer on a new, empty part; its sidecar is durable before the first byte."""
        with _writing():
            name, fd = self._new_file(key, fence)
            state = dataclasses.replace(state, length=0, prefix_sha256=hashlib.sha256().hexdigest())
            self._write_sidecar(name, state)
            self._sync_directory()
        return PartWriter(self, name, fd, state, hashlib.sha256())

    def reopen(self, stored: StoredPart, fence: int) -> PartWriter:
        """Return a writer that stands at the end of a verified prefix (storage rules 6 and 7).

        The part becomes the claim's own: by rename if its writer is gone for certain, else by a
        copy. Raises ``PartCorrupt`` if file and sidecar disagree (R3); the part is left as is.
        """
        fd = self._open_checked(stored.name)
        try:
            verdict = judge_part(stored.state, os.fstat(fd).st_size)
            if not isinstance(verdict, Keep):
                msg = f"part {stored.name.part} is shorter than its sidecar says"
                raise PartCorrupt(msg)
            alone = os.fstat(fd).st_nlink == 1 and _lock(fd)
            if not alone:
                return self._copy(fd, stored, fence)
            hasher = _hash_prefix(fd, stored)
            with _writing():
                if verdict.cut:
                    os.ftruncate(fd, verdict.length)
                name = self._adopt(stored, fence)
        except BaseException:
            os.close(fd)
            raise
        os.lseek(fd, 0, os.SEEK_END)
        return PartWriter(self, name, fd, stored.state, hasher)

    def finished(self, stored: StoredPart) -> FinishedPart:
        """Return a whole part, verified, ready to publish with no request (R7).

        Raises ``PartCorrupt`` as ``reopen`` does.
        """
        fd = self._open_checked(stored.name)
        try:
            if os.fstat(fd).st_size != stored.state.length:
                msg = f"part {stored.name.part} is not as long as its sidecar says"
                raise PartCorrupt(msg)
            digest = Digest(_hash_prefix(fd, stored).hexdigest())
        finally:
            os.close(fd)
        path = self.directory / stored.name.part
        return FinishedPart(stored.state, stored.state.length, digest, path)

    def discard(self, key: str, fence: int, *, keep: PartName | None = None) -> None:
        """Remove a job's parts up to *fence*: never those of a later claim (I11, I15)."""
        for name in self._names(key):
            if name.fence <= fence and name != keep:
                self.remove(name)

    def keep_longest(self, key: str, fence: int) -> None:
        """Remove a job's parts but the one that a later attempt would build on."""
        stored = self.find(key)
        if stored:
            self.discard(key, fence, keep=stored[0].name)

    def remove(self, name: PartName) -> None:
        """Remove one part: the sidecar first, so that nothing vouches for half a removal."""
        for file in (name.sidecar, name.part):
            with suppress(FileNotFoundError):
                os.unlink(file, dir_fd=self._dir)

    # -- names and files -------------------------------------------------------------------

    def _names(self, key: str) -> set[PartName]:
        parsed = (PartName.parse(entry) for entry in os.listdir(self._dir) if entry.startswith(key))
        return {name for name in parsed if name is not None and name.key == key}

    def _size(self, file: str) -> int | None:
        try:
            return os.stat(file, dir_fd=self._dir, follow_symlinks=False).st_size
        except FileNotFoundError:
            return None

    def _read(self, file: str) -> bytes:
        fd = os.open(file, os.O_RDONLY | _OPEN, dir_fd=self._dir)
        with open(fd, "rb") as stream:
            return stream.read()

    def _new_file(self, key: str, fence: int) -> tuple[PartName, int]:
        taken = {name.serial for name in self._names(key) if name.fence == fence}
        name = PartName(key, fence, max(taken, default=-1) + 1)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN
        fd = os.open(name.part, flags, 0o600, dir_fd=self._dir)
        _lock(fd)
        return name, fd

    def _open_checked(self, name: PartName) -> int:
        """Open a part that is a regular file of ours; anything else is refused (E2, F24)."""
        try:
            fd = os.open(name.part, os.O_RDWR | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except OSError as error:
            msg = f"part {name.part} cannot be opened: {error.strerror}"
            raise PartCorrupt(msg) from error
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            os.close(fd)
            msg = f"part {name.part} is not a regular file of ours"
            raise PartCorrupt(msg)
        return fd

    def _adopt(self, stored: StoredPart, fence: int) -> PartName:
        """Give a part its new owner's name; a crash in between leaves one whole pair."""
        old = stored.name
        if old.fence == fence:
            return old
        taken = {name.serial for name in self._names(old.key) if name.fence == fence}
        new = PartName(old.key, fence, max(taken, default=-1) + 1)
        self._write_sidecar(new, stored.state)
        os.rename(old.part, new.part, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        os.unlink(old.sidecar, dir_fd=self._dir)
        self._sync_directory()
        return new

    def _copy(self, source: int, stored: StoredPart, fence: int) -> PartWriter:
        """Copy a prefix that someone else may still be writing behind, hashing on the way."""
        writer = self.create(stored.name.key, fence, stored.state)
        try:
            for chunk in _chunks(source, stored.state.length):
                writer.write(chunk)
            if writer.length != stored.state.length or writer.hexdigest() != stored.state.prefix_sha256:
                msg = f"part {stored.name.part} does not hash to what its sidecar says"
                raise PartCorrupt(msg)
            writer.checkpoint()
        except BaseException:
            writer.abandon()
            raise
        os.close(source)
        return writer

    def _write_sidecar(self, name: PartName, state: PartState) -> None:
        temporary = f"{name.sidecar}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _OPEN
        fd = os.open(temporary, flags, 0o600, dir_fd=self._dir)
        try:
            os.write(fd, _encode(name, state))
            if self.fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name.sidecar, src_dir_fd=self._dir, dst_dir_fd=self._dir)

    def _sync_directory(self) -> None:
        if self.fsync:
            os.fsync(self._dir)


class PartWriter:
    """Appends to one part, hashing on the way; used by one thread at a time.

    ``length`` is the number of bytes the part holds, ``kept`` how many of them were there when
    it was opened.
    """

    def __init__(self, store: PartStore, name: PartName, fd: int, state: PartState, hasher: _Hash) -> None:
        self.name = name
        self.state = state
        self.length = self.kept = state.length
        self.limit: int | None = None
        self._store = store
        self._fd = fd
        self._hasher = hasher
        self._broken = False
        self._checkpointed_at = time.monotonic()

    @property
    def path(self) -> Path:
        """Where the bytes are."""
        return self._store.directory / self.name.part

    def hexdigest(self) -> str:
        """Return the SHA-256 of all bytes so far, 64 hex digits."""
        return self._hasher.copy().hexdigest()

    def describe(self, state: PartState) -> None:
        """Take over what a new response says of the same bytes; durable at the next checkpoint."""
        self.state = dataclasses.replace(
            state, length=self.state.length, prefix_sha256=self.state.prefix_sha256
        )

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append *data* and hash it; checkpoint when one is due.

        Raises ``IntegrityError`` beyond ``limit`` (R35) and ``WriteFailed`` when the disk does
        not take it; after that the last checkpoint is all that counts.
        """
        if self.limit is not None and self.length + len(data) > self.limit:
            msg = f"more bytes than the {self.limit} that were declared"
            raise IntegrityError(msg, reason="length-mismatch")
        with _writing(self):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        self._hasher.update(data)
        self.length += len(data)
        if (
            self.length - self.state.length >= self._store.checkpoint_bytes
            or time.monotonic() - self._checkpointed_at >= self._store.checkpoint_seconds
        ):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make all bytes so far durable, then the sidecar that vouches for them (rule 5)."""
        if self._broken:
            msg = f"part {self.name.part} failed before and is not written again"
            raise WriteFailed(msg)
        with _writing(self):
            if self._store.fsync:
                os.fdatasync(self._fd)
            state = dataclasses.replace(self.state, length=self.length, prefix_sha256=self.hexdigest())
            self._store._write_sidecar(self.name, state)
        self.state = state
        self._checkpointed_at = time.monotonic()

    def finish(self) -> FinishedPart:
        """Return the whole part: its length is now the representation's complete length."""
        self.state = dataclasses.replace(self.state, total=self.length)
        self.checkpoint()
        os.close(self._fd)
        return FinishedPart(self.state, self.length, Digest(self.state.prefix_sha256), self.path)

    def close(self) -> int:
        """Keep the part for a later attempt; return how many bytes of it are durable."""
        try:
            if not self._broken and self.length > self.state.length:
                self.checkpoint()
        except WriteFailed:
            pass  # the part now ends at its last checkpoint, which is what is returned
        finally:
            os.close(self._fd)
        return self.state.length

    def abandon(self) -> None:
        """Close the part and remove it."""
        os.close(self._fd)
        self._store.remove(self.name)


# -- helpers ---------------------------------------------------------------------------------


class _writing:  # noqa: N801 - reads as a statement
    """Turn an ``OSError`` inside into ``WriteFailed``, and the writer into a broken one (rule 10)."""

    def __init__(self, writer: PartWriter | None = None) -> None:
        self._writer = writer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if self._writer is not None:
            self._writer._broken = True
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        msg = f"cannot write the part: {error.strerror or error}"
        raise WriteFailed(msg, reason="no-space" if full else "write-failed") from error


def _lock(fd: int) -> bool:
    """Whether nobody else has the part open for writing (an optimisation: rule 7)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _chunks(fd: int, length: int) -> Iterator[bytes]:
    offset = 0
    while offset < length and (chunk := os.pread(fd, min(READ_SIZE, length - offset), offset)):
        offset += len(chunk)
        yield chunk


def _hash_prefix(fd: int, stored: StoredPart) -> _Hash:
    """Return the hash of the part's first ``length`` bytes, or raise ``PartCorrupt`` (R3, I10)."""
    hasher = hashlib.sha256()
    for chunk in _chunks(fd, stored.state.length):
        hasher.update(chunk)
    if hasher.hexdigest() != stored.state.prefix_sha256:
        msg = f"part {stored.name.part} does not hash to what its sidecar says"
        raise PartCorrupt(msg)
    return hasher
