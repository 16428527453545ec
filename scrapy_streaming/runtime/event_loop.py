"""Bridges between the event loop and threads, with Twisted's reactor or without one.

What may live here: calls that work on both. Knows nothing of downloads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from scrapy.utils.asyncio import call_later, is_asyncio_available
from scrapy.utils.defer import maybe_deferred_to_future
from twisted.internet.defer import Deferred


def caller_from_threads() -> Callable[..., object]:
    """Return a function that a thread may call to have another one called on the event loop."""
    if is_asyncio_available():
        return asyncio.get_event_loop().call_soon_threadsafe
    from twisted.internet import reactor

    from_thread: Callable[..., object] = reactor.callFromThread
    return from_thread


async def sleep(seconds: float) -> None:
    """Return after *seconds* (``scrapy.utils.asyncio.sleep`` exists from Scrapy 2.18 on)."""
    over: Deferred[None] = Deferred()
    call_later(seconds, over.callback, None)
    await maybe_deferred_to_future(over)
