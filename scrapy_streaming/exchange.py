"""What the components hand to one another: the ticket that a request carries in its meta.

What may live here: values only. The middleware, the handler and the pipeline know this module
and never one another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from scrapy import Request

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Known, Lease
from scrapy_streaming.protocol.resume import Fetch, Mode, Outcome, Plan, Reason
from scrapy_streaming.storage.finished import FinishedPart
from scrapy_streaming.storage.ledger import JobRequest

TICKET: Final = "_streaming"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the download handler gave, before any middleware could change it.

    ``body`` is what Scrapy buffered of a response that has no ``part``.
    """

    outcome: Outcome
    part: FinishedPart | None = None
    resumed_from: int = 0
    body: bytes = b""


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
    ``previous`` is what the job was completed with before. ``answer`` came from the handler last;
    ``published`` is what the pipeline's ``file_downloaded`` published.
    """

    key: str
    job: JobRequest
    lease: Lease
    known: Known | None = None
    expected: Digest | None = None
    mode: Mode = Mode.NORMAL
    restarts: int = 0
    reclaims: int = 0
    kept: int = 0
    ours: tuple[str, ...] = ()
    plan: Plan | None = None
    streams: bool = False
    max_size: int = 0
    first: str = ""
    asked: str = ""
    stale: bool = False
    changes: int = 0
    unmarked: str | None = None
    previous: Completion | None = None
    answer: Answer | None = None
    published: FinishedPart | None = None

    def accepts(self, known: Known) -> bool:
        """Whether what is stored can be what the request expects (E9)."""
        return self.expected is None or known.digest == str(self.expected)


def ticket_of(request: Request) -> Ticket | None:
    """Return the ticket a request carries, ``None`` for a request that is not ours."""
    ticket: Ticket | None = request.meta.get(TICKET)
    return ticket


def request_fields(request: Request) -> dict[str, str]:
    """Return the request's fields by lower-case name, several values joined as HTTP does."""
    return {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in request.headers.items()
    }


def response_fields(raw: Iterable[tuple[bytes, Iterable[bytes]]]) -> dict[str, list[str]]:
    """Return a response's fields by lower-case name, each with all its values, in order."""
    return {
        name.decode("latin-1").lower(): [value.decode("latin-1") for value in values] for name, values in raw
    }


def ask_plainly(request: Request, ticket: Ticket) -> None:
    """Turn a planned request into a plain GET whose body Scrapy buffers."""
    for name in ticket.ours:
        if name != "Accept-Encoding":
            request.headers.pop(name, None)
    request.meta[TICKET] = replace(ticket, plan=Fetch(Reason.BARE), streams=False)
