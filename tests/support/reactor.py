"""Tests that are coroutines, on the reactor of the tests.

What may live here: what makes a coroutine a test.
"""

from __future__ import annotations

import functools

from scrapy.utils.defer import deferred_from_coro


def on_reactor(test):
    """Run *test* as Scrapy runs coroutines: pytest-twisted waits for the deferred that this returns."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        return deferred_from_coro(test(*args, **kwargs))

    return run
