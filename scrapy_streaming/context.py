"""What the components hand to one another: the context of one download, from its claim to its completion.

What may live here: values only. The middleware, the handler and the pipeline know this module
and never one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from scrapy import Request

from scrapy_streaming.protocol.answers import Outcome, Refuse, Replace, SentRequest, Unchanged
from scrapy_streaming.protocol.attempts import Attempt
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Lease, StoredRepresentation, is_recent
from scrapy_streaming.protocol.planning import Fetch, Plan
from scrapy_streaming.protocol.reasons import Reason, Recovery
from scrapy_streaming.protocol.selecting import selects_again
from scrapy_streaming.request_fields import fields_of
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.decoding import decodable
from scrapy_streaming.storage.job_request import JobRequest

#: Where a request's meta has the context of its download. All copies of the request share it.
CONTEXT: Final = "_streaming"
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
    part: CompletePart | None = None
    resumed_from: int = 0
    body: bytes = b""


@dataclass(slots=True)
class Tries:
    """What became of the requests for one file in this crawl.

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

    def answered(self, status: int, part: CompletePart | None) -> None:
        """Note an answer, and the *part* on disk that it completed, if any."""
        self.status = status
        if part is not None:
            self.whole, self.kept = True, part.length if part.path is not None else 0


@dataclass(frozen=True, slots=True)
class RequestInFlight:
    """A request as the middleware planned it.

    ``fields`` are the names of the request fields that the plan set. ``streams``: the handler takes the
    body itself. ``max_size`` in bytes, 0 for no limit. ``redirected_again``: this URL was asked before,
    and a redirect led to it again.
    """

    plan: Plan
    fields: tuple[str, ...]
    streams: bool
    max_size: int = 0
    redirected_again: bool = False

    def plain(self) -> RequestInFlight:
        """Return this request as a plain GET whose body Scrapy buffers."""
        return replace(self, plan=Fetch(Reason.BARE), streams=False)


@dataclass(slots=True, eq=False)
class DownloadContext:
    """One download from its claim to its completion: every request for the file carries this object.

    Set at the claim: ``stored`` is what is stored of the URL already, ``previous`` what the job was
    completed with before, ``expected`` the digest that the bytes must have, ``request_fields`` those
    that the request was to be sent with (``None``: not known). A whole part is published with no
    request if it was written at ``refresh_before`` or later, in seconds since the epoch; ``None`` for
    any (R7). ``accepts_codings`` is the request's own Accept-Encoding (R78). ``only_resumes``: the file
    is only taken if validators prove it to be that of the part; the request that began it may have had
    other fields.

    ``lease`` is the current one: a claim after a lost lease replaces it. ``attempt`` says how the file is
    asked for next. ``original_url`` is the URL asked before any redirect, ``original_fields`` the fields
    of the request for it as it came to the middleware, and ``last_url`` the URL asked last. ``sent`` is
    the request in flight, ``None`` if it was not planned; ``answer`` what the handler gave for it last.
    ``published`` is what the pipeline's ``file_downloaded`` published.
    """

    key: str
    job: JobRequest
    lease: Lease
    stored: StoredRepresentation | None = None
    expected: Digest | None = None
    previous: Completion | None = None
    refresh_before: float | None = None
    accepts_codings: str | None = None
    only_resumes: bool = False
    request_fields: Mapping[str, str] | None = None
    attempt: Attempt = field(default_factory=Attempt)
    original_url: str = ""
    original_fields: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()
    last_url: str = ""
    sent: RequestInFlight | None = None
    answer: Answer | None = None
    published: CompletePart | None = None
    tries: Tries = field(default_factory=Tries)

    @property
    def plan(self) -> Plan | None:
        """The plan of the request in flight, ``None`` if it has none."""
        return None if self.sent is None else self.sent.plan

    @property
    def planned_fields(self) -> tuple[str, ...]:
        """The names of the request fields that the last plan set."""
        return () if self.sent is None else self.sent.fields

    @property
    def streams(self) -> bool:
        """Whether the handler takes the body of the request in flight itself."""
        return self.sent is not None and self.sent.streams

    @property
    def has_whole_answer(self) -> bool:
        """Whether the last answer brought a whole file, or confirmed one that is stored."""
        return self.answer is not None and (
            self.answer.part is not None or isinstance(self.answer.outcome, Unchanged)
        )

    def may_publish(self, written_at: float, now: float) -> bool:
        """Whether a whole part of that time may be published with no request (R7, I14)."""
        return self.expected is not None or is_recent(written_at, self.refresh_before, now)

    def accepts(self, stored: StoredRepresentation) -> bool:
        """Whether what is stored can be what the request expects (E9), and selects (R40)."""
        if self.request_fields is not None and not selects_again(stored, self.request_fields):
            return False
        return self.expected is None or stored.digest == str(self.expected)

    def judged_by(self, request: Request) -> SentRequest:
        """Return what an answer to *request* is judged by, beside its plan."""
        again = self.sent is not None and self.sent.redirected_again
        return SentRequest(fields_of(request.headers), self.original_url, again, decodable())

    def allowed(self, outcome: Outcome) -> Outcome:
        """Return *outcome*, but refuse another representation than the part's where only that is wanted."""
        other = self.only_resumes and isinstance(outcome, Replace)
        return Refuse(Reason.CHANGED, Recovery.FAIL) if other else outcome


def context_of(request: Request) -> DownloadContext | None:
    """Return the context of the download that *request* belongs to, ``None`` if it is not streamed."""
    context: DownloadContext | None = request.meta.get(CONTEXT)
    return context
