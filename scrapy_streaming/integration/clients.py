"""One GET by the library of the caller: urllib, httpx or requests.

What may live here: one adapter a library. The library follows redirects, because it knows which credentials
may be sent to which host. Nothing is retried here, and no body is read.
"""

from __future__ import annotations

import base64
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from scrapy_streaming.exceptions import RequestFailed
from scrapy_streaming.integration.answers import Answer, answer_of
from scrapy_streaming.redaction import url_without_userinfo

_AGENT: Final = "scrapy-streaming"


@dataclass(frozen=True, slots=True)
class Client:
    """Makes requests: ``get`` takes a URL, the fields to send, and the timeout in seconds."""

    get: Callable[[str, Mapping[str, str], float], Answer]


def client_of(given: Any) -> Client:
    """Return the client for *given*: ``None`` or ``"urllib"``, an ``httpx.Client``, a ``requests.Session``.

    Raises ``TypeError`` for anything else.
    """
    if given is None or given == "urllib":
        return Client(_by_urllib)
    for kind in type(given).__mro__:
        match kind.__module__.partition(".")[0], kind.__name__:
            case ("httpx" | "httpx2") as library, "Client":
                return Client(partial(_by_httpx, given, sys.modules[library]))
            case "requests", "Session":
                return Client(partial(_by_requests, given))
    msg = (
        "client must be None (for urllib), an httpx.Client or a requests.Session, "
        f"got {type(given).__module__}.{type(given).__qualname__}"
    )
    raise TypeError(msg)


def _failed(url: str, error: BaseException) -> RequestFailed:
    return RequestFailed(f"{url}: no response: {error}")


def _by_urllib(url: str, fields: Mapping[str, str], seconds: float) -> Answer:
    sent = {"User-Agent": _AGENT, **fields}
    bare = url_without_userinfo(url)
    request = urllib.request.Request(bare, headers=sent)  # noqa: S310 - the opener handles http and https only
    if bare != url:
        sent["Authorization"] = _basic(urlsplit(url))
        request.add_unredirected_header("Authorization", sent["Authorization"])  # not sent to other hosts
    try:
        answer = answer_of(_opener().open(request, timeout=seconds))
    except urllib.error.HTTPError as error:
        answer = answer_of(error)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(url, error) from error
    asked = {name.lower(): value for name, value in sent.items()}
    return replace(answer, asked=asked, redirected=answer.url != bare)


def _basic(parts: SplitResult) -> str:
    """Return the value of ``Authorization`` for the user and password of a URL (RFC 7617)."""
    credentials = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for http and https alone: a redirect leads to no local file and no FTP server."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    opener.addheaders = []
    return opener


def _by_httpx(client: Any, errors: Any, url: str, fields: Mapping[str, str], _: float) -> Answer:
    request = client.build_request("GET", url, headers=dict(fields))
    try:
        response = client.send(request, stream=True, follow_redirects=True)
    except (errors.HTTPError, errors.StreamError, OSError) as error:
        raise _failed(url, error) from error
    return answer_of(response)


def _by_requests(session: Any, url: str, fields: Mapping[str, str], seconds: float) -> Answer:
    try:
        response = session.get(url, headers=dict(fields), stream=True, timeout=seconds)
    except OSError as error:  # the base of all errors of requests
        raise _failed(url, error) from error
    return answer_of(response)
