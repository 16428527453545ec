"""Blobs: finished bytes named by their digest, and the names people use for them.

What may live here: the blob store's contract, the local one, and how names are made. Learned
from git's ``finalize_object_file`` and containerd's content store: write aside, make durable,
link into place, then make the directory durable.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from scrapy_streaming.exceptions import IntegrityError, NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName, StoredRepresentation
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.failpoints import failpoint

LINK_MODES: Final = ("auto", "reflink", "hardlink", "symlink", "copy", "none")
#: How often a link is asked for that fails because the blob is just being replaced.
LINK_TRIES: Final = 10
_FICLONE: Final = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
#: What opening a blob says when there is none, or a thing in its place that is none (F24).
_NO_BLOB = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
#: What a filesystem says of a name that no file of it can have.
_NO_NAME = frozenset({errno.ENAMETOOLONG, errno.EILSEQ})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_CLONE = frozenset({errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM})


_BLOB = re.compile(r"[0-9a-f]{64}", re.ASCII)
_STAMP = struct.Struct(">QQQ")
_64_BITS: Final = (1 << 64) - 1  # times before 1970 are negative, and some filesystems know no end of time
_WRITTEN = slice(0, 16)


def stamp_of(info: os.stat_result) -> bytes:
    """Return a file's stamp, 24 bytes: inode, times of modification and of change in nanoseconds (R77).

    The kernel sets the time of change at each write, link, rename and change of mode, and nobody can
    set it back: a file with the stamp that was noted has the bytes that were there then.
    """
    return _STAMP.pack(info.st_ino & _64_BITS, info.st_mtime_ns & _64_BITS, info.st_ctime_ns & _64_BITS)


def _unwritten(stamp: bytes, info: os.stat_result) -> bool:
    """Whether it is the stamp's file and was linked, renamed or unlinked since, but not written to."""
    return stamp[_WRITTEN] == stamp_of(info)[_WRITTEN]


@dataclass(frozen=True, slots=True)
class Published:
    """A blob that exists under its name. ``size`` in bytes, ``stamp`` as ``stamp_of`` gives it."""

    digest: Digest
    size: int
    deduplicated: bool
    stamp: bytes = b""


class Tampered(enum.StrEnum):
    """What was done to a stored file from outside; each has its warning and its statistic (R77)."""

    BAD_BLOB = "bad-blob"
    BLOB_MISSING = "blob-missing"
    BAD_NAME = "bad-name"
    NAME_MISSING = "name-missing"


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A blob's file as it was found; nothing of its bytes was looked at. ``info`` is ``lstat``'s."""

    digest: Digest
    path: Path
    info: os.stat_result

    def same(self, now: os.stat_result) -> bool:
        """Whether *now* is this file, which nobody replaced, named or vouched for since (see ``_hold``)."""
        then = self.info
        return (
            os.path.samestat(now, then)
            and (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
            and (now.st_nlink, now.st_atime_ns) == (then.st_nlink, then.st_atime_ns)
        )


@dataclass(frozen=True, slots=True)
class Look:
    """What was found in a blob's place.

    ``stamp`` is that of good bytes, ``None`` if they are ``tampered`` with; then ``found`` is what
    stands there, if anything does. ``hashed``: the stamp did not tell, so the bytes were read.
    ``restored``: there was no blob, and it was made again from its name.
    """

    stamp: bytes | None = None
    hashed: bool = False
    tampered: Tampered | None = None
    found: BlobFile | None = None
    restored: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """A name that leads to a blob.

    ``path`` is to be reported, as short as can be. ``stamp`` is the blob's by now, ``None`` if its file
    was written to meanwhile; ``own`` is that of a name which is a file of its own. ``hashed``: the
    name's bytes were read. ``tampered``: what had become of the name, made again since; ``kept`` is
    where other bytes that stood there are now.
    """

    path: str
    stamp: bytes | None = None
    own: bytes | None = None
    hashed: bool = False
    tampered: Tampered | None = None
    kept: Path | None = None


@dataclass(frozen=True, slots=True)
class Adopted:
    """A file that stood in the store already, and is a blob by now.

    ``path`` is its name, to be reported; ``size`` in bytes, ``stored_at`` its time of modification in
    seconds since the epoch. ``stamp`` is the blob's, ``own`` that of a name which is a file of its own,
    ``file`` that of the file which the name leads to. ``hashed``: its bytes were read.
    """

    path: str
    digest: Digest
    size: int
    stored_at: float
    stamp: bytes
    file: bytes
    own: bytes | None = None
    hashed: bool = True


class BlobStore(Protocol):
    """Where finished representations go."""

    def publish(self, part: CompletePart) -> Published:
        """Make the part's bytes exist, durably, under their digest; twice is once."""

    def look(self, digest: Digest, size: int, stamp: bytes | None) -> Look:
        """Return whether the blob's bytes are right; they are read only if *stamp* does not tell."""

    def verify(self, digest: Digest) -> bool:
        """Whether the blob's bytes hash to its name."""


class LocalBlobStore:
    """Blobs under ``blobs/sha256/ab/<hex>`` and names beside them, on one local filesystem."""

    def __init__(self, root: Path, quarantine: Path, *, fsync: bool = True, link_mode: str = "auto") -> None:
        self.root = root
        self.fsync = fsync
        self.link_mode = link_mode
        self.quarantine_folder = quarantine
        self._own = _below(root, quarantine.parent)
        self._dir = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._durable: set[str] = set()
        self._clones = link_mode in ("auto", "reflink")
        # names share the blob's file in auto: as writable as stock's, for whoever leaves or edits one
        self._mode = 0o666 & ~_umask() if link_mode == "auto" else 0o444

    def close(self) -> None:
        """Let go of the root."""
        os.close(self._dir)

    @property
    def makes_names(self) -> bool:
        """Whether bytes get the names that are asked for."""
        return self.link_mode != "none"

    @staticmethod
    def relative(digest: Digest) -> str:
        """Return the blob's path below the store's root."""
        return f"blobs/sha256/{digest.hex[:2]}/{digest.hex}"

    def path(self, digest: Digest) -> Path:
        """Return where the blob is, or would be."""
        return self.root / self.relative(digest)

    def place(self, digest: Digest, name: str | None) -> Path:  # noqa: ARG002 - NamedFiles needs it
        """Return where bytes are that were stored and have the name."""
        return self.path(digest)

    def look_at(self, known: StoredRepresentation) -> Look:
        """Return whether stored bytes are there and right, as ``look`` does.

        A blob that is gone is made again from the recorded name, if that has its bytes: so it is where
        publishing by content was switched off, or ``blobs`` was removed.
        """
        digest = Digest.parse(known.digest)
        look = self.look(digest, known.size, known.stamp)
        if look.tampered is Tampered.BLOB_MISSING and known.name is not None:
            with suppress(NotAdopted):
                again = self.adopt(known.name.path, checksum=digest.hex)
                return Look(again.stamp, hashed=True, restored=True)
        return look

    def was_replaced(self, known: StoredRepresentation, wanted: str) -> bool:
        """Whether a file with other bytes than the recorded ones stands at the recorded name *wanted*.

        Whoever put it there, a crawl without the ledger, ``FilesPipeline`` or a user: it may be newer.
        """
        if known.name is None or known.name.path != wanted:
            return False
        with self._folder_of(wanted) as (folder, last):
            if folder is None:
                return False
            try:
                info = os.stat(last, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return False
            digest = Digest.parse(known.digest)
            if not stat.S_ISREG(info.st_mode) or self._same_file(digest, info):
                return False
            if stamp_of(info) == known.name.stamp and info.st_size == known.size:
                return False
            return hash_of(last, folder)[0] not in (None, digest.hex)

    def look(self, digest: Digest, size: int, stamp: bytes | None) -> Look:
        """Return whether the blob is there and its bytes are right (R77).

        A file of *size* bytes with the *stamp* that was noted of good ones is good. Any other of
        that size is read; the stamp returned is from before that.
        """
        path = self.path(digest)
        try:
            info = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return Look(tampered=Tampered.BLOB_MISSING)
        regular = stat.S_ISREG(info.st_mode) and info.st_size == size
        if regular and stamp_of(info) == stamp:
            return Look(stamp)
        found = BlobFile(digest, path, info)
        if not regular:
            return Look(tampered=Tampered.BAD_BLOB, found=found)
        hexadecimal, now = hash_of(path)
        if now is not None and hexadecimal == digest.hex:
            return Look(stamp_of(now), hashed=True)
        return Look(None, hashed=True, tampered=Tampered.BAD_BLOB, found=self._again(found))

    @staticmethod
    def _again(found: BlobFile) -> BlobFile | None:
        """Return the file with the time at which we read it; ``None`` if it is another by now."""
        with suppress(FileNotFoundError):
            info = os.lstat(found.path)
            if stamp_of(info) == stamp_of(found.info):
                return replace(found, info=info)
        return None

    def restamp(self, digest: Digest, stamp: bytes) -> bytes | None:
        """Return the blob's stamp after it was linked or unlinked; ``None`` if it was written to."""
        try:
            info = os.lstat(self.path(digest))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stamp_of(info) if _unwritten(stamp, info) else None

    def has(self, digest: Digest, size: int) -> bool:
        """Whether the blob is there, a regular file of *size* bytes; its bytes are not read."""
        try:
            info = os.stat(self.path(digest), follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(info.st_mode) and info.st_size == size

    def verify(self, digest: Digest) -> bool:
        """Whether the blob is there and its bytes hash to its name (reads all of it).

        One that cannot be read for a fault of the disk is not good either.
        """
        return hash_of(self.path(digest))[0] == digest.hex

    def files(self) -> Iterator[BlobFile]:
        """Give every blob's file, shard after shard; what is not of our grammar is passed over (F24)."""
        top = self.root / "blobs" / "sha256"
        for shard in _entries(top):
            if len(shard.name) != 2 or not shard.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(shard.path):
                if _BLOB.fullmatch(entry.name) is None or entry.name[:2] != shard.name:
                    continue
                with suppress(FileNotFoundError):
                    info = os.lstat(entry.path)
                    if stat.S_ISREG(info.st_mode):
                        yield BlobFile(Digest(entry.name), Path(entry.path), info)

    def take(self, found: BlobFile, target: Path) -> bool:
        """Move a blob's file to *target*, on the same filesystem, if it is still as it was *found*.

        Looked at again when it is away: who vouched for it meanwhile gets it back, who comes later
        finds none and publishes its own (``_hold``).
        """
        try:
            if not found.same(os.lstat(found.path)):
                return False
            os.rename(found.path, target)
        except FileNotFoundError:
            return False
        if found.same(os.lstat(target)):
            return True
        self.put_back(found.digest, target)
        return False

    def put_back(self, digest: Digest, source: Path) -> None:
        """Make *source* the blob again, durably, unless there is one by now; *source* is gone then."""
        shard = self._shard(digest)
        try:
            self._move_back(shard, digest, source)
            self._sync(shard)
        finally:
            os.close(shard)
        with suppress(FileNotFoundError):
            os.unlink(source)

    @staticmethod
    def _move_back(shard: int, digest: Digest, source: Path) -> None:
        try:
            os.link(source, digest.hex, dst_dir_fd=shard, follow_symlinks=False)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            os.rename(source, digest.hex, dst_dir_fd=shard)

    def set_aside(self, found: BlobFile) -> bool:
        """Put a blob's file into quarantine if it is still as it was *found* (E9)."""
        target = self.quarantine_folder / f"{found.digest.hex}.{secrets.token_hex(4)}.blob"
        try:
            return self.take(found, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        aside = found.path.with_name(f".{found.digest.hex}.{secrets.token_hex(8)}.tmp")
        if not self.take(found, aside):  # out of its place first: a good blob may come there meanwhile
            return False
        with open(aside, "rb") as source, open(target, "xb") as copy:
            shutil.copyfileobj(source, copy)
            self._sync(copy.fileno())
        os.unlink(aside)
        return True

    # -- publishing ------------------------------------------------------------------------

    def publish(self, part: CompletePart) -> Published:
        """Make the part's bytes exist under their digest, durably and atomically.

        Storage rules 11 and 12. The part itself stays until the ledger has the record. Raises
        ``IntegrityError`` if the file is not as long as the bytes that were counted, and
        ``WriteFailed`` when the disk does not take it.
        """
        with _writing(f"cannot publish {part.digest}"):
            shard = self._shard(part.digest)
            try:
                if part.data is not None:
                    return self._publish_bytes(shard, part, part.data)
                return self._publish_file(shard, part)
            finally:
                os.close(shard)

    def _publish_file(self, shard: int, part: CompletePart) -> Published:
        if part.path is None:
            msg = "a finished part has bytes or a path"
            raise TypeError(msg)
        path = part.path
        try:
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # a worker without a ledger has published the same, and removed its parts
            look = self.look(part.digest, part.length, None)
            if look.stamp is None:
                raise
            return Published(part.digest, part.length, True, look.stamp)
        try:
            info = os.fstat(source)
            if not stat.S_ISREG(info.st_mode) or info.st_size != part.length:
                msg = f"{path} does not hold the {part.length} bytes that were counted"
                raise IntegrityError(msg, reason="length-mismatch")
            self._settle(source)
            failpoint("blob-synced")
            return self._place(shard, part, lambda name: self._link_or_copy(shard, name, part, source))
        finally:
            os.close(source)

    def _publish_bytes(self, shard: int, part: CompletePart, data: bytes) -> Published:
        return self._place(shard, part, lambda name: self._write_aside(shard, name, [data], part.digest))

    def _place(
        self, shard: int, part: CompletePart, make: Callable[[str], None], *, alone: bool = False
    ) -> Published:
        """Make the blob in its shard, again if ``gc`` takes away the one that was found there."""
        for _ in range(LINK_TRIES):
            with suppress(FileNotFoundError):
                return self._place_now(shard, part, make, alone=alone)
        return self._place_now(shard, part, make, alone=alone)

    def _place_now(
        self, shard: int, part: CompletePart, make: Callable[[str], None], *, alone: bool
    ) -> Published:
        """Make the blob; an existing one counts only if its bytes are right (R66)."""
        name = part.digest.hex
        found = True
        try:
            os.stat(name, dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            try:
                make(name)
                found = False
            except FileExistsError:
                pass  # another publisher was faster: the same rule holds for its blob
        duplicate = found and self.verify(part.digest) and self._hold(shard, part.digest, alone=alone)
        if found and not duplicate:
            self._replace(shard, part, make)
        stamp = stamp_of(os.stat(name, dir_fd=shard, follow_symlinks=False))
        failpoint("blob-linked")
        self._sync(shard)
        failpoint("blob-durable")
        return Published(part.digest, part.length, duplicate, stamp)

    def _replace(self, shard: int, part: CompletePart, make: Callable[[str], None]) -> None:
        """Put good bytes in a bad blob's place; the bad ones are kept in quarantine.

        By rename over it: a second publisher that saw the same bad blob may only come to replace
        the first one's good blob by its own, never to take it away.
        """
        name = part.digest.hex
        bad = os.stat(name, dir_fd=shard, follow_symlinks=False)
        if part.path is not None and os.path.samestat(bad, os.stat(part.path, follow_symlinks=False)):
            msg = f"the bytes of {part.digest} changed after they were counted"
            raise IntegrityError(msg)
        self._keep_bad(shard, part.digest, bad)
        temporary = f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            make(temporary)
            os.rename(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=shard)

    def _keep_bad(self, shard: int, digest: Digest, bad: os.stat_result) -> None:
        """Give what stands in a blob's place a name in quarantine, which may be on another disk."""
        target = self.quarantine_folder / f"{digest.hex}.{secrets.token_hex(4)}.blob"
        if stat.S_ISDIR(bad.st_mode):
            os.rename(digest.hex, target, src_dir_fd=shard)
            return
        try:
            os.link(digest.hex, target, src_dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            return  # another publisher has replaced it, and kept it
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            _keep_copy(digest.hex, shard, target)

    def _link_or_copy(self, shard: int, name: str, part: CompletePart, source: int) -> None:
        """Link a part to its blob; copy where that cannot be (R68)."""
        try:
            os.link(str(part.path), name, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            os.lseek(source, 0, os.SEEK_SET)
            with open(source, "rb", closefd=False) as stream:
                chunks = iter(lambda: stream.read(READ_SIZE), b"")
                self._write_aside(shard, name, chunks, part.digest)

    def _write_aside(self, shard: int, name: str, chunks: Iterable[bytes], digest: Digest) -> None:
        """Write chunks beside the blob, check them, make them durable, move them into place."""
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, _TEMPORARY, 0o600, dir_fd=shard)
        try:
            hasher = hashlib.sha256()
            with open(fd, "wb") as stream:
                for chunk in chunks:
                    hasher.update(chunk)
                    stream.write(chunk)
                stream.flush()
                self._settle(stream.fileno())
            if hasher.hexdigest() != digest.hex:
                msg = f"bytes changed while {digest} was published"
                raise IntegrityError(msg)
            self._move(shard, temporary, name)
        finally:
            with suppress(FileNotFoundError):  # moved into place
                os.unlink(temporary, dir_fd=shard)

    @staticmethod
    def _move(shard: int, temporary: str, name: str) -> None:
        """Give finished bytes their name, by link: of two publishers at once, one must find the other's.

        A rename would put a second file in the place of one that names may be linked to already.
        """
        try:
            os.link(temporary, name, src_dir_fd=shard, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            os.rename(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)

    def _hold(self, shard: int, digest: Digest, *, alone: bool) -> bool:
        """Vouch for a blob that was there before us; whether it could be done.

        Whoever linked it may not have come to its fsync: what we vouch for, we sync. The time of
        access tells ``gc`` of us: it looks at it after it has moved a blob away, we look for the
        blob after we have set it, so one of the two notices the other. The time of modification
        stays: copies are known by it. *alone*: no ``gc`` runs, and the file stays as it is. Raises
        ``FileNotFoundError`` if the blob is gone.
        """
        fd = os.open(digest.hex, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shard)
        try:
            self._sync(fd)
            held = os.fstat(fd)
            if not alone:
                os.utime(fd, ns=(time.time_ns(), held.st_mtime_ns))
            return os.path.samestat(held, os.stat(digest.hex, dir_fd=shard, follow_symlinks=False))
        except PermissionError:  # another user's file
            return False
        finally:
            os.close(fd)

    def _settle(self, fd: int) -> None:
        """Give a whole file its permissions and its time, and make it durable."""
        os.fchmod(fd, self._mode)
        _mark_time(fd)
        self._sync(fd)

    def _sync(self, fd: int) -> None:
        if self.fsync:
            try:
                os.fsync(fd)
            except OSError as error:
                raise _failure("cannot make bytes durable", error, "sync-failed") from error

    def quarantine(self, part: CompletePart) -> None:
        """Put a part whose bytes are not what they should be where nobody serves it (E9)."""
        if part.path is not None:
            with _writing(f"cannot put {part.path} into quarantine"):
                os.rename(
                    part.path, self.quarantine_folder / f"{part.digest.hex}.{secrets.token_hex(4)}.part"
                )

    def _shard(self, digest: Digest) -> int:
        """Return a descriptor of the blob's directory, made durably if it is new."""
        return self._descend(("blobs", "sha256", digest.hex[:2]), durable=self.fsync)

    def _descend(self, names: tuple[str, ...], *, durable: bool) -> int:
        """Open a directory below the root, step by step, making what is missing (E2).

        A step that is a symbolic link or no directory raises ``StoreError``.
        """
        current = os.open(".", _DIRECTORY, dir_fd=self._dir)
        for depth in range(1, len(names) + 1):
            try:
                below = self._step(current, names[:depth], durable=durable)
            finally:
                os.close(current)
            current = below
        return current

    def _step(self, current: int, names: tuple[str, ...], *, durable: bool) -> int:
        made = True
        try:
            os.mkdir(names[-1], dir_fd=current)
            failpoint("folder-made")
        except FileExistsError:
            made = False
        path = "/".join(names)
        if durable and (made or path not in self._durable):
            self._sync(current)
            self._durable.add(path)
        try:
            return os.open(names[-1], _DIRECTORY, dir_fd=current)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            msg = f"{self.root / path} is not a plain directory; nothing was written through it"
            raise StoreError(msg, reason="store-unsafe") from error

    # -- names -----------------------------------------------------------------------------

    def is_taken(self, path: str) -> bool:
        """Whether something stands at the name *path*: one look at the disk, no more."""
        try:
            return os.path.lexists(self.root.joinpath(*safe_parts(path)))
        except StoreError:
            return False

    def written_at(self, path: str) -> float | None:
        """Return when the file at the name *path* was last written to, in seconds since the epoch.

        ``None`` if nothing is there.
        """
        try:
            return os.stat(self.root.joinpath(*safe_parts(path))).st_mtime
        except (FileNotFoundError, NotADirectoryError, StoreError):
            return None
        except OSError as error:
            if error.errno not in _NO_NAME | {errno.ELOOP}:
                raise
            return None

    def adopt(
        self,
        path: str,
        *,
        noted: NotedFile | None = None,
        checksum: str | None = None,
        stop: threading.Event | None = None,
        alone: bool = False,
    ) -> Adopted:
        """Make a file that another program stored at the name *path* a blob; return what it is now.

        Its bytes are read once, or not at all if it is as it was *noted*. In link mode ``auto`` the
        file itself becomes the blob, by a link (a clone where there are any), its time of modification
        stays; bytes of which there is a blob stay a file of their own. *checksum* is what the bytes
        must hash to, hexadecimal: 64 digits of SHA-256 or 32 of MD5, as ``FilesPipeline`` has it. Once
        *stop* is set nothing is read any more. *alone*: no ``gc`` runs meanwhile, so that a blob which is
        there need not be marked as in use, which changes its stamp and that of its name.

        Raises ``NotAdopted`` for what is not there, no plain file or behind a link (E2, F24), of an
        owner who is neither we, nor root, nor the store's, not readable, being written, of another
        checksum, or left by *stop*; ``WriteFailed`` when the disk does not take the blob.
        """
        with self._folder_of(path) as (folder, last):
            if folder is None:
                raise NotAdopted(path, "not-found")
            found = Stray(path, folder, last, self._open_stray(path, folder, last), stop)
            try:
                return self._adopt(found, noted, checksum, alone=alone)
            finally:
                os.close(found.fd)

    def _open_stray(self, path: str, folder: int, last: str) -> int:
        try:
            fd = _open_blob(last, folder)
        except PermissionError as error:
            raise NotAdopted(path, "unreadable") from error
        if fd is None:
            fd = self._open_linked(folder, last)
        if fd is None:
            try:
                os.stat(last, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError as error:
                raise NotAdopted(path, "not-found") from error
            raise NotAdopted(path, "not-regular")
        return fd

    def _adopt(self, found: Stray, noted: NotedFile | None, checksum: str | None, *, alone: bool) -> Adopted:
        info = os.fstat(found.fd)
        if info.st_uid not in (0, os.geteuid(), os.fstat(self._dir).st_uid):
            raise NotAdopted(found.path, "other-owner")
        if _is_open_for_writing(found.fd):
            raise NotAdopted(found.path, "being-written")
        unchanged = noted is not None and noted.stamp == stamp_of(info)
        digest = Digest(noted.hexadecimal) if noted is not None and unchanged else None
        if digest is None or checksum is not None:
            digest = found.hashed(info, checksum)
        # of a file that was noted the ledger has the blob as present: gc leaves that alone
        named = self._make_stored(digest, found, info, alone=alone or unchanged)
        file = stamp_of(os.stat(found.last, dir_fd=found.folder))
        times = (info.st_size, info.st_mtime)
        return Adopted(named.path, digest, *times, named.stamp or file, file, named.own, hashed=not unchanged)

    def _make_stored(self, digest: Digest, found: Stray, info: os.stat_result, *, alone: bool) -> Named:
        """Make a file that was read a blob; return what became of its name."""
        if not (self._same_file(digest, info) or (alone and self._is_stored(digest))):
            stray = CompletePart(PartState("", Validators()), info.st_size, digest, self.root / found.path)
            with _writing(f"cannot adopt {found.path!r}"):
                shard = self._shard(digest)
                try:
                    make = partial(self._take_in, shard, digest=digest, found=found, info=info)
                    self._place(shard, stray, make, alone=alone)
                finally:
                    os.close(shard)
        named = self._named_as_found(digest, found)
        return replace(named, stamp=stamp_of(os.stat(self.path(digest), follow_symlinks=False)))

    def _is_stored(self, digest: Digest) -> bool:
        """Whether there is a good blob, durable by now."""
        if not self.verify(digest):
            return False
        fd = _open_blob(self.path(digest))
        if fd is None:
            return False
        try:
            self._sync(fd)
        finally:
            os.close(fd)
        return True

    def _named_as_found(self, digest: Digest, found: Stray) -> Named:
        """Give the name what the link mode has names be; in ``auto`` it is that already."""
        info = os.stat(found.last, dir_fd=found.folder, follow_symlinks=False)
        if self.link_mode == "auto" and self._same_file(digest, info):
            return Named(found.path)
        return self.name(digest, found.path, recorded=RecordedName(found.path, stamp_of(info)))

    def _take_in(self, shard: int, name: str, digest: Digest, found: Stray, info: os.stat_result) -> None:
        """Make a file that was read a blob: aside, then moved into place if nobody wrote to it meanwhile."""
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        try:
            if not self._link_stray(shard, temporary, found, info):
                os.lseek(found.fd, 0, os.SEEK_SET)
                os.close(self._fill(found.fd, temporary, shard, _copy_bytes))
                os.chmod(temporary, self._mode, dir_fd=shard)
            if not found.unwritten(info):
                raise NotAdopted(found.path, "being-written")
            self._move(shard, temporary, name)
        finally:
            _unlink(temporary, shard)

    def _link_stray(self, shard: int, temporary: str, found: Stray, info: os.stat_result) -> bool:
        """Whether a file needs no copy to be a blob: by a clone, or by a link if it has one name only."""
        if self._clones:
            fd = self._cloned(found.fd, temporary, shard)
            self._clones = fd is not None
            if fd is not None:
                os.close(fd)
                os.chmod(temporary, self._mode, dir_fd=shard)
                return True
        if info.st_nlink != 1 or self.link_mode not in ("auto", "hardlink", "symlink"):
            return False
        self._sync(found.fd)
        try:
            os.link(found.last, temporary, src_dir_fd=found.folder, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            return False
        linked = os.stat(temporary, dir_fd=shard, follow_symlinks=False)
        if not os.path.samestat(linked, info):
            raise NotAdopted(found.path, "being-written")
        if self.link_mode != "auto":
            with suppress(PermissionError):  # the store's owner's, and we are another
                os.chmod(temporary, self._mode, dir_fd=shard)
        return True

    def shared(self, path: str, inodes: Container[int]) -> int | None:
        """Return the size of the blob whose file the name *path* leads to; ``None`` if it has its own bytes.

        *inodes* are those of the blobs that have names. Raises ``NotAdopted`` for a link to a blob that is
        not there.
        """
        with self._folder_of(path) as (folder, last):
            if folder is None:
                return None
            try:
                info = os.stat(last, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return None
            if stat.S_ISREG(info.st_mode):
                return info.st_size if info.st_nlink > 1 and info.st_ino in inodes else None
            if not stat.S_ISLNK(info.st_mode):
                return None
            fd = self._open_linked(folder, last)
            if fd is None:
                self._refuse_dangling(path, os.readlink(last, dir_fd=folder))
                return None
            try:
                return os.fstat(fd).st_size
            finally:
                os.close(fd)

    def _refuse_dangling(self, path: str, target: str) -> None:
        """Raise ``NotAdopted`` for a link to a blob that is not there; a user's own may lead anywhere."""
        hexadecimal = PurePosixPath(target).name
        if _BLOB.fullmatch(hexadecimal) is None:
            return
        if target == "../" * (len(safe_parts(path)) - 1) + self.relative(Digest(hexadecimal)):
            raise NotAdopted(path, "blob-missing")

    def give_own(self, path: str, digest: Digest | None = None) -> None:
        """Give the name *path* a file of its own with the bytes that it leads to, or those of a blob.

        Atomic and durable; time, permissions and, for root, the owner stay. Raises ``NotAdopted``, or
        ``WriteFailed`` when the disk does not take it.
        """
        *folders, last = self.parts_of(path)
        with naming(path):
            folder = self._descend(tuple(folders), durable=self.fsync)
            try:
                source = self._source_of(path, folder, last, digest)
                try:
                    self._own_aside(source, folder, last)
                finally:
                    os.close(source)
                self._sync(folder)
            finally:
                os.close(folder)

    def _source_of(self, path: str, folder: int, last: str, digest: Digest | None) -> int:
        if digest is None:
            return self._open_stray(path, folder, last)
        if not self.verify(digest) or (fd := _open_blob(self.path(digest))) is None:
            raise NotAdopted(path, "bad-blob" if os.path.lexists(self.path(digest)) else "blob-missing")
        return fd

    def _own_aside(self, source: int, folder: int, last: str) -> None:
        """Make a file with the bytes of *source* aside, and move it into the name's place."""
        temporary, info = f".{secrets.token_hex(16)}.tmp", os.fstat(source)
        with ExitStack() as undo:
            undo.callback(_unlink, temporary, folder)
            fd = self._cloned(source, temporary, folder)
            if fd is None:
                fd = self._fill(source, temporary, folder, _copy_bytes)
            undo.callback(os.close, fd)
            if info.st_mode & stat.S_IWUSR:  # else it is read-only as a blob, which no name need be
                os.fchmod(fd, stat.S_IMODE(info.st_mode))
            if os.geteuid() == 0:
                os.fchown(fd, info.st_uid, info.st_gid)
            self._sync(fd)
            failpoint("name-made")
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)

    def _cloned(self, source: int, temporary: str, folder: int) -> int | None:
        """Return a descriptor of a new file that shares the extents of *source*; ``None`` if it cannot."""
        try:
            return self._fill(source, temporary, folder, _clone_bytes)
        except OSError as error:
            if error.errno not in _NO_CLONE:
                raise
            _unlink(temporary, folder)
            return None

    def can_clone(self) -> bool:
        """Whether a copy of a file needs no room here."""
        probe, copy = (f".{secrets.token_hex(16)}.tmp" for _ in range(2))
        with ExitStack() as undo:
            for name in (probe, copy):
                undo.callback(_unlink, name, self._dir)
            with open(os.open(probe, _TEMPORARY, 0o600, dir_fd=self._dir), "wb") as stream:
                stream.write(b"?")
            source = os.open(probe, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._dir)
            undo.callback(os.close, source)
            fd = self._cloned(source, copy, self._dir)
            if fd is not None:
                os.close(fd)
        return fd is not None

    def own_file(self, digest: Digest, path: str) -> BlobFile | None:
        """Return the file of the blob's name *path*; ``None`` if there is none, or it is the blob's own."""
        with self._folder_of(path) as (folder, last):
            if folder is None:
                return None
            try:
                info = os.stat(last, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return None
        if not stat.S_ISREG(info.st_mode) or self._same_file(digest, info):
            return None
        return BlobFile(digest, self.root / path, info)

    def _same_file(self, digest: Digest, info: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.lstat(self.path(digest)), info)
        except (FileNotFoundError, NotADirectoryError):
            return False

    @contextmanager
    def _folder_of(self, path: str) -> Iterator[tuple[int | None, str]]:
        """Give the folder of the name *path*, open, ``None`` if there is none, and the last part of it."""
        try:
            *folders, last = safe_parts(path)
        except StoreError:
            yield None, ""
            return
        folder = self._look(tuple(folders))
        try:
            yield folder, last
        finally:
            if folder is not None:
                os.close(folder)

    def _look(self, names: tuple[str, ...]) -> int | None:
        """Open a directory below the root, making nothing; ``None`` if it is not there, or a link."""
        if self._own and names[: len(self._own)] == self._own:
            return None
        current = os.open(".", _DIRECTORY, dir_fd=self._dir)
        for name in names:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=current)
            except OSError as error:
                if error.errno not in _NO_BLOB:
                    raise
                return None
            finally:
                os.close(current)
            current = below
        return current

    def _open_linked(self, folder: int, last: str) -> int | None:
        """Open the blob that a symbolic link of ours leads to; ``None`` for any other thing."""
        try:
            hexadecimal = PurePosixPath(os.readlink(last, dir_fd=folder)).name
            if _BLOB.fullmatch(hexadecimal) is None:
                return None
            there = os.stat(last, dir_fd=folder)
        except OSError:
            return None
        fd = _open_blob(self.path(Digest(hexadecimal)))
        if fd is not None and not os.path.samestat(os.fstat(fd), there):
            os.close(fd)
            return None
        return fd

    def name(
        self,
        digest: Digest,
        wanted: str,
        *,
        stamp: bytes | None = None,
        recorded: RecordedName | None = None,
        part: CompletePart | None = None,
    ) -> Named:
        """Make *wanted* (a path below the root) a name of the blob; return what became of it.

        Atomic: a reader sees the old bytes or the new, never none (storage rule 13). With link mode
        ``none`` nothing is made and the blob's own path is returned. *stamp* is the blob's, whose
        bytes are known to be right. *recorded*: the name that led to these bytes before; if other
        bytes stand there now, and no blob has them, they are kept in quarantine (R77). *part* is
        what the blob was made of, and may still be linked to it. Raises ``StoreError`` for a path
        that leaves the store (E1) and ``WriteFailed`` when the disk does not take it.
        """
        if self.link_mode == "none":
            return Named(self.relative(digest), stamp)
        *folders, last = parts = self.parts_of(wanted)
        wanted = "/".join(parts)
        with naming(wanted):
            folder = self._descend(tuple(folders), durable=False)
            try:
                named = self._name(Place(folder, last, digest, len(folders), part), wanted, recorded)
            finally:
                os.close(folder)
        if named.stamp is not None and named.stamp == stamp:
            return named
        return replace(named, stamp=None if stamp is None else self.restamp(digest, stamp))

    def parts_of(self, wanted: str | os.PathLike[str]) -> tuple[str, ...]:
        """Return the components of a path below the store's root.

        Raises ``StoreError`` (``store-unsafe``) for one that leaves the store, leads into what is the
        store's own, or can be no file's name.
        """
        parts = safe_parts(wanted)
        if self._own and parts[: len(self._own)] == self._own:
            raise _unusable(wanted)
        return parts

    def _name(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        """Make the name, again if ``gc`` just looks at the blob, and puts it back."""
        for left in reversed(range(LINK_TRIES)):
            try:
                return self._name_now(place, wanted, recorded)
            except FileNotFoundError:
                if not left or os.path.lexists(self.path(place.digest)):
                    raise
            time.sleep(0.01)
        raise AssertionError  # the last try returns or raises

    def _name_now(self, place: Place, wanted: str, recorded: RecordedName | None) -> Named:
        blob = os.stat(self.path(place.digest))
        ours = 1 + place.part_linked(blob)  # names that the blob's file has beside those that people use
        try:
            found = os.stat(place.last, dir_fd=place.folder)
        except OSError:  # nothing, or a link that leads nowhere: to be replaced, never followed
            found = None
        if found is not None and os.path.samestat(found, blob):
            if self.link_mode != "auto":
                return Named(wanted, stamp_of(blob))
            if found.st_nlink <= ours + 1:
                self._make_writable(place.digest, found)
                return Named(wanted, stamp_of(blob))
            return Named(wanted, own=self._make_name(place, ours))
        there = self._there(place, blob, recorded)
        if there is None:
            gone = recorded is not None and recorded.path == wanted
            own = self._make_name(place, ours)
            return Named(wanted, own=own, tampered=Tampered.NAME_MISSING if gone else None)
        if there.right and self.link_mode not in ("hardlink", "symlink"):
            linked = there.hashed and blob.st_nlink == ours and self._link_instead(place, ours)
            return Named(wanted, own=None if linked else there.stamp, hashed=there.hashed)
        bad = not there.right and recorded is not None and not there.kept
        kept = self._keep_name(place) if bad else None
        own = self._make_name(place, ours)
        return Named(wanted, None, own, there.hashed, Tampered.BAD_NAME if bad else None, kept)

    def _there(self, place: Place, blob: os.stat_result, recorded: RecordedName | None) -> _There | None:
        """Return what stands in a name's place and is not the blob's own file; ``None`` for nothing.

        Its bytes are read if its stamp does not tell: to keep them if nobody else has them, or
        because they may be those of the blob.
        """
        try:
            info = os.stat(place.last, dir_fd=place.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(info.st_mode):
            return _There(kept=stat.S_ISDIR(info.st_mode))  # of a directory nothing is kept: it stays
        if recorded is not None and stamp_of(info) == recorded.stamp and info.st_size == blob.st_size:
            return _There(stamp_of(info), right=True)
        if recorded is None and info.st_size != blob.st_size:
            return _There()
        hexadecimal, now = hash_of(place.last, place.folder)
        if hexadecimal is None or now is None:
            return _There(hashed=True)
        right = hexadecimal == place.digest.hex
        kept = self.has(Digest(hexadecimal), now.st_size) or self._is_aside(place.digest, now)
        return _There(stamp_of(now), True, right, kept)

    def _is_aside(self, digest: Digest, info: os.stat_result) -> bool:
        """Whether quarantine has this very file: it was the blob's, set aside when the blob was looked at."""
        if os.stat(self.quarantine_folder).st_dev != info.st_dev:
            return False
        with os.scandir(self.quarantine_folder) as entries:
            named = (each for each in entries if each.name.startswith(f"{digest.hex}."))
            return any(each.inode() == info.st_ino for each in named)

    def _keep_name(self, place: Place) -> Path | None:
        """Give what stands in a name's place a name in quarantine; ``None`` for what has no bytes to keep."""
        target = self.quarantine_folder / f"{place.digest.hex}.{secrets.token_hex(4)}.name"
        try:
            os.link(place.last, target, src_dir_fd=place.folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            return target if _keep_copy(place.last, place.folder, target) else None
        return target

    def _make_name(self, place: Place, ours: int) -> bytes | None:
        """Make the name aside and move it into place; return the stamp of its own file, if it has one."""
        temporary = f".{secrets.token_hex(16)}.tmp"
        with ExitStack() as undo:
            undo.callback(
                _unlink, temporary, place.folder
            )  # also: rename of two links to one inode does nothing
            fd = self._name_aside(place, temporary, ours)
            if fd is not None:
                undo.callback(os.close, fd)
            failpoint("name-made")
            os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
            failpoint("name-moved")
            # by descriptor: under its name there may be another worker's file by now
            return None if fd is None else stamp_of(os.fstat(fd))

    def _link_instead(self, place: Place, ours: int) -> bool:
        """Whether a link took the place of a copy: people have no name yet that is the blob's own file."""
        if self.link_mode != "auto" or self._clones:
            return False
        temporary = f".{secrets.token_hex(16)}.tmp"
        if not self._linked(self.path(place.digest), temporary, place.folder, ours):
            return False
        os.rename(temporary, place.last, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        return True

    def _name_aside(self, place: Place, temporary: str, ours: int) -> int | None:
        """Make what is to be the name; return a descriptor if it is a file of its own."""
        blob = self.path(place.digest)
        if self.link_mode == "symlink":
            os.symlink("../" * place.depth + self.relative(place.digest), temporary, dir_fd=place.folder)
            return None
        if self._clones and (fd := self._clone(blob, temporary, place.folder)) is not None:
            return fd
        if self._linked(blob, temporary, place.folder, ours):
            return None
        with open(blob, "rb") as source:
            return self._fill(source.fileno(), temporary, place.folder, _copy_bytes)

    def _linked(self, blob: Path, temporary: str, folder: int, ours: int) -> bool:
        """Whether the blob could be linked, and in ``auto`` this is the only name that people use.

        While another publisher puts a file in its place, a link may find the old one, which has
        no name any more, and be told that there is none: to be asked again. Of two that link at
        once both may see the other's name, and then both copy.
        """
        if self.link_mode not in ("auto", "hardlink"):
            return False
        for _ in range(LINK_TRIES):
            try:
                if self.link_mode == "auto" and os.stat(blob).st_nlink > ours:  # it has its first name
                    return False
                os.link(blob, temporary, dst_dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                if not os.path.lexists(blob):
                    raise
            except OSError as error:
                if error.errno not in NO_LINK:
                    raise
                return False
            else:
                return self.link_mode == "hardlink" or self._is_first_name(blob, temporary, folder, ours)
        return False

    def _is_first_name(self, blob: Path, temporary: str, folder: int, ours: int) -> bool:
        """Whether a link just made is the only name that people use; it is removed if not."""
        info = os.stat(temporary, dir_fd=folder, follow_symlinks=False)
        if info.st_nlink > ours + 1:
            os.unlink(temporary, dir_fd=folder)
            return False
        self._make_writable(Digest(blob.name), info)
        return True

    def _make_writable(self, digest: Digest, info: os.stat_result) -> None:
        """Give a blob that was published in another link mode the permissions of a name of ``auto``."""
        if not info.st_mode & stat.S_IWUSR:
            with suppress(PermissionError):  # another user's file
                os.chmod(self.path(digest), self._mode)

    def _clone(self, blob: Path, temporary: str, folder: int) -> int | None:
        """Return a descriptor of a new file that shares the blob's extents, ``None`` if that cannot be."""
        with open(blob, "rb") as source:
            fd = self._cloned(source.fileno(), temporary, folder)
        self._clones = fd is not None
        return fd

    def _fill(self, source: int, temporary: str, folder: int, how: Callable[[int, int], None]) -> int:
        """Return a descriptor of a new file with the source's bytes and time of modification."""
        with ExitStack() as undo:
            fd = os.open(temporary, _TEMPORARY, 0o666, dir_fd=folder)
            undo.callback(os.close, fd)
            how(source, fd)
            info = os.fstat(source)
            os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
            self._sync(fd)
            undo.pop_all()
        return fd


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob is to have a name: ``last`` in ``folder``, ``depth`` folders below the root."""

    folder: int
    last: str
    digest: Digest
    depth: int
    part: CompletePart | None

    def part_linked(self, blob: os.stat_result) -> bool:
        """Whether the part is still linked to the blob that was made of it."""
        if self.part is None or self.part.path is None:
            return False
        try:
            return os.path.samestat(os.lstat(self.part.path), blob)
        except FileNotFoundError:
            return False


@dataclass(frozen=True, slots=True)
class _There:
    """What stands in a name's place: whether its bytes are the ``right`` ones, or are ``kept`` elsewhere.

    By another blob, or in quarantine.
    """

    stamp: bytes | None = None
    hashed: bool = False
    right: bool = False
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Stray:
    """A file that another program stored, for ``LocalBlobStore.adopt``: ``last`` in ``folder``, as ``fd``."""

    path: str
    folder: int
    last: str
    fd: int
    stop: threading.Event | None

    def unwritten(self, info: os.stat_result) -> bool:
        """Whether nobody wrote to the file since it was as in *info*."""
        now = os.fstat(self.fd)
        return _unwritten(stamp_of(info), now) and now.st_size == info.st_size

    def hashed(self, info: os.stat_result, checksum: str | None) -> Digest:
        """Return the digest of the bytes; raise ``NotAdopted`` if *checksum* is another or they change."""
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        also_md5 = checksum is not None and len(checksum) == 2 * md5.digest_size
        os.lseek(self.fd, 0, os.SEEK_SET)
        left = info.st_size
        try:
            while left >= 0 and (chunk := os.read(self.fd, READ_SIZE)):  # of one that grows there is no end
                if self.stop is not None and self.stop.is_set():
                    raise NotAdopted(self.path, "interrupted")
                left -= len(chunk)
                sha.update(chunk)
                if also_md5:
                    md5.update(chunk)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise NotAdopted(self.path, "unreadable") from error
        if not self.unwritten(info):
            raise NotAdopted(self.path, "being-written")
        if checksum is not None and checksum.lower() != (md5 if also_md5 else sha).hexdigest():
            raise NotAdopted(self.path, "checksum-mismatch")
        return Digest(sha.hexdigest())


def _is_open_for_writing(fd: int) -> bool:
    """Whether somebody has a file open for writing, as far as the system tells: of one's own files, on Linux.

    A lease is refused then. One that is given is given back at once; who opens the file to write in
    between has the kernel send a signal, to us and one that is ignored.
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


def _umask() -> int:
    mask = os.umask(0o077)  # there is no way to ask; a file made just now is private, not public
    os.umask(mask)
    return mask


def _mark_time(fd: int) -> None:
    """Set a file's times to now, to the nanosecond: the kernel's own tick would hide a write right after."""
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def _unlink(name: str, folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def _keep_copy(name: str, folder: int, target: Path) -> bool:
    """Copy a file; whether it has bytes: a link or a pipe has none to keep."""
    fd = _open_blob(name, folder)
    if fd is None:
        return False
    with open(fd, "rb") as source, open(target, "xb") as copy:
        shutil.copyfileobj(source, copy)
    return True


def hash_of(path: Path | str, dir_fd: int | None = None) -> tuple[str | None, os.stat_result | None]:
    """Return what a regular file's bytes hash to, and its state from before they were read.

    ``None`` for a file that is not there or cannot be read.
    """
    try:
        fd = _open_blob(path, dir_fd)
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


def _clone_bytes(source: int, target: int) -> None:
    fcntl.ioctl(target, _FICLONE, source)


def _copy_bytes(source: int, target: int) -> None:
    with open(source, "rb", closefd=False) as read, open(target, "wb", closefd=False) as write:
        while chunk := read.read(READ_SIZE):
            write.write(chunk)


def safe_parts(wanted: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the components of a path below the store's root, where Scrapy's own store puts it (C8, E1, F19).

    Scrapy takes ``/a//b/../c`` for ``a/c`` of the store. Raises ``StoreError`` (``store-unsafe``) for what
    leaves the store, holds NUL, is empty, or stands where this package's own files do: ``.streaming``,
    ``blobs/sha256``, ``blobs/.trash``, and ``blobs`` itself.
    """
    text = os.fspath(wanted)
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            if not parts:
                raise _unusable(wanted)
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    found = tuple(parts)
    own = found[:1] == (".streaming",) or found == ("blobs",) or found[:2] in _OWN_BLOBS
    if not found or "\0" in text or own or any(_too_long(part) for part in found):
        raise _unusable(wanted)
    return found


#: Folders of this package's beside which users may have files.
_OWN_BLOBS: Final = (("blobs", "sha256"), ("blobs", ".trash"))


def _too_long(part: str) -> bool:
    try:
        return len(os.fsencode(part)) > 255
    except UnicodeEncodeError:  # no file can have such a name, whatever its length
        return True


def _unusable(wanted: str | os.PathLike[str]) -> StoreError:
    msg = f"file_path() gave {wanted!r}, which is no usable path inside FILES_STORE"
    return StoreError(msg, reason="store-unsafe")


def _below(root: Path, folder: Path) -> tuple[str, ...]:
    """Return the components that lead from *root* down to *folder*, none if it is elsewhere."""
    try:
        return folder.resolve().relative_to(root.resolve()).parts
    except ValueError:
        return ()


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return what is in a directory, in order; nothing if there is none."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _open_blob(path: Path | str, dir_fd: int | None = None) -> int | None:
    """Return a descriptor of a regular file, ``None`` if there is none in that place (F24)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in _NO_BLOB:
            raise
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


@contextmanager
def naming(wanted: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``, or ``StoreError`` for what no file can be called."""
    with _writing(f"cannot make the name {wanted!r}"):
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_NAME and not isinstance(error, IsADirectoryError):
                raise
            raise _unusable(wanted) from error


@contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``."""
    try:
        yield
    except OSError as error:
        raise _failure(what, error) from error


def _failure(what: str, error: OSError, reason: str = "write-failed") -> WriteFailed:
    msg = f"{what}: {error.strerror or error}"
    return WriteFailed(msg, reason="no-space" if error.errno in _FULL else reason)
