"""Leaving: every name gets bytes of its own, so that blobs and this package's folder may be deleted."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from scrapy_streaming.exceptions import NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage.maintenance.arriving import Refused, names
from scrapy_streaming.storage.maintenance.common import Progress, Store, alone


@dataclass
class Detached:
    """What ``detach`` did: ``names`` looked at, and the ``bytes`` that were written.

    ``detached`` shared their bytes with a blob, ``made`` were recorded and not there, ``own`` had
    bytes of their own; ``refused`` still need their blob.
    """

    names: int = 0
    bytes: int = 0
    detached: int = 0
    made: int = 0
    own: int = 0
    refused: int = 0


class _Inodes:
    """The inodes of the blobs that have names, eight bytes each."""

    def __init__(self, store: Store) -> None:
        found = (file.info.st_ino for file in store.blobs.files() if file.info.st_nlink > 1)
        self._sorted = array("Q", sorted(found))

    def __contains__(self, inode: object) -> bool:
        if not isinstance(inode, int):
            return False
        at = bisect_left(self._sorted, inode)
        return at < len(self._sorted) and self._sorted[at] == inode


def detach(
    store: Store,
    *,
    refused: Refused,
    spared: Collection[Path] = (),
    reserve: int = 0,
    progress: Progress | None = None,
) -> Detached:
    """Give every name of the store bytes of its own; return what was done. No crawl may run.

    The names are those that stand in the store, and those that the ledger knows: one that is gone is
    made again from its blob. Each is replaced atomically, so that what breaks off goes on. *refused* is
    told of each that cannot be; *spared* are files that are none of the store's. Raises ``WriteFailed``
    (``no-space``) before anything is done if it does not fit and leave *reserve* bytes,
    ``MaintenanceRuns``, ``LedgerError``, ``OSError``.
    """
    told: set[str] = set()
    with alone(store):
        inodes, result = _Inodes(store), Detached()
        _check_room(store, inodes, spared, reserve)
        done = -1
        while result.detached + result.made > done:  # a folder that changes while it is read may miss names
            done, seen = max(0, result.detached + result.made), 0
            for path, size, digest in _wanting(store, inodes, spared):
                seen += 1
                reason = _give_own(store, result, path, size, digest)
                if reason is not None and path not in told:
                    told.add(path)
                    refused(path, reason)
                if progress is not None and seen % 100 == 0:
                    progress(seen, result.bytes)
    result.names, result.refused = seen, len(told)
    result.own = seen - result.refused - result.detached - result.made
    return result


def _give_own(
    store: Store, result: Detached, path: str, size: int | NotAdopted | None, digest: Digest | None
) -> str | None:
    """Give one name bytes of its own; return the word for why not, ``None`` if it has them."""
    if size is None:
        return None
    try:
        if isinstance(size, NotAdopted):
            raise size
        store.blobs.give_own(path, digest)
    except StoreError as refusal:
        return refusal.reason
    result.detached += digest is None
    result.made += digest is not None
    result.bytes += size
    return None


def _check_room(store: Store, inodes: _Inodes, spared: Collection[Path], reserve: int) -> None:
    """Raise ``WriteFailed`` if the bytes that are to be written do not fit."""
    if store.blobs.can_clone():
        return
    need = sum(size for _, size, _ in _wanting(store, inodes, spared) if isinstance(size, int))
    disk = os.statvfs(store.blobs.root)
    free = disk.f_bavail * disk.f_frsize - reserve
    if need > free:
        msg = (
            f"the names need {need} bytes of their own, {max(0, free)} are free beside "
            f"STREAMING_MIN_FREE_BYTES={reserve}: nothing was done"
        )
        raise WriteFailed(msg, reason="no-space")


def _wanting(
    store: Store, inodes: _Inodes, spared: Collection[Path]
) -> Iterator[tuple[str, int | NotAdopted | None, Digest | None]]:
    """Give each name with how many bytes it has to get, ``None`` for none, and the blob of one to make."""
    for path in names(store, spared):
        try:
            yield path, store.blobs.shared(path, inodes), None
        except NotAdopted as refusal:
            yield path, refusal, None
    after = 0
    while rows := store.ledger.names(after).result():
        after = rows[-1].job_id
        for row in rows:
            if row.path == store.blobs.relative(Digest.parse(row.digest)):
                yield row.path, NotAdopted(row.path, "no-name"), None
            elif not store.blobs.is_taken(row.path):
                yield row.path, row.size, Digest.parse(row.digest)
