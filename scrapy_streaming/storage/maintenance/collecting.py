"""Removing what nothing refers to, while crawls run (F26, I15).

What may live here: what is removed, and when. Parts, blobs and others know and remove their own files.

Three things protect a blob that a crawl is about to use:

- Only blobs older than the grace time are removed. While other workers run that is at least an hour,
  and no worker takes that long from publishing a blob to recording it.
- A publisher that verifies an existing blob changes its time of access, and then checks that the blob
  is still there; ``gc`` moves a blob to the trash, and then checks that time
  (``BlobStore.move_to_trash``).
- A claim that was offered a stored representation may use its blob without touching it. It cannot
  complete once the blob is marked ``deleting``, and no blob is marked while such a claim is current.

So the steps are: mark in the ledger what nothing refers to, move it to the trash, record it as missing,
delete it. If the process is killed in between, the next run restores what was recorded meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.storage import identity, workers
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.blobs import FoundBlob, Presence
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.leftovers import Leftover
from scrapy_streaming.storage.maintenance.common import (
    MaintenanceRuns,
    Progress,
    Store,
    alone,
    batches,
    own_directory,
)
from scrapy_streaming.storage.maintenance.inspection import Rebuilt, read_unknown
from scrapy_streaming.storage.parts import PartFiles

#: Seconds after which a published blob is recorded, or its worker has ended: no ledger is waited for longer.
SETTLING: Final = 3600.0
#: Parts of failed and dead jobs are kept so many times as long: a crawl may resume them.
FAILED_TIMES: Final = 7.0
#: Seconds of grace by default.
GRACE: Final = 86400.0
#: Parts that are locked, and whose jobs are read, together.
PARTS_AT_ONCE: Final = 64


#: Called with the kind, location and size in bytes of each thing that is, or would be, removed.
OnRemoved = Callable[[str, str, int], None]


def _silent(kind: str, location: str, size: int) -> None:
    """Do nothing."""


@dataclass
class Collected:
    """What ``collect`` removed, or would remove: ``counts`` and ``sizes`` (bytes) by kind.

    Kinds: ``parts``, ``temporary``, ``orphans``, ``superseded``, ``trash``. ``grace``: the grace time
    used, in seconds. ``restored``: blobs in use that a killed ``gc`` had moved to the trash.
    ``removed`` is called with each thing.
    """

    grace: float
    dry_run: bool = False
    restored: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    removed: OnRemoved = _silent

    @property
    def bytes(self) -> int:
        """The bytes of all kinds together."""
        return sum(self.sizes.values())

    def add(self, kind: str, location: str, size: int) -> None:
        """Count one thing."""
        self.removed(kind, location, size)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.sizes[kind] = self.sizes.get(kind, 0) + size


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What ``reconcile`` did: parts and temporary files removed, blobs restored, events removed.

    ``read``: what was recorded of a store whose ledger is an older copy, ``None`` if nothing had to be.
    """

    parts: int = 0
    temporary: int = 0
    restored: int = 0
    events: int = 0
    read: Rebuilt | None = None


def collect(
    store: Store,
    *,
    grace: float = GRACE,
    superseded: bool = False,
    dry_run: bool = False,
    removed: OnRemoved = _silent,
    progress: Progress | None = None,
) -> Collected:
    """Remove what nothing refers to and is older than *grace* seconds; return what that was.

    These are parts of jobs that are done, not recorded or failed long ago, temporary files of killed
    processes, blobs that were published and never recorded, and with *superseded* blobs that only old
    generations of jobs name. *grace* is at least ``SETTLING`` while other workers run. With *dry_run*
    nothing is changed. Raises ``MaintenanceRuns``, ``StoreError``, ``LedgerError`` (``ledger-put-back``,
    ``ledger-behind`` until the store has been read), ``WriteFailed``, ``OSError``.
    """
    with alone(store) as now:
        store.refuse_unknown()
        # a worker that starts after this publishes files that are younger than `now`
        others = workers.running_workers(own_directory(store) / "workers", store.worker_id)
        result = Collected(max(grace, SETTLING) if others else grace, dry_run, removed=removed)
        round_ = _Round(store, now, result, progress)
        round_.empty_trash()
        round_.sweep_parts(failed=True)
        round_.sweep_leftovers()
        linked = round_.sweep_store()
        round_.sweep_orphans(linked)
        if superseded:
            round_.sweep_superseded(linked)
        return result


def reconcile(
    store: Store, *, history_seconds: float, grace: float = GRACE, stop: threading.Event | None = None
) -> Reconciled:
    """Clean up at the start of a crawl: parts, temporary files, what a killed ``gc`` left, old events.

    *history_seconds*: the age above which events are removed. If the ledger is an older copy, blobs that it
    does not have are read and recorded until *stop* is set, and no part is removed. Does nothing while
    other maintenance runs. Raises ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    try:
        with alone(store) as now:
            result = Collected(max(grace, SETTLING))
            round_ = _Round(store, now, result, None)
            round_.empty_trash(remove=False)
            older = store.ledger.standing().result().unread
            read = read_unknown(store, stop or threading.Event()) if older else None
            if not older:
                round_.sweep_parts(failed=False)
            round_.sweep_leftovers()
            events = 0
            while trimmed := store.ledger.trim_events(history_seconds).result():
                events += trimmed
    except MaintenanceRuns:
        return Reconciled()
    counts = result.counts
    parts, temporary = counts.get("parts", 0), counts.get("temporary", 0)
    return Reconciled(parts, temporary, result.restored, events, read)


class _Round:
    """One run over the store, which may remove what is older than ``result.grace`` seconds before *now*."""

    def __init__(self, store: Store, now: float, result: Collected, progress: Progress | None) -> None:
        self._store = store
        self._now = now
        self._result = result
        self._progress = progress
        self._seen = [0, 0]

    def _is_old(self, changed_at: float, times: float = 1.0) -> bool:
        return changed_at < self._now - times * self._result.grace

    # -- parts and leftovers -----------------------------------------------------------------

    def sweep_parts(self, *, failed: bool) -> None:
        """Remove parts of jobs that are done or not recorded, with *failed* also of those failed long ago."""
        old = (part for part in self._store.parts.files() if self._is_old(part.changed_at))
        for some in batches(old, PARTS_AT_ONCE):
            with ExitStack() as locks:
                locked = [part for part in some if self._store.parts.lock(part.name, locks)]
                states = self._store.ledger.states_of({part.name.key for part in locked}).result()
                for part in locked:
                    state = states.get(part.name.key)
                    ended = failed and state in (JobState.FAILED, JobState.DEAD)
                    if state in (None, JobState.DONE) or (
                        ended and self._is_old(part.changed_at, FAILED_TIMES)
                    ):
                        self._remove_part(part)

    def _remove_part(self, part: PartFiles) -> None:
        size = self._store.parts.freed_by(part.name)
        if not self._result.dry_run:
            self._store.parts.remove(part.name)
        self._result.add("parts", str(part.path), size)

    def sweep_leftovers(self) -> None:
        """Remove what killed processes left beside parts, workers' files and the store's identity."""
        own = own_directory(self._store)
        for leftovers in (
            self._store.parts.leftovers(),
            workers.leftovers(own / "workers"),
            identity.leftovers(own),
        ):
            for leftover in leftovers:
                # a worker that is starting is not among the others yet, so its files stay whatever the grace
                if leftover.changed_at < self._now - SETTLING:
                    self._remove_leftover(leftover)

    def sweep_store(self) -> frozenset[str]:
        """Remove what killed processes left among blobs and names; return what links lead to (hex)."""
        found = self._store.blobs.survey()
        for leftover in found.leftovers:
            self._remove_leftover(leftover)
        return found.linked

    def _remove_leftover(self, leftover: Leftover) -> None:
        if self._is_old(leftover.changed_at) and (self._result.dry_run or leftover.remove()):
            self._result.add("temporary", str(leftover.location), leftover.size)

    # -- blobs -------------------------------------------------------------------------------

    def sweep_orphans(self, linked: frozenset[str]) -> None:
        """Remove blobs that were published and never recorded."""
        for some in batches(self._candidates(linked)):
            found = {str(blob.digest): blob for blob in some}
            ledger = self._store.ledger
            gone = ledger.orphans(found).result()
            if gone and not self._result.dry_run:
                gone = ledger.mark_orphans_deleting({digest: found[digest].size for digest in gone}).result()
            self._remove("orphans", {digest: found[digest] for digest in gone})

    def _candidates(self, linked: frozenset[str]) -> Iterator[FoundBlob]:
        for blob in self._store.blobs.blobs():
            self._seen[0] += 1
            self._seen[1] += blob.size
            if self._progress is not None and self._seen[0] % 1000 == 0:
                self._progress(*self._seen)
            if self._is_unused(blob, linked):
                yield blob

    def _is_unused(self, blob: FoundBlob, linked: frozenset[str]) -> bool:
        return self._is_old(blob.changed_at) and not blob.shared and blob.digest.hex not in linked

    def sweep_superseded(self, linked: frozenset[str]) -> None:
        """Remove blobs that only old generations of jobs name."""
        ledger, age, after = self._store.ledger, self._result.grace, None
        while page := ledger.superseded(age, after=after).result():
            after = page[-1][0]
            blobs = filter(None, (self._store.blobs.find(Digest.parse(digest)) for digest, _ in page))
            for some in batches(blob for blob in blobs if self._is_unused(blob, linked)):
                found = {str(blob.digest): blob for blob in some}
                gone = frozenset(found)
                if not self._result.dry_run:
                    gone = ledger.mark_superseded_deleting(gone, age).result()
                self._remove("superseded", {digest: found[digest] for digest in gone})

    def _remove(self, kind: str, marked: dict[str, FoundBlob]) -> None:
        """Move marked blobs to the trash; delete those that were not recorded meanwhile."""
        if self._result.dry_run:
            for blob in marked.values():
                self._result.add(kind, blob.location, blob.size)
            return
        if not marked:
            return
        failpoint("gc-marked")
        blobs = self._store.blobs
        trashed = [digest for digest, blob in marked.items() if blobs.move_to_trash(blob)]
        failpoint("gc-trashed")
        deleted = self._store.ledger.finish_deletion(marked).result()
        failpoint("gc-recorded")
        for digest in trashed:
            blob = marked[digest]
            if digest in deleted:
                blobs.delete_trashed(blob.digest)
                self._result.add(kind, blob.location, blob.size)
            else:
                blobs.restore_trashed(blob.digest)
                self._result.restored += 1

    # -- the trash ---------------------------------------------------------------------------

    def empty_trash(self, *, remove: bool = True) -> None:
        """Restore blobs in use that a killed ``gc`` moved to the trash; *remove* the rest if old."""
        if not self._result.dry_run:
            # no other gc runs: the process that marked these has ended
            self._store.ledger.finish_deletion(None).result()
        blobs = self._store.blobs
        for some in batches(blobs.trashed()):
            rows = self._store.ledger.blobs_of({str(blob.digest) for blob in some}).result()
            for blob in some:
                row = rows.get(str(blob.digest))
                recorded = row is not None and row.state == BlobState.PRESENT
                if recorded and blobs.presence(blob.digest) is Presence.NOTHING:
                    if not self._result.dry_run:
                        blobs.restore_trashed(blob.digest)
                    self._result.restored += 1
                elif remove and self._is_old(blob.changed_at):
                    self._delete_trashed(blob)

    def _delete_trashed(self, blob: FoundBlob) -> None:
        if self._result.dry_run or self._store.blobs.delete_trashed(blob.digest):
            self._result.add("trash", blob.location, blob.size)
