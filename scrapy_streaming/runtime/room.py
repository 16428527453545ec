"""The downloads that wait for room on the disks, and those that would take the reserve (R9, C21).

What may live here: waiting, and breaking off. Measuring is ``space``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

from scrapy.utils.asyncio import call_later
from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred

from scrapy_streaming.exceptions import StreamingError, WriteFailed
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.runtime.bodies import Body
from scrapy_streaming.runtime.space import UNKNOWN_NEED, NoSpace, Space, is_no_space, pause
from scrapy_streaming.runtime.stats import Stats
from scrapy_streaming.runtime.threads import Threads

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

T = TypeVar("T")
P = ParamSpec("P")


class Room:
    """Waits for room on the disk, at most *patience* seconds; breaks off what would take the reserve.

    *bodies* are those in flight.
    """

    def __init__(
        self, space: Space, bodies: Collection[Body], patience: float, stats: Stats, threads: Threads
    ) -> None:
        self._space = space
        self._bodies = bodies
        self._patience = patience
        self._stats = stats
        self._threads = threads
        self._waiting: set[Deferred[None]] = set()

    def refusal(self, url: str, need: int | None) -> NoSpace | None:
        """Return why a body of *need* bytes (``None``: unknown) does not fit, ``None`` if it does."""
        return self._space.refusal(url, need, self._bodies)

    def keep_reserve(self) -> None:
        """Break off bodies of unknown length when the reserve is reached (R9); others were promised room."""
        open_ended = [body for body in self._bodies if body.left is None and not body.concluded]
        if open_ended and self._space.free() < 0:
            for body in open_ended:
                body.break_off(self._space.refusal(body.url, None, ()) or NoSpace(body.url, UNKNOWN_NEED))

    async def found(self, error: StreamingError) -> bool:
        """Wait for room after *error*, a ``no-space``; return whether there is some (C21).

        After one wait of STREAMING_PATIENCE seconds was in vain, no other is begun until there is room.
        Raises what ``break_off`` is given.
        """
        space = self._space
        need = error.need if isinstance(error, NoSpace) else UNKNOWN_NEED
        ends, tried = time.monotonic() + self._patience, 0
        if not space.exhausted:
            self._stats.count("waits_for_space")
            if not self._waiting:
                logger.warning(
                    "%s; what does not fit waits for room, up to STREAMING_PATIENCE=%g seconds",
                    error, self._patience,
                )  # fmt: skip
        while not space.exhausted and time.monotonic() < ends:
            await self._wait(min(pause(tried), max(0.0, ends - time.monotonic())))
            tried += 1
            if space.free(self._bodies) >= need:
                return True
        if space.free(self._bodies) >= need:
            space.exhausted = False
            return True
        if not space.exhausted:
            space.exhausted = True
            logger.warning(
                "no-space: no room came for %g seconds (STREAMING_PATIENCE): what does not fit fails now, "
                "its part is kept", self._patience,
            )  # fmt: skip
        return False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what *function* returns, called in a thread; a full disk is waited for."""
        while True:
            try:
                return await self._threads.run(function, *args, **kwargs)
            except WriteFailed as error:
                if not is_no_space(error) or not await self.found(error):
                    raise

    def break_off(self, error: Callable[[], StreamingError]) -> None:
        """End every wait, each with an *error* of its own."""
        self._waiting, waiting = set(), self._waiting
        for over in waiting:
            over.errback(error())

    async def _wait(self, seconds: float) -> None:
        over: Deferred[None] = Deferred()
        self._waiting.add(over)
        call_later(seconds, lambda: None if over.called else over.callback(None))
        try:
            await maybe_deferred_to_future(over)
        finally:
            self._waiting.discard(over)
