"""Adoption: how a file that another program stored under a name becomes a blob (C6, C11, I16).

What may live here: reading such a file once, and making it a blob without a copy where that is safe.
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
class Stray:
    """A file that another program stored: ``last`` in ``folder``, open as ``fd``."""

    path: str
    folder: int
    last: str
    fd: int
    stop: threading.Event | None

    def is_unwritten(self, info: os.stat_result) -> bool:
        """Return whether nothing wrote to the file since it was as in *info*."""
        now = os.fstat(self.fd)
        return is_unwritten(stamp_of(info), now) and now.st_size == info.st_size

    def hash(self, info: os.stat_result, checksum: str | None) -> Digest:
        """Return the digest of the bytes; raise ``NotAdopted`` if *checksum* is another or they change."""
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


#: Makes a file that was read part of the store, and returns what its name leads to then.
Store = Callable[[Digest, Stray, os.stat_result, bool], Named]


@dataclass(frozen=True, slots=True)
class Terms:
    """How a file is adopted: the arguments of ``BlobStore.adopt``."""

    noted: NotedFile | None = None
    checksum: str | None = None
    stop: threading.Event | None = None
    alone: bool = False


def adopt(blobs: NameFiles, path: str, terms: Terms, store: Store) -> Adopted:
    """Read the file at the name *path*, have *store* take it, and return what it is now.

    Raises ``NotAdopted`` for what is not there, no plain file or behind a link (E2, F24), of an owner
    who is neither this user, nor root, nor the store's, not readable, being written, of another checksum,
    or not read to its end because of ``stop``.
    """
    with blobs.disk.folder_of(path) as (folder, last):
        if folder is None:
            raise NotAdopted(path, "not-found")
        stray = Stray(path, folder, last, blobs.open_stray(path, folder, last), terms.stop)
        try:
            return _adopt(blobs, stray, terms, store)
        finally:
            os.close(stray.fd)


def _adopt(blobs: NameFiles, stray: Stray, terms: Terms, store: Store) -> Adopted:
    info = os.fstat(stray.fd)
    if info.st_uid not in (0, os.geteuid(), os.fstat(blobs.disk.fd).st_uid):
        raise NotAdopted(stray.path, "other-owner")
    if is_open_for_writing(stray.fd):
        raise NotAdopted(stray.path, "being-written")
    noted = terms.noted
    unchanged = noted is not None and noted.stamp == stamp_of(info)
    digest = Digest(noted.hexadecimal) if noted is not None and unchanged else None
    if digest is None or terms.checksum is not None:
        digest = stray.hash(info, terms.checksum)
    # the blob of a noted file is recorded as present, so gc leaves it alone
    named = store(digest, stray, info, terms.alone or unchanged)
    file = stamp_of(os.stat(stray.last, dir_fd=stray.folder))
    return Adopted(
        named.path,
        digest,
        info.st_size,
        info.st_mtime,
        named.stamp or file,
        file,
        named.own_stamp,
        hashed=not unchanged,
    )


class Adopter:
    """Makes files that other programs stored blobs of one local store."""

    def __init__(self, blobs: NameFiles, publisher: Publisher, namer: Namer) -> None:
        self._blobs = blobs
        self._disk = blobs.disk
        self._publisher = publisher
        self._namer = namer

    def make_blob(self, digest: Digest, stray: Stray, info: os.stat_result, alone: bool) -> Named:
        """Make a file that was read a blob; return its name.

        In link mode ``auto`` the file itself becomes the blob, by a link (a clone where there are any),
        and keeps its time of modification. A file whose bytes are a blob already stays a file of its own.
        """
        if not (self._blobs.is_same_file(digest, info) or (alone and self._is_stored(digest))):
            path = self._blobs.root / stray.path
            part = CompletePart(PartState("", Validators()), info.st_size, digest, path)
            with durable.writing(f"cannot adopt {stray.path!r}"):
                shard = self._blobs.open_shard(digest)
                try:
                    make = partial(self._take_in, shard, digest=digest, stray=stray, info=info)
                    self._publisher.place(shard, part, make, alone=alone)
                finally:
                    os.close(shard)
        named = self._name(digest, stray)
        return replace(named, stamp=stamp_of(os.stat(self._blobs.path(digest), follow_symlinks=False)))

    def _is_stored(self, digest: Digest) -> bool:
        """Return whether there is a good blob, durable by now."""
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

    def _name(self, digest: Digest, stray: Stray) -> Named:
        """Make the name what the link mode has names be; in ``auto`` it is that already."""
        info = os.stat(stray.last, dir_fd=stray.folder, follow_symlinks=False)
        if self._disk.link_mode == "auto" and self._blobs.is_same_file(digest, info):
            return Named(stray.path)
        return self._namer.name(digest, stray.path, recorded=RecordedName(stray.path, stamp_of(info)))

    def _take_in(self, shard: int, name: str, digest: Digest, stray: Stray, info: os.stat_result) -> None:
        """Make the blob's file aside, and move it into place if nothing wrote to *stray* meanwhile."""
        temporary = f".{digest.hex}.{secrets.token_hex(8)}.tmp"
        try:
            if not self._share(shard, temporary, stray, info):
                os.lseek(stray.fd, 0, os.SEEK_SET)
                os.close(self._disk.copy(stray.fd, temporary, shard))
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
            if not stray.is_unwritten(info):
                raise NotAdopted(stray.path, "being-written")
            self._disk.move(shard, temporary, name)
        finally:
            durable.unlink(temporary, shard)

    def _share(self, shard: int, temporary: str, stray: Stray, info: os.stat_result) -> bool:
        """Make the blob's file without a copy: a clone, or a link to a file that has one name only."""
        if self._disk.clones:
            fd = self._disk.clone(stray.fd, temporary, shard)
            self._disk.clones = fd is not None
            if fd is not None:
                os.close(fd)
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
                return True
        if info.st_nlink != 1 or self._disk.link_mode not in ("auto", "hardlink", "symlink"):
            return False
        self._disk.sync(stray.fd)
        try:
            os.link(stray.last, temporary, src_dir_fd=stray.folder, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            return False
        linked = os.stat(temporary, dir_fd=shard, follow_symlinks=False)
        if not os.path.samestat(linked, info):
            raise NotAdopted(stray.path, "being-written")
        if self._disk.link_mode != "auto":
            with suppress(PermissionError):  # the file of the store's owner, who is another user
                os.chmod(temporary, self._disk.mode, dir_fd=shard)
        return True
