"""Download one file to a store without a crawler.

What may live here: the order of the steps. Claim, then plan, request, judge and receive until the
representation is whole, then publish, name, complete. After a break the next try starts from the bytes that
are kept.
"""

from __future__ import annotations

import logging
import math
import mimetypes
import os
import random
import time
from contextlib import closing
from dataclasses import replace
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlsplit

from w3lib.url import canonicalize_url, safe_url_string

from scrapy_streaming.exceptions import IntegrityError, LeaseLost, StreamingError, Undecodable
from scrapy_streaming.integration.arguments import (
    checked_callback,
    checked_digest,
    checked_name,
    checked_path,
)
from scrapy_streaming.integration.claims import Claims
from scrapy_streaming.integration.clients import client_of
from scrapy_streaming.integration.fetching import BadStatus, FileRequest, Received, Try, restarted
from scrapy_streaming.integration.planning import oldest_fresh
from scrapy_streaming.integration.publishing import decoded
from scrapy_streaming.integration.receiving import Progress
from scrapy_streaming.integration.storing import FileStorage
from scrapy_streaming.integration.switches import is_off, settings, why_no_streaming
from scrapy_streaming.protocol.attempts import Attempt
from scrapy_streaming.protocol.jobs import Done, Granted, Lease, StoredRepresentation, job_key, request_hash
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.redaction import clean_record, url_without_userinfo
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import broken_promise
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.store import Storage

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Seconds between two tries that added no byte: the first pause, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


def download(
    url: str,
    *,
    store: str | os.PathLike[str],
    client: Any = None,
    expected: Any = None,
    name: str | None = None,
    progress_callback: Progress | None = None,
) -> dict[str, Any] | None:
    """Download a file to *store*; return the entry that a crawl would put into ``item["files"]``.

    *store* is a folder, as ``FILES_STORE``; crawls may share it. *client* makes the requests: ``None`` for
    urllib, an ``httpx.Client`` or a ``requests.Session``, with its own credentials, proxies and timeouts.
    *expected* is the digest that the bytes must have (``sha256:<hex>``, hex, or ``{"sha256": hex}``), *name*
    a path below *store*, by default the one that ``FilesPipeline`` gives. *progress_callback* gets the bytes
    received so far and their total, or ``None``. A broken transfer is resumed, also after its process was
    killed; a stored file is revalidated by a conditional request when it is older than 90 days
    (``STREAMING_REVALIDATE``). If another worker holds the job, wait for its result (``STREAMING_HELD``).
    ``None`` if ``STREAMING_ENABLED`` or ``STREAMING_IO_ENABLED`` is off.

    Raises ``TypeError`` for a wrong argument; ``AnswerRefused`` (``bad-status-404`` …), ``RequestFailed``
    and ``BodyIncomplete`` when all tries failed, ``IntegrityError``, ``JobUnavailable``, ``StoreError``,
    ``LedgerError``, ``WriteFailed``.
    """
    root, checked = checked_path("store", store), _checked_url(url)
    digest, path = checked_digest(expected, checked), checked_name(name) or default_path(checked)
    requester, progress = client_of(client), checked_callback(progress_callback)
    if is_off(why_no_streaming("io")):
        return None
    loaded = settings(root)
    job = _job_of(checked, loaded.work_id or "")
    key = job_key(job.work_id, job.artifact_id, job.url)
    with closing(Storage.open(loaded)) as storage:
        path = storage.blobs.check_name(path)  # raises before anything is requested
        file = FileRequest(urldefrag(checked)[0], key, job, path, digest, requester, progress)
        renew = storage.ledger.renew if loaded.why_no_ledger is None else None
        with Claims(loaded.lease_seconds, renew, waits=loaded.held == "wait") as claims:
            return _Download(file, storage, loaded, claims).run()


def _job_of(url: str, work_id: str) -> JobRequest:
    canonical = canonicalize_url(url_without_userinfo(url))
    return JobRequest(work_id, "", canonical, request_hash("GET", canonical))


def _checked_url(url: Any) -> str:
    if not isinstance(url, str):
        msg = f"url must be str, got {type(url).__name__}"
        raise TypeError(msg)
    try:
        scheme, checked = urlsplit(url).scheme.lower(), str(safe_url_string(url))
    except ValueError as error:
        msg = f"url cannot be read: {error}: {url!r}"
        raise TypeError(msg) from error
    if scheme not in ("http", "https"):
        msg = f"url must be http://… or https://…, got {url!r}"
        raise TypeError(msg)
    return checked


def default_path(url: str) -> str:
    """Return the path below the store that ``FilesPipeline`` of Scrapy 2.19 gives to the file of *url*."""
    extension = Path(urlsplit(url).path).suffix
    if extension not in mimetypes.types_map:
        extension = Path(url).suffix  # "?file=a.pdf"
    if extension not in mimetypes.types_map:
        extension = ""
        kind = mimetypes.guess_type(url)[0]
        if kind:
            extension = mimetypes.guess_extension(kind) or ""
    return f"full/{sha1(url.encode(), usedforsecurity=False).hexdigest()}{extension}"


class _Download:
    """The download of one file, from its claim to its entry."""

    def __init__(
        self, file: FileRequest, storage: Storage, settings: StreamingSettings, claims: Claims
    ) -> None:
        self._file = file
        self._storage = storage
        self._settings = settings
        self._claims = claims
        self._stored = FileStorage(file, storage, claims)

    def run(self) -> dict[str, Any]:
        """Return the entry; claim the job again if its lease is lost."""
        refresh = oldest_fresh(self._settings)
        for left in reversed(range(self._settings.max_attempts)):
            claim = self._claim(refresh)
            if isinstance(claim, Done):
                entry = self._stored.replayed(claim.completion)
                if entry is not None:
                    return entry
                refresh = math.inf  # recorded, but the bytes are gone or not the expected ones
                continue
            try:
                return self._fetch_and_store(claim)
            except LeaseLost:
                if not left:
                    raise
                refresh = None  # the other worker's result is fresh enough
        msg = f"{self._file.url}: the job could not be claimed in {self._settings.max_attempts} tries"
        raise LeaseLost(msg)

    def _claim(self, refresh_before: float | None) -> Granted | Done:
        file, kept = self._file, self._storage.kept.get(self._file.key, 0)
        return self._claims.claim(
            lambda: self._storage.jobs.claim(file.key, file.job, refresh_before=refresh_before, kept=kept)
        )

    def _fetch_and_store(self, granted: Granted) -> dict[str, Any]:
        lease = granted.lease
        try:
            entry = self._stored.adopted(granted, oldest_fresh(self._settings))
            if entry is not None:
                return entry
            known = None if granted.known is None else self._stored.present(granted.known)
            return self._stored.stored(granted, self._received(lease, known))
        except LeaseLost:
            self._claims.end(lease)
            raise
        except StreamingError as error:
            self._fail(lease, error)
            raise
        except BaseException:  # reraised: also after Ctrl-C the job is free at once
            self._claims.end(lease)
            self._storage.jobs.release(lease)
            raise

    def _fail(self, lease: Lease, error: StreamingError) -> None:
        """Record that the job failed; log it if that cannot be recorded."""
        self._claims.end(lease)
        permanent = isinstance(error, BadStatus) and error.permanent
        wait = error.wait if isinstance(error, BadStatus) else None
        future = self._storage.jobs.fail(
            lease, error.reason, str(error), permanent=permanent, retry_after=wait
        )
        if (failed := future.exception()) is not None:
            logger.info("the failure of a job was not recorded: %s", failed)

    def _received(self, lease: Lease, known: StoredRepresentation | None) -> Received:
        """Return the whole representation, after as many tries as the settings allow."""
        attempt = Attempt()
        while True:
            if attempt.stuck:
                time.sleep(_pause(attempt.stuck))
            result = Try(self._file, self._storage, self._settings, self._claims, lease).run(attempt, known)
            if isinstance(result, Received):
                checked = self._checked(lease, result, attempt)
                if isinstance(checked, Received):
                    return checked
                result = checked
            attempt = result

    def _checked(self, lease: Lease, received: Received, attempt: Attempt) -> Received | Attempt:
        """Return the representation, decoded and verified; or the attempt for the next try (R34, R63)."""
        if received.part is None:
            if received.known is None or self._stored.present(received.known) is None:
                return self._restarted(attempt, Reason.BLOB_MISSING, Recovery.REFETCH_NO_CACHE)
            return received
        may_restart = received.resumed_from and attempt.restarts < self._settings.restarts
        parts, key = self._storage.parts, self._file.key
        try:
            part = decoded(
                received.part,
                self._file.expected,
                lambda coded: parts.decode(coded, key, lease.fence, self._settings.max_size),
            )
        except Undecodable:
            parts.discard(key, lease.fence)
            if not may_restart:
                raise
            return self._restarted(attempt, Reason.UNDECODABLE, Recovery.DISCARD)
        wrong = broken_promise(part, self._file.expected)
        if wrong is None:
            return replace(received, part=part)
        self._storage.blobs.quarantine(part)
        parts.discard(key, lease.fence)
        if may_restart:
            return self._restarted(attempt, Reason.DIGEST_MISMATCH, Recovery.DISCARD)
        msg = f"{part.state.url}: the bytes hash to {part.digest}, expected was {wrong}"
        raise IntegrityError(msg)

    def _restarted(self, attempt: Attempt, reason: Reason, then: Recovery) -> Attempt:
        return restarted(attempt, then, self._file.url, reason, limit=self._settings.restarts)


def _pause(stuck: int) -> float:
    """Return the pause in seconds after *stuck* tries in a row that added no byte: doubled, with jitter."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (stuck - 1))
    return longest / 2 + random.uniform(0, longest / 2)  # noqa: S311 - jitter is no secret
