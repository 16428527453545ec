"""Jobs in memory, in place of the ledger while it is switched off or SQLAlchemy is not installed.

What may live here: the ledger's verbs that a download needs, for the jobs that this process has claimed or
completed. Nothing outlives the process, and workers do not see each other's jobs: locks protect parts,
atomic renames protect files.
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

#: Completions that are remembered; a later claim for a forgotten one finds its file by name.
REMEMBERED: Final = 10_000


class Unrecorded:
    """The verbs of ``Jobs`` that a download needs; each returns a future that is done.

    A lease never expires. *fence_of* returns the highest fence of a job's parts, also of earlier crawls,
    which becomes the fence of a claim.
    """

    def __init__(self, worker_id: str, fence_of: Callable[[str], int]) -> None:
        self._worker_id = worker_id
        self._fence_of = fence_of
        self._held: dict[str, tuple[JobRequest, Lease]] = {}
        self._done: OrderedDict[str, tuple[JobRequest, Completion]] = OrderedDict()

    def claim(
        self, key: str, request: JobRequest, *, refresh_before: float | None = None, **_: object
    ) -> Future[Claim]:
        """Return ``Granted``, or ``Held`` or ``Done`` if this process has or completed the job.

        The future raises ``KeyConflict`` if another request has the key (I18).
        """
        asked = [of[key][0] for of in (self._held, self._done) if key in of]
        for other in asked:
            if other.request_hash != request.request_hash:
                msg = f"job {key} belongs to another request for {other.url}; give this one an artifact id"
                return _failure(KeyConflict(msg))
        if key in self._held:
            return _answer(Held(self._worker_id, math.inf))
        known = None
        if key in self._done:
            completion = self._done[key][1]
            if is_recent(completion.completed_at, refresh_before, time.time()):
                return _answer(Done(completion))
            known = completion.known
        lease = Lease(0, key, self._fence_of(key), secrets.token_hex(16), math.inf, 1)
        self._held[key] = (request, lease)
        return _answer(Granted(lease, known))

    def complete(
        self,
        lease: Lease,
        known: StoredRepresentation,
        *,
        path: str | None = None,
        by_response: bool = False,
        **_: object,
    ) -> Future[Completion]:
        """Return the completion; it is forgotten after ``REMEMBERED`` others."""
        request = self._end(lease)
        name = None if path is None else RecordedName(path, None if known.name is None else known.name.stamp)
        known, at = replace(known, fetched_at=time.time(), name=name), time.time()
        completion = Completion(lease.claim_id, known, at, path=path, by_response=by_response)
        if request is not None:
            self._done[lease.job_key] = (request, completion)
            if len(self._done) > REMEMBERED:
                self._done.popitem(last=False)
        return _answer(completion)

    def release(self, lease: Lease) -> Future[None]:
        """Give the job back."""
        self._end(lease)
        return _answer(None)

    def fail(self, lease: Lease, *_: object, **__: object) -> Future[None]:
        """Give the job back: the next claim is granted."""
        self._end(lease)
        return _answer(None)

    def _end(self, lease: Lease) -> JobRequest | None:
        request, held = self._held.get(lease.job_key, (None, None))
        if held != lease:
            return None
        del self._held[lease.job_key]
        return request

    def free(self, keys: Collection[str]) -> Future[frozenset[str]]:
        """Return those of *keys* that are not claimed."""
        return _answer(frozenset(keys) - self._held.keys())

    def adoptable(self, _digest: str, _path: str) -> Future[bool]:
        """Return true: nothing is recorded that speaks against it."""
        return _answer(True)

    def noted_files(self, _paths: Collection[str]) -> Future[dict[str, NotedFile]]:
        """Return nothing: no file was noted."""
        return _answer({})

    def set_blob_state(self, _digest: str, _to: str, _origins: Collection[str]) -> Future[bool]:
        """Return true: no state is recorded that could differ."""
        return _answer(True)

    def begin_work(self, _lease: Lease, **_: object) -> Future[None]:
        """Record nothing: attempts are not counted."""
        return _answer(None)

    def delivered(self, _completions: Collection[Completion]) -> Future[None]:
        """Record nothing."""
        return _answer(None)

    def note_blob(self, _digest: str, _stamp: bytes) -> Future[None]:
        """Record nothing."""
        return _answer(None)

    def note_name(self, _completion: Completion, _name: object) -> Future[None]:
        """Record nothing."""
        return _answer(None)

    def close(self) -> None:
        """Do nothing."""


def _answer(value: T) -> Future[T]:
    """Return a future that is done, with *value*."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _failure(error: Exception) -> Future[Any]:
    """Return a future that raises *error*."""
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
