"""Leaving this package: every name gets bytes of its own, so that blobs and state may be deleted.

What may live here: which names need bytes of their own, and whether those fit on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from scrapy_streaming.exceptions import NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.filesystems import free_bytes
from scrapy_streaming.storage.maintenance.arriving import Refused
from scrapy_streaming.storage.maintenance.common import Progress, Store, alone


@dataclass
class Detached:
    """What ``detach`` did: ``names`` examined, and the ``bytes`` that were written.

    ``detached`` shared their bytes with a blob, ``made`` were recorded and missing, ``own`` had bytes of
    their own; ``refused`` still need their blob.
    """

    names: int = 0
    bytes: int = 0
    detached: int = 0
    made: int = 0
    own: int = 0
    refused: int = 0


def detach(
    store: Store,
    *,
    refused: Refused,
    spared: Collection[Path] = (),
    reserve: int = 0,
    progress: Progress | None = None,
) -> Detached:
    """Give every name of the store bytes of its own; return what was done. No crawl may run.

    The names are those in the store and those in the ledger: one that is missing is made again from its
    blob. Each is replaced atomically, so that an interrupted run can be continued. *refused* is called with
    each that cannot be replaced and the reason; *spared* are files that do not belong to the store. Raises
    ``WriteFailed`` (``no-space``) before anything is done if the bytes do not fit with *reserve* bytes left
    free, ``MaintenanceRuns``, ``LedgerError``, ``OSError``.
    """
    reported: set[str] = set()
    with alone(store):
        size_of, result = store.blobs.shared_sizes(), Detached()
        _check_room(store, size_of, spared, reserve)
        done = -1
        while result.detached + result.made > done:  # a folder that changes while it is read may miss names
            done, seen = max(0, result.detached + result.made), 0
            for path, size, digest in _wanting(store, size_of, spared):
                seen += 1
                reason = _give_own(store, result, path, size, digest)
                if reason is not None and path not in reported:
                    reported.add(path)
                    refused(path, reason)
                if progress is not None and seen % 100 == 0:
                    progress(seen, result.bytes)
    result.names, result.refused = seen, len(reported)
    result.own = seen - result.refused - result.detached - result.made
    return result


def _give_own(
    store: Store, result: Detached, path: str, size: int | NotAdopted | None, digest: Digest | None
) -> str | None:
    """Give one name bytes of its own; return the reason if that fails, else ``None``."""
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


def _check_room(
    store: Store, size_of: Callable[[str], int | None], spared: Collection[Path], reserve: int
) -> None:
    """Raise ``WriteFailed`` if the bytes that will be written do not fit."""
    if store.blobs.can_clone():
        return
    need = sum(size for _, size, _ in _wanting(store, size_of, spared) if isinstance(size, int))
    free = min((free_bytes(folder) for folder in store.blobs.folders), default=need + reserve) - reserve
    if need > free:
        msg = (
            f"the names need {need} bytes of their own, {max(0, free)} are free beside "
            f"STREAMING_MIN_FREE_BYTES={reserve}: nothing was done"
        )
        raise WriteFailed(msg, reason="no-space")


def _wanting(
    store: Store, size_of: Callable[[str], int | None], spared: Collection[Path]
) -> Iterator[tuple[str, int | NotAdopted | None, Digest | None]]:
    """Yield each name, how many bytes it needs (``None``: it has its own), and the blob of a missing one.

    In place of the number there is ``NotAdopted`` for a name that cannot be replaced.
    """
    for path in store.blobs.names(spared):
        try:
            yield path, size_of(path), None
        except NotAdopted as refusal:
            yield path, refusal, None
    after = 0
    while rows := store.ledger.names(after).result():
        after = rows[-1].job_id
        for row in rows:
            if row.path == blob_key(Digest.parse(row.digest)):
                yield row.path, NotAdopted(row.path, "no-name"), None
            elif not store.blobs.is_taken(row.path):
                yield row.path, row.size, Digest.parse(row.digest)
