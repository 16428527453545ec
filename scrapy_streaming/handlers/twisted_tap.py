"""Taps the bodies of Scrapy's HTTP/1.1 handler, and bounds the heads of its answers.

What may live here: all reliance on private names of Scrapy's handlers and of Twisted. That is:

- Scrapy's HTTP/1.1 handler has its connection pool in ``_pool``, and the pool is asked for each
  connection by ``getConnection(key, endpoint)``, in the task of the request it is for; one it had
  already comes in a wrapper that has it in ``_clientProtocol``;
- a Twisted response has ``deliverBody(protocol)``, and hands the protocol a transport whose
  ``_producer`` is the connection's own (Scrapy relies on that too), to be aborted at once; that has
  ``protocol``, or with TLS ``wrappedProtocol``, whose ``connectionLost(reason)`` it calls;
- a connection's ``request(request)`` makes a parser, ``_parser``, which takes the head of the answer
  line by line: ``lineReceived(line)``, and ``lineLengthExceeded(line)`` for one over ``MAX_LENGTH``; when
  the answer ended, or cannot be read, its ``connectionLost(reason)`` is called;
  of a proxy's tunnel the endpoint reads the head in ``processProxyResponse(data)``, into
  ``_connectBuffer``, from the connection ``_protocol``, and ``connectFailed(reason)`` ends it.

The pool is put behind a proxy. For a streamed request the response's ``deliverBody`` is replaced:
Scrapy's own body reader gets the connection (it takes certificate and address from it) and then
the end of the body, so Scrapy's deadline is over once the head is there, and the tap gets the body.
Where a name is missing the handler logs one warning, and Scrapy buffers as it always did.

The head of an answer is bounded for streamed requests alone: a page with a larger one is a page that
Scrapy reads, and a crawl reads its pages with the package as without it. Twisted itself bounds what
frames a body: 1 KiB for the line of a chunk, 64 KiB for all trailers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from scrapy import Request
from scrapy.utils.asyncio import call_later
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionClosed, ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.web.client import ResponseDone
from twisted.web.http import PotentialDataLoss
from twisted.web.iweb import UNKNOWN_LENGTH

from scrapy_streaming.download import Download
from scrapy_streaming.exceptions import AddressRefused, HeadTooLarge, StreamingError
from scrapy_streaming.protocol.addresses import is_public
from scrapy_streaming.protocol.answers import PassOn
from scrapy_streaming.protocol.parts import BodyEnd
from scrapy_streaming.request_fields import response_fields

#: Bytes to ask of the kernel at a time while a streamed body arrives (Twisted's own: 64 KiB).
READ_SIZE: Final = 256 << 10
#: Bytes that one line of a head may have, and a whole head, informational answers before it included.
#: Twisted alone takes 16 KiB in a line, and any number of lines.
MAX_LINE: Final = 64 << 10
MAX_HEAD: Final = 256 << 10
_MISSING: Final = object()
_SIZE_KEYS: Final = ("download_maxsize", "download_warnsize")


def wrap_pool(handler: Any) -> bool:
    """Put the connection pool of Scrapy's *handler* behind the tap; return whether it has one."""
    pool = getattr(handler, "_pool", None)
    if not hasattr(pool, "getConnection"):
        return False
    handler._pool = _TappedPool(pool)
    return True


@contextmanager
def attached(tap: Tap | None, limit: HeadLimit) -> Iterator[None]:
    """Have a request that begins inside tapped, and the head of its answer bounded."""
    tokens = _TAP.set(tap), _LIMIT.set(limit)
    try:
        yield
    finally:
        _TAP.reset(tokens[0])
        _LIMIT.reset(tokens[1])


class _TappedPool:
    """Hands out connections; those for a streamed request give its tap the response."""

    def __init__(self, pool: Any) -> None:
        self._wrapped = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def getConnection(self, key: Any, endpoint: Any) -> Any:
        tap, limit = _TAP.get(), _LIMIT.get()
        guarded = tap is not None and tap.guarded
        if limit is not None:
            endpoint = _LimitedEndpoint(endpoint, limit)
        if tap is not None and guarded:
            endpoint = _GuardedEndpoint(endpoint, tap.url)
        connection = self._wrapped.getConnection(key, endpoint)
        if tap is not None and guarded:
            connection.addCallback(_public, tap.url)
        if limit is not None:
            connection.addCallback(limit.watch)
        return connection if tap is None else connection.addCallback(_TappedConnection, tap)


class _LimitedEndpoint:
    """Has new connections watched, also one that replaces a kept connection that is gone."""

    def __init__(self, endpoint: Any, limit: HeadLimit) -> None:
        self._wrapped = endpoint
        self._limit = limit

    def connect(self, factory: Any) -> Any:
        self._limit.watch_tunnel(self._wrapped)
        return self._wrapped.connect(factory).addCallback(self._limit.watch)


class HeadLimit:
    """Bounds the heads that answer one streamed request, and aborts a connection beyond it (E5).

    *refuse* is called with the error; *unbounded* with an object that lacks a name that this needs.
    """

    def __init__(
        self, url: str, refuse: Callable[[StreamingError], object], unbounded: Callable[[object], object]
    ) -> None:
        self._refuse = refuse
        self._unbounded = unbounded
        self._broken = False
        self._error = HeadTooLarge(
            f"{url}: the head of the answer has more than {MAX_HEAD} bytes, or {MAX_LINE} in a line"
        )

    def watch(self, connection: Any) -> Any:
        """Return *connection*; the next request on it has the head of its answer bounded."""
        protocol = getattr(connection, "_clientProtocol", connection)
        if not hasattr(protocol, "request"):
            self._unbounded(protocol)
            return connection

        def request(wanted: Any) -> Any:
            del protocol.request  # the connection may go on to serve other requests
            answer = protocol.request(wanted)
            self._bound(protocol)
            return answer

        protocol.request = request
        return connection

    def _bound(self, protocol: Any) -> None:
        parser = getattr(protocol, "_parser", None)
        take = getattr(parser, "lineReceived", None)
        if parser is None or take is None or not hasattr(parser, "lineLengthExceeded"):
            self._unbounded(protocol)
            return
        left = MAX_HEAD

        def line_received(line: bytes) -> Any:
            nonlocal left
            left -= len(line) + 1
            return take(line) if left >= 0 else self._abort(protocol)

        end = parser.connectionLost

        def connection_lost(reason: Any = None) -> None:
            end(reason)
            # of what cannot be read Twisted only closes its side, and with TLS waits for the other's
            if isinstance(reason, Failure) and not reason.check(ConnectionClosed, CancelledError):
                _abort_soon(protocol)

        parser.connectionLost = connection_lost
        parser.MAX_LENGTH = MAX_LINE
        parser.lineReceived = line_received
        parser.lineLengthExceeded = lambda _: self._abort(protocol)

    def watch_tunnel(self, endpoint: Any) -> None:
        """Bound what a proxy answers to CONNECT, if that is how *endpoint* connects."""
        take = getattr(endpoint, "processProxyResponse", None)
        if take is None:
            return
        if not all(hasattr(endpoint, name) for name in ("_connectBuffer", "connectFailed")):
            self._unbounded(endpoint)
            return

        def received(data: bytes) -> None:
            if len(endpoint._connectBuffer) + len(data) <= MAX_HEAD:
                take(data)
                return
            protocol = endpoint._protocol
            protocol.dataReceived = lambda _: None
            self._abort(protocol)
            endpoint.connectFailed(Failure(self._error))

        endpoint.processProxyResponse = received

    def _abort(self, protocol: Any) -> StreamingError:
        """Close the connection; return why, which has a parser take no further line."""
        if not self._broken:
            self._broken = True
            self._refuse(self._error)
            _abort_soon(protocol)
        return self._error


def _abort_soon(protocol: Any) -> None:
    """Abort a connection that is just being read from: done inside, the TLS of Twisted 24.3 goes astray."""

    def abort() -> None:
        if getattr(protocol.transport, "connected", False):
            protocol.transport.abortConnection()

    call_later(0, abort)


class _GuardedEndpoint:
    """Connects to public addresses only: a kept connection that is gone is replaced from here."""

    def __init__(self, endpoint: Any, url: str) -> None:
        self._wrapped = endpoint
        self._url = url

    def connect(self, factory: Any) -> Any:
        return self._wrapped.connect(factory).addCallback(_public, self._url)


def _public(connection: Any, url: str) -> Any:
    """Return *connection* if its other end has a public address, before anything is sent (E3)."""
    protocol = getattr(connection, "_clientProtocol", connection)
    host = str(getattr(protocol.transport.getPeer(), "host", "an unknown address"))
    if not is_public(host):
        protocol.abort()
        raise AddressRefused(host, url)
    return connection


class _TappedConnection:
    def __init__(self, connection: Any, tap: Tap) -> None:
        self._wrapped = connection
        self._tap = tap

    def request(self, request: Any) -> Any:
        return self._wrapped.request(request).addCallback(self._tap.head_received)


class Tap(Protocol):
    """The protocol that Twisted delivers a streamed body to; it gives the body to a ``Download``."""

    def __init__(self, download: Download, request: Request, *, guarded: bool) -> None:
        self.download = download
        self.url = request.url
        self.guarded = guarded
        self._request = request
        self._reader: Any = None
        self._ended = self._aborted = False
        self._framed = True
        self._lost_by: Failure | None = None  # why the transport lost the connection
        self._noting: Any = None  # the protocol whose ``connectionLost`` is replaced meanwhile
        self._sizes: dict[str, Any] = {}

    def head_received(self, response: Any) -> Any:
        """Have a Twisted response judged before the first byte of its body is delivered."""
        fields = response_fields(response.headers.getAllRawHeaders())
        length = None if response.length is UNKNOWN_LENGTH else response.length
        self._framed = length is not None
        if not isinstance(self.download.judge(response.code, fields, length), PassOn):
            # Scrapy's limits are for bodies in memory; a streamed one has its own
            self._sizes = {key: self._request.meta.get(key, _MISSING) for key in _SIZE_KEYS}
            self._request.meta.update(dict.fromkeys(_SIZE_KEYS, 0))
            deliver = response.deliverBody
            response.deliverBody = lambda reader: self._deliver(deliver, reader)
        return response

    def restore_sizes(self) -> None:
        """Put the request's own size limits back."""
        for key, value in self._sizes.items():
            if value is _MISSING:
                self._request.meta.pop(key, None)
            else:
                self._request.meta[key] = value

    def _deliver(self, deliver: Any, reader: Any) -> None:
        self._reader = reader
        wanted = self.download.begin(self._abort)
        deliver(self)
        if not wanted or self._aborted:  # before there was a connection to close
            self._abort()

    def makeConnection(self, transport: Any) -> None:
        """Take the transport of the body; let Scrapy's reader take what it needs of it."""
        self.transport = transport
        if hasattr(transport._producer, "bufferSize"):  # a third less work on the event loop
            transport._producer.bufferSize = READ_SIZE
        self._note_loss(transport._producer)
        self._reader.makeConnection(transport)
        self._reader.connectionLost(Failure(ResponseDone("the body is streamed")))

    def dataReceived(self, data: bytes) -> None:
        """Give the bytes to the download; pause until it is ready for more."""
        ready = self.download.write(data)
        if ready is not None and self.transport is not None:
            self.transport.pauseProducing()
            ready.addCallback(self._resume)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Take note that the body has ended; *reason* is Twisted's."""
        self._ended = True
        if self._noting is not None:  # the connection may go on to bring other bodies
            del self._noting.connectionLost
        self.download.finish(self._end_by(reason))

    def _end_by(self, reason: Failure) -> BodyEnd:
        """Return how the body ended: a reset, or TLS without close_notify, is no end (RFC 9112 §9.8)."""
        if reason.check(ResponseDone):
            return BodyEnd.FRAMED
        closed = self._lost_by is not None and self._lost_by.check(ConnectionDone)
        return BodyEnd.CLOSED if reason.check(PotentialDataLoss) and closed else BodyEnd.LOST

    def _note_loss(self, transport: Any) -> None:
        """Note why the connection is lost: for a body that only its end marks, Twisted hides the reason."""
        if self._framed:
            return
        wrapped = hasattr(transport, "wrappedProtocol")
        protocol: Any = transport if wrapped else getattr(transport, "protocol", None)
        while hasattr(protocol, "wrappedProtocol"):  # TLS, also in a proxy's tunnel: the innermost is HTTP's
            protocol = protocol.wrappedProtocol
        pass_on = getattr(protocol, "connectionLost", None)
        if protocol is None or pass_on is None:
            return

        def connection_lost(reason: Failure) -> None:
            self._lost_by = reason
            pass_on(reason)

        protocol.connectionLost = connection_lost
        self._noting = protocol

    def _resume(self, _: None) -> None:
        if not self._ended and not self._aborted and self.transport is not None:
            self.transport.resumeProducing()

    def _abort(self) -> None:
        """Close the connection at once; after the body's end it is another request's, and left alone."""
        self._aborted = True
        if not self._ended and self.transport is not None:
            self.transport._producer.abortConnection()


_TAP: ContextVar[Tap | None] = ContextVar("scrapy_streaming_tap", default=None)
_LIMIT: ContextVar[HeadLimit | None] = ContextVar("scrapy_streaming_head_limit", default=None)
