"""The one way round the pool: a kept connection that is gone is replaced from the endpoint (E3)."""

from __future__ import annotations

import pytest
from scrapy.utils.defer import maybe_deferred_to_future
from support.origin import Origin
from support.reactor import on_reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.web.client import HTTPConnectionPool

from scrapy_streaming.exceptions import AddressRefused
from scrapy_streaming.handlers.twisted_tap import _GuardedEndpoint


@on_reactor
async def test_a_new_connection_to_a_private_address_is_refused(origin: Origin) -> None:
    from twisted.internet import reactor

    pool = HTTPConnectionPool(reactor, persistent=False)
    endpoint = _GuardedEndpoint(TCP4ClientEndpoint(reactor, origin.host, origin.port), "http://x/")
    with pytest.raises(AddressRefused, match="is not public"):
        await maybe_deferred_to_future(pool.getConnection("key", endpoint))
