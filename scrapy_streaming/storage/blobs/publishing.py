"""Publishing: a complete part becomes a blob, durably and atomically (storage rules 11 and 12).

What may live here: its steps. As in git's ``finalize_object_file`` and containerd's content store they are:
write under a temporary name, sync, link into place, sync the folder.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from scrapy_streaming.exceptions import IntegrityError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage import durable
from scrapy_streaming.storage.blobs.base import Published
from scrapy_streaming.storage.blobs.files import BlobFiles
from scrapy_streaming.storage.blobs.plain import READ, keep_copy, stamp_of
from scrapy_streaming.storage.complete_part import READ_SIZE, CompletePart
from scrapy_streaming.storage.failpoints import failpoint

#: Attempts of a step that fails while another process replaces or removes the blob.
TRIES: Final = 10

#: Makes the file of a blob under a given name in the blob's folder.
Maker = Callable[[str], None]


class Publisher:
    """Publishes complete parts into the blobs of one local store."""

    def __init__(self, blobs: BlobFiles) -> None:
        self._blobs = blobs
        self._disk = blobs.disk

    def publish(self, part: CompletePart) -> Published:
        """Make the part's bytes a blob; raise as ``BlobStore.publish``."""
        with durable.writing(f"cannot publish {part.digest}"):
            shard = self._blobs.open_shard(part.digest)
            try:
                if part.data is not None:
                    return self._publish_bytes(shard, part, part.data)
                return self._publish_file(shard, part)
            finally:
                os.close(shard)

    def _publish_bytes(self, shard: int, part: CompletePart, data: bytes) -> Published:
        return self.place(shard, part, lambda name: self._disk.write(shard, name, [data], part.digest))

    def _publish_file(self, shard: int, part: CompletePart) -> Published:
        if part.path is None:
            msg = "a complete part has bytes or a path"
            raise TypeError(msg)
        try:
            source = os.open(part.path, READ)
        except FileNotFoundError:  # a worker without a ledger published the same and removed the parts
            found = self._blobs.inspect_blob(part.digest, part.length, None)
            if found.stamp is None:
                raise
            return Published(part.digest, part.length, True, found.stamp)
        try:
            info = os.fstat(source)
            if not stat.S_ISREG(info.st_mode) or info.st_size != part.length:
                msg = f"{part.path} is not a regular file of the {part.length} bytes that were received"
                raise IntegrityError(msg, reason="length-mismatch")
            self._disk.finish(source)
            failpoint("blob-synced")
            return self.place(shard, part, lambda name: self._link_or_copy(shard, name, part, source))
        finally:
            os.close(source)

    def _link_or_copy(self, shard: int, name: str, part: CompletePart, source: int) -> None:
        """Link a part to its blob; copy where the file system cannot link (R68)."""
        try:
            os.link(str(part.path), name, dst_dir_fd=shard, follow_symlinks=False)
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            os.lseek(source, 0, os.SEEK_SET)
            with open(source, "rb", closefd=False) as stream:
                chunks = iter(lambda: stream.read(READ_SIZE), b"")
                self._disk.write(shard, name, chunks, part.digest)

    # -- the blob's place ------------------------------------------------------------------

    def place(self, shard: int, part: CompletePart, make: Maker, *, alone: bool = False) -> Published:
        """Make the blob with *make* unless a good one exists; return it.

        Done again if ``gc`` removes an existing blob meanwhile. *alone* as of ``BlobStore.adopt``.
        """
        for _ in range(TRIES):
            with suppress(FileNotFoundError):
                return self._place_once(shard, part, make, alone=alone)
        return self._place_once(shard, part, make, alone=alone)

    def _place_once(self, shard: int, part: CompletePart, make: Maker, *, alone: bool) -> Published:
        """Make the blob; use an existing one only if its bytes are right (R66)."""
        name = part.digest.hex
        found = True
        try:
            os.stat(name, dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            try:
                make(name)
                found = False
            except FileExistsError:
                pass  # another publisher was first: its blob is verified, too
        duplicate = (
            found and self._blobs.verify(part.digest) and self._protect(shard, part.digest, alone=alone)
        )
        if found and not duplicate:
            self._replace(shard, part, make)
        stamp = stamp_of(os.stat(name, dir_fd=shard, follow_symlinks=False))
        failpoint("blob-linked")
        self._disk.sync(shard)
        failpoint("blob-durable")
        return Published(part.digest, part.length, duplicate, stamp)

    def _protect(self, shard: int, digest: Digest, *, alone: bool) -> bool:
        """Make an existing blob durable and protect it from ``gc``; return whether that was done.

        The publisher that created the blob may not have synced it, so it is synced before success is
        reported. Then its time of access is set: ``gc`` compares that after it has moved a blob to the
        trash, and this method checks that the blob is still there after it has set the time, so at least
        one side detects the race. The time of modification stays, since copies have the same. *alone*: no
        ``gc`` runs, and the times stay. Raises ``FileNotFoundError`` if the blob is missing.
        """
        fd = os.open(digest.hex, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=shard)
        try:
            self._disk.sync(fd)
            info = os.fstat(fd)
            if not alone:
                os.utime(fd, ns=(time.time_ns(), info.st_mtime_ns))
            return os.path.samestat(info, os.stat(digest.hex, dir_fd=shard, follow_symlinks=False))
        except PermissionError:  # another user's file
            return False
        finally:
            os.close(fd)

    def _replace(self, shard: int, part: CompletePart, make: Maker) -> None:
        """Replace a bad blob by a good one; keep the bad bytes in quarantine.

        By a rename over it: of two publishers that found the same bad blob, the second may replace the
        first one's good blob by its own good blob, but never removes it.
        """
        name = part.digest.hex
        bad = os.stat(name, dir_fd=shard, follow_symlinks=False)
        if part.path is not None and os.path.samestat(bad, os.stat(part.path, follow_symlinks=False)):
            msg = f"the bytes of {part.digest} changed after they were hashed"
            raise IntegrityError(msg)
        self._keep_bad(shard, part.digest, bad)
        temporary = f".{name}.{secrets.token_hex(8)}.tmp"
        try:
            make(temporary)
            os.rename(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)
        finally:
            durable.unlink(temporary, shard)

    def _keep_bad(self, shard: int, digest: Digest, bad: os.stat_result) -> None:
        """Keep what is at a blob's place in quarantine, which may be on another disk."""
        target = self._disk.quarantine_path(digest, "blob")
        if stat.S_ISDIR(bad.st_mode):
            os.rename(digest.hex, target, src_dir_fd=shard)
            return
        try:
            os.link(digest.hex, target, src_dir_fd=shard, follow_symlinks=False)
        except FileNotFoundError:
            return  # another publisher has just moved it to quarantine
        except OSError as error:
            if error.errno not in durable.NO_LINK:
                raise
            keep_copy(digest.hex, shard, target)
