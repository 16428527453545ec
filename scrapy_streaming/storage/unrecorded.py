"""Jobs without a ledger, in memory: those that one process has claimed, and those it completed last.

Used instead of the ledger while it is switched off or SQLAlchemy is not installed. Nothing outlives the
process, and workers do not see each other's jobs: locks protect parts, atomic renames protect files.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Final, TypeVar

from scrapy_streaming.exceptions import KeyConflict
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Done,
    Granted,
    Held,
    Lease,
    NotedFile,
    RecordedName,
    StoredRepresentation,
    is_recent,
)
from scrapy_streaming.storage.job_request import JobRequest

T = TypeVar("T")

#: Completions that are kept: a claim for an older one finds its file under its name.
REMEMBERED: Final = 10_000


class Unrecorded:
    """Has the verbs of ``Jobs`` that a download needs, each answered at once.

    A lease has no end. *fence_of* gives the highest fence of a job's parts, those of earlier crawls
    included: a claim has that fence.
    """

    def __init__(self, worker_id: str, fence_of: Callable[[str], int]) -> None:
        self._worker_id = worker_id
        self._fence_of = fence_of
        self._held: dict[str, tuple[JobRequest, Lease]] = {}
        self._done: OrderedDict[str, tuple[JobRequest, Completion]] = OrderedDict()

    def claim(
        self, key: str, request: JobRequest, *, refresh_before: float | None = None, **_: object
    ) -> Future[Claim]:
        """Give ``Granted``, or ``Held`` or ``Done`` by this process.

        The future raises ``KeyConflict`` if the key is taken by another request (I18).
        """
        asked = [of[key][0] for of in (self._held, self._done) if key in of]
        for other in asked:
            if other.request_hash != request.request_hash:
                msg = f"job {key} is taken by another request for {other.url}: it needs its own artifact id"
                return _raises(KeyConflict(msg))
        if key in self._held:
            return _gives(Held(self._worker_id, math.inf))
        known = None
        if key in self._done:
            completion = self._done[key][1]
            if is_recent(completion.completed_at, refresh_before, time.time()):
                return _gives(Done(completion))
            known = completion.known
        lease = Lease(0, key, self._fence_of(key), secrets.token_hex(16), math.inf, 1)
        self._held[key] = (request, lease)
        return _gives(Granted(lease, known))

    def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        *,
        path: str | None = None,
        by_response: bool = False,
        **_: object,
    ) -> Future[Completion]:
        """Give the completion; it is dropped after ``REMEMBERED`` others, or when the process ends."""
        request = self._end(lease)
        name = None if path is None else RecordedName(path, None if known.name is None else known.name.stamp)
        known, at = replace(known, fetched_at=time.time(), name=name), time.time()
        completion = Completion(lease.claim_id, known, at, path=path, by_response=by_response)
        if request is not None:
            self._done[lease.job_key] = (request, completion)
            if len(self._done) > REMEMBERED:
                self._done.popitem(last=False)
        return _gives(completion)

    def release(self, lease: Lease) -> Future[None]:
        """Give the job back."""
        self._end(lease)
        return _gives(None)

    def fail(self, lease: Lease, *_: object, **__: object) -> Future[None]:
        """Give the job back; the next claim tries again."""
        self._end(lease)
        return _gives(None)

    def _end(self, lease: Lease) -> JobRequest | None:
        request, held = self._held.get(lease.job_key, (None, None))
        if held != lease:
            return None
        del self._held[lease.job_key]
        return request

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Give those of *keys* that are not claimed."""
        return _gives(frozenset(keys) - self._held.keys())

    def adoptable(self, _digest: str, _path: str) -> Future[bool]:
        """Give true: no record says which job a file belongs to."""
        return _gives(True)

    def noted_files(self, _paths: Collection[str]) -> Future[dict[str, NotedFile]]:
        """Give nothing: no file was noted."""
        return _gives({})

    def set_blob_state(self, _digest: str, _to: str, _origins: Collection[str]) -> Future[bool]:
        """Give true: no other worker can have changed the state before."""
        return _gives(True)

    def begin_work(self, _lease: Lease, **_: object) -> Future[None]:
        """Note nothing: no attempts are counted."""
        return _gives(None)

    def delivered(self, _completions: Collection[Completion]) -> Future[None]:
        """Note nothing."""
        return _gives(None)

    def note_blob(self, _digest: str, _stamp: bytes) -> Future[None]:
        """Note nothing."""
        return _gives(None)

    def note_name(self, _completion: Completion, _name: object) -> Future[None]:
        """Note nothing."""
        return _gives(None)

    def close(self) -> None:
        """Do nothing."""


def _gives(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _raises(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
