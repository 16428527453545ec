"""Answers of any HTTP library, as one value: the head, and the octets of the body as they arrive.

What may live here: one adapter a library. No library is imported; the class of a response names its
library. The octets are those on the wire: no library may decode them before they reach a part, whose
offsets count octets of the encoded representation (RFC 9110 §14.1.2).
"""

from __future__ import annotations

import http.client
import sys
import urllib.error
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urldefrag, urljoin

from scrapy_streaming.exceptions import AnswerRefused, BodyConsumed
from scrapy_streaming.protocol.answers import ResponseHead
from scrapy_streaming.protocol.fields import parse_content_length
from scrapy_streaming.storage.complete_part import CompletePart

#: Flags with which Scrapy marks a body that may not be whole.
_DOUBTFUL: Final = ("download_stopped", "dataloss", "partial")

Chunks = Callable[[int], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``url`` is the last one requested, without fragment; ``fields`` are by lower-case name.

    ``length`` is the Content-Length that frames the body, in bytes, ``None`` if there is none; ``framed``:
    something else marks the body's end. ``asked`` are the fields of the request, ``None`` where the library
    does not keep them. ``redirected``: another URL led here. ``chunks`` yields the octets, at most so many
    at a time, and raises one of ``broken`` if they end too early. ``consumed``: some were read already.
    ``stored`` is a body that this package received before. ``peer`` returns the server's address, ``None``
    if it is unknown.
    """

    status: int
    url: str
    fields: Mapping[str, list[str]]
    length: int | None
    framed: bool
    chunks: Chunks
    broken: tuple[type[BaseException], ...] = (OSError,)
    asked: Mapping[str, str] | None = None
    redirected: bool = False
    consumed: bool = False
    stored: CompletePart | None = None
    peer: Callable[[], str | None] = field(default=lambda: None)
    close: Callable[[], object] = field(default=lambda: None)

    @property
    def head(self) -> ResponseHead:
        """The head, as ``judge_response`` takes it."""
        return ResponseHead.from_fields(self.status, self.url, self.fields, self.length)

    def check_unread(self) -> None:
        """Raise ``BodyConsumed`` if octets of the body were read already."""
        if self.consumed:
            msg = (
                f"{self.url}: the body was read before; hand the response over unread "
                "(httpx: client.stream(), requests: stream=True, urllib3: preload_content=False)"
            )
            raise BodyConsumed(msg)


def answer_of(response: Any) -> Answer:
    """Return *response* as an ``Answer``; raise ``TypeError`` if its library is unknown."""
    for kind in type(response).__mro__:
        library = kind.__module__.partition(".")[0]
        adapt = _ADAPTERS.get((library, kind.__name__))
        if adapt is not None:
            found = adapt(response)
            return replace(found, url=urldefrag(found.url)[0])
    msg = (
        "response must be one of httpx, requests, urllib3, urllib or Scrapy, "
        f"got {type(response).__module__}.{type(response).__qualname__}"
    )
    raise TypeError(msg)


def _by_name(pairs: Iterable[tuple[Any, Any]]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, value in pairs:
        found[_text(name).lower()].append(_text(value))
    return dict(found)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def joined(fields: Mapping[str, list[str]]) -> dict[str, str]:
    """Return fields by lower-case name, several values joined as HTTP does."""
    return {name: ", ".join(values) for name, values in fields.items()}


def framing(fields: Mapping[str, list[str]]) -> tuple[int | None, bool]:
    """Return the Content-Length that frames the body, if one does, and whether chunks do (RFC 9112 §6.3)."""
    if any(fields.get("transfer-encoding", ())):
        return None, "chunked" in ",".join(fields["transfer-encoding"]).lower()
    return parse_content_length(tuple(fields.get("content-length", ()))), False


# -- httpx -----------------------------------------------------------------------------------


def _httpx(response: Any) -> Answer:
    if not hasattr(response.stream, "__iter__"):
        msg = "response must be that of a synchronous client, got one of an asynchronous client"
        raise TypeError(msg)
    fields = _by_name(response.headers.raw)
    length, chunked = framing(fields)
    module = sys.modules[type(response).__module__.partition(".")[0]]
    return Answer(
        response.status_code,
        str(response.url),
        fields,
        length,
        chunked or response.http_version not in ("HTTP/1.0", "HTTP/1.1"),
        lambda _: (
            response.iter_raw()
        ),  # without a size: what httpx gathers for one is lost when the body breaks off
        (OSError, module.HTTPError, module.StreamError),
        joined(_by_name(response.request.headers.raw)),
        bool(response.history),
        response.is_stream_consumed or response.is_closed,
        peer=lambda: _httpx_peer(response),
        close=response.close,
    )


def _httpx_peer(response: Any) -> str | None:
    stream = response.extensions.get("network_stream")
    address = None if stream is None else stream.get_extra_info("server_addr")
    return str(address[0]) if isinstance(address, tuple) else None


# -- requests, urllib3 -----------------------------------------------------------------------


def _requests(response: Any) -> Answer:
    raw = response.raw
    found = _urllib3(raw)
    read = getattr(response, "_content_consumed", False) or found.consumed
    return replace(
        found,
        status=response.status_code,
        url=response.url,
        asked=joined(_by_name(response.request.headers.items())),
        redirected=bool(response.history),
        consumed=bool(read),
        close=response.close,
    )


def _urllib3(response: Any) -> Answer:
    fields = _by_name(response.headers.items())
    length, chunked = framing(fields)
    errors = sys.modules["urllib3.exceptions"]
    body = response.status not in (204, 304) and length != 0
    return Answer(
        response.status,
        _urllib3_url(response),
        fields,
        length,
        chunked,
        lambda size: _urllib3_chunks(response, size, length),
        (OSError, http.client.HTTPException, errors.HTTPError),
        consumed=body and (response.tell() > 0 or response.isclosed()),
        peer=lambda: _peer(response.connection),
        close=response.close,
    )


def _urllib3_chunks(response: Any, size: int, length: int | None) -> Iterator[bytes]:
    if not hasattr(response, "read1"):  # before urllib3 2.2
        yield from response.stream(size, decode_content=False)
        return
    yield from _as_it_comes(lambda most: response.read1(most, decode_content=False), size, length)


def _as_it_comes(read1: Callable[[int], bytes], size: int, length: int | None) -> Iterator[bytes]:
    """Yield what *read1* returns, up to *length* bytes: waiting for a full chunk loses bytes at a break."""
    left = length
    while left is None or left > 0:
        chunk = read1(size if left is None else min(size, left))
        if not chunk:
            return
        if left is not None:
            left -= len(chunk)
        yield chunk


def _urllib3_url(response: Any) -> str:
    """Return the requested URL: for a request of a pool urllib3 keeps the path alone."""
    url, pool = str(response.geturl() or ""), getattr(response, "_pool", None)
    if pool is None or "://" in url:
        return url
    host = f"[{pool.host}]" if ":" in pool.host else pool.host
    port = "" if pool.port in (None, {"http": 80, "https": 443}.get(pool.scheme)) else f":{pool.port}"
    return urljoin(f"{pool.scheme}://{host}{port}", url)


def _peer(connection: Any) -> str | None:
    """Return the address at the other end; urllib's file object keeps its socket under a private name."""
    connected = getattr(connection, "sock", None) or getattr(connection, "_sock", None)
    return None if connected is None else str(connected.getpeername()[0])


# -- urllib ----------------------------------------------------------------------------------


def _http_client(response: http.client.HTTPResponse) -> Answer:
    fields = _by_name(response.headers.items())
    length, chunked = framing(fields)
    return Answer(
        response.status,
        str(getattr(response, "url", "")),
        fields,
        length,
        chunked,
        lambda size: _as_it_comes(response.read1, size, length),
        (OSError, http.client.HTTPException),
        consumed=_http_client_consumed(response, length, chunked=chunked),
        peer=lambda: _peer(getattr(response.fp, "raw", None)),
        close=response.close,
    )


def _http_client_consumed(response: Any, length: int | None, *, chunked: bool) -> bool:
    if response.status in (204, 304) or length == 0:
        return False
    if response.isclosed():
        return True
    if chunked:
        return response.chunk_left is not None  # of the chunk that is being read
    return length is not None and response.length != length


def _http_error(error: urllib.error.HTTPError) -> Answer:
    """Return the answer that ``urlopen`` raises for a status of failure; its body is never a file's."""
    fields = _by_name(error.headers.items())
    return Answer(error.code, str(error.url), fields, *framing(fields), lambda _: iter(()), close=error.close)


# -- Scrapy ----------------------------------------------------------------------------------


def _scrapy(response: Any) -> Answer:
    for flag in _DOUBTFUL:
        if flag in response.flags:
            word = flag.replace("_", "-")
            msg = f"{response.url}: Scrapy says that the body may not be whole ({flag})"
            raise AnswerRefused(msg, reason=f"incomplete-{word}")
    fields = {
        _text(name).lower(): [_text(each) for each in values] for name, values in response.headers.items()
    }
    fields.pop("transfer-encoding", None)  # the body was received whole
    asked = None
    if response.request is not None:
        asked = {
            _text(name).lower(): ", ".join(map(_text, values))
            for name, values in response.request.headers.items()
        }
    redirected = response.request is not None and bool(response.request.meta.get("redirect_times"))
    if "decoded" in response.flags:  # its validators are those of the coded body (RFC 9110 §8.8.1)
        fields = {name: values for name, values in fields.items() if name not in ("etag", "last-modified")}
    body = response.body
    fields.pop("content-length", None)
    return Answer(
        response.status,
        response.url,
        fields,
        len(body),
        framed=True,
        chunks=lambda size: (body[at : at + size] for at in range(0, len(body), size)),
        asked=asked,
        redirected=redirected,
    )


def _streamed(response: Any) -> Answer:
    """Return an answer that the download handler of this package judged and received already."""
    if response.part is None:
        msg = f"{response.url}: nothing was received ({response.outcome.reason})"
        raise AnswerRefused(msg, reason=str(response.outcome.reason))
    part: CompletePart = response.part.finished
    return Answer(
        response.status,
        part.state.url,
        {},
        part.length,
        framed=True,
        chunks=lambda _: response.part.pieces(),
        redirected=True,
        stored=part,
    )


_ADAPTERS: Final[Mapping[tuple[str, str], Callable[[Any], Answer]]] = {
    ("httpx", "Response"): _httpx,
    ("httpx2", "Response"): _httpx,
    ("requests", "Response"): _requests,
    ("urllib3", "BaseHTTPResponse"): _urllib3,  # urllib3 2
    ("urllib3", "HTTPResponse"): _urllib3,
    ("http", "HTTPResponse"): _http_client,
    ("urllib", "HTTPError"): _http_error,
    ("scrapy_streaming", "StreamedResponse"): _streamed,
    ("scrapy", "Response"): _scrapy,
}
