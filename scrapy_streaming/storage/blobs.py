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
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from scrapy_streaming.exceptions import IntegrityError, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage.finished import READ_SIZE, FinishedPart

LINK_MODES: Final = ("auto", "reflink", "hardlink", "symlink", "copy", "none")
_FICLONE: Final = 0x40049409
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_CLONE = frozenset({errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.EPERM})


@dataclass(frozen=True, slots=True)
class Published:
    """A blob that exists under its name. ``size`` in bytes."""

    digest: Digest
    size: int
    deduplicated: bool


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
        except FileNotFoundError:
            return False
        return stat.S_ISREG(info.st_mode) and info.st_size == size

    def verify(self, digest: Digest) -> bool:
        """Whether the blob is there and its bytes hash to its name (reads all of it)."""
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        with open(fd, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == digest.hex

    # -- publishing ------------------------------------------------------------------------

    def publish(self, part: FinishedPart) -> Published:
        """Make the part's bytes exist under their digest, durably and atomically.

        Storage rules 11 and 12. The part itself stays until the ledger has the record. Raises
        ``IntegrityError`` if the file is not as long as the bytes that were counted, and
        ``WriteFailed`` when the disk does not take it.
        """
        try:
            shard = self._shard(part.digest)
            try:
                if part.data is not None:
                    return self._publish_bytes(shard, part, part.data)
                return self._publish_file(shard, part)
            finally:
                os.close(shard)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            msg = f"cannot publish {part.digest}: {error.strerror or error}"
            raise WriteFailed(msg, reason="no-space" if full else "write-failed") from error

    def _publish_file(self, shard: int, part: FinishedPart) -> Published:
        if part.path is None:
            msg = "a finished part has bytes or a path"
            raise TypeError(msg)
        source = os.open(part.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(source).st_size != part.length:
                msg = f"{part.path} does not hold the {part.length} bytes that were counted"
                raise IntegrityError(msg, reason="length-mismatch")
            if self.fsync:
                os.fsync(source)
            os.fchmod(source, 0o444)
            return self._place(shard, part, lambda: self._link_or_copy(shard, part.path, source, part))
        finally:
            os.close(source)

    def _publish_bytes(self, shard: int, part: FinishedPart, data: bytes) -> Published:
        def write_and_link() -> None:
            self._write_aside(shard, part.digest, [data])

        return self._place(shard, part, write_and_link)

    def _place(self, shard: int, part: FinishedPart, link: Callable[[], None]) -> Published:
        """Link the blob into its shard; an existing one counts only if its bytes are right (R66)."""
        duplicate = False
        try:
            os.stat(part.digest.hex, dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            with suppress(FileExistsError):
                link()
        else:
            duplicate = self.verify(part.digest)
            if duplicate:
                self._sync_existing(shard, part.digest)
            else:
                self._to_quarantine(shard, part.digest)
                link()
        if self.fsync:
            os.fsync(shard)
        return Published(part.digest, part.length, duplicate)

    def _link_or_copy(self, shard: int, path: Path | None, source: int, part: FinishedPart) -> None:
        """Link a part to its blob; copy where that cannot be (R68)."""
        try:
            os.link(str(path), part.digest.hex, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with open(source, "rb", closefd=False) as stream:
                self._write_aside(shard, part.digest, iter(lambda: stream.read(READ_SIZE), b""))

    def _write_aside(self, shard: int, digest: Digest, chunks: object) -> None:
        """Write chunks beside the blob, check them, make them durable, move them into place."""
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        fd = os.open(temporary, _TEMPORARY, 0o600, dir_fd=shard)
        try:
            hasher = hashlib.sha256()
            with open(fd, "wb") as stream:
                for chunk in chunks:  # type: ignore[attr-defined]
                    hasher.update(chunk)
                    stream.write(chunk)
                stream.flush()
                os.fchmod(stream.fileno(), 0o444)
                if self.fsync:
                    os.fsync(stream.fileno())
            if hasher.hexdigest() != digest.hex:
                msg = f"bytes changed while {digest} was published"
                raise IntegrityError(msg)
            os.rename(temporary, digest.hex, src_dir_fd=shard, dst_dir_fd=shard)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=shard)
            raise

    def _sync_existing(self, shard: int, digest: Digest) -> None:
        """Whoever linked the blob may not have come to its fsync: what we vouch for, we sync."""
        if self.fsync:
            fd = os.open(digest.hex, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shard)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _to_quarantine(self, shard: int, digest: Digest) -> None:
        target = self._quarantine / f"{digest.hex}.{secrets.token_hex(4)}.blob"
        os.rename(digest.hex, target, src_dir_fd=shard)

    def quarantine(self, part: FinishedPart) -> None:
        """Put a part whose bytes are not what they should be where nobody serves it (E9)."""
        if part.path is not None:
            os.rename(part.path, self._quarantine / f"{part.digest.hex}.{secrets.token_hex(4)}.part")

    def _shard(self, digest: Digest) -> int:
        """Return a descriptor of the blob's directory, made durably if it is new."""
        return self._descend(("blobs", "sha256", digest.hex[:2]), durable=self.fsync)

    def _descend(self, names: tuple[str, ...], *, durable: bool) -> int:
        """Open a directory below the root, step by step, making what is missing (E2).

        A step that is a symbolic link or no directory raises ``StoreError``.
        """
        current = os.dup(self._dir)
        for depth, name in enumerate(names, 1):
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=current)
            try:
                below = os.open(name, _DIRECTORY, dir_fd=current)
            except OSError as error:
                os.close(current)
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                where = self.root.joinpath(*names[:depth])
                msg = f"{where} is not a plain directory; nothing was written through it"
                raise StoreError(msg, reason="store-unsafe") from error
            path = "/".join(names[:depth])
            if durable and path not in self._durable:
                os.fsync(current)
                self._durable.add(path)
            os.close(current)
            current = below
        return current

    # -- names -----------------------------------------------------------------------------

    def name(self, digest: Digest, wanted: str) -> str:
        """Make *wanted* (a path below the root) a name of the blob; return the path to report.

        Atomic: a reader sees the old bytes or the new, never none (rule 13). With link mode
        ``none`` nothing is made and the blob's own path is returned. Raises ``StoreError`` for
        a path that leaves the store (E1) and ``WriteFailed`` when the disk does not take it.
        """
        if self.link_mode == "none":
            return self.relative(digest)
        *folders, last = safe_parts(wanted)
        try:
            folder = self._descend(tuple(folders), durable=False)
            try:
                if not self._named(folder, last, digest):
                    self._make_name(folder, last, digest, depth=len(folders))
            finally:
                os.close(folder)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            msg = f"cannot make the name {wanted}: {error.strerror or error}"
            raise WriteFailed(msg, reason="no-space" if full else "write-failed") from error
        return wanted

    def _named(self, folder: int, last: str, digest: Digest) -> bool:
        """Whether the name leads to the blob already: same inode, or a copy we made of it.

        A copy carries its blob's modification time, to the nanosecond.
        """
        blob = os.stat(self.path(digest))
        try:
            found = os.stat(last, dir_fd=folder)
        except FileNotFoundError:
            return False
        if (found.st_dev, found.st_ino) == (blob.st_dev, blob.st_ino):
            return True
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
            os.rename(temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        finally:  # also: rename of two links to one inode does nothing
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)

    def _link_name(self, blob: Path, temporary: str, folder: int) -> None:
        if self.link_mode in ("auto", "hardlink"):
            try:
                os.link(blob, temporary, dst_dir_fd=folder, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
            else:
                return
        with open(blob, "rb") as source:
            self._fill(source.fileno(), temporary, folder, _copy_bytes)

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
            if self.fsync:
                os.fsync(fd)
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
        or "\0" in wanted
        or ".." in parts
        or parts[0] in ("blobs", ".streaming")
        or any(len(os.fsencode(part)) > 255 for part in parts)
    )
    if bad:
        msg = f"file_path() gave {wanted!r}, which is no usable path inside FILES_STORE"
        raise StoreError(msg, reason="store-unsafe")
    return parts
