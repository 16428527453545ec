"""The parts of downloads that are open, decoded or removed.

What may live here: the owner of an open part, and file work on parts in threads. An open part has one
owner at a time. Between the plan of a request and the first byte of its answer that is ``OpenParts``; the
download that takes it out closes it, and a part that no download took is closed before the next plan,
after an error, or at the end of the crawl.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import PartCorrupt, StreamingError
from scrapy_streaming.protocol import codings
from scrapy_streaming.protocol.answers import Append, Replace
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.threads import Threads
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.decoding import coded_twice
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.parts import PartStore

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


class OpenParts:
    """Owns the verified parts that wait for the bodies of their requests, by job key.

    *default_limit* is DOWNLOAD_MAXSIZE in bytes, 0 for none.
    """

    def __init__(self, parts: PartStore, threads: Threads, default_limit: int) -> None:
        self._parts = parts
        self._default_limit = default_limit
        self._threads = threads
        self._waiting: dict[str, PartWriter] = {}
        self._removals: set[Deferred[None]] = set()

    def put(self, key: str, writer: PartWriter) -> None:
        """Take over an open part, until ``take`` or ``close``."""
        self._waiting[key] = writer

    def take(self, key: str) -> PartWriter | None:
        """Give the job's open part away, ``None`` if there is none: the caller closes it."""
        return self._waiting.pop(key, None)

    async def close(self, key: str) -> None:
        """Close the job's part if no download took it."""
        writer = self._waiting.pop(key, None)
        if writer is not None:
            await self._threads.run(writer.close)

    async def end(self) -> None:
        """Close every part and wait for removals that are under way."""
        for key in list(self._waiting):
            await self.close(key)
        for removal in list(self._removals):
            await maybe_deferred_to_future(removal)

    def open_for(self, context: DownloadContext, outcome: Append | Replace, fence: int) -> PartWriter:
        """Return the part that takes a body: the verified one that waits for it, or a new one (blocks).

        Raises ``PartCorrupt`` if the part to append to is gone.
        """
        writer = self.take(context.key)
        if isinstance(outcome, Replace):
            if writer is not None:
                writer.close()
            return self._parts.create(context.key, fence, outcome.state)
        if writer is None or writer.length != outcome.state.length:
            msg = f"the part to append to is not there any more: {outcome.state.url}"
            raise PartCorrupt(msg)
        writer.describe(outcome.state)
        writer.limit = outcome.until
        writer.provisional = outcome.provisional
        return writer

    async def decoded(self, part: CompletePart, context: DownloadContext) -> CompletePart:
        """Return *part* with the codings taken off that the request did not ask for (R34).

        As it is if it has none, or if the file is meant to be in it: by its name or media type, or
        because the expected digest is that of the coded octets. At most STREAMING_MAX_SIZE bytes, or
        DOWNLOAD_MAXSIZE where that is not set. Raises ``Undecodable``, ``DecodedTooLarge``,
        ``WriteFailed``.
        """
        if not part.state.content_encoding or part.coded is not None or context.expected == part.digest:
            return part
        if part.state.coding_is_content and await self._threads.run(_coded_twice, part):
            part = replace(part, state=replace(part.state, coding_is_content=False))
        if not part.state.to_decode:
            return part
        max_size = 0 if context.sent is None else context.sent.max_size
        key, fence = context.key, context.lease.fence
        return await self._threads.run(self._parts.decode, part, key, fence, max_size or self._default_limit)

    def discard_whole(self, context: DownloadContext, then: Callable[[], object]) -> None:
        """Remove the job's whole parts in a thread, then call *then*; the end of the crawl waits for both."""
        removal = deferred_from_coro(self._discard_whole(context, then))
        self._removals.add(removal)
        removal.addBoth(lambda _: self._removals.discard(removal))

    async def _discard_whole(self, context: DownloadContext, then: Callable[[], object]) -> None:
        try:
            await self._threads.run(self._parts.discard_whole, context.key, context.lease.fence)
        except (StreamingError, OSError) as error:
            logger.warning("the refused part of a job could not be removed: %s", error)
        then()


def _coded_twice(part: CompletePart) -> bool:
    """Whether a file that is meant to be in its coding came in it once more."""
    return coded_twice(part.chunks(), codings.codings(part.state.content_encoding)[0])
