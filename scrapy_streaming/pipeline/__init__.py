"""The item pipeline: claims, publishes, completes. A drop-in for ``FilesPipeline``.

What may live here: the hooks of ``FilesPipeline``, and the way of one file from its claim to its entry.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from itemadapter import ItemAdapter, is_item
from scrapy import Request, Spider
from scrapy.http import Response
from scrapy.pipelines.files import FilesPipeline
from scrapy.pipelines.media import FileInfo, MediaPipeline
from scrapy.utils.defer import deferred_from_coro, ensure_awaitable
from scrapy.utils.httpobj import urlparse_cached
from scrapy.utils.request import referer_str
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from scrapy_streaming.context import CONTEXT, DownloadContext, context_of
from scrapy_streaming.exceptions import LeaseLost, LedgerError, StoreError, UnusableId
from scrapy_streaming.failures import FileException, FileRefused, marked, reason_of, stopped
from scrapy_streaming.pipeline.around_hooks import AroundHooks, error_of
from scrapy_streaming.pipeline.files_store import AtomicFilesStore
from scrapy_streaming.pipeline.received_files import (
    answer_to,
    received_file,
    resulting_representation,
    written_by_hook,
)
from scrapy_streaming.pipeline.recorded_files import BLOB_GONE, FileName, granted_of, recorded_name
from scrapy_streaming.protocol.answers import AlreadyWhole, PassOn, Unchanged
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Done, StoredRepresentation
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.request_jobs import expected_of
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.results import entry_of, is_unexpected
from scrapy_streaming.runtime.lease_table import lease_lost
from scrapy_streaming.runtime.ledger_calls import DAMAGED_RECORD
from scrapy_streaming.runtime.shutdown import CrawlStopping
from scrapy_streaming.storage.job_request import Repeat

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class StoredFile(FileInfo):
    """The entry for ``item["files"]``: what ``FilesPipeline`` gives, and more.

    ``checksum`` is the SHA-256 in hexadecimal, ``digest`` the same as ``sha256:…``; ``size`` and
    ``resumed_from`` are bytes; ``reason`` is the word of the decision, ``proof`` what it rests on that
    the bytes are right.
    """

    digest: str
    size: int
    resumed_from: int
    reason: str
    proof: str | None
    media_type: str | None
    etag: str | None
    last_modified: str | None
    completion_id: str


class StreamingFilesPipeline(AroundHooks):
    """Stores files by content, durably, once; remembers what it has.

    The hooks of ``FilesPipeline`` (``file_path``, ``get_media_requests``, ``item_completed``,
    ``file_downloaded``) and its settings work as they do there. Without the extension it is a
    ``FilesPipeline`` and no more: switched off, or with a store that is not local.
    """

    # -- before the download ---------------------------------------------------------------

    def job_url(self, request: Request, item: Any = None) -> str:
        """Return the URL that names the job *request* asks for; the request is sent to its own.

        Override it to take out what changes from run to run, like a one-time token.
        """
        return request.url

    def media_to_download(
        self, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> Deferred[FileInfo | None] | None:
        """Return the recorded result if it is fresh, else claim the job and return ``None``."""
        if self._off:
            return super().media_to_download(request, info, item=item)
        return deferred_from_coro(self._recorded_or_claimed(request, info, item))

    async def _recorded_or_claimed(
        self, request: Request, info: MediaPipeline.SpiderInfo, item: Any
    ) -> FileInfo | None:
        try:
            expected = expected_of(request)
        except ValueError as error:
            raise FileRefused(f"bad-expected-digest: {error}", permanent=True) from error
        name = self._name(request, info, item)
        asked = name.given if isinstance(name.given, str) else name.path
        repeat = self._repeat(request, asked, expected)
        for _ in range(self._runtime.settings.max_attempts):
            try:
                return await self._result_or_context(expected, repeat, request, info, item)
            except CrawlStopping as stop:
                raise stopped(request) from stop
            except UnusableId as error:
                raise FileRefused(f"{error.reason}: {error.args[0]}", permanent=True) from error
            except LedgerError as error:
                if error.reason != DAMAGED_RECORD:
                    raise
                raise FileRefused(f"{error.reason}: {error.args[0]}") from error
            except LeaseLost as error:  # while the stored file was checked: the next claim decides
                lost = error
        raise lost

    def _name(
        self, request: Request, info: MediaPipeline.SpiderInfo, item: Any, response: Response | None = None
    ) -> FileName:
        """Return the name that ``file_path()`` gives; raise ``FileRefused`` if no file can have it.

        Without a response a hook may know of none yet, and give nothing. The name is as short as can be
        (C8): ``/a//b/../c.pdf`` is ``a/c.pdf``, as in Scrapy.
        """
        given = self.file_path(request, response=response, info=info, item=item)
        blobs = self._runtime.storage.blobs
        if not blobs.makes_names or (response is None and not given):
            return FileName(given, False, given)
        try:
            path = blobs.check_name(given)
        except StoreError as error:
            raise FileRefused(f"{error.reason}: {error.args[0]}", permanent=True) from error
        return FileName(path, False, given)

    def _repeat(self, request: Request, path: str, expected: Digest | None) -> Repeat | None:
        """Return what a later plain GET needs to finish what *request* asks for (C4)."""
        by_url = getattr(self.file_path, "__func__", None) is FilesPipeline.file_path
        return self._runtime.requests.repeat(request, expected, path, by_url=by_url)

    def _takes_only_the_rest(self, item: Any) -> bool:
        """Whether only what validators prove to be the rest of a part is taken for an item's files."""
        return False

    async def _result_or_context(
        self,
        expected: Digest | None,
        repeat: Repeat | None,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> StoredFile | None:
        requests, fresh = self._runtime.requests, self._recorded.refresh_before
        key, job = requests.job(request, self._work_id(item), self.job_url(request, item))
        job = replace(job, repeat=repeat)
        host = request.meta.get("download_slot") or urlparse_cached(request).hostname or ""
        claim = await self._jobs.claim(key, job, refresh_before=fresh, host=host)
        while isinstance(claim, Done):  # again, if another worker completed it meanwhile
            if requests.answers(claim.completion.known, expected, request):
                result = await self._replay(claim.completion, request, info, item, ask=True)
                if result is not None:
                    return result
            claim = await self._jobs.claim(key, job, refresh_before=math.inf, host=host)
        granted = granted_of(claim)
        stored = granted.known
        with self._jobs.released_on_error(granted.lease):
            if stored is None:
                name = partial(self._name, request, info, item)
                adopted = await self._recorded.adopt(granted, job, expected, name)
                if adopted is not None:
                    self.inc_stats("uptodate")
                    path, completion = adopted
                    return self._entry(request, path, "uptodate", Reason.ADOPTED, completion)
            else:  # only kept after a 304 if its bytes are there (R44, R77)
                stored = (
                    None if is_unexpected(expected, stored) else await self._runtime.files.confirm(stored)
                )
            self._runtime.shutdown.refuse()  # Scrapy must not be given a download any more
        codings = request.headers.get("Accept-Encoding")
        request.meta[CONTEXT] = DownloadContext(
            key,
            job,
            granted.lease,
            stored,
            expected,
            granted.previous,
            refresh_before=fresh,
            accepts_codings=None if codings is None else codings.decode("latin-1"),
            request_fields=requests.fields_to_send(request),
            only_resumes=self._takes_only_the_rest(item),
        )
        return None

    def _work_id(self, item: Any) -> str | None:
        field = self._runtime.settings.work_id_field
        return None if field is None or item is None else str(ItemAdapter(item).get(field) or "") or None

    async def _replay(
        self,
        completion: Completion,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
        *,
        ask: bool = False,
    ) -> StoredFile | None:
        """Return the result that the ledger recorded; ``None`` without its blob, see ``RecordedFiles``."""
        wanted = recorded_name(completion) or self._name(request, info, item)
        path = await self._recorded.replay(completion, wanted, ask=ask)
        if path is None:
            return None
        self.inc_stats("uptodate")
        return self._entry(request, wanted.shown(path), "uptodate", Reason.STORED, completion)

    # -- after it --------------------------------------------------------------------------

    async def media_downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> FileInfo:
        """Publish what was received, record it, and return the result entry.

        Raises ``FileException`` for what is not stored.
        """
        if self._off:
            return await super().media_downloaded(response, request, info, item=item)
        context = context_of(request)
        if context is None:
            msg = f"{request} came without going through media_to_download()"
            raise FileException(msg)
        async with self._discarding(response, request, context):
            received = await received_file(response, request, self._runtime.files)
        try:
            await self._jobs.renewals.ensure(context.lease)
        except LeaseLost:
            claim = await self._jobs.claim_again(context)
            if isinstance(claim, Done):
                result = await self._replay(claim.completion, request, info, item)
                if result is None:
                    raise FileRefused(BLOB_GONE) from None
                return result
            granted_of(claim)
        async with self._discarding(response, request, context):
            received, name, checksum = await self._hooks(received, context, request, info, item)
        stored, reason = resulting_representation(received, context)
        if isinstance(received.outcome, PassOn) and reason is Reason.TRANSFORMED:
            self._stats.decision(reason, request.url, context.lease)
        path, completion = await self._name_and_complete(context, received, stored, name)
        if received.part is not None:
            received.part.stored = self._runtime.storage.blobs.local_file(Digest.parse(stored.digest), path)
        await self._publication.discard_parts(context, completion.known)
        status = "cached" if "cached" in response.flags else "downloaded"
        status = "uptodate" if received.part is None else status
        self.inc_stats(status)
        logger.debug(
            "File (%s): %s from %s referred in <%s>", status, reason, request, referer_str(request),
            extra={"spider": info.spider},
        )  # fmt: skip
        entry = self._entry(request, name.shown(path), status, reason, completion, received.resumed_from)
        own = completion.known.digest == stored.digest  # else another worker's, which no hook here saw
        if own and checksum:
            entry["checksum"] = checksum
        return entry

    @asynccontextmanager
    async def _discarding(
        self, response: Response, request: Request, context: DownloadContext
    ) -> AsyncGenerator[None, None]:
        """Discard a whole part that a middleware or a hook refuses: the next crawl fetches another."""
        try:
            yield
        except FileException:
            answer = answer_to(response, request)
            if answer is not None and answer.part is not None:
                await self._publication.discard_parts(context)
            raise

    async def _hooks(
        self,
        received: StreamedResponse,
        context: DownloadContext,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> tuple[StreamedResponse, FileName, str | None]:
        """Call the hooks as ``FilesPipeline`` does; return what they published, its name and checksum."""
        name = self._name_of(received, context, request, info, item)
        if received.part is None:
            return received, name, None
        checksum = await ensure_awaitable(self.file_downloaded(received, request, info, item=item))
        published, store = context.published, self.store
        if published is None and isinstance(store, AtomicFilesStore):
            file = store.take_written(name.given)
            if file is not None:  # the hook stored it by ``self.store``, as stock's own does
                run = self._runtime.threads.run
                published = await run(written_by_hook, file, received.part.finished)
        if published is not None and published.digest == received.part.digest:
            received.part.finished = published
        elif published is not None:  # a hook changed it (R76)
            received = StreamedResponse.around(received, PassOn(Reason.TRANSFORMED), published)
        return received, name, checksum

    def _name_of(
        self,
        received: StreamedResponse,
        context: DownloadContext,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> FileName:
        """Return the name, and whether it depends on the response (C7).

        Without a full response at hand, a name that an earlier one made stays.
        """
        wanted = self._name(request, info, item, received)
        by_response = wanted.given != self.file_path(request, info=info, item=item)
        recorded = recorded_name(context.previous)
        bodiless = isinstance(received.outcome, Unchanged)
        if recorded is not None and (
            bodiless or (isinstance(received.outcome, AlreadyWhole) and not by_response)
        ):
            return recorded
        return wanted._replace(by_response=by_response)

    async def file_downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> str:
        """Publish the part; return its SHA-256, 64 hex digits."""
        if self._off:
            return await ensure_awaitable(super().file_downloaded(response, request, info, item=item))
        context = context_of(request)
        received = await received_file(response, request, self._runtime.files)
        if received.part is None or context is None:
            msg = f"{response} has nothing to publish"
            raise FileException(msg)
        part = received.part.finished
        published = await self._runtime.files.publish(part, context.expected)
        context.published = replace(part, stamp=published.stamp)
        return published.digest.hex

    async def _name_and_complete(
        self,
        context: DownloadContext,
        received: StreamedResponse,
        stored: StoredRepresentation,
        name: FileName,
    ) -> tuple[str, Completion]:
        """Return the name and the completion: this worker's, or that of the one that took the job over.

        Raises ``LeaseLost`` if the job is lost again and again.
        """
        part = None if received.part is None else received.part.finished
        if part is not None and part.stamp is None:  # a subclass's ``file_downloaded`` did not publish it
            published = await self._runtime.files.publish_checked(part)
            part = replace(part, stamp=published.stamp)
        for _ in range(self._runtime.settings.max_attempts):
            lease = context.lease
            try:
                named = await self._publication.name(lease, stored, name.path, part)
                return named.path, await self._publication.complete(
                    lease,
                    self._runtime.files.with_name(stored, named),
                    received.resumed_from,
                    path=named.path,
                    by_response=name.by_response,
                    part=part,
                )
            except LeaseLost:
                claim = await self._jobs.claim_again(context)
            if isinstance(claim, Done):
                path = await self._runtime.files.name_recorded(claim.completion, name.path)
                if path is None:
                    raise FileRefused(BLOB_GONE)
                return path, claim.completion
            granted_of(claim)
        raise lease_lost(context.lease)

    def _entry(
        self,
        request: Request,
        path: str,
        status: str,
        reason: Reason,
        completion: Completion,
        resumed_from: int = 0,
    ) -> StoredFile:
        """Return the entry for ``item["files"]``."""
        self._jobs.remember(completion)
        entry = entry_of(
            completion, request.url, path, status=status, reason=reason, resumed_from=resumed_from
        )
        return cast("StoredFile", entry)

    def media_failed(self, failure: Failure, request: Request, info: MediaPipeline.SpiderInfo) -> Any:
        """Raise the error that the item's results hold; the log has its line already."""
        if self._off:
            return super().media_failed(failure, request, info)
        error = error_of(failure)
        if isinstance(error, FileException):
            raise error
        failed = marked(error)
        reason = reason_of(error) if failed is None else failed.reason
        raise FileRefused(f"{reason}: {error}") from error


class UninvitedFilesPipeline(StreamingFilesPipeline):
    """What the add-on puts where no ``FilesPipeline`` was: an item without URLs of files stays as it is."""

    async def process_item(self, item: Any, spider: Spider | None = None) -> Any:
        """Return the item, with its files if it names URLs of files."""
        if not is_item(item) or ItemAdapter(item).get(self.files_urls_field) is None:
            return item
        return await super().process_item(item)
