"""The files of a local store's blobs: finding and verifying them, the trash, quarantine.

What may live here: finding, reading, moving away and restoring files under ``blobs/``. ``publishing`` makes
them, ``names`` links names to them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.base import (
    BlobStore,
    FoundBlob,
    Hashed,
    Inspection,
    Presence,
    Tampered,
    blob_key,
)
from scrapy_streaming.storage.blobs.disk import Disk, is_plain
from scrapy_streaming.storage.blobs.plain import READ, entries, hash_of, is_unwritten, stamp_of
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.leftovers import Leftover, files_in, leftovers_in

#: The name of a blob's file.
BLOB: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
#: The name of a blob's file while it is written.
_ASIDE: Final = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{16}\.tmp", re.ASCII)
_TRASHED: Final = re.compile(r"([0-9a-f]{64})\.gone", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFile(FoundBlob):
    """A blob's file, or a name's, as it was found; ``info`` is what ``lstat`` gave."""

    path: Path
    info: os.stat_result

    @classmethod
    def of(cls, digest: Digest, path: Path, info: os.stat_result, name: str | None = None) -> Self:
        """Return the file *path* as *info* describes it."""
        return cls(
            digest=digest,
            size=info.st_size,
            # change, not modification: no program can set it, and a new name or a rename counts
            changed_at=info.st_ctime,
            stamp=stamp_of(info),
            shared=info.st_nlink > 1,
            location=str(path),
            name=name,
            path=path,
            info=info,
        )

    def same(self, now: os.stat_result) -> bool:
        """Return whether *now* is this file, and nothing has replaced, named or verified it since.

        A publisher that verifies a blob changes its time of access.
        """
        then = self.info
        return (
            os.path.samestat(now, then)
            and (now.st_size, now.st_mtime_ns) == (then.st_size, then.st_mtime_ns)
            and (now.st_nlink, now.st_atime_ns) == (then.st_nlink, then.st_atime_ns)
        )


class BlobFiles(BlobStore):
    """What the two kinds of local store share: blobs that are files under ``blobs/sha256/ab/<hex>``."""

    def __init__(self, root: Path, quarantine: Path, *, fsync: bool = True, link_mode: str = "auto") -> None:
        self.root = root
        self.disk = Disk(root, quarantine, fsync=fsync, link_mode=link_mode)
        self.quarantine_location = str(quarantine)
        self.folders = (root,)
        #: below ``blobs``, not STREAMING_DIR: a rename must not leave the file system
        self._trash = root / "blobs" / ".trash"

    def close(self) -> None:
        """Close the root."""
        self.disk.close()

    def path(self, digest: Digest) -> Path:
        """Return where the blob is, or would be."""
        return self.root / blob_key(digest)

    def describe(self, digest: Digest) -> str:
        """Return the blob's path."""
        return str(self.path(digest))

    def open_shard(self, digest: Digest) -> int:
        """Return a descriptor of the blob's folder, made durably if it is new."""
        return self.disk.make_folder(("blobs", "sha256", digest.hex[:2]), lasting=True)

    # -- reading ---------------------------------------------------------------------------

    def open(self, digest: Digest, name: str | None = None) -> BinaryIO:
        """Return the blob's bytes; raise ``OSError`` if it is not there."""
        path = self.local_file(digest, name)
        return open(os.open(path, READ), "rb")

    def local_file(self, digest: Digest, name: str | None = None) -> Path:  # noqa: ARG002 - NamesOnlyStore needs it
        """Return the blob's file."""
        return self.path(digest)

    # -- what is there ---------------------------------------------------------------------

    def find(self, digest: Digest) -> BlobFile | None:
        """Return the blob's file; ``None`` if there is no regular file."""
        info = self.info(digest)
        return BlobFile.of(digest, self.path(digest), info) if info is not None and is_plain(info) else None

    def info(self, digest: Digest) -> os.stat_result | None:
        """Return the ``lstat`` of the blob's file; ``None`` if it is missing."""
        try:
            return os.lstat(self.path(digest))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def presence(self, digest: Digest) -> Presence:
        """Return what is at the blob's place."""
        info = self.info(digest)
        if info is None:
            return Presence.NOTHING
        return Presence.BLOB if is_plain(info) else Presence.OTHER

    def is_same_file(self, digest: Digest, info: os.stat_result) -> bool:
        """Return whether *info* is of the blob's own file."""
        now = self.info(digest)
        return now is not None and os.path.samestat(now, info)

    def verify(self, digest: Digest) -> bool:
        """Return whether the blob's bytes have its digest; false also if the disk cannot read them."""
        return hash_of(self.path(digest))[0] == digest.hex

    def inspect_blob(self, digest: Digest, size: int, stamp: bytes | None) -> Inspection:
        """Return whether the blob is there and its bytes are right (R77).

        A new stamp is from before the bytes were read, so that a later inspection detects a write during it.
        """
        info = self.info(digest)
        if info is None:
            return Inspection(tampered=Tampered.BLOB_MISSING)
        regular = is_plain(info) and info.st_size == size
        if regular and stamp_of(info) == stamp:
            return Inspection(stamp)
        found = BlobFile.of(digest, self.path(digest), info)
        if not regular:
            return Inspection(tampered=Tampered.BAD_BLOB, found=found)
        hexadecimal, now = hash_of(found.path)
        if now is not None and hexadecimal == digest.hex:
            return Inspection(stamp_of(now), hashed=True)
        return Inspection(None, hashed=True, tampered=Tampered.BAD_BLOB, found=self._found_again(found))

    @staticmethod
    def _found_again(found: BlobFile) -> BlobFile | None:
        """Return the file with its current time of access; ``None`` if it changed."""
        with suppress(FileNotFoundError):
            info = os.lstat(found.path)
            if stamp_of(info) == found.stamp:
                return BlobFile.of(found.digest, found.path, info)
        return None

    def renew_stamp(self, digest: Digest, stamp: bytes) -> bytes | None:
        """Return the blob's current stamp; ``None`` if it was written to since *stamp*, or is missing."""
        info = self.info(digest)
        return stamp_of(info) if info is not None and is_unwritten(stamp, info) else None

    def blobs(self) -> Iterator[BlobFile]:
        """Yield every blob's file, by digest; skip files of other names (F24)."""
        for shard in entries(self.root / "blobs" / "sha256"):
            if len(shard.name) != 2 or not shard.is_dir(follow_symlinks=False):
                continue
            for entry in entries(shard.path):
                if BLOB.fullmatch(entry.name) is None or entry.name[:2] != shard.name:
                    continue
                with suppress(FileNotFoundError):
                    info = os.lstat(entry.path)
                    if is_plain(info):
                        yield BlobFile.of(Digest(entry.name), Path(entry.path), info)

    def hash(self, found: FoundBlob, stop: threading.Event) -> Hashed | None:
        """Return the digest of a file's bytes; ``None`` if it is missing, or *stop* was set meanwhile."""
        path = _file(found).path
        try:
            fd = os.open(path, READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            return Hashed(found, None, error.strerror or str(error))
        hasher = hashlib.sha256()
        try:
            while chunk := os.read(fd, READ_SIZE):
                hasher.update(chunk)
                if stop.is_set():
                    return None
            info = os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return Hashed(found, None, error.strerror or str(error))
        finally:
            os.close(fd)
        return Hashed(BlobFile.of(found.digest, path, info, found.name), hasher.hexdigest())

    # -- damage ----------------------------------------------------------------------------

    def quarantine(self, part: CompletePart) -> None:
        """Move a part's file to quarantine (E9)."""
        if part.path is not None:
            with durable.writing(f"cannot put {part.path} into quarantine"):
                os.rename(part.path, self.disk.quarantine_path(part.digest, "part"))

    def set_aside(self, found: FoundBlob) -> bool:
        """Move a blob's file to quarantine unless it changed since it was *found* (E9)."""
        file, target = _file(found), self.disk.quarantine_path(found.digest, "blob")
        try:
            return self.take(file, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        aside = file.path.with_name(f".{found.digest.hex}.{secrets.token_hex(8)}.tmp")
        if not self.take(file, aside):  # before the copy: a publisher may store a good blob meanwhile
            return False
        with open(aside, "rb") as source, open(target, "xb") as copy:
            shutil.copyfileobj(source, copy)
            self.disk.sync(copy.fileno())
        os.unlink(aside)
        return True

    def take(self, found: BlobFile, target: Path) -> bool:
        """Move a blob's file to *target*, on the same file system, unless it changed since it was *found*.

        Returns whether it was moved. This is checked again after the move: if a publisher verified the blob
        meanwhile, it is moved back. A later publisher finds no blob and stores its own
        (``Publisher._protect``).
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
        """Make *source* the blob again, durably, unless there is one again; remove *source*."""
        shard = self.open_shard(digest)
        try:
            _link_back(shard, digest, source)
            self.disk.sync(shard)
        finally:
            os.close(shard)
        durable.unlink(source)

    # -- the trash -------------------------------------------------------------------------

    def _trashed(self, digest: Digest) -> Path:
        return self._trash / f"{digest.hex}.gone"

    def move_to_trash(self, found: FoundBlob) -> bool:
        """Move a blob's file to the trash unless it changed since it was *found*.

        Raises ``StoreError`` (``store-unsafe``) if the trash is not a folder.
        """
        with suppress(FileExistsError):
            os.mkdir(self._trash, 0o700)
        if not stat.S_ISDIR(os.lstat(self._trash).st_mode):
            msg = f"{self._trash} is not a plain directory; nothing was moved to it"
            raise StoreError(msg, reason="store-unsafe")
        return self.take(_file(found), self._trashed(found.digest))

    def delete_trashed(self, digest: Digest) -> bool:
        """Delete a blob's file in the trash."""
        try:
            os.unlink(self._trashed(digest))
        except FileNotFoundError:
            return False
        return True

    def restore_trashed(self, digest: Digest) -> None:
        """Move a blob's file in the trash back to its place."""
        self.put_back(digest, self._trashed(digest))

    def trashed(self) -> Iterator[BlobFile]:
        """Yield the blobs' files in the trash; skip files of other names."""
        if os.path.islink(self._trash):
            return
        for path, info in files_in(self._trash):
            match = _TRASHED.fullmatch(path.name)
            if match is not None and is_plain(info):
                yield BlobFile.of(Digest(match[1]), path, info)

    # -- for maintenance -------------------------------------------------------------------

    def blobs_aside(self) -> Iterator[Leftover]:
        """Yield the temporary files that killed processes left beside blobs."""
        for shard, info in files_in(self.root / "blobs" / "sha256"):
            if stat.S_ISDIR(info.st_mode):
                yield from leftovers_in(shard, _ASIDE)

    def shared_inodes(self) -> Inodes:
        """Return the inodes of the blobs that have names."""
        return Inodes(file.info.st_ino for file in self.blobs() if file.shared)

    def can_clone(self) -> bool:
        """Return whether a copy needs no space on the disk."""
        return self.disk.can_clone()

    def removable(self) -> list[Path]:
        """Return the blobs' folder; only its own part where users have files beside the blobs."""
        blobs = self.root / "blobs"
        own = {"sha256", self._trash.name}
        whole = not blobs.is_dir() or {path.name for path in blobs.iterdir()} <= own
        return [blobs if whole else blobs / "sha256"]


class Inodes:
    """A set of inodes that needs eight bytes for each."""

    def __init__(self, inodes: Iterator[int]) -> None:
        self._sorted = array("Q", sorted(inodes))

    def __contains__(self, inode: int) -> bool:
        at = bisect_left(self._sorted, inode)
        return at < len(self._sorted) and self._sorted[at] == inode


def _file(found: FoundBlob) -> BlobFile:
    """Return a blob that this store found; raise ``TypeError`` for one of another store."""
    if not isinstance(found, BlobFile):
        msg = f"{found} is not of this store"
        raise TypeError(msg)
    return found


def _link_back(shard: int, digest: Digest, source: Path) -> None:
    try:
        os.link(source, digest.hex, dst_dir_fd=shard, follow_symlinks=False)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in durable.NO_LINK:
            raise
        os.rename(source, digest.hex, dst_dir_fd=shard)
