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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrapy_streaming.exceptions import DecodedTooLarge, IntegrityError, PartCorrupt, WriteFailed
from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import Keep, PartState, judge_part
from scrapy_streaming.protocol.reasons import Proof
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.decoding import decoded
from scrapy_streaming.storage.failpoints import failpoint

if TYPE_CHECKING:
    from hashlib import _Hash

FORMAT: Final = 1
#: No sidecar of ours comes near this; a longer one is damaged. In bytes.
SIDECAR_LIMIT: Final = 1 << 20
#: Decoded bytes that are kept in memory, at most.
SMALL_DECODED: Final = 256 << 10
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_NAME = re.compile(rf"([0-9a-f]{{64}})\.{_NUMBER}-{_NUMBER}\.(part|json|json\.tmp)", re.ASCII)
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: The machine is short of something: that says nothing about the part.
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


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

    @property
    def temporary(self) -> str:
        """What the sidecar is called while it is written."""
        return f"{self.sidecar}.tmp"


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A part found on disk, as its sidecar describes it; nothing of it is verified yet.

    ``written_at`` is when the sidecar was written, in seconds since the epoch by the filesystem's clock.
    """

    name: PartName
    state: PartState
    written_at: float = 0.0


# -- sidecars --------------------------------------------------------------------------------


def _encode(name: PartName, state: PartState) -> bytes:
    validators = state.validators
    document = {
        "format": FORMAT,
        "job_key": name.key,
        "fence": name.fence,
        "url": url_without_userinfo(state.url),
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
        "coding_is_content": state.coding_is_content,
        "proof": state.proof,
    }
    return json.dumps(document, sort_keys=True).encode()


def _decode(name: PartName, text: bytes) -> PartState | None:
    """Return what a sidecar says, or ``None`` if it is damaged, newer, or another part's (R4)."""
    try:
        document = json.loads(text)
        if [document["format"], document["job_key"], document["fence"]] != [FORMAT, name.key, name.fence]:
            return None
        digest = _typed(document["repr_digest"], str, None)
        state = PartState(
            url=_typed(document["url"], str),
            validators=_decode_validators(document),
            length=_typed(document["length"], int),
            prefix_sha256=Digest(document["prefix_sha256"]).hex,
            total=_typed(document["total"], int, None),
            content_encoding=_typed(document["content_encoding"], str),
            vary=tuple(_typed(field, str) for field in _typed(document["vary"], list)),
            selecting=_typed(document["selecting"], str),
            repr_digest=None if digest is None else Digest.parse(digest),
            ranges_refused=_typed(document["ranges_refused"], bool),
            media_type=_typed(document["media_type"], str, None),
            coding_is_content=_typed(_coding_is_content(document), bool),
            proof=Proof(document.get("proof", Proof.LENGTH)),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = state.length >= 0 and (state.total is None or state.total >= state.length)
    return state if sound else None


def _coding_is_content(document: dict[str, Any]) -> Any:
    """Return whether the file is meant to be in its coding; older releases did not note it (R34)."""
    if "coding_is_content" in document:
        return document["coding_is_content"]
    return codings.is_content(document["content_encoding"], document["media_type"], [document["url"]])


def _decode_validators(document: dict[str, Any]) -> Validators:
    """Return the validators; raise ``ValueError`` for what no response can have given (E6)."""
    said = [_typed(document[field], str, None) for field in ("etag", "last_modified", "date")]
    found = Validators.from_fields(*([] if value is None else [value] for value in said))
    if [None if found.etag is None else str(found.etag), found.last_modified, found.date] != said:
        raise ValueError
    return found


def _typed(value: Any, kind: type, *others: None) -> Any:
    """Return *value* if it is exactly a *kind* (a ``bool`` is no ``int``), or one of *others*."""
    if type(value) is not kind and value not in others:
        raise TypeError
    return value


# -- the store -------------------------------------------------------------------------------


class PartStore:
    """The parts of one store. All calls block but ``may_have``; none may run on an event loop."""

    def __init__(
        self,
        directory: Path,
        *,
        fsync: bool = True,
        checkpoint_bytes: int = 16 << 20,
        checkpoint_seconds: float = 5.0,
        adopt: bool = True,
        fenced: bool = True,
    ) -> None:
        """*adopt*: locks tell for certain that a writer is gone; not so on network filesystems.

        *fenced*: each claim has a fence of its own. Without a ledger two processes may have the same:
        then a part that another one has locked is never removed.
        """
        self.directory = directory
        self.adopt = adopt
        self.fenced = fenced
        self.fsync = fsync
        self.checkpoint_bytes = checkpoint_bytes
        self.checkpoint_seconds = checkpoint_seconds
        self._keys: set[str] = set()
        self._fences: dict[str, int] = {}
        self._dir = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _OPEN)

    def may_have(self, key: str, fence: int) -> bool:
        """Whether a job may have parts: found by ``lengths``, made since, or left by an earlier claim."""
        return fence > 1 or key in self._keys

    def highest_fence(self, key: str) -> int:
        """Return the highest fence of the parts that ``lengths`` found of a job, 0 if there were none."""
        return self._fences.get(key, 0)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._dir)

    def find(self, key: str) -> list[StoredPart]:
        """Return the parts of a job that a sidecar vouches for, the longest first."""
        found = []
        with _writing():
            for name in self._names(key):
                state, sidecar = self._state(name), self._info(name.sidecar)
                if state is not None and sidecar is not None and self._info(name.part) is not None:
                    found.append(StoredPart(name, state, sidecar.st_mtime))
        return sorted(found, key=lambda p: (p.state.length, p.name), reverse=True)

    def lengths(self) -> dict[str, int]:
        """Return, for each job that has parts, how many bytes its longest one vouches for."""
        found: dict[str, int] = {}
        with _writing():
            for name in self._names():
                state = self._state(name)
                if state is not None:
                    found[name.key] = max(state.length, found.get(name.key, 0))
                    self._fences[name.key] = max(name.fence, self.highest_fence(name.key))
        self._keys.update(found)
        return found

    def create(self, key: str, fence: int, state: PartState) -> PartWriter:
        """Return a writer on a new, empty part; its sidecar is durable before the first byte."""
        state = dataclasses.replace(state, length=0, prefix_sha256=hashlib.sha256().hexdigest())
        with _writing(), ExitStack() as undo:
            name, fd = self._new_file(key, fence)
            undo.callback(self.remove, name)  # a part without a sidecar is of no use
            undo.callback(os.close, fd)
            self.write_sidecar(name, state)
            self._sync_directory()
            undo.pop_all()
        return PartWriter(self, name, fd, state, hashlib.sha256())

    def reopen(self, stored: StoredPart, fence: int) -> PartWriter:
        """Return a writer that stands at the end of a verified prefix (storage rules 6 and 7).

        The part becomes the claim's own: by rename if its writer is gone for certain, else by a
        copy. Raises ``PartCorrupt`` if file and sidecar disagree (R3); the part is left as is.
        """
        fd = self._open_checked(stored.name)
        adopted = False
        try:
            if not isinstance(judge_part(stored.state, os.fstat(fd).st_size), Keep):
                msg = f"part {stored.name.part} is shorter than its sidecar says"
                raise PartCorrupt(msg)
            with _writing():
                free = self._free(fd, stored, fence)
            if not free:
                return self._copy(fd, stored, fence)
            hasher = _hash_prefix(fd, stored)
            length = stored.state.length
            with _writing():
                if os.fstat(fd).st_size > length:
                    os.ftruncate(fd, length)
                os.lseek(fd, length, os.SEEK_SET)
                name = self._adopt(stored, fence)
            adopted = True
            return PartWriter(self, name, fd, stored.state, hasher)
        finally:
            if not adopted:
                os.close(fd)

    def complete_part(self, stored: StoredPart) -> CompletePart:
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
        return CompletePart(stored.state, stored.state.length, digest, path)

    def decode(self, part: CompletePart, key: str, fence: int, limit: int) -> CompletePart:
        """Return *part* with its codings taken off (R34); *limit* is in bytes, 0 for none.

        What does not fit ``SMALL_DECODED`` bytes goes to a file beside the part, which ``discard``
        removes. Raises ``Undecodable``, ``DecodedTooLarge``, ``WriteFailed``.
        """
        length, hasher, small = 0, hashlib.sha256(), bytearray()
        with ExitStack() as undo:
            file: tuple[int, Path] | None = None
            for chunk in decoded(part.chunks(), part.state.to_decode) if part.length else ():
                length += len(chunk)
                if limit and length > limit:
                    msg = f"{part.state.url}: decodes to more than {limit} bytes"
                    raise DecodedTooLarge(msg)
                hasher.update(chunk)
                small += chunk
                if len(small) > SMALL_DECODED:
                    file = file or self._scratch(key, fence, undo)
                    with _writing():
                        _write_all(file[0], small)
                    small = bytearray()
            if file is not None:
                with _writing():
                    _write_all(file[0], small)
                undo.pop_all()
                os.close(file[0])
        digest, state = Digest(hasher.hexdigest()), part.state
        if file is None:
            return CompletePart(state, length, digest, data=bytes(small), coded=part.digest)
        return CompletePart(state, length, digest, file[1], coded=part.digest)

    def _scratch(self, key: str, fence: int, undo: ExitStack) -> tuple[int, Path]:
        """Return a new file's descriptor and path; no sidecar vouches for it, so nothing resumes it."""
        with _writing():
            name, fd = self._new_file(key, fence)
        undo.callback(self.remove, name)
        undo.callback(os.close, fd)
        return fd, self.directory / name.part

    def discard(self, key: str, fence: int, *, keep: PartName | None = None) -> None:
        """Remove a job's parts up to *fence*: never those of a later claim (I11, I15)."""
        with _writing():
            for name in self._names(key):
                if name.fence <= fence and name != keep and (self.fenced or not self._in_work(name)):
                    self.remove(name)
        if keep is None:
            self._keys.discard(key)

    def discard_whole(self, key: str, fence: int) -> None:
        """Remove those of a job's parts, up to *fence*, that are whole: one that somebody refused."""
        for stored in self.find(key):
            if stored.state.whole and stored.name.fence <= fence:
                self.remove(stored.name)

    def keep_longest(self, key: str, fence: int) -> None:
        """Remove a job's parts but the one that a later attempt would build on."""
        stored = self.find(key)
        if stored:
            self.discard(key, fence, keep=stored[0].name)

    def remove(self, name: PartName) -> None:
        """Remove one part: the sidecar first, so that nothing vouches for half a removal."""
        with _writing():
            for file in (name.sidecar, name.temporary, name.part):
                with suppress(FileNotFoundError, IsADirectoryError):
                    os.unlink(file, dir_fd=self._dir)

    # -- names and files -------------------------------------------------------------------

    def _names(self, key: str = "") -> set[PartName]:
        """Return the names of a job's parts, of all jobs' without *key*."""
        # a descriptor of its own: two threads listing by one share its position, and miss entries
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=self._dir)
        try:
            entries = os.listdir(fd)
        finally:
            os.close(fd)
        parsed = (PartName.parse(entry) for entry in entries if entry.startswith(key))
        return {name for name in parsed if name is not None and key in ("", name.key)}

    def _info(self, file: str) -> os.stat_result | None:
        try:
            return os.stat(file, dir_fd=self._dir, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _state(self, name: PartName) -> PartState | None:
        """Return what the sidecar says; ``None`` if it cannot be read or is no plain file (R4, F24)."""
        try:
            fd = os.open(name.sidecar, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise
            return None
        try:
            with open(fd, "rb", closefd=False) as stream:
                return _decode(name, stream.read(SIDECAR_LIMIT)) if _plain(fd) else None
        except OSError:
            return None
        finally:
            os.close(fd)

    def _new_file(self, key: str, fence: int) -> tuple[PartName, int]:
        self._keys.add(key)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN
        while True:
            taken = {name.serial for name in self._names(key) if name.fence == fence}
            name = PartName(key, fence, max(taken, default=-1) + 1)
            try:
                fd = os.open(name.part, flags, 0o600, dir_fd=self._dir)
            except FileExistsError:
                if self.fenced:
                    raise
                continue  # another process, which has the same fence, was faster
            _lock(fd)
            return name, fd

    def _in_work(self, name: PartName) -> bool:
        """Whether another writer has the part locked."""
        try:
            fd = os.open(name.part, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise
            return False
        try:
            return not _lock(fd)
        finally:
            os.close(fd)

    def _open_checked(self, name: PartName) -> int:
        """Open a part that is a regular file of ours; anything else is refused (E2, F24).

        For writing if that may be: one that was about to be linked as a blob is read-only already.
        """
        flags = os.O_NONBLOCK | _OPEN
        try:
            try:
                fd = os.open(name.part, os.O_RDWR | flags, dir_fd=self._dir)
            except PermissionError:
                fd = os.open(name.part, os.O_RDONLY | flags, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise _failure(error) from error
            msg = f"part {name.part} cannot be opened: {error.strerror}"
            raise PartCorrupt(msg) from error
        if not _plain(fd):
            os.close(fd)
            msg = f"part {name.part} is not a regular file of ours"
            raise PartCorrupt(msg)
        return fd

    def _free(self, fd: int, stored: StoredPart, fence: int) -> bool:
        """Whether nobody else can be writing, linking or taking this part (I11).

        Looked at under the lock: until then its writer may have gone on, finished, or lost it to
        another claim. A whole part may be on its way to a blob, by a claim that holds no lock.
        """
        if not self.adopt or stored.state.whole or stored.name.fence > fence:
            return False
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or not _lock(fd):
            return False
        info, named = os.fstat(fd), self._info(stored.name.part)
        unmoved = named is not None and os.path.samestat(info, named)
        return unmoved and info.st_nlink == 1 and self._state(stored.name) == stored.state

    def _adopt(self, stored: StoredPart, fence: int) -> PartName:
        """Give a part its new owner's name; a crash in between leaves one whole pair."""
        old = stored.name
        if old.fence == fence:
            return old
        taken = {name.serial for name in self._names(old.key) if name.fence == fence}
        new = PartName(old.key, fence, max(taken, default=-1) + 1)
        self.write_sidecar(new, stored.state)
        failpoint("part-adopting")
        os.rename(old.part, new.part, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        failpoint("part-adopted")
        with suppress(FileNotFoundError):
            os.unlink(old.sidecar, dir_fd=self._dir)
        self._sync_directory()
        return new

    def _copy(self, source: int, stored: StoredPart, fence: int) -> PartWriter:
        """Copy a prefix that someone else may still be writing behind, hashing on the way."""
        writer = self.create(stored.name.key, fence, stored.state)
        with ExitStack() as undo:
            undo.callback(writer.abandon)  # half a copy is of no use
            for chunk in _chunks(source, stored):
                writer.write(chunk)
            if writer.length != stored.state.length or writer.hexdigest() != stored.state.prefix_sha256:
                msg = f"part {stored.name.part} does not hash to what its sidecar says"
                raise PartCorrupt(msg)
            writer.checkpoint()
            undo.pop_all()
        writer.kept = writer.length
        return writer

    def write_sidecar(self, name: PartName, state: PartState) -> None:
        """Put a sidecar in its place, whole or not at all; raises ``OSError`` or ``WriteFailed``."""
        fd = self._new_sidecar(name)
        with ExitStack() as undo:
            undo.callback(os.unlink, name.temporary, dir_fd=self._dir)
            try:
                _write_all(fd, _encode(name, state))
                if self.fsync:
                    _sync(os.fsync, fd)
            finally:
                os.close(fd)
            failpoint("sidecar-written")
            os.rename(name.temporary, name.sidecar, src_dir_fd=self._dir, dst_dir_fd=self._dir)
            undo.pop_all()
        failpoint("sidecar-named")

    def _new_sidecar(self, name: PartName) -> int:
        """Open a new file: one that is there is a killed writer's or planted, never written to (E2)."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN
        try:
            return os.open(name.temporary, flags, 0o600, dir_fd=self._dir)
        except FileExistsError:
            os.unlink(name.temporary, dir_fd=self._dir)
            return os.open(name.temporary, flags, 0o600, dir_fd=self._dir)

    def _sync_directory(self) -> None:
        """Make the names durable, by a descriptor of its own: one that failed is never synced again."""
        if self.fsync:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=self._dir)
            try:
                _sync(os.fsync, fd)
            finally:
                os.close(fd)


class PartWriter:
    """Appends to one part, hashing on the way; used by one thread at a time.

    ``length`` is the number of bytes the part holds, ``kept`` how many of them were there when
    it was opened, ``limit`` how many it may come to hold (``None``: any number). While it is
    ``provisional`` no sidecar vouches for what was written since then.
    """

    def __init__(self, store: PartStore, name: PartName, fd: int, state: PartState, hasher: _Hash) -> None:
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
        """Take over what a new response says of the same bytes; durable at the next checkpoint."""
        self.state = dataclasses.replace(
            state, length=self.state.length, prefix_sha256=self.state.prefix_sha256
        )
        self.limit = self.state.total

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append *data* and hash it; checkpoint when one is due.

        Raises ``IntegrityError`` beyond ``limit`` (R35) and ``WriteFailed`` when the disk does
        not take it; after that the last checkpoint is all that counts.
        """
        if self.limit is not None and self.length + len(data) > self.limit:
            msg = f"more bytes than the {self.limit} that were declared"
            raise IntegrityError(msg, reason="length-mismatch")
        with self._using():
            _write_all(self._fd, data)
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
        """Return *size* bytes of those that were there when the part was opened; fewer at their end."""
        with _writing():
            return os.pread(self._fd, min(size, self.kept - offset), offset)

    def checkpoint(self) -> None:
        """Make all bytes so far durable, then the sidecar that vouches for them (storage rule 5)."""
        with self._using():
            if self._store.fsync:
                _sync(os.fdatasync, self._fd)
            failpoint("part-synced")
            state = dataclasses.replace(self.state, length=self.length, prefix_sha256=self.hexdigest())
            self._store.write_sidecar(self.name, state)
        self.state = state
        self._checkpointed_at = time.monotonic()

    def finish(self) -> CompletePart:
        """Return the whole part: its length is now the representation's complete length.

        Closed in any case. Raises ``WriteFailed`` as ``checkpoint`` does.
        """
        self.state = dataclasses.replace(self.state, total=self.length)
        try:
            self.checkpoint()
        finally:
            self._close()
        return CompletePart(self.state, self.length, Digest(self.state.prefix_sha256), self.path)

    def close(self) -> int:
        """Keep the part for a later attempt; return how many bytes of it are durable.

        What is provisional is cut off: it may not be the representation's (R64, R74).
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
        """Close the descriptor once: its number may be another file's by now."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Do something to the file; after the first failure nothing is done to it again (storage rule 10)."""
        if self._broken:
            msg = f"part {self.name.part} failed before and is not written again"
            raise WriteFailed(msg, reason=self._why_broken)
        self._broken = True  # until it is done: after any failure nobody knows what the file holds
        try:
            with _writing():
                yield
        except WriteFailed as error:
            self._why_broken = error.reason
            raise
        self._broken = False


# -- helpers ---------------------------------------------------------------------------------


def _begin_write_back(fd: int, offset: int, length: int) -> None:
    """Have the kernel start to write now, so that the checkpoint has less to wait for (a hint)."""
    with suppress(OSError):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``."""
    try:
        yield
    except OSError as error:
        raise _failure(error) from error


def _failure(error: OSError, reason: str = "write-failed") -> WriteFailed:
    msg = f"cannot write the part: {error.strerror or error}"
    return WriteFailed(msg, reason="no-space" if error.errno in _FULL else reason)


def _sync(how: Callable[[int], None], fd: int) -> None:
    try:
        how(fd)
    except OSError as error:
        raise _failure(error, "sync-failed") from error


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        written = os.write(fd, rest)
        if written == 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        rest = rest[written:]


def _plain(fd: int) -> bool:
    """Whether it is a regular file of ours."""
    info = os.fstat(fd)
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()


def _lock(fd: int) -> bool:
    """Whether nobody else has the part open for writing (an optimisation: storage rule 7)."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _chunks(fd: int, stored: StoredPart) -> Iterator[bytes]:
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


def _hash_prefix(fd: int, stored: StoredPart) -> _Hash:
    """Return the hash of the part's first ``length`` bytes, or raise ``PartCorrupt`` (R3, I10)."""
    hasher = hashlib.sha256()
    for chunk in _chunks(fd, stored):
        hasher.update(chunk)
    if hasher.hexdigest() != stored.state.prefix_sha256:
        msg = f"part {stored.name.part} does not hash to what its sidecar says"
        raise PartCorrupt(msg)
    return hasher
