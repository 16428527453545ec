"""A file of ``download`` in the store: used as it is, adopted, or published, named and recorded.

What may live here: what ``download`` does with whole bytes. Requests are in ``fetching``.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from scrapy_streaming.exceptions import BlobGoing
from scrapy_streaming.integration.claims import Claims
from scrapy_streaming.integration.fetching import FileRequest, Received
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Granted, Lease, RecordedName, StoredRepresentation
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.results import (
    adopt_fresh,
    adopted_representation,
    entry_of,
    is_unexpected,
    may_adopt,
)
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.complete_part import representation_of
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds between two tries to publish what ``gc`` is removing, and their number.
GOING_PAUSE, GOING_TRIES = 0.05, 600


class FileStorage:
    """One requested file in the store."""

    def __init__(self, file: FileRequest, storage: Storage, claims: Claims) -> None:
        self._file = file
        self._storage = storage
        self._claims = claims

    def replayed(self, completion: Completion) -> dict[str, Any] | None:
        """Return the entry of recorded bytes, naming them again if need be; ``None`` without them."""
        known, blobs = completion.known, self._storage.blobs
        if is_unexpected(self._file.expected, known):
            return None
        if blobs.was_replaced(known, self._file.path):  # by bytes that may be newer: the server is asked
            return None
        present = self.present(known)
        if present is None:
            return None
        named = blobs.name(
            Digest.parse(known.digest), self._file.path, stamp=present.stamp, recorded=known.name
        )
        if named.own_stamp is not None:
            self._storage.jobs.note_name(completion, RecordedName(named.path, named.own_stamp))
        return self._entry(completion, named.path, "uptodate", Reason.STORED)

    def present(self, known: StoredRepresentation) -> StoredRepresentation | None:
        """Return *known* with the stamp of its blob; ``None`` if its bytes are not there (R44, R77)."""
        inspected = self._storage.blobs.inspect(known)
        if inspected.tampered is not None:
            state = BlobState.MISSING if inspected.found is None else BlobState.QUARANTINED
            self._storage.jobs.set_blob_state(known.digest, state, [BlobState.PRESENT]).result()
            if inspected.found is not None:
                self._storage.blobs.set_aside(inspected.found)
            logger.warning("%s: fetched again: %s", inspected.tampered, known.final_url)
        if inspected.stamp is None:
            return None
        if inspected.stamp != known.stamp:
            self._storage.jobs.note_blob(known.digest, inspected.stamp)
        return replace(known, stamp=inspected.stamp)

    def adopted(self, granted: Granted, refresh_before: float | None) -> dict[str, Any] | None:
        """Return the entry of a fresh file that no completion records (I16); ``None`` if there is none."""
        file, blobs, jobs = self._file, self._storage.blobs, self._storage.jobs
        has_part = file.key in self._storage.kept
        if not may_adopt(granted, file.job, has_part=has_part, refresh_before=refresh_before):
            return None
        if not blobs.is_taken(file.path):
            return None
        noted = jobs.noted_files([file.path]).result().get(file.path)
        found = adopt_fresh(blobs, file.path, noted, refresh_before)
        if found is None or file.expected not in (None, found.digest):
            return None
        if not jobs.adoptable(str(found.digest), file.path).result():
            return None
        known = adopted_representation(found, file.job.url)
        self._claims.end(granted.lease)
        completion = jobs.complete(granted.lease, known, path=file.path).result()
        return self._entry(completion, file.path, "uptodate", Reason.ADOPTED)

    def stored(self, granted: Granted, received: Received) -> dict[str, Any]:
        """Publish, name and record what was received; return its entry.

        Raises ``LeaseLost``: nothing was recorded.
        """
        blobs, part, lease = self._storage.blobs, received.part, granted.lease
        known, reason = self._published(granted, received)
        self._claims.assure(lease)
        digest = Digest.parse(known.digest)
        named = blobs.name(digest, self._file.path, stamp=known.stamp, recorded=known.name, part=part)
        known = replace(known, stamp=named.stamp, name=RecordedName(named.path, named.own_stamp))
        completion = self._complete(lease, known, received, named.path)
        self._storage.parts.discard(self._file.key, lease.fence)
        if known.stamp is not None:
            now = blobs.renew_stamp(digest, known.stamp)  # removing the part's link changed it
            if now is not None and now != known.stamp:
                self._storage.jobs.note_blob(known.digest, now)
        status = "uptodate" if part is None else "downloaded"
        return self._entry(completion, named.path, status, reason, received.resumed_from)

    def _published(self, granted: Granted, received: Received) -> tuple[StoredRepresentation, Reason]:
        """Return the representation, its bytes a blob, and the word of the decision."""
        part, previous, reason = received.part, granted.known, received.reason
        if part is None:
            assert received.known is not None
            known = received.known
        else:
            stamp = self._storage.blobs.publish(part).stamp
            known = replace(representation_of(part, self._file.expected), stamp=stamp)
        if previous is None or previous.digest != known.digest:
            return known, reason
        reason = reason if part is None else Reason.UNCHANGED_CONTENT
        return replace(known, name=previous.name), reason

    def _complete(
        self, lease: Lease, known: StoredRepresentation, received: Received, path: str
    ) -> Completion:
        """Return the recorded completion; publish again what ``gc`` is removing."""
        self._claims.end(lease)
        left = GOING_TRIES
        while True:
            left -= 1
            try:
                return self._storage.jobs.complete(
                    lease, known, resumed_from=received.resumed_from, path=path
                ).result()
            except BlobGoing:
                if received.part is None or not left:
                    raise
            time.sleep(GOING_PAUSE)
            self._storage.blobs.publish(received.part)

    def _entry(
        self, completion: Completion, path: str, status: str, reason: Reason, resumed_from: int = 0
    ) -> dict[str, Any]:
        return entry_of(
            completion, self._file.url, path, status=status, reason=reason, resumed_from=resumed_from
        )
