"""Files that need no request: what the ledger recorded, and what another program stored under the name.

What may live here: the pipeline's way from a claim to a result without a download.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from scrapy_streaming.failures import FileRefused
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Claim, Completion, Dead, Granted, Held, Waiting
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.results import adopt_fresh, adopted_representation, may_adopt
from scrapy_streaming.runtime.crawl import Runtime
from scrapy_streaming.storage.job_request import JobRequest

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Why a file is refused whose bytes another worker stored, and which were taken away or changed since.
BLOB_GONE = f"{Reason.BLOB_MISSING}: of what another worker stored"


class FileName(NamedTuple):
    """The name of a file below the store's root; ``by_response``: without the response it is another.

    ``given`` is what ``file_path()`` gave for it: ``/a//b.pdf`` or a ``PurePath`` for ``a/b.pdf``.
    """

    path: str
    by_response: bool
    given: Any

    def shown(self, path: str) -> Any:
        """Return what a result entry shows for the name that was made: as ``file_path()`` gave it."""
        return self.given if path == self.path else path


def recorded_name(completion: Completion | None) -> FileName | None:
    """Return the recorded name if the response made it, which is not at hand any more (C7)."""
    if completion is None or not completion.by_response or completion.path is None:
        return None
    return FileName(completion.path, True, completion.path)


class RecordedFiles:
    """Gives the results of files that are stored already.

    *expires* gives ``FILES_EXPIRES`` in days: a subclass of the pipeline may set its own at any time.
    """

    def __init__(self, runtime: Runtime, expires: Callable[[], float]) -> None:
        self._runtime = runtime
        self._blobs = runtime.storage.blobs
        self._expires = expires

    @property
    def refresh_before(self) -> float | None:
        """Since when bytes must be stored to be fresh; see ``RequestJobs.refresh_before``."""
        return self._runtime.requests.refresh_before(self._expires())

    async def replay(self, completion: Completion, wanted: FileName, *, ask: bool = False) -> str | None:
        """Return the name of what the ledger recorded, made anew if need be; ``None`` without its blob.

        Also, with *ask*, if another file has the name by now.
        """
        named = await self._runtime.files.name_recorded(completion, wanted.path, ask=ask)
        if named is not None:
            self._runtime.stats.count("bytes_saved", completion.known.size)
        return named

    async def adopt(
        self, granted: Granted, job: JobRequest, expected: Digest | None, name: Callable[[], FileName]
    ) -> tuple[Any, Completion] | None:
        """Return the shown name and the completion of a file that stands under the job's name (C6, C11).

        Another program stored it there. *name* gives the name, if it is needed.

        Hashed once, recorded, not fetched. So it is in a store that ``FilesPipeline`` filled, for another
        URL of the same name, after ``rebuild``, or with a ledger put back from a backup (I16). ``None``
        for what is not there or too old, and for a job that is not its URL's alone, whose name another
        job may have taken.
        """
        refresh_before = self.refresh_before
        has_part = granted.lease.job_key in self._runtime.storage.kept
        if not may_adopt(granted, job, has_part=has_part, refresh_before=refresh_before):
            return None
        wanted = name()
        path = wanted.path
        if not path or not self._blobs.is_taken(path):
            return None
        calls, jobs = self._runtime.calls, self._runtime.storage.jobs
        noted = await calls.result(jobs.noted_files([path]))
        found = await self._runtime.threads.run(
            adopt_fresh, self._blobs, path, noted.get(path), refresh_before
        )
        if found is None or expected not in (None, found.digest):
            return None
        if not await calls.result(jobs.adoptable(str(found.digest), path)):
            return None
        stored = adopted_representation(found, job.url)
        completion = await self._runtime.publication.complete(granted.lease, stored, 0, path=found.path)
        self._runtime.stats.count(f"decision/{Reason.ADOPTED}")
        self._runtime.stats.count("bytes_saved", found.size)
        return wanted.shown(found.path), completion


def granted_of(claim: Claim) -> Granted:
    """Return the grant, or raise ``FileRefused`` with the obstacle."""
    match claim:
        case Granted():
            return claim
        case Held(worker_id):
            reason = f"held: worker {worker_id} has the job (STREAMING_HELD=skip)"
            raise FileRefused(reason)
        case Waiting(error=error):
            reason = f"waiting: backing off after {error}"
            raise FileRefused(reason)
        case Dead(attempts, error):
            reason = f"dead: gave up after {attempts} attempts ({error}); requeue it to try again"
            raise FileRefused(reason)
        case _:
            msg = f"unexpected {claim!r}"
            raise TypeError(msg)
