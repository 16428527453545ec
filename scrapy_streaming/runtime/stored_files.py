"""Files that are stored: published, confirmed, named.

What may live here: what follows, in this crawl, of what the blob store found: what is counted, logged and
recorded. The blob store decides whether bytes are right.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import IntegrityError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Lease, RecordedName, StoredRepresentation
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.jobs import Jobs
from scrapy_streaming.runtime.ledger_calls import LedgerCalls, log_not_recorded
from scrapy_streaming.runtime.open_parts import OpenParts
from scrapy_streaming.runtime.room import Room
from scrapy_streaming.runtime.stats import Stats
from scrapy_streaming.runtime.threads import Threads
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.blobs import Inspection, Named, Published, Tampered
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class StoredFiles:
    """Publishes, confirms and names the files of a crawl. *offline*: no server may be asked."""

    def __init__(
        self,
        storage: Storage,
        calls: LedgerCalls,
        threads: Threads,
        room: Room,
        stats: Stats,
        *,
        offline: bool,
    ) -> None:
        self._storage = storage
        self._blobs = storage.blobs
        self._calls = calls
        self._threads = threads
        self._room = room
        self._stats = stats
        self._offline = offline

    # -- publishing ------------------------------------------------------------------------

    async def publish(self, part: CompletePart, expected: Digest | None) -> Published:
        """Return the published blob; the part's bytes are checked against *expected* first.

        Raises ``IntegrityError`` (the part goes to quarantine) or ``WriteFailed``.
        """
        started = time.monotonic()
        published = await self._room.run(self._check_and_publish, part, expected)
        self._stats.time(started)
        self._count_published(published, part)
        return published

    async def publish_checked(self, part: CompletePart) -> Published:
        """Return the published blob of a part whose bytes need no check; raise ``WriteFailed``."""
        published = await self._room.run(self._blobs.publish, part)
        self._count_published(published, part)
        return published

    async def republish(self, part: CompletePart) -> None:
        """Publish a blob again that ``gc`` was just collecting."""
        await self._room.run(self._blobs.publish, part)

    async def quarantine(self, part: CompletePart) -> None:
        """Set a part aside whose bytes are wrong."""
        await self._threads.run(self._blobs.quarantine, part)

    def _check_and_publish(self, part: CompletePart, expected: Digest | None) -> Published:
        wrong = broken_promise(part, expected)
        if wrong is not None:
            self._blobs.quarantine(part)
            msg = f"{part.state.url}: the bytes hash to {part.digest}, expected was {wrong}"
            raise IntegrityError(msg)
        return self._blobs.publish(part)

    def _count_published(self, published: Published, part: CompletePart) -> None:
        """Count a blob that is new, or the bytes that needed no second place."""
        self._stats.count("deduplicated" if published.deduplicated else "blobs_published")
        self._stats.count("bytes_saved", part.length if published.deduplicated else 0)

    # -- what is stored --------------------------------------------------------------------

    async def confirm(self, stored: StoredRepresentation) -> StoredRepresentation | None:
        """Return *stored*, its stamp that of the blob now; ``None`` if its bytes are not there (R44, R77)."""
        found = await self._threads.run(self._blobs.inspect, stored)
        if found.stamp is None:
            await self._set_aside(stored, found)
            return None
        self._count_inspection(found, stored)
        self.record_stamp(stored, found.stamp)
        return replace(stored, stamp=found.stamp)

    async def name_recorded(self, completion: Completion, path: str, *, ask: bool = False) -> str | None:
        """Return the name of recorded bytes, made anew if need be; ``None`` if they are not there (R77).

        Also, with *ask*, if other bytes have the name: they may be newer, so the server is asked.
        """
        stored = completion.known
        found, named = await self._threads.run(
            self._inspect_and_name, stored, path, ask=ask and not self._offline
        )
        if named is None:
            await self._set_aside(stored, found)
            return None
        self._count_inspection(found, stored)
        now = self.with_name(stored, named)
        self.record_stamp(stored, named.stamp)
        if named.own_stamp is not None and now.name is not None and now.name != stored.name:
            self._storage.jobs.note_name(completion, now.name).add_done_callback(log_not_recorded)
        return named.path

    def with_name(self, stored: StoredRepresentation, named: Named) -> StoredRepresentation:
        """Return *stored* with its name and its stamp as they are now; report what had become of the name."""
        self._count_hashed(named.hashed)
        if named.tampered is not None:
            self._report_tampered(named.tampered, named.path, named.kept, "made again from its blob")
        return replace(stored, stamp=named.stamp, name=RecordedName(named.path, named.own_stamp))

    def record_stamp(self, stored: StoredRepresentation, stamp: bytes | None) -> None:
        """Record the stamp of a blob if it is another than before; no caller waits for it."""
        if stamp is not None and stamp != stored.stamp:
            self._storage.jobs.note_blob(stored.digest, stamp).add_done_callback(log_not_recorded)

    def _inspect_and_name(
        self, stored: StoredRepresentation, path: str, *, ask: bool
    ) -> tuple[Inspection, Named | None]:
        digest, blobs = Digest.parse(stored.digest), self._blobs
        found = blobs.inspect(stored)
        if found.stamp is None or (ask and blobs.was_replaced(stored, path)):
            return found, None
        return found, blobs.name(digest, path, stamp=found.stamp, recorded=stored.name)

    async def _set_aside(self, stored: StoredRepresentation, found: Inspection) -> None:
        """Have bytes fetched again that are gone or changed, and set them aside.

        Of several workers the one that marks the blob reports it.
        """
        self._count_hashed(found.hashed)
        if found.tampered is None:
            return
        if found.tampered.of_name:
            kept = await self._threads.run(self._blobs.keep_replaced, stored)
            path = stored.digest if stored.name is None else stored.name.path
            self._report_tampered(found.tampered, path, kept, f"fetched again: {stored.final_url}")
            return
        bad = found.tampered is Tampered.BAD_BLOB
        state = BlobState.QUARANTINED if bad else BlobState.MISSING
        marked = await self._calls.result(
            self._storage.jobs.set_blob_state(stored.digest, state, [BlobState.PRESENT])
        )
        if found.found is not None:  # if another worker's blob stands there by now, it keeps the bad bytes
            await self._threads.run(self._blobs.set_aside, found.found)
        if marked:
            self._stats.count(f"tampered/{found.tampered}")
            where = self._blobs.quarantine_location
            what = f"was changed from outside, its bytes are kept in {where}" if bad else "is gone"
            place = self._blobs.describe(Digest.parse(stored.digest))
            logger.warning("%s: %s %s; fetched again: %s", found.tampered, place, what, stored.final_url)

    def _report_tampered(self, tampered: Tampered, path: str, kept: str | None, then: str) -> None:
        """Count and log what had become of a name, and what follows."""
        self._stats.count(f"tampered/{tampered}")
        what = "was gone" if tampered is Tampered.NAME_MISSING else "was changed from outside"
        aside = f", its bytes are kept as {kept}" if kept is not None else ""
        logger.warning("%s: %s %s%s; %s", tampered, path, what, aside, then)

    def _count_inspection(self, found: Inspection, stored: StoredRepresentation) -> None:
        """Count what it took to know that bytes are right."""
        self._count_hashed(found.hashed)
        if not found.restored:
            return
        path = self._blobs.describe(Digest.parse(stored.digest))
        if stored.stamp is None:  # there never was one: publishing by content was switched off
            logger.info("%s is made of the file that has its name", path)
        else:
            self._stats.count(f"tampered/{Tampered.BLOB_MISSING}")
            logger.warning("%s: %s is gone; made again from its name", Tampered.BLOB_MISSING, path)

    def _count_hashed(self, hashed: bool) -> None:
        """Count a file that was read because its stamp did not decide."""
        if hashed:
            self._stats.count("files_hashed")


class Publication:
    """The end of a download: its blob named and recorded under its lease, then its parts discarded."""

    def __init__(
        self, storage: Storage, files: StoredFiles, jobs: Jobs, parts: OpenParts, room: Room, threads: Threads
    ) -> None:
        self._storage = storage
        self._files = files
        self._jobs = jobs
        self._parts = parts
        self._room = room
        self._threads = threads

    async def complete(
        self,
        lease: Lease,
        stored: StoredRepresentation,
        resumed_from: int,
        *,
        path: str | None = None,
        by_response: bool = False,
        part: CompletePart | None = None,
    ) -> Completion:
        """Return the completion, as ``Jobs.complete`` does; *part* is what the blob was made of."""
        republish: Any = None if part is None else partial(self._files.republish, part)
        return await self._jobs.complete(
            lease, stored, resumed_from, path=path, by_response=by_response, republish=republish
        )

    async def name(
        self, lease: Lease, stored: StoredRepresentation, path: str, part: CompletePart | None
    ) -> Named:
        """Make the name of a blob; *part* is what it was made of, if that was received now.

        Raises ``LeaseLost``: the name may be that of a newer representation by now.
        """
        while True:
            await self._jobs.renewals.ensure(lease)
            named = await self._room.run(self._name, lease, stored, path, part)
            if named is not None:
                return named

    def _name(
        self, lease: Lease, stored: StoredRepresentation, path: str, part: CompletePart | None
    ) -> Named | None:
        """Make the name; ``None`` if the lease has to be renewed first."""
        if not self._jobs.leases.is_valid(lease):
            return None
        stamp = stored.stamp if part is None else part.stamp
        digest = Digest.parse(stored.digest)
        return self._storage.blobs.name(digest, path, stamp=stamp, recorded=stored.name, part=part)

    async def discard_parts(
        self, context: DownloadContext, stored: StoredRepresentation | None = None
    ) -> None:
        """Remove the job's parts, as far as they are not a later claim's.

        A blob that was linked from one, *stored*, has another time of change then: that is recorded.
        """
        await self._parts.close(context.key)
        fence = context.lease.fence
        if not self._storage.parts.may_have(context.key, fence):
            return
        stamp = await self._threads.run(self._discard, context.key, fence, stored)
        if stored is not None:
            self._files.record_stamp(stored, stamp)

    def _discard(self, key: str, fence: int, stored: StoredRepresentation | None) -> bytes | None:
        self._storage.parts.discard(key, fence)
        if stored is None or stored.stamp is None:
            return None
        return self._storage.blobs.renew_stamp(Digest.parse(stored.digest), stored.stamp)
