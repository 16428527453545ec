"""Adoption: a file that another program stored under a name becomes a blob (C6, C11, I16).

What may live here: reading such a file once, and making it a blob, without a copy where that is safe.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from scrapy_streaming.exceptions import NotAdopted
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import NotedFile, RecordedName
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.base import Adopted, Named
from scrapy_streaming.storage.blobs.name_files import NameFiles
from scrapy_streaming.storage.blobs.names import Namer
from scrapy_streaming.storage.blobs.plain import is_open_for_writing, is_unwritten, open_plain, stamp_of
from scrapy_streaming.storage.blobs.publishing import Publisher
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A file that another program stored.

    ``last`` is its name in the open directory ``folder``, ``fd`` its descriptor; ``stop`` ends its reading.
    """

    path: str
    folder: int
    last: str
    fd: int
    stop: threading.Event | None

    def is_unwritten(self, info: os.stat_result) -> bool:
        """Return whether nothing has written to the file since *info* was read."""
        now = os.fstat(self.fd)
        return is_unwritten(stamp_of(info), now) and now.st_size == info.st_size

    def hash(self, info: os.stat_result, checksum: str | None) -> Digest:
        """Return the digest of the bytes.

        Raises ``NotAdopted`` if they do not have *checksum*, change meanwhile, cannot be read, or ``stop``
        is set.
        """
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        also_md5 = checksum is not None and len(checksum) == 2 * md5.digest_size
        os.lseek(self.fd, 0, os.SEEK_SET)
        left = info.st_size
        try:
            while left >= 0 and (chunk := os.read(self.fd, READ_SIZE)):  # a file that grows has no end
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
        if not self.is_unwritten(info):
            raise NotAdopted(self.path, "being-written")
        if checksum is not None and checksum.lower() != (md5 if also_md5 else sha).hexdigest():
            raise NotAdopted(self.path, "checksum-mismatch")
        return Digest(sha.hexdigest())


#: Stores a file that was read, and returns its name then; arguments as of ``Adopter.make_blob``.
Store = Callable[[Digest, ForeignFile, os.stat_result, bool], Named]


@dataclass(frozen=True, slots=True)
class AdoptionOptions:
    """How a file is adopted: the arguments of ``BlobStore.adopt``."""

    noted: NotedFile | None = None
    checksum: str | None = None
    stop: threading.Event | None = None
    alone: bool = False


def adopt(blobs: NameFiles, path: str, options: AdoptionOptions, store: Store) -> Adopted:
    """Read the file at the name *path*, pass it to *store*, and return its description.

    Raises ``NotAdopted`` for a file that is missing, not regular, behind a link (E2, F24), not readable,
    being written, of another checksum, or whose owner is neither this user nor root nor the store's; and
    if ``stop`` was set before its end.
    """
    with blobs.disk.folder_of(path) as (folder, last):
        if folder is None:
            raise NotAdopted(path, "not-found")
        file = ForeignFile(path, folder, last, blobs.open_name(path, folder, last), options.stop)
        try:
            return _adopt(blobs, file, options, store)
        finally:
            os.close(file.fd)


def _adopt(blobs: NameFiles, file: ForeignFile, options: AdoptionOptions, store: Store) -> Adopted:
    info = os.fstat(file.fd)
    if info.st_uid not in (0, os.geteuid(), os.fstat(blobs.disk.fd).st_uid):
        raise NotAdopted(file.path, "other-owner")
    if is_open_for_writing(file.fd):
        raise NotAdopted(file.path, "being-written")
    noted = options.noted
    unchanged = noted is not None and noted.stamp == stamp_of(info)
    digest = Digest(noted.hexadecimal) if noted is not None and unchanged else None
    if digest is None or options.checksum is not None:
        digest = file.hash(info, options.checksum)
    # the blob of a noted file is recorded as present, so gc does not remove it
    named = store(digest, file, info, options.alone or unchanged)
    file_stamp = stamp_of(os.stat(file.last, dir_fd=file.folder))
    return Adopted(
        named.path,
        digest,
        info.st_size,
        info.st_mtime,
        named.stamp or file_stamp,
        file_stamp,
        named.own_stamp,
        hashed=not unchanged,
    )


class Adopter:
    """Makes blobs of files that other programs stored in one local store."""

    def __init__(self, blobs: NameFiles, publisher: Publisher, namer: Namer) -> None:
        self._blobs = blobs
        self._disk = blobs.disk
        self._publisher = publisher
        self._namer = namer

    def make_blob(self, digest: Digest, file: ForeignFile, info: os.stat_result, alone: bool) -> Named:
        """Make a blob of a file that was read (*info* is its state then); return its name.

        In link mode ``auto`` the file itself becomes the blob, by a link (by a clone where the file system
        has them), and keeps its time of modification. A file whose bytes are a blob already stays a file of
        its own. *alone* as of ``BlobStore.adopt``.
        """
        if not (self._blobs.is_same_file(digest, info) or (alone and self._is_stored(digest))):
            path = self._blobs.root / file.path
            part = CompletePart(PartState("", Validators()), info.st_size, digest, path)
            with durable.writing(f"cannot adopt {file.path!r}"):
                shard = self._blobs.open_shard(digest)
                try:
                    make = partial(self._make_file, shard, digest=digest, file=file, info=info)
                    self._publisher.place(shard, part, make, alone=alone)
                finally:
                    os.close(shard)
        named = self._name(digest, file)
        return replace(named, stamp=stamp_of(os.stat(self._blobs.path(digest), follow_symlinks=False)))

    def _is_stored(self, digest: Digest) -> bool:
        """Return whether the blob exists, has the right bytes, and is durable now."""
        if not self._blobs.verify(digest):
            return False
        fd = open_plain(self._blobs.path(digest))
        if fd is None:
            return False
        try:
            self._disk.sync(fd)
        finally:
            os.close(fd)
        return True

    def _name(self, digest: Digest, file: ForeignFile) -> Named:
        """Turn the file into a name as the link mode has it; in ``auto`` it is one already."""
        info = os.stat(file.last, dir_fd=file.folder, follow_symlinks=False)
        if self._disk.link_mode == "auto" and self._blobs.is_same_file(digest, info):
            return Named(file.path)
        return self._namer.name(digest, file.path, recorded=RecordedName(file.path, stamp_of(info)))

    def _make_file(
        self, shard: int, name: str, digest: Digest, file: ForeignFile, info: os.stat_result
    ) -> None:
        """Make the blob under a temporary name; move it into place unless the file changed meanwhile."""
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        try:
            if not self._share(shard, temporary, file, info):
                os.lseek(file.fd, 0, os.SEEK_SET)
                os.close(self._disk.copy(file.fd, temporary, shard))
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
            if not file.is_unwritten(info):
                raise NotAdopted(file.path, "being-written")
            self._disk.move(shard, temporary, name)
        finally:
            durable.unlink(temporary, shard)

    def _share(self, shard: int, temporary: str, file: ForeignFile, info: os.stat_result) -> bool:
        """Make the blob's file without a copy: a clone, or a link to a file that has one name only."""
        if self._disk.clones:
            fd = self._disk.clone(file.fd, temporary, shard)
            self._disk.clones = fd is not None
            if fd is not None:
                os.close(fd)
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
                return True
        if info.st_nlink != 1 or self._disk.link_mode not in ("auto", "hardlink", "symlink"):
            return False
        self._disk.sync(file.fd)
        try:
            os.link(file.last, temporary, src_dir_fd=file.folder, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            return False
        linked = os.stat(temporary, dir_fd=shard, follow_symlinks=False)
        if not os.path.samestat(linked, info):
            raise NotAdopted(file.path, "being-written")
        if self._disk.link_mode != "auto":
            with suppress(PermissionError):  # the file belongs to another user, the store's owner
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
        return True
