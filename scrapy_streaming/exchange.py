"""What the components hand to one another: the ticket that a request carries in its meta.

What may live here: values only. The middleware, the handler and the pipeline know this module
and never one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from scrapy import Request, Spider
from scrapy.http import Headers
from scrapy.settings import BaseSettings
from scrapy.utils.url import url_is_from_any_domain
from w3lib.http import basic_auth_header

from scrapy_streaming.protocol.answers import Asked, Outcome, Refuse, Replace
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Lease, StoredRepresentation, is_recent
from scrapy_streaming.protocol.planning import Fetch, Plan
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import selects_again
from scrapy_streaming.storage.decoding import decodable
from scrapy_streaming.storage.finished import FinishedPart
from scrapy_streaming.storage.job_request import JobRequest

TICKET: Final = "_streaming"
SECONDS_A_DAY: Final = 86400
#: Flags with which Scrapy marks a body that may not be whole.
DOUBTFUL: Final = ("download_stopped", "dataloss", "partial")
#: The one of a body that only the closed connection ends.
UNMARKED: Final = "partial"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the download handler gave, before any middleware could change it.

    ``body`` is what Scrapy buffered of a response that has no ``part``.
    """

    outcome: Outcome
    part: FinishedPart | None = None
    resumed_from: int = 0
    body: bytes = b""


@dataclass(slots=True)
class Tries:
    """What became of the requests for one file in this crawl; all of them share it.

    ``sent`` counts those that went to the download handler, ``status`` is that of the answer to the
    last one, ``kept`` how many bytes a part holds after it. ``whole``: it brought a whole file.
    """

    sent: int = 0
    status: int | None = None
    kept: int = 0
    whole: bool = False

    def begin(self, kept: int) -> None:
        """Count a request that is about to be sent; *kept* bytes of a part are there before it."""
        self.sent += 1
        self.status, self.kept, self.whole = None, kept, False

    def answered(self, status: int, part: FinishedPart | None) -> None:
        """Note an answer; one with a *part* on disk keeps that."""
        self.status = status
        if part is not None:
            self.whole, self.kept = True, part.length if part.path is not None else 0


@dataclass(frozen=True, slots=True)
class Ticket:
    """One job on its way through the downloader.

    ``kept`` is the number of bytes a part held when the request was last planned; ``ours`` are
    the request fields that the last plan set; ``max_size`` in bytes, 0 for no limit; ``streams``
    says that the handler takes the body itself; ``reclaims`` counts how often the job was claimed
    again because its lease was lost. ``first`` is the URL that was asked before any redirect and
    ``asked`` the one asked last; ``stale`` that it was asked before, and a redirect had led there.
    ``changes`` counts the resumptions in a row that met another representation (R62).
    ``unmarked`` is the SHA-256 (hex) of a body whose end nothing marked, when one came before (R33).
    A whole part is published with no request if it was written at ``refresh_before`` or later, in seconds
    since the epoch; ``None`` for any (R7). ``first_fields`` are the fields of the request for ``first``
    as it came to the middleware. ``odd_pieces`` counts pieces that did not match their own
    Content-Digest (R64). ``accepts_codings`` is the request's own Accept-Encoding (R78).
    ``only_resumes``: the file is only taken if validators prove it to be that of the part; the request
    that began it may have had other fields. ``fields`` are those that the request was to be sent with,
    ``None`` if that was not looked at. ``previous`` is what the job was completed with before.
    ``answer`` came from the handler last; ``published`` is what the pipeline's ``file_downloaded``
    published. ``tries`` is shared by all requests for the file.
    """

    key: str
    job: JobRequest
    lease: Lease
    known: StoredRepresentation | None = None
    expected: Digest | None = None
    mode: Recovery = Recovery.NONE
    restarts: int = 0
    reclaims: int = 0
    kept: int = 0
    ours: tuple[str, ...] = ()
    plan: Plan | None = None
    streams: bool = False
    max_size: int = 0
    first: str = ""
    first_fields: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()
    asked: str = ""
    stale: bool = False
    changes: int = 0
    unmarked: str | None = None
    refresh_before: float | None = None
    accepts_codings: str | None = None
    odd_pieces: int = 0
    only_resumes: bool = False
    fields: Mapping[str, str] | None = None
    previous: Completion | None = None
    answer: Answer | None = None
    published: FinishedPart | None = None
    tries: Tries = field(default_factory=Tries, compare=False)

    def publishes(self, written_at: float, now: float) -> bool:
        """Whether a whole part of that time may be published with no request (R7, I14)."""
        return self.expected is not None or is_recent(written_at, self.refresh_before, now)

    def accepts(self, known: StoredRepresentation) -> bool:
        """Whether what is stored can be what the request expects (E9), and selects (R40)."""
        if self.fields is not None and not selects_again(known, self.fields):
            return False
        return self.expected is None or known.digest == str(self.expected)


def ticket_of(request: Request) -> Ticket | None:
    """Return the ticket a request carries, ``None`` for a request that is not ours."""
    ticket: Ticket | None = request.meta.get(TICKET)
    return ticket


def request_fields(request: Request) -> dict[str, str]:
    """Return the request's fields by lower-case name, several values joined as HTTP does."""
    return _by_name(request.headers)


def fields_to_send(request: Request, settings: BaseSettings, spider: Spider | None) -> dict[str, str]:
    """Return the fields that a request will have behind Scrapy's own middlewares, as ``request_fields``.

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
    return _by_name(headers)


def _authorization(request: Request, settings: BaseSettings, spider: Spider | None) -> bytes | None:
    """Return what HttpAuth would add: of the request's meta, else of the spider, else of the settings.

    Scrapy before 2.19 reads the spider alone; who sets the others there is asked once more, no worse.
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


def _by_name(headers: Headers) -> dict[str, str]:
    return {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in headers.items()
    }


def response_fields(raw: Iterable[tuple[bytes, Iterable[bytes]]]) -> dict[str, list[str]]:
    """Return a response's fields by lower-case name, each with all its values, in order."""
    return {
        name.decode("latin-1").lower(): [value.decode("latin-1") for value in values] for name, values in raw
    }


def asked_by(request: Request, ticket: Ticket) -> Asked:
    """Return what an answer to *request* is judged by, beside its plan."""
    return Asked(request_fields(request), ticket.first, ticket.stale, decodable())


def resumed_or_refused(ticket: Ticket, outcome: Outcome) -> Outcome:
    """Return *outcome*, but refuse another representation than that of the part where only it is wanted."""
    other = ticket.only_resumes and isinstance(outcome, Replace)
    return Refuse(Reason.CHANGED, Recovery.FAIL) if other else outcome


def ask_plainly(request: Request, ticket: Ticket) -> None:
    """Turn a planned request into a plain GET whose body Scrapy buffers."""
    for name in ticket.ours:
        if name != "Accept-Encoding":
            request.headers.pop(name, None)
    request.meta[TICKET] = replace(ticket, plan=Fetch(Reason.BARE), streams=False)
