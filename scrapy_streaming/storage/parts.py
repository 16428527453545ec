"""The store of parts: unfinished representations on disk, each with its sidecar.

What may live here: finding, opening, taking over and removing the files in ``parts/``.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from scrapy_streaming.exceptions import DecodedTooLarge, PartCorrupt
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.parts import Keep, PartState, judge_part
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.decoding import decoded
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.leftovers import Leftover, files_in, leftover
from scrapy_streaming.storage.part_writer import WRITE, PartWriter, hash_prefix, prefix_chunks, wrong_hash
from scrapy_streaming.storage.sidecar import SIDECAR_LIMIT, PartName, StoredPart, decode, encode

#: Decoded bytes that are kept in memory, at most.
SMALL_DECODED: Final = 256 << 10
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW
#: Errors for lack of descriptors or memory: they do not show that the part is damaged.
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


@dataclasses.dataclass(frozen=True, slots=True)
class PartFiles:
    """A part's files; ``changed_at`` is the last change of any of them, in seconds since the epoch."""

    name: PartName
    path: Path
    changed_at: float


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
        """Open *directory*, which must exist; a part's checkpoint is due after so many bytes or seconds.

        *adopt*: take over a part without a copy if it can be locked; not on file systems whose locks are
        not reliable. *fenced*: each claim has a fence of its own. Without a ledger two processes may have
        the same fence; then a part that another process has locked is never removed. Raises ``OSError``.
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
        """Return whether a job may have parts: ``lengths`` found one, one was made since, or *fence* > 1."""
        return fence > 1 or key in self._keys

    def highest_fence(self, key: str) -> int:
        """Return the highest fence of a job's parts when ``lengths`` was called, 0 without parts."""
        return self._fences.get(key, 0)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._dir)

    def find(self, key: str) -> list[StoredPart]:
        """Return the parts of a job that have a sound sidecar, the longest first; raise ``WriteFailed``."""
        found = []
        with durable.writing(WRITE):
            for name in self._names(key):
                state, sidecar = self._state(name), self._info(name.sidecar)
                if state is not None and sidecar is not None and self._info(name.part) is not None:
                    found.append(StoredPart(name, state, sidecar.st_mtime))
        return sorted(found, key=lambda p: (p.state.length, p.name), reverse=True)

    def lengths(self) -> dict[str, int]:
        """Return the durable bytes of each job's longest part, by job key; raise ``WriteFailed``."""
        found: dict[str, int] = {}
        with durable.writing(WRITE):
            for name in self._names():
                state = self._state(name)
                if state is not None:
                    found[name.key] = max(state.length, found.get(name.key, 0))
                    self._fences[name.key] = max(name.fence, self.highest_fence(name.key))
        self._keys.update(found)
        return found

    def create(self, key: str, fence: int, state: PartState) -> PartWriter:
        """Return a writer on a new, empty part, whose sidecar is durable; raise ``WriteFailed``."""
        state = dataclasses.replace(state, length=0, prefix_sha256=hashlib.sha256().hexdigest())
        with durable.writing(WRITE), ExitStack() as undo:
            name, fd = self._new_file(key, fence)
            undo.callback(self.remove, name)  # a part without a sidecar is of no use
            undo.callback(os.close, fd)
            self.write_sidecar(name, state)
            self._sync_directory()
            undo.pop_all()
        return PartWriter(self, name, fd, state, hashlib.sha256())

    def reopen(self, stored: StoredPart, fence: int) -> PartWriter:
        """Return a writer that appends to the verified prefix of a part (storage rules 6 and 7).

        The claim gets a part of its own: by rename if a lock proves that no other process writes to it,
        else by a copy. Raises ``PartCorrupt`` if file and sidecar disagree (R3), and leaves the part as it
        is; raises ``WriteFailed``.
        """
        fd = self._open_checked(stored.name)
        adopted = False
        try:
            if not isinstance(judge_part(stored.state, os.fstat(fd).st_size), Keep):
                msg = f"part {stored.name.part} is shorter than its sidecar says"
                raise PartCorrupt(msg)
            with durable.writing(WRITE):
                adoptable = self._can_adopt(fd, stored, fence)
            if not adoptable:
                return self._copy(fd, stored, fence)
            hasher = hash_prefix(fd, stored)
            length = stored.state.length
            with durable.writing(WRITE):
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
        """Return a part whose bytes are all there as a complete part, verified, ready to publish (R7).

        Raises ``PartCorrupt`` as ``reopen`` does.
        """
        fd = self._open_checked(stored.name)
        try:
            if os.fstat(fd).st_size != stored.state.length:
                msg = f"part {stored.name.part} is not as long as its sidecar says"
                raise PartCorrupt(msg)
            digest = Digest(hash_prefix(fd, stored).hexdigest())
        finally:
            os.close(fd)
        path = self.directory / stored.name.part
        return CompletePart(stored.state, stored.state.length, digest, path)

    def decode(self, part: CompletePart, key: str, fence: int, limit: int) -> CompletePart:
        """Return *part* decoded (R34), in at most *limit* bytes (0: no limit).

        Up to ``SMALL_DECODED`` bytes stay in memory; more go to a file beside the part, which ``discard``
        removes. Raises ``Undecodable``, ``DecodedTooLarge``, ``WriteFailed``, ``OSError`` if *part* cannot
        be read.
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
                    with durable.writing(WRITE):
                        durable.write_all(file[0], small)
                    small = bytearray()
            if file is not None:
                with durable.writing(WRITE):
                    durable.write_all(file[0], small)
                undo.pop_all()
                os.close(file[0])
        digest, state = Digest(hasher.hexdigest()), part.state
        if file is None:
            return CompletePart(state, length, digest, data=bytes(small), coded=part.digest)
        return CompletePart(state, length, digest, file[1], coded=part.digest)

    def _scratch(self, key: str, fence: int, undo: ExitStack) -> tuple[int, Path]:
        """Return the descriptor and path of a new file without a sidecar, so that it is never resumed."""
        with durable.writing(WRITE):
            name, fd = self._new_file(key, fence)
        undo.callback(self.remove, name)
        undo.callback(os.close, fd)
        return fd, self.directory / name.part

    def discard(self, key: str, fence: int, *, keep: PartName | None = None) -> None:
        """Remove a job's parts with a fence up to *fence*, but for *keep*: none of a later claim (I11, I15).

        Raises ``WriteFailed``.
        """
        with durable.writing(WRITE):
            for name in self._names(key):
                if name.fence <= fence and name != keep and (self.fenced or not self._is_locked(name)):
                    self.remove(name)
        if keep is None:
            self._keys.discard(key)

    def discard_whole(self, key: str, fence: int) -> None:
        """Remove a job's whole parts with a fence up to *fence*, after their bytes were refused."""
        for stored in self.find(key):
            if stored.state.whole and stored.name.fence <= fence:
                self.remove(stored.name)

    def keep_longest(self, key: str, fence: int) -> None:
        """Remove a job's parts with a fence up to *fence*, but for the job's longest, to be resumed later."""
        stored = self.find(key)
        if stored:
            self.discard(key, fence, keep=stored[0].name)

    def remove(self, name: PartName) -> None:
        """Remove one part, the sidecar first: a part without one is never resumed. Raise ``WriteFailed``."""
        with durable.writing(WRITE):
            for file in (name.sidecar, name.temporary, name.part):
                with suppress(FileNotFoundError, IsADirectoryError):
                    os.unlink(file, dir_fd=self._dir)

    # -- for maintenance -------------------------------------------------------------------

    def files(self) -> list[PartFiles]:
        """Return the files of all parts, without temporary sidecars."""
        found: dict[PartName, PartFiles] = {}
        for path, info in files_in(self.directory):
            name = PartName.parse(path.name)
            if name is None or path.name == name.temporary:
                continue
            last = found[name].changed_at if name in found else 0.0
            found[name] = PartFiles(name, self.directory / name.part, max(info.st_ctime, last))
        return list(found.values())

    def lock(self, name: PartName, locks: ExitStack) -> bool:
        """Lock a part until *locks* is closed; return whether it is locked now, so that it has no writer."""
        try:
            fd = os.open(name.part, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except FileNotFoundError:
            return True  # only the sidecar is left
        except OSError:
            return False  # a link, or another user's: left alone
        locks.callback(os.close, fd)
        return stat.S_ISREG(os.fstat(fd).st_mode) and durable.try_lock(fd)

    def freed_by(self, name: PartName) -> int:
        """Return the bytes that removing a part frees: none if its file is also a blob."""
        part = self._info(name.part) or self._info(name.sidecar)
        return part.st_size if part is not None and part.st_nlink == 1 else 0

    def leftovers(self) -> Iterator[Leftover]:
        """Yield the temporary sidecars that killed processes left."""
        for path, info in files_in(self.directory):
            name = PartName.parse(path.name)
            if name is not None and path.name == name.temporary and stat.S_ISREG(info.st_mode):
                yield leftover(path, info)

    # -- names and files -------------------------------------------------------------------

    def _names(self, key: str = "") -> set[PartName]:
        """Return the names of a job's parts; of all jobs' parts without *key*."""
        # by a new descriptor: threads that list through one share its position, and miss entries
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
        """Return the content of a sidecar, ``None`` if it is damaged, unreadable or not regular (R4, F24)."""
        try:
            fd = os.open(name.sidecar, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise
            return None
        try:
            with open(fd, "rb", closefd=False) as stream:
                return decode(name, stream.read(SIDECAR_LIMIT)) if _is_own_file(fd) else None
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
                continue  # another process with the same fence has just made it
            durable.try_lock(fd)
            return name, fd

    def _is_locked(self, name: PartName) -> bool:
        """Return whether another writer has the part locked."""
        try:
            fd = os.open(name.part, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise
            return False
        try:
            return not durable.try_lock(fd)
        finally:
            os.close(fd)

    def _open_checked(self, name: PartName) -> int:
        """Open a part that is a regular file of this user; raise ``PartCorrupt`` for anything else (E2, F24).

        Read-only if it must be: publishing makes a part read-only before it links it to its blob.
        """
        flags = os.O_NONBLOCK | _OPEN
        try:
            try:
                fd = os.open(name.part, os.O_RDWR | flags, dir_fd=self._dir)
            except PermissionError:
                fd = os.open(name.part, os.O_RDONLY | flags, dir_fd=self._dir)
        except OSError as error:
            if error.errno in _SHORTAGE:
                raise durable.write_failed(WRITE, error) from error
            msg = f"part {name.part} cannot be opened: {error.strerror}"
            raise PartCorrupt(msg) from error
        if not _is_own_file(fd):
            os.close(fd)
            msg = f"part {name.part} is not a regular file of this user"
            raise PartCorrupt(msg)
        return fd

    def _can_adopt(self, fd: int, stored: StoredPart, fence: int) -> bool:
        """Return whether no other process can be writing, linking or taking over this part (I11).

        The sidecar is compared again under the lock: before, the part's writer may have appended to it or
        finished it, or another claim may have taken it over. A whole part may be about to become a blob,
        and the claim that publishes it has no lock.
        """
        if not self.adopt or stored.state.whole or stored.name.fence > fence:
            return False
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR or not durable.try_lock(fd):
            return False
        info, named = os.fstat(fd), self._info(stored.name.part)
        unmoved = named is not None and os.path.samestat(info, named)
        return unmoved and info.st_nlink == 1 and self._state(stored.name) == stored.state

    def _adopt(self, stored: StoredPart, fence: int) -> PartName:
        """Rename a part to the claim's own name; a crash in between leaves a part with its sidecar."""
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
        """Copy a prefix and hash it, while another process may append to the original."""
        writer = self.create(stored.name.key, fence, stored.state)
        with ExitStack() as undo:
            undo.callback(writer.abandon)  # half a copy is of no use
            for chunk in prefix_chunks(source, stored):
                writer.write(chunk)
            if writer.length != stored.state.length or writer.hexdigest() != stored.state.prefix_sha256:
                raise wrong_hash(stored)
            writer.checkpoint()
            undo.pop_all()
        writer.kept = writer.length
        return writer

    def write_sidecar(self, name: PartName, state: PartState) -> None:
        """Replace a part's sidecar atomically; raise ``OSError`` or ``WriteFailed``."""
        fd = self._new_sidecar(name)
        with ExitStack() as undo:
            undo.callback(os.unlink, name.temporary, dir_fd=self._dir)
            try:
                durable.write_all(fd, encode(name, state))
                if self.fsync:
                    durable.sync(fd, WRITE)
            finally:
                os.close(fd)
            failpoint("sidecar-written")
            os.rename(name.temporary, name.sidecar, src_dir_fd=self._dir, dst_dir_fd=self._dir)
            undo.pop_all()
        failpoint("sidecar-named")

    def _new_sidecar(self, name: PartName) -> int:
        """Open a new temporary sidecar; an old one is a killed writer's, or planted, and is removed (E2)."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN
        try:
            return os.open(name.temporary, flags, 0o600, dir_fd=self._dir)
        except FileExistsError:
            os.unlink(name.temporary, dir_fd=self._dir)
            return os.open(name.temporary, flags, 0o600, dir_fd=self._dir)

    def _sync_directory(self) -> None:
        """Make the names durable through a new descriptor: one whose sync failed is never synced again."""
        if self.fsync:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=self._dir)
            try:
                durable.sync(fd, WRITE)
            finally:
                os.close(fd)


# -- helpers ---------------------------------------------------------------------------------


def _is_own_file(fd: int) -> bool:
    """Return whether *fd* is a regular file of this user."""
    info = os.fstat(fd)
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()
