"""Blobs: finished bytes named by their digest, and the names people use for them.

What may live here: the blob store's contract, the local one, and how names are made. Learned
from git's ``finalize_object_file`` and containerd's content store: write aside, make durable,
link into place, then make the directory durable.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from scrapy_streaming.exceptions import IntegrityError, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.finished import READ_SIZE, FinishedPart

LINK_MODES: Final = ("auto", "reflink", "hardlink", "symlink", "copy", "none")
#: How often a link is asked for that fails because the blob is just being replaced.
LINK_TRIES: Final = 10
_FICLONE: Final = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
#: What opening a blob says when there is none, or a thing in its place that is none (F24).
_NO_BLOB = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_CLONE = frozenset({errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM})


_BLOB = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Published:
    """A blob that exists under its name. ``size`` in bytes."""

    digest: Digest
    size: int
    deduplicated: bool


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


class BlobStore(Protocol):
    """Where finished representations go."""

    def publish(self, part: FinishedPart) -> Published:
        """Make the part's bytes exist, durably, under their digest; twice is once."""

    def has(self, digest: Digest, size: int) -> bool:
        """Whether the blob is there with that many bytes."""

    def verify(self, digest: Digest) -> bool:
        """Whether the blob's bytes hash to its name."""


class LocalBlobStore:
    """Blobs under ``blobs/sha256/ab/<hex>`` and names beside them, on one local filesystem."""

    def __init__(self, root: Path, quarantine: Path, *, fsync: bool = True, link_mode: str = "auto") -> None:
        self.root = root
        self.fsync = fsync
        self.link_mode = link_mode
        self._quarantine = quarantine
        self._own = _below(root, quarantine.parent)
        self._dir = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._durable: set[str] = set()
        self._clones = link_mode in ("auto", "reflink")

    def close(self) -> None:
        """Let go of the root."""
        os.close(self._dir)

    @staticmethod
    def relative(digest: Digest) -> str:
        """Return the blob's path below the store's root."""
        return f"blobs/sha256/{digest.hex[:2]}/{digest.hex}"

    def path(self, digest: Digest) -> Path:
        """Return where the blob is, or would be."""
        return self.root / self.relative(digest)

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
        fd = _open_blob(self.path(digest))
        if fd is None:
            return False
        try:
            with open(fd, "rb", closefd=False) as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == digest.hex
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        finally:
            os.close(fd)

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
            if error.errno not in _NO_LINK:
                raise
            os.rename(source, digest.hex, dst_dir_fd=shard)

    def set_aside(self, found: BlobFile) -> bool:
        """Put a blob's file into quarantine if it is still as it was *found* (E9)."""
        target = self._quarantine / f"{found.digest.hex}.{secrets.token_hex(4)}.blob"
        try:
            return self.take(found, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        fd = _open_blob(found.path)
        if fd is None:
            return False
        with open(fd, "rb") as source, open(target, "xb") as copy:
            shutil.copyfileobj(source, copy)
            self._sync(copy.fileno())
        os.unlink(found.path)
        return True

    # -- publishing ------------------------------------------------------------------------

    def publish(self, part: FinishedPart) -> Published:
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

    def _publish_file(self, shard: int, part: FinishedPart) -> Published:
        if part.path is None:
            msg = "a finished part has bytes or a path"
            raise TypeError(msg)
        path = part.path
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            info = os.fstat(source)
            if not stat.S_ISREG(info.st_mode) or info.st_size != part.length:
                msg = f"{path} does not hold the {part.length} bytes that were counted"
                raise IntegrityError(msg, reason="length-mismatch")
            self._sync(source)
            failpoint("blob-synced")
            os.fchmod(source, 0o444)
            return self._place(shard, part, lambda name: self._link_or_copy(shard, name, part, source))
        finally:
            os.close(source)

    def _publish_bytes(self, shard: int, part: FinishedPart, data: bytes) -> Published:
        return self._place(shard, part, lambda name: self._write_aside(shard, name, [data], part.digest))

    def _place(self, shard: int, part: FinishedPart, make: Callable[[str], None]) -> Published:
        """Make the blob in its shard, again if ``gc`` takes away the one that was found there."""
        for _ in range(LINK_TRIES):
            with suppress(FileNotFoundError):
                return self._place_now(shard, part, make)
        return self._place_now(shard, part, make)

    def _place_now(self, shard: int, part: FinishedPart, make: Callable[[str], None]) -> Published:
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
        duplicate = found and self.verify(part.digest) and self._hold(shard, part.digest)
        if found and not duplicate:
            self._replace(shard, part, make)
        failpoint("blob-linked")
        self._sync(shard)
        failpoint("blob-durable")
        return Published(part.digest, part.length, duplicate)

    def _replace(self, shard: int, part: FinishedPart, make: Callable[[str], None]) -> None:
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
        target = self._quarantine / f"{digest.hex}.{secrets.token_hex(4)}.blob"
        if stat.S_ISDIR(bad.st_mode):
            os.rename(digest.hex, target, src_dir_fd=shard)
            return
        try:
            os.link(digest.hex, target, src_dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            return  # another publisher has replaced it, and kept it
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            fd = _open_blob(digest.hex, dir_fd=shard)
            if fd is not None:  # a link or a pipe has no bytes to keep
                with open(fd, "rb") as source, open(target, "xb") as copy:
                    shutil.copyfileobj(source, copy)

    def _link_or_copy(self, shard: int, name: str, part: FinishedPart, source: int) -> None:
        """Link a part to its blob; copy where that cannot be (R68)."""
        try:
            os.link(str(part.path), name, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
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
                os.fchmod(stream.fileno(), 0o444)
                self._sync(stream.fileno())
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
            if error.errno not in _NO_LINK:
                raise
            os.rename(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)

    def _hold(self, shard: int, digest: Digest) -> bool:
        """Vouch for a blob that was there before us; whether it could be done.

        Whoever linked it may not have come to its fsync: what we vouch for, we sync. The time of
        access tells ``gc`` of us: it looks at it after it has moved a blob away, we look for the
        blob after we have set it, so one of the two notices the other. The time of modification
        stays: copies are known by it. Raises ``FileNotFoundError`` if the blob is gone.
        """
        fd = os.open(digest.hex, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shard)
        try:
            self._sync(fd)
            held = os.fstat(fd)
            os.utime(fd, ns=(time.time_ns(), held.st_mtime_ns))
            return os.path.samestat(held, os.stat(digest.hex, dir_fd=shard, follow_symlinks=False))
        except PermissionError:  # another user's file
            return False
        finally:
            os.close(fd)

    def _sync(self, fd: int) -> None:
        if self.fsync:
            try:
                os.fsync(fd)
            except OSError as error:
                raise _failure("cannot make bytes durable", error, "sync-failed") from error

    def quarantine(self, part: FinishedPart) -> None:
        """Put a part whose bytes are not what they should be where nobody serves it (E9)."""
        if part.path is not None:
            with _writing(f"cannot put {part.path} into quarantine"):
                os.rename(part.path, self._quarantine / f"{part.digest.hex}.{secrets.token_hex(4)}.part")

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

    def known_name(self, path: str) -> tuple[Digest, int] | None:
        """Return the blob, and its size, whose bytes the name *path* leads to (reads all of them).

        ``None`` for a name that is not there, leads to bytes of which there is no blob, or out of
        the store: through no link, but for one to a blob of ours (F24).
        """
        try:
            *folders, last = safe_parts(path)
        except StoreError:
            return None
        folder = self._look(tuple(folders))
        if folder is None:
            return None
        try:
            fd = _open_blob(last, folder)
            if fd is None:
                fd = self._open_linked(folder, last)
        finally:
            os.close(folder)
        if fd is None:
            return None
        with open(fd, "rb") as stream:
            digest = Digest(hashlib.file_digest(stream, "sha256").hexdigest())
            size = os.fstat(fd).st_size
        return (digest, size) if self.has(digest, size) else None

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

    def name(self, digest: Digest, wanted: str) -> str:
        """Make *wanted* (a path below the root) a name of the blob; return the path to report.

        Atomic: a reader sees the old bytes or the new, never none (rule 13). With link mode
        ``none`` nothing is made and the blob's own path is returned. Raises ``StoreError`` for
        a path that leaves the store (E1) and ``WriteFailed`` when the disk does not take it.
        """
        if self.link_mode == "none":
            return self.relative(digest)
        parts = safe_parts(wanted)
        if self._own and parts[: len(self._own)] == self._own:
            raise _unusable(wanted)
        *folders, last = parts
        with _writing(f"cannot make the name {wanted!r}"):
            folder = self._descend(tuple(folders), durable=False)
            try:
                for left in reversed(range(LINK_TRIES)):
                    try:
                        if not self._named(folder, last, digest):
                            self._make_name(folder, last, digest, depth=len(folders))
                        break
                    except FileNotFoundError:
                        if not left or os.path.lexists(self.path(digest)):
                            raise
                    time.sleep(0.01)  # ``gc`` looks at it just now, and puts it back
            except IsADirectoryError as error:
                raise _unusable(wanted) from error
            finally:
                os.close(folder)
        return wanted

    def _named(self, folder: int, last: str, digest: Digest) -> bool:
        """Whether the name leads to the blob already: same inode, or a copy we made of it.

        A copy carries its blob's modification time, to the nanosecond.
        """
        blob = os.stat(self.path(digest))
        try:
            found = os.stat(last, dir_fd=folder)
        except OSError:  # nothing, or a link that leads nowhere: to be replaced, never followed
            return False
        if (found.st_dev, found.st_ino) == (blob.st_dev, blob.st_ino):
            return True
        found = os.stat(last, dir_fd=folder, follow_symlinks=False)
        return (
            self.link_mode not in ("hardlink", "symlink")
            and stat.S_ISREG(found.st_mode)
            and (found.st_size, found.st_mtime_ns) == (blob.st_size, blob.st_mtime_ns)
        )

    def _make_name(self, folder: int, last: str, digest: Digest, *, depth: int) -> None:
        temporary = f".{secrets.token_hex(16)}.tmp"
        blob = self.path(digest)
        try:
            if self.link_mode == "symlink":
                target = "../" * depth + self.relative(digest)
                os.symlink(target, temporary, dir_fd=folder)
            elif not (self._clones and self._clone(blob, temporary, folder)):
                self._link_name(blob, temporary, folder)
            failpoint("name-made")
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
            failpoint("name-moved")
        finally:  # also: rename of two links to one inode does nothing
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)

    def _link_name(self, blob: Path, temporary: str, folder: int) -> None:
        if self.link_mode in ("auto", "hardlink") and self._linked(blob, temporary, folder):
            return
        with open(blob, "rb") as source:
            self._fill(source.fileno(), temporary, folder, _copy_bytes)

    def _linked(self, blob: Path, temporary: str, folder: int) -> bool:
        """Whether the blob could be linked.

        While another publisher puts a file in its place, a link may find the old one, which has
        no name any more, and be told that there is none: to be asked again.
        """
        for _ in range(LINK_TRIES):
            try:
                os.link(blob, temporary, dst_dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                if not os.path.lexists(blob):
                    raise
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                return False
            else:
                return True
        return False

    def _clone(self, blob: Path, temporary: str, folder: int) -> bool:
        """Whether the filesystem shared the blob's extents with a new file (reflink)."""
        with open(blob, "rb") as source:
            try:
                self._fill(source.fileno(), temporary, folder, _clone_bytes)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                self._clones = False
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                return False
        return True

    def _fill(self, source: int, temporary: str, folder: int, how: Callable[[int, int], None]) -> None:
        fd = os.open(temporary, _TEMPORARY, 0o644, dir_fd=folder)
        try:
            how(source, fd)
            self._sync(fd)
            info = os.fstat(source)
            os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
        finally:
            os.close(fd)


def _clone_bytes(source: int, target: int) -> None:
    fcntl.ioctl(target, _FICLONE, source)


def _copy_bytes(source: int, target: int) -> None:
    with open(source, "rb", closefd=False) as read, open(target, "wb", closefd=False) as write:
        while chunk := read.read(READ_SIZE):
            write.write(chunk)


def safe_parts(wanted: str) -> tuple[str, ...]:
    """Return the components of a path below the store's root (E1, F19).

    Raises ``StoreError`` (``store-unsafe``) for an absolute path, ``..``, NUL, an empty path or
    one inside what is ours (``blobs``, ``.streaming``).
    """
    parts = PurePosixPath(wanted).parts
    bad = (
        not parts
        or wanted.startswith("/")
        or wanted.endswith(("/", "/."))
        or "\0" in wanted
        or ".." in parts
        or parts[0] in ("blobs", ".streaming")
        or any(_too_long(part) for part in parts)
    )
    if bad:
        raise _unusable(wanted)
    return parts


def _too_long(part: str) -> bool:
    try:
        return len(os.fsencode(part)) > 255
    except UnicodeEncodeError:  # no file can have such a name, whatever its length
        return True


def _unusable(wanted: str) -> StoreError:
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
def _writing(what: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into ``WriteFailed``."""
    try:
        yield
    except OSError as error:
        raise _failure(what, error) from error


def _failure(what: str, error: OSError, reason: str = "write-failed") -> WriteFailed:
    msg = f"{what}: {error.strerror or error}"
    return WriteFailed(msg, reason="no-space" if error.errno in _FULL else reason)
