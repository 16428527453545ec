"""The fields of requests and responses, by lower-case name.

What may live here: reading them of Scrapy's objects, and what Scrapy's own middlewares will add to a request.
"""

from __future__ import annotations

from collections.abc import Iterable

from scrapy import Request, Spider
from scrapy.http import Headers
from scrapy.settings import BaseSettings
from scrapy.utils.url import url_is_from_any_domain
from w3lib.http import basic_auth_header


def fields_of(headers: Headers) -> dict[str, str]:
    """Return a request's fields by lower-case name, several values joined as HTTP does."""
    return {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in headers.items()
    }


def fields_to_send(request: Request, settings: BaseSettings, spider: Spider | None) -> dict[str, str]:
    """Return the fields that a request will have behind Scrapy's own middlewares, as ``fields_of`` does.

    Those are HttpAuth, DefaultHeaders and UserAgent. What other middlewares set is not known here.
    """
    headers = request.headers.copy()
    authorization = _authorization(request, settings, spider)
    if authorization is not None:
        headers.setdefault("Authorization", authorization)
    for name, value in settings["DEFAULT_REQUEST_HEADERS"].items():
        if value is not None:
            headers.setdefault(name, value)
    agent = getattr(spider, "user_agent", settings["USER_AGENT"])
    if agent:
        headers.setdefault("User-Agent", agent)
    return fields_of(headers)


def _authorization(request: Request, settings: BaseSettings, spider: Spider | None) -> bytes | None:
    """Return what HttpAuth would add: of the request's meta, else of the spider, else of the settings.

    Scrapy before 2.19 reads the spider alone: where the others are set, the server is asked once more.
    """
    meta, given = request.meta, settings.get
    user, password, domain = (meta.get(f"http_{name}") for name in ("user", "pass", "auth_domain"))
    if not (user or password):
        user, password, domain = (
            getattr(spider, f"http_{name}", None) for name in ("user", "pass", "auth_domain")
        )
    if not (user or password):
        user, password, domain = (given(f"HTTPAUTH_{name}") for name in ("USER", "PASS", "DOMAIN"))
    if not (user or password) or (domain and not url_is_from_any_domain(request.url, [domain])):
        return None
    return basic_auth_header(user or "", password or "")


def response_fields(raw: Iterable[tuple[bytes, Iterable[bytes]]]) -> dict[str, list[str]]:
    """Return a response's fields by lower-case name, each with all its values, in order."""
    return {
        name.decode("latin-1").lower(): [value.decode("latin-1") for value in values] for name, values in raw
    }
