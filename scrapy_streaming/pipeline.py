"""The item pipeline: claims, publishes, completes. A drop-in for ``FilesPipeline``."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from itemadapter import ItemAdapter, is_item
from scrapy import Request, Spider, signals
from scrapy.crawler import Crawler
from scrapy.downloadermiddlewares.retry import RetryMiddleware
from scrapy.exceptions import DontCloseSpider, DropItem
from scrapy.http import Response
from scrapy.pipelines.files import FilesPipeline, FSFilesStore
from scrapy.pipelines.media import FileInfo, MediaPipeline
from scrapy.utils.defer import deferred_from_coro, ensure_awaitable, maybe_deferred_to_future
from scrapy.utils.httpobj import urlparse_cached
from scrapy.utils.python import global_object_name
from scrapy.utils.request import referer_str
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from scrapy_streaming.exceptions import (
    IntegrityError,
    LeaseLost,
    LedgerError,
    NotAdopted,
    StoreError,
    UnusableId,
    WriteFailed,
)
from scrapy_streaming.exchange import (
    DOUBTFUL,
    TICKET,
    Answer,
    Ticket,
    Tries,
    request_fields,
    response_fields,
    ticket_of,
)
from scrapy_streaming.extension import (
    LEDGER_ROW,
    StreamingExtension,
    expected_of,
    lease_lost,
    why_without,
)
from scrapy_streaming.failures import (
    FailedFile,
    FailuresField,
    FileException,
    failed_file,
    log_failed,
    mark,
    mark_raised,
    marked,
    not_of_a_file,
    not_said_before,
    reason_of,
)
from scrapy_streaming.protocol.answers import (
    PERMANENT,
    AlreadyWhole,
    Append,
    PassOn,
    Replace,
    ResponseHead,
    Unchanged,
)
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.fields import retry_after
from scrapy_streaming.protocol.jobs import (
    Claim,
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    Lease,
    NotedFile,
    RecordedName,
    StoredRepresentation,
    Waiting,
    is_recent,
)
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.selecting import selecting_key, selects_again
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.repeating import UNLIKE
from scrapy_streaming.response import StreamedResponse
from scrapy_streaming.shutdown import CrawlStopping
from scrapy_streaming.storage.blobs import Adopted, Named
from scrapy_streaming.storage.finished import FinishedPart, broken_promise, known_of, small_part
from scrapy_streaming.storage.job_request import JobRequest, Repeat
from scrapy_streaming.texts import clean_record, without_credentials

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: Errors of the machine, which say nothing about a part: it stays.
KEEPING = (WriteFailed, LedgerError, LeaseLost, StoreError)

#: Results kept in memory; older ones are asked of the ledger again.
RESULT_CACHE = 10_000
#: Why a file is refused whose bytes another worker stored, and somebody has taken away or changed since.
BLOB_GONE = f"{Reason.BLOB_MISSING}: of what another worker stored"


class FileRefused(FileException):
    """A file that is not stored; ``reason`` is the stable word, ``permanent`` whether to ask again.

    The reason is the message up to its first colon. ``retry_after`` is when the server wants to be
    asked again, in seconds.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(without_credentials(message))
        self.reason = message.partition(":")[0]
        self.permanent = permanent
        self.retry_after = retry_after


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


class _Name(NamedTuple):
    """The name of a file below the store's root; ``by_response``: without the response it is another.

    ``given`` is what ``file_path()`` gave for it: ``/a//b.pdf`` or a ``PurePath`` for ``a/b.pdf``.
    """

    path: str
    by_response: bool
    given: Any


class AtomicFilesStore(FSFilesStore):
    """Scrapy's store for hooks that write by themselves: whole files, through no link to a blob.

    ``written`` are the paths below the store that were written and not looked at yet.
    """

    def __init__(self, basedir: Any) -> None:
        super().__init__(basedir)
        self.written: set[str] = set()

    def persist_file(self, path: Any, buf: BytesIO, info: Any, meta: Any = None, headers: Any = None) -> None:
        """Write a file aside and move it into place."""
        target = self._get_filesystem_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(16)}.tmp")
        temporary.write_bytes(buf.getvalue())
        temporary.replace(target)
        self.written.add(os.fspath(path))

    def file_of(self, path: Any) -> Path:
        """Return the file of a path: Scrapy takes each for one below the store's root."""
        return self._get_filesystem_path(path)


class StreamingFilesPipeline(FilesPipeline):
    """Stores files by content, durably, once; remembers what it has.

    The hooks of ``FilesPipeline`` (``file_path``, ``get_media_requests``, ``item_completed``,
    ``file_downloaded``) and its settings work as they do there. Without the extension it is a
    ``FilesPipeline`` and no more: switched off, or with a store that is not local.
    """

    STORE_SCHEMES: ClassVar[dict[str, Any]] = {
        **FilesPipeline.STORE_SCHEMES,
        "": AtomicFilesStore,
        "file": AtomicFilesStore,
    }
    _extension: StreamingExtension

    def __init__(self, store_uri: Any, *args: Any, crawler: Crawler, **kwargs: Any) -> None:
        extension = crawler.get_extension(StreamingExtension)
        self._off = extension is None
        if self._off:
            self.__dict__["STORE_SCHEMES"] = _stocks(self.STORE_SCHEMES)  # FilesPipeline reads it of self
        super().__init__(store_uri, *args, crawler=crawler, **kwargs)
        if extension is None:
            for reason in why_without(crawler):
                logger.warning("%s works as FilesPipeline does: %s", global_object_name(type(self)), reason)
            return
        self._extension = extension
        self._fingerprinter = _ByExpectation(self._fingerprinter)
        self._items = 0
        self._items_done: Deferred[None] | None = None
        self._failures_field = FailuresField(extension.settings.failures_field)
        self._wrap_hooks()
        crawler.signals.connect(self._keep_open, signals.spider_idle)

    def _wrap_hooks(self) -> None:
        """Do ours around the hooks of ``MediaPipeline``: a subclass's need not call those of this class."""
        self._completed_hook, self._downloaded_hook, self._failed_hook, self._asked_hook = (
            self.item_completed,
            self.media_downloaded,
            self.media_failed,
            self.media_to_download,
        )
        self.__dict__.update(
            item_completed=self._completed_or_left,
            media_to_download=self._asked,
            media_downloaded=self._downloaded,
            media_failed=self._failed,
        )

    def open_spider(self, spider: Spider | None = None) -> None:
        """Start with an empty cache of results, of bounded size."""
        if self._off:
            super().open_spider()
            return
        if self.crawler.spider is None:
            msg = "open_spider() before the crawl has a spider"
            raise RuntimeError(msg)
        self.spiderinfo = self.SpiderInfo(self.crawler.spider)
        self.spiderinfo.downloaded = _Bounded()
        if not self._extension.plans:
            logger.warning(
                "files are stored, but not resumed, nor asked about by conditional requests: "
                "scrapy_streaming.middleware.ResumeMiddleware is not in DOWNLOADER_MIDDLEWARES"
            )
        logging.getLogger(MediaPipeline.__module__).addFilter(not_said_before)
        logging.getLogger(RetryMiddleware.__module__).addFilter(not_of_a_file)

    async def process_item(self, item: Any, spider: Spider | None = None) -> Any:
        """Return the item with its files.

        The crawl is kept open meanwhile: Scrapy 2.15 does not count an item of ``start()`` as work.
        """
        if self._off:
            return await super().process_item(item)
        self._items += 1
        self._extension.items += 1
        try:
            return await super().process_item(item)
        finally:
            self._items -= 1
            self._extension.item_left()
            if not self._items and self._items_done is not None:
                self._items_done.callback(None)

    def _completed_or_left(self, results: list[Any], item: Any, info: MediaPipeline.SpiderInfo) -> Any:
        """Call the hook ``item_completed``, unless a stop broke files of the item off.

        Raises ``DropItem`` then: the next crawl comes to the whole item again (C2).
        """
        left = sum(1 for ok, value in results if not ok and _is_stop(value))
        if left:
            msg = f"{CrawlStopping.reason}: {left} of its {len(results)} files are left to the next crawl"
            raise DropItem(msg)
        self._failures_field.fill(item, results)
        return self._completed_hook(results, item, info)

    def _keep_open(self) -> None:
        if self._items:
            raise DontCloseSpider

    async def close_spider(self) -> None:
        """Wait for the items in work."""
        if not self._off and self._items:
            self._items_done = Deferred()
            await maybe_deferred_to_future(self._items_done)

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
        name = self._path(request, info, item)
        asked = name.given if isinstance(name.given, str) else name.path
        repeat = self._repeat(request, asked, expected, item)
        for _ in range(self._extension.settings.max_attempts):
            try:
                return await self._result_or_ticket(expected, repeat, request, info, item)
            except CrawlStopping as stop:
                raise _stopped(request) from stop
            except UnusableId as error:
                raise FileRefused(f"{error.reason}: {error.args[0]}", permanent=True) from error
            except LedgerError as error:
                if error.reason != LEDGER_ROW:
                    raise
                raise FileRefused(f"{error.reason}: {error.args[0]}") from error
            except LeaseLost as error:  # while what is there was looked at: the next claim sees whose it is
                lost = error
        raise lost

    async def _asked(self, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None) -> Any:
        """Call the hook ``media_to_download``; report a file that it refuses, before any request."""
        try:
            return await ensure_awaitable(self._asked_hook(request, info, item=item))
        except Exception as error:
            if not _is_stop_error(error):
                mark(error, self._report(request, error, Tries(), keeps=True))
            raise

    def _report(self, request: Request, error: Exception, tries: Tries, *, keeps: bool) -> FailedFile:
        """Count and log a file that is not stored; return what is known of that."""
        failed = failed_file(request, error, tries, keeps=keeps)
        self._extension.count(f"failed/{failed.reason}")
        log_failed(request, error, failed, tries, self.crawler.spider)
        return failed

    def _path(
        self, request: Request, info: MediaPipeline.SpiderInfo, item: Any, response: Response | None = None
    ) -> _Name:
        """Return the name that ``file_path()`` gives; raise ``FileRefused`` if no file can have it.

        Without a response a hook may know of none yet, and give nothing. The name is as short as can be
        (C8): ``/a//b/../c.pdf`` is ``a/c.pdf``, as in Scrapy.
        """
        given = self.file_path(request, response=response, info=info, item=item)
        if not self._extension.storage.blobs.makes_names or (response is None and not given):
            return _Name(given, False, given)
        try:
            path = "/".join(self._extension.storage.blobs.parts_of(given))
        except StoreError as error:
            raise FileRefused(f"{error.reason}: {error.args[0]}", permanent=True) from error
        return _Name(path, False, given)

    def _repeat(self, request: Request, path: str, expected: Digest | None, item: Any) -> Repeat | None:
        """Return what a later plain GET needs to finish what *request* asks for (C4)."""
        if self._extension.told_apart(request):
            return UNLIKE
        if self._extension.settings.link_mode == "none":
            return self._extension.repeats.of(request, expected, None, by_url=True)
        by_url = getattr(self.file_path, "__func__", None) is FilesPipeline.file_path
        return self._extension.repeats.of(request, expected, path, by_url=by_url)

    def _takes_only_the_rest(self, item: Any) -> bool:
        """Whether only what validators prove to be the rest of a part is taken for an item's files."""
        return False

    async def _result_or_ticket(
        self,
        expected: Digest | None,
        repeat: Repeat | None,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> StoredFile | None:
        key, job = self._extension.job(request, self._work_id(item), self.job_url(request, item))
        job = replace(job, repeat=repeat)
        host = request.meta.get("download_slot") or urlparse_cached(request).hostname or ""
        fresh = self._extension.refresh_before(self.expires)
        claim = await self._extension.claim_in_turn(key, job, host, refresh_before=fresh)
        while isinstance(claim, Done):  # again, if another worker completed it meanwhile
            if self._answers(claim.completion.known, expected, request):
                result = await self._replay(claim.completion, request, info, item, ask=True)
                if result is not None:
                    return result
            claim = await self._extension.claim_in_turn(key, job, host, refresh_before=math.inf)
        granted = _granted(claim)
        with self._extension.released_on_error(granted.lease):
            if granted.known is None:
                result = await self._adopted(granted, job, expected, request, info, item)
                if result is not None:
                    return result
            known = None if _other_than(expected, granted.known) else await self._present(granted.known)
            if self._extension.stopping:  # Scrapy must not be given a download any more
                raise CrawlStopping
        codings = request.headers.get("Accept-Encoding")
        request.meta[TICKET] = Ticket(
            key,
            job,
            granted.lease,
            known,
            expected,
            refresh_before=fresh,
            accepts_codings=None if codings is None else codings.decode("latin-1"),
            fields=self._extension.fields_to_send(request),
            previous=granted.previous,
            only_resumes=self._takes_only_the_rest(item),
        )
        return None

    def _answers(self, known: StoredRepresentation, expected: Digest | None, request: Request) -> bool:
        """Whether what is stored may be given for *request* with no word from the server (E9, R40)."""
        if _other_than(expected, known):
            return False
        if not set(known.vary) - {"accept-encoding"}:
            return True
        foreseen = not self._extension.foreign_middlewares
        return foreseen and selects_again(known, self._extension.fields_to_send(request))

    async def _adopted(
        self,
        granted: Granted,
        job: JobRequest,
        expected: Digest | None,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> StoredFile | None:
        """Return the result for a file that another program stored under the job's name (C6, C11).

        Hashed once, recorded, not fetched. So it is in a store that ``FilesPipeline`` filled, for another
        URL of the same name, after ``rebuild``, or with a ledger put back from a backup (I16). ``None``
        for what is not there or too old, and for a job that is not its URL's alone, whose name another
        job may have taken.
        """
        part_left = granted.lease.job_key in self._extension.storage.kept  # it knows what selected it (R40)
        first = granted.lease.generation == 1 and not job.artifact_id and not part_left
        if not first or self._extension.refresh_before(self.expires) == math.inf:
            return None
        wanted = self._path(request, info, item)
        path = wanted.path
        if not path or not self._extension.storage.blobs.is_taken(path):
            return None
        noted = await self._extension.settle(self._extension.storage.jobs.noted_files([path]))
        found = await self._extension.run(self._fresh_name, path, noted.get(path))
        if found is None or expected not in (None, found.digest):
            return None
        digest = str(found.digest)
        if not await self._extension.settle(self._extension.storage.jobs.adoptable(digest, path)):
            return None
        name = RecordedName(found.path, found.own)
        known = StoredRepresentation(
            digest, found.size, Validators(), job.url, stamp=found.stamp, name=name, stored_at=found.stored_at
        )
        completion = await self._extension.complete(granted.lease, known, 0, found.path)
        self._extension.count(f"decision/{Reason.ADOPTED}")
        self._extension.count("bytes_saved", found.size)
        self.inc_stats("uptodate")
        shown = wanted.given if found.path == path else found.path
        return self._entry(request, shown, "uptodate", Reason.ADOPTED, completion)

    def _fresh_name(self, path: str, noted: NotedFile | None) -> Adopted | None:
        """Return the file at a name, a blob by now, if ``FilesPipeline`` would call it up to date (I14)."""
        blobs = self._extension.storage.blobs
        written_at = blobs.written_at(path)
        before = self._extension.refresh_before(self.expires)
        if written_at is None or not is_recent(written_at, before, time.time()):
            return None
        try:
            return blobs.adopt(path, noted=noted)
        except (NotAdopted, WriteFailed) as refusal:
            logger.info("File (%s): not adopted, the server is asked: %s", refusal.reason, refusal.args[0])
            return None

    def _work_id(self, item: Any) -> str | None:
        field = self._extension.settings.work_id_field
        return None if field is None or item is None else str(ItemAdapter(item).get(field) or "") or None

    async def _present(self, known: StoredRepresentation | None) -> StoredRepresentation | None:
        """Return *known* only if its bytes are there to be kept after a 304 (R44, R77)."""
        return None if known is None else await self._extension.stored(known)

    async def _replay(
        self,
        completion: Completion,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
        *,
        ask: bool = False,
    ) -> StoredFile | None:
        """Return what the ledger recorded, its name made anew if need be; ``None`` without its blob.

        Also, with *ask*, if another file has the name by now.
        """
        recorded = self._recorded_path(completion)
        wanted = self._path(request, info, item) if not recorded else _Name(recorded, True, recorded)
        named = await self._extension.named_again(completion, wanted.path, ask=ask)
        if named is None:
            return None
        self._extension.count("bytes_saved", completion.known.size)
        self.inc_stats("uptodate")
        shown = wanted.given if named == wanted.path else named
        return self._entry(request, shown, "uptodate", Reason.STORED, completion)

    async def _replay_or_fail(
        self, completion: Completion, request: Request, info: MediaPipeline.SpiderInfo, item: Any
    ) -> StoredFile:
        """Return the result of the worker who took the job over."""
        result = await self._replay(completion, request, info, item)
        if result is None:
            raise FileRefused(BLOB_GONE)
        return result

    # -- after it --------------------------------------------------------------------------

    async def media_downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> FileInfo:
        """Publish what was received, record it, and return the result entry.

        Raises ``FileException`` for what is not stored.
        """
        if self._off:
            return await super().media_downloaded(response, request, info, item=item)
        ticket = ticket_of(request)
        if ticket is None:
            msg = f"{request} came without going through media_to_download()"
            raise FileException(msg)
        async with self._discarding(response, request, ticket):
            received = await self._received(response, request)
        try:
            await self._extension.assure(self._extension.leases.latest(ticket.lease))
        except LeaseLost:
            claim = await self._extension.claim_again(ticket)
            if isinstance(claim, Done):
                return await self._replay_or_fail(claim.completion, request, info, item)
            _granted(claim)
        async with self._discarding(response, request, ticket):
            received, name, checksum = await self._hooks(received, ticket, request, info, item)
        known, reason = self._known(received, ticket)
        if isinstance(received.outcome, PassOn) and reason is Reason.TRANSFORMED:
            self._extension.decided(request, ticket, reason)
        path, completion = await self._name_and_record(ticket, received, known, name)
        if received.part is not None:
            received.part.stored = self._extension.storage.blobs.place(Digest.parse(known.digest), path)
        await self._extension.discard_parts(ticket, completion.known)
        status = "cached" if "cached" in response.flags else "downloaded"
        status = "uptodate" if received.part is None else status
        self.inc_stats(status)
        logger.debug(
            "File (%s): %s from %s referred in <%s>", status, reason, request, referer_str(request),
            extra={"spider": info.spider},
        )  # fmt: skip
        shown = name.given if path == name.path else path
        entry = self._entry(request, shown, status, reason, completion, received.resumed_from)
        ours = completion.known.digest == known.digest  # else another worker's, which no hook of ours saw
        if ours and checksum:
            entry["checksum"] = checksum
        return entry

    @asynccontextmanager
    async def _discarding(
        self, response: Response, request: Request, ticket: Ticket
    ) -> AsyncGenerator[None, None]:
        """Discard a whole part that a middleware or a hook refuses: the next crawl is to fetch another."""
        try:
            yield
        except FileException:
            answer = _answer_to(response, request)
            if answer is not None and answer.part is not None:
                await self._extension.discard_parts(ticket)
            raise

    async def _hooks(
        self,
        received: StreamedResponse,
        ticket: Ticket,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> tuple[StreamedResponse, _Name, str | None]:
        """Call the hooks as ``FilesPipeline`` does; return what they published, its name and checksum."""
        name = self._name_of(received, ticket, request, info, item)
        if received.part is None:
            return received, name, None
        checksum = await ensure_awaitable(self.file_downloaded(received, request, info, item=item))
        published = (ticket_of(request) or ticket).published
        if published is None:
            published = await self._extension.run(self._written_by_hook, name.given, received.part.finished)
        if published is not None and published.digest == received.part.digest:
            received.part.finished = published
        elif published is not None:  # a hook changed it (R76)
            received = StreamedResponse.around(received, PassOn(Reason.TRANSFORMED), published)
        return received, name, checksum

    def _written_by_hook(self, given: Any, part: FinishedPart) -> FinishedPart | None:
        """Return what a hook stored by ``self.store``, as stock's own does; ``None`` if it did not."""
        if not isinstance(self.store, AtomicFilesStore) or os.fspath(given) not in self.store.written:
            return None
        self.store.written.discard(os.fspath(given))
        file = self.store.file_of(given)
        with file.open("rb") as stream:
            digest = Digest(hashlib.file_digest(stream, "sha256").hexdigest())
            length = os.fstat(stream.fileno()).st_size
        if digest == part.digest:
            return None
        return FinishedPart(replace(part.state, validators=Validators()), length, digest, file)

    def _name_of(
        self,
        received: StreamedResponse,
        ticket: Ticket,
        request: Request,
        info: MediaPipeline.SpiderInfo,
        item: Any,
    ) -> _Name:
        """Return the name, and whether it depends on the response (C7).

        Without a full response at hand, a name that an earlier one made stays.
        """
        wanted = self._path(request, info, item, received)
        by_response = wanted.given != self.file_path(request, info=info, item=item)
        recorded = self._recorded_path(ticket.previous)
        bodiless = isinstance(received.outcome, Unchanged)
        if recorded is not None and (
            bodiless or (isinstance(received.outcome, AlreadyWhole) and not by_response)
        ):
            return _Name(recorded, True, recorded)
        return wanted._replace(by_response=by_response)

    def _recorded_path(self, completion: Completion | None) -> str | None:
        """Return the recorded name if the response made it, which is not at hand any more (C7)."""
        return completion.path if completion is not None and completion.by_response else None

    async def _received(self, response: Response, request: Request) -> StreamedResponse:
        """Return the response with its part; refuse what is no whole representation.

        What a middleware or a hook made of a response is stored as ``transformed`` (R76).
        """
        asked = response.request or request
        answer = _answer_to(response, request)
        outcome = response.outcome if isinstance(response, StreamedResponse) else PassOn()
        unchanged = next((o for o in (outcome, answer and answer.outcome) if isinstance(o, Unchanged)), None)
        if response.status not in (200, 203) and not (unchanged and response.status == 304):
            raise self._bad_status(response, request)
        if isinstance(response, StreamedResponse) and not isinstance(outcome, PassOn):
            return response
        for flag in DOUBTFUL:
            if flag in response.flags:
                reason = f"incomplete-{flag.replace('_', '-')}"
                raise FileRefused(reason)
        state = _state_of(response, asked)
        if isinstance(response, StreamedResponse) and response.part is not None:
            part = replace(response.part.finished, state=state)
        else:
            part = small_part(state, response.body)
        if unchanged is not None and unchanged.known.digest == str(part.digest):
            return StreamedResponse.around(response, unchanged)
        if answer is not None and answer.part is not None and answer.part.digest == part.digest:
            return StreamedResponse.around(response, answer.outcome, answer.part, answer.resumed_from)
        if answer is not None and answer.part is None and not unchanged and answer.body == response.body:
            if not part.length and asked.method != "GET":  # HEAD has no body, others are answered without
                raise self._empty(request)
            reason = Reason.FETCHED if response.status == 200 else Reason.TRANSFORMED
            return StreamedResponse.around(response, PassOn(reason), part)
        return await self._transformed(response, request, answer, part)

    async def _transformed(
        self, response: Response, request: Request, answer: Answer | None, part: FinishedPart
    ) -> StreamedResponse:
        """Return the response that a middleware or a hook made; no validator belongs to its bytes (R76).

        Raises ``FileRefused`` for an empty one, and ``IntegrityError`` if it was made of wrong bytes.
        """
        if not part.length:
            raise self._empty(request)
        source = None if answer is None else answer.part
        if source is not None and broken_promise(source, None) is not None:
            await self._extension.run(self._extension.storage.blobs.quarantine, source)
            msg = f"{source.state.url}: the bytes hash to {source.digest}, and the server said otherwise"
            raise IntegrityError(msg)
        state = replace(part.state, validators=Validators())
        made_of = None if answer is None else answer.outcome
        if isinstance(made_of, Append | Replace):  # what selected it does not change with its bytes (R40)
            state = replace(state, vary=made_of.state.vary, selecting=made_of.state.selecting)
        part = replace(part, state=state)
        return StreamedResponse.around(response, PassOn(Reason.TRANSFORMED), part)

    def _empty(self, request: Request) -> FileRefused:
        """Return the refusal of a body of no bytes that is not the origin's own file."""
        return FileRefused("empty-content")

    def _bad_status(self, response: Response, request: Request) -> FileRefused:
        """Return the refusal of a response that is an error."""
        wait = retry_after(
            [value.decode("latin-1") for value in response.headers.getlist("Retry-After")], time.time()
        )
        permanent = response.status in PERMANENT
        return FileRefused(f"bad-status-{response.status}", permanent=permanent, retry_after=wait)

    def _known(self, received: StreamedResponse, ticket: Ticket) -> tuple[StoredRepresentation, Reason]:
        """Return what is now known of the representation, and the word for how that came."""
        if isinstance(received.outcome, Unchanged):
            return received.outcome.known, received.outcome.reason
        if received.part is None:
            raise FileRefused(str(received.outcome.reason))
        known = known_of(received.part.finished, ticket.expected)
        if ticket.known is not None and ticket.known.digest == known.digest:
            return replace(known, name=ticket.known.name), Reason.UNCHANGED_CONTENT
        return known, received.outcome.reason

    async def file_downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> str:
        """Publish the part; return its SHA-256, 64 hex digits."""
        if self._off:
            return await ensure_awaitable(super().file_downloaded(response, request, info, item=item))
        ticket = ticket_of(request)
        received = await self._received(response, request)
        if received.part is None or ticket is None:
            msg = f"{response} has nothing to publish"
            raise FileException(msg)
        part = received.part.finished
        published = await self._extension.publish(part, ticket.expected)
        request.meta[TICKET] = replace(ticket, published=replace(part, stamp=published.stamp))
        return published.digest.hex

    async def _name_and_record(
        self, ticket: Ticket, received: StreamedResponse, known: StoredRepresentation, name: _Name
    ) -> tuple[str, Completion]:
        """Return the name and the completion: ours, or that of the worker who took the job over.

        Raises ``LeaseLost`` if the job is lost again and again.
        """
        extension = self._extension
        part = None if received.part is None else received.part.finished
        for _ in range(extension.settings.max_attempts):
            lease = extension.leases.latest(ticket.lease)
            try:
                named = await self._named(lease, part, known, name.path)
                return named.path, await extension.complete(
                    lease,
                    extension.named(known, named),
                    received.resumed_from,
                    named.path,
                    part,
                    by_response=name.by_response,
                )
            except LeaseLost:
                claim = await extension.claim_again(ticket)
            if isinstance(claim, Done):
                theirs = await extension.named_again(claim.completion, name.path)
                if theirs is None:
                    raise FileRefused(BLOB_GONE)
                return theirs, claim.completion
            _granted(claim)
        raise lease_lost(ticket.lease)

    async def _named(
        self, lease: Lease, part: FinishedPart | None, known: StoredRepresentation, path: str
    ) -> Named:
        """Make the name; a subclass's ``file_downloaded`` may have left the publishing to us.

        Raises ``LeaseLost``: the name may be that of a newer representation by now.
        """
        if part is not None and part.stamp is None:
            published = await self._extension.run_with_room(self._extension.storage.blobs.publish, part)
            self._extension.count_published(published, part)
            part = replace(part, stamp=published.stamp)
        while True:
            await self._extension.assure(lease)
            named = await self._extension.run_with_room(self._name, lease, part, known, path)
            if named is not None:
                return named

    def _name(
        self, lease: Lease, part: FinishedPart | None, known: StoredRepresentation, path: str
    ) -> Named | None:
        """Make the name; ``None`` if the lease has to be renewed first."""
        if not self._extension.leases.valid(lease):
            return None
        stamp = known.stamp if part is None else part.stamp
        digest = Digest.parse(known.digest)
        return self._extension.storage.blobs.name(digest, path, stamp=stamp, recorded=known.name, part=part)

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
        known = completion.known
        self._extension.remember(completion)
        return {
            "url": request.url,
            "path": path,
            "checksum": known.digest.removeprefix("sha256:"),
            "status": status,
            "digest": known.digest,
            "size": known.size,
            "resumed_from": resumed_from,
            "reason": str(reason),
            "media_type": known.media_type,
            "etag": None if known.validators.etag is None else str(known.validators.etag),
            "last_modified": known.validators.last_modified,
            "proof": known.proof or None,
            "completion_id": completion.completion_id,
        }

    async def _downloaded(
        self, response: Response, request: Request, info: MediaPipeline.SpiderInfo, *, item: Any = None
    ) -> Any:
        """Call the hook ``media_downloaded``; a job that it did not complete is given back."""
        result = await ensure_awaitable(self._downloaded_hook(response, request, info, item=item))
        ticket = ticket_of(request)
        if ticket is not None:
            self._extension.release_unless_ended(self._extension.leases.latest(ticket.lease))
        return result

    def media_failed(self, failure: Failure, request: Request, info: MediaPipeline.SpiderInfo) -> Any:
        """Raise the error that the item's results hold; the log has its line already."""
        if self._off:
            return super().media_failed(failure, request, info)
        error = _error_of(failure)
        if isinstance(error, FileException):
            raise error
        failed = marked(error)
        reason = reason_of(error) if failed is None else failed.reason
        raise FileRefused(f"{reason}: {error}") from error

    def _failed(self, failure: Failure, request: Request, info: MediaPipeline.SpiderInfo) -> Any:
        """Report the failure, give the job back, then call the hook ``media_failed``."""
        ticket, error = ticket_of(request), _error_of(failure)
        if ticket is None:
            failed = self._report(request, error, Tries(), keeps=True)
        elif isinstance(error, CrawlStopping):
            self._extension.count(f"failed/{error.reason}")
            self._extension.release(self._extension.leases.latest(ticket.lease))
            raise _stopped(request) from error
        else:
            if not self._extension.plans:  # nobody counted
                ticket.tries.sent = 1
            failed = self._report(request, error, ticket.tries, keeps=isinstance(error, KEEPING))
            self._give_back(ticket, failed.reason, error)
        mark(error, failed)
        try:
            return self._failed_hook(failure, request, info)
        except Exception as raised:
            mark_raised(raised, error, failed)
            raise

    def _give_back(self, ticket: Ticket, code: str, error: Exception) -> None:
        """End the job as failed; a whole part that somebody refused goes first: the next file is another."""
        fail = partial(
            self._extension.fail,
            self._extension.leases.latest(ticket.lease),
            code,
            str(error),
            permanent=isinstance(error, FileRefused) and error.permanent,
            retry_after=error.retry_after if isinstance(error, FileRefused) else None,
        )
        if ticket.tries.whole and not isinstance(error, KEEPING):
            self._extension.discard_whole(ticket, fail)
        else:
            fail()


class UninvitedFilesPipeline(StreamingFilesPipeline):
    """What the add-on puts where no ``FilesPipeline`` was: an item without URLs of files stays as it is."""

    async def process_item(self, item: Any, spider: Spider | None = None) -> Any:
        """Return the item, with its files if it names URLs of files."""
        if not is_item(item) or ItemAdapter(item).get(self.files_urls_field) is None:
            return item
        return await super().process_item(item)


class _ByExpectation:
    """Tells requests apart by the digest they expect, too: the result of one is no answer to the other."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def fingerprint(self, request: Request) -> bytes:
        """Return the project's fingerprint, with the expected digest if there is one."""
        fingerprint: bytes = self._inner.fingerprint(request)
        try:
            expected = expected_of(request)
        except ValueError:  # refused when the job is asked for
            return fingerprint
        return fingerprint if expected is None else fingerprint + bytes.fromhex(expected.hex)


class _Bounded(OrderedDict[bytes, Any]):
    """A dictionary that forgets its oldest entry beyond ``RESULT_CACHE``."""

    def __setitem__(self, key: bytes, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > RESULT_CACHE:
            self.popitem(last=False)


def _stocks(store_schemes: dict[str, Any]) -> dict[str, Any]:
    """Return the kinds of stores as ``FilesPipeline`` has them, with those that a subclass added."""
    return {
        scheme: FSFilesStore if kind is AtomicFilesStore else kind for scheme, kind in store_schemes.items()
    }


def _stopped(request: Request) -> FileRefused:
    """Say that a file waits for the next crawl; return the error that the item's result holds."""
    logger.info("File (%s): left to the next crawl: %s", CrawlStopping.reason, request)
    return FileRefused(CrawlStopping.reason)


def _error_of(failure: Failure) -> Exception:
    """Return the error of a failed file: the pipeline catches no other kind."""
    error = failure.value
    assert isinstance(error, Exception)
    return error


def _is_stop(result: Any) -> bool:
    """Whether a file's failure is that the user stopped the crawl."""
    return _is_stop_error(getattr(result, "value", None))


def _is_stop_error(error: Any) -> bool:
    return isinstance(error, FileRefused) and error.reason == CrawlStopping.reason


def _answer_to(response: Response, request: Request) -> Answer | None:
    """Return what the handler gave for the last request that led to *response*."""
    ticket = ticket_of(response.request or request)
    return None if ticket is None else ticket.answer


def _state_of(response: Response, request: Request) -> PartState:
    """Return what the head of a buffered response says of its body."""
    fields = response_fields(response.headers.items())
    head = ResponseHead.from_fields(response.status, response.url, fields, None)
    return PartState(
        url=head.url,
        validators=head.validators,
        vary=head.vary,
        selecting=selecting_key(head.vary, request_fields(request)),
        media_type=head.media_type,
    )


def _other_than(expected: Digest | None, known: StoredRepresentation | None) -> bool:
    """Whether what is stored is not what the request expects: then it is no answer to it (E9)."""
    return expected is not None and known is not None and known.digest != str(expected)


def _granted(claim: Claim) -> Granted:
    """Return the grant, or raise ``FileRefused`` saying what stands in the way."""
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
