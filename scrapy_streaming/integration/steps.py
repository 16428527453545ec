"""The three steps that other code adopts piece by piece: decide, receive, publish.

Each works on one part at a path of the caller's choice (``storage.part_files``): the sidecar beside
it carries what one step has to know of the one before, also over a crash in between.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urldefrag

from scrapy_streaming.exceptions import (
    AnswerRefused,
    BodyIncomplete,
    IntegrityError,
    PartCorrupt,
    RequestFailed,
    WriteFailed,
)
from scrapy_streaming.integration.answers import Answer, answer_of
from scrapy_streaming.integration.clients import Client, client_of
from scrapy_streaming.integration.receiving import Progress, Reception, terms_of
from scrapy_streaming.integration.switches import is_off, or_fall_back, settings, why_no_streaming
from scrapy_streaming.protocol.answers import AlreadyWhole, Append, Outcome, Refuse, Replace, SentRequest
from scrapy_streaming.protocol.digests import Digest, expected_digest
from scrapy_streaming.protocol.jobs import StoredRepresentation, is_recent
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.parts import PartState, unproven
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Fetch,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    Revalidate,
    plan_request,
)
from scrapy_streaming.protocol.ranges import ContentRange
from scrapy_streaming.protocol.reasons import Proof, Reason, Recovery
from scrapy_streaming.protocol.selecting import ALWAYS, selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.complete_part import CompletePart, broken_promise
from scrapy_streaming.storage.decoding import coded_twice, decodable
from scrapy_streaming.storage.part_files import KEY, PartFile
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.sidecar import StoredPart
from scrapy_streaming.storage.store import Storage

#: Days that a finished representation is fresh, as ``FILES_EXPIRES`` is in Scrapy.
FRESH_DAYS: Final = 90
#: What the fields of ``validators`` and ``part_state`` may be called.
_FIELDS: Final = ("etag", "last_modified", "date")
#: Why a part is not gone on with, unless its last bytes are compared.
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-", re.ASCII)
_UNVALIDATED: Final = (Reason.NO_VALIDATOR, Reason.WEAK_VALIDATOR)


@dataclass(frozen=True, slots=True)
class ResumeDecision:
    """What to ask for.

    ``mode``: ``fresh`` (all of it), ``resume`` (from ``resume_byte_offset`` on, in bytes) or ``cached``
    (the bytes are here: with ``headers`` a 304 confirms them, without any no request is needed).
    ``headers`` go into the request as they are. ``reason`` is the stable word of the decision table,
    ``outcome`` the plan as the rules have it.
    """

    mode: Literal["fresh", "resume", "cached"]
    resume_byte_offset: int
    headers: dict[str, str]
    reason: str
    outcome: Plan


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """What was written: bytes, milliseconds, MiB a second of writing without the time of syncs.

    ``sha256_hex`` is that of the whole part, ``resumed_from_bytes`` how many of its bytes were there before.
    """

    bytes_written: int
    sha256_hex: str
    elapsed_ms: float
    fsync_ms: float
    avg_write_mibps: float
    resumed_from_bytes: int


@dataclass(frozen=True, slots=True)
class FinalizedArtifact:
    """A published file: ``path`` (absolute; the blob's own without a name), ``digest`` (``sha256:…``).

    ``size`` in bytes; ``deduplicated``: the store had these bytes already.
    """

    path: Path
    digest: str
    size: int
    deduplicated: bool


# -- arguments -------------------------------------------------------------------------------


def checked_path(name: str, value: Any) -> Path:
    """Return a path, or raise ``TypeError`` naming the argument."""
    if isinstance(value, str | os.PathLike) and (text := os.fspath(value)) and isinstance(text, str):
        return Path(text).absolute()
    msg = f"{name} must be a path, got {value!r}"
    raise TypeError(msg)


def checked_digest(value: Any, url: str = "") -> Digest | None:
    """Return the expected digest (``sha256:…``, 64 hex digits, ``{"sha256": …}``), or raise ``TypeError``."""
    fragment = urldefrag(url)[1]
    try:
        match value:
            case None:
                return expected_digest(None, None, fragment)
            case Digest():
                return expected_digest(str(value), None, fragment)
            case str():
                text = value if ":" in value else f"sha256:{value}"
                return expected_digest(text, None, fragment)
            case Mapping():
                return expected_digest(None, {"sha256": value["sha256"]}, fragment)
    except (ValueError, KeyError, AttributeError) as error:
        msg = f"expected={value!r} is no SHA-256: {error}"
        raise TypeError(msg) from error
    msg = f"expected must be 'sha256:<64 hex digits>', got {type(value).__name__}"
    raise TypeError(msg)


def checked_name(value: Any) -> str | None:
    """Return the name of a file below the store, or raise ``TypeError``."""
    if value is None or isinstance(value, str):
        return value
    msg = f"name must be a path below the store, got {type(value).__name__}"
    raise TypeError(msg)


def checked_callback(value: Any) -> Progress | None:
    """Return the callback, or raise ``TypeError``."""
    if value is None or callable(value):
        checked: Progress | None = value
        return checked
    msg = f"progress_callback must be callable with (bytes, total or None), got {type(value).__name__}"
    raise TypeError(msg)


def _checked_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    msg = f"{name} must be a whole number of bytes, {least} or more, got {value!r}"
    raise TypeError(msg)


def _validators(name: str, given: Any) -> Validators | None:
    """Return validators from fields of a response or of the caller's own making, ``None`` for none."""
    if given is None or isinstance(given, Validators):
        return given
    if not hasattr(given, "items"):
        msg = f"{name} must be Validators or a mapping of fields, got {type(given).__name__}"
        raise TypeError(msg)
    found = {
        key.lower().replace("-", "_"): value
        for key, value in ((_text(key), value) for key, value in given.items())
    }
    values = {field: found.get(field) for field in _FIELDS}
    for field, value in values.items():
        if value is not None and not isinstance(value, str | bytes | list | tuple):
            msg = f"{name}[{field!r}] must be a text as the server sent it, got {type(value).__name__}"
            raise TypeError(msg)
    return Validators.from_fields(*([] if values[f] is None else _all(values[f]) for f in _FIELDS))


def _all(value: Any) -> list[str]:
    return [_text(each).strip() for each in (value if isinstance(value, list | tuple) else [value])]


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


# -- 1: what to ask for ----------------------------------------------------------------------


def try_streaming_resume_decision(  # noqa: PLR0913 - the contract of docs/adapter.md; all but two by keyword
    validators: Any,
    part_state: Any,
    *,
    prefix_check_bytes: int = 65536,
    allow_without_validators: bool = False,
    client: Any = None,
    url: Any = None,
    fallback: bool = False,
) -> ResumeDecision | None:
    """Return what to ask the server for; ``None`` if ``STREAMING_RESUME_ENABLED`` is off.

    *part_state* is what is here: ``None``, the path of a part (its sidecar is read, and its bytes are
    compared with it), a ``PartState``, a mapping with ``length`` and what else a ``PartState`` has, or a
    ``FinalizedArtifact`` that *validators* are of. *validators* is what the server last said (a mapping
    with ``ETag``, ``Last-Modified``, ``Date``, or ``Validators``): a part with others is of another
    representation, and not offered. *url*, if given, must be the one that the part is of, behind
    redirects. A part without a strong validator is only gone on with if *allow_without_validators* is
    on and *client* (of httpx or requests, or ``"urllib"``) finds its last *prefix_check_bytes* bytes, and
    its length, on the server again. Raises ``TypeError`` for a wrong argument, ``StoreError``
    (``part-busy``), ``RequestFailed``.
    """
    _checked_number("prefix_check_bytes", prefix_check_bytes, 1)
    if url is not None and not isinstance(url, str):
        msg = f"url must be str, got {type(url).__name__}"
        raise TypeError(msg)
    if client is not None and url is None:
        msg = "url must be given with client: it is what client asks"
        raise TypeError(msg)
    said = _validators("validators", validators)
    asks = None if client is None else client_of(client)
    here = _here(part_state, said, url)
    if is_off(why_no_streaming("resume")):
        return None

    def decide() -> ResumeDecision:
        found = here() if callable(here) else here
        if isinstance(found.state, StoredRepresentation):
            return _decision(plan_request(None, found.state, PlannedRequest(found.state.final_url, {})))
        check = None
        if allow_without_validators and asks is not None and found.path is not None:
            check = _TailCheck(asks, url or "", found.path, prefix_check_bytes)
        return _decide(found, said, url, check)

    return or_fall_back(fallback, decide)


@dataclass(frozen=True, slots=True)
class _Here:
    """What is here: since when (seconds since the epoch), and where if it is a part on disk."""

    state: PartState | StoredRepresentation | None
    written_at: float
    path: Path | None = None


def _here(given: Any, said: Validators | None, url: str | None) -> _Here | Callable[[], _Here]:
    """Return what *part_state* stands for; raise ``TypeError`` naming it."""
    now = time.time()
    match given:
        case None | PartState():
            return _Here(given, now)
        case FinalizedArtifact(digest=digest, size=size):
            mine, asked = Validators() if said is None else said, urldefrag(url or "")[0]
            known = StoredRepresentation(
                digest, size, mine, asked, selecting=selecting_key((), {}), proof=Proof.LENGTH
            )
            return _Here(known, now)
        case str() | os.PathLike():
            path = checked_path("part_state", given)
            return lambda: _read_part(path)
        case Mapping():
            return _Here(_state_of(given, said, url), now)
    msg = f"part_state must be None, a path, a PartState or a mapping with length, got {type(given).__name__}"
    raise TypeError(msg)


def _state_of(given: Mapping[str, Any], said: Validators | None, url: str | None) -> PartState:
    length, total = given.get("length"), given.get("total")
    if not isinstance(length, int) or not isinstance(total, int | None):
        msg = (
            f"part_state['length'] and ['total'] must be whole numbers of bytes, got {length!r} and {total!r}"
        )
        raise TypeError(msg)
    own = _validators("part_state", given)
    if own is None or own == Validators():
        own = said if said is not None else Validators()
    return PartState(
        url=urldefrag(str(given.get("url", url or "")))[0],
        validators=own,
        length=length,
        total=total,
        selecting=selecting_key((), {}),
    )


def _read_part(path: Path) -> _Here:
    """Return what the sidecar at *path* says once its bytes hash to it (R2, R3); no file is made."""
    if not path.parent.is_dir():
        return _Here(None, 0.0)
    part = PartFile(path)
    try:
        stored = part.current()
        if stored is None:
            return _Here(None, 0.0)
        if stored.state.whole:
            part.complete_part(stored)
        else:
            part.reopen(stored, 0).close()
    except PartCorrupt:
        part.remove_files()
        return _Here(None, 0.0)
    finally:
        part.close()
    return _Here(stored.state, stored.written_at, path)


@dataclass(frozen=True, slots=True)
class _TailCheck:
    """How a part without validators is compared with what the server has now (R19)."""

    client: Client
    url: str
    path: Path
    size: int


def _decide(
    found: _Here, said: Validators | None, url: str | None, check: _TailCheck | None
) -> ResumeDecision:
    state = found.state
    if not isinstance(state, PartState):
        return _decision(Fetch(Reason.NOTHING_STORED))
    if said is not None and _another(state.validators, said):
        return _decision(Fetch(Reason.CHANGED))
    asked = PlannedRequest(
        urldefrag(url)[0] if url else state.url, {}, settings().weak_validators == "accept"
    )
    plan = plan_part(state, asked, fresh=is_fresh(found.written_at))
    if check is None or not isinstance(plan, Fetch) or plan.reason not in _UNVALIDATED:
        return _decision(plan)
    at = _offset_behind_tail(check, state)
    if at is None:
        return _decision(plan)
    return _decision(Resume(state, Reason.TAIL_OVERLAP, overlap=state.length - at))


def _offset_behind_tail(check: _TailCheck, state: PartState) -> int | None:
    """Return where to go on if the server has the part's last bytes, and its length; ``None`` if not (R6).

    The answer to the request that goes on begins with these bytes again: what is compared and what is
    joined to it come from one answer.
    """
    size = min(check.size, state.length)
    at = state.length - size
    if state.total is None or not size:
        return None
    fields = {**ALWAYS, "Range": f"bytes={at}-{state.length - 1}"}
    answer = check.client.get(check.url, fields, settings().stall_timeout)
    try:
        head = answer.head
        span = ContentRange.parse(head.content_ranges[0]) if len(head.content_ranges) == 1 else None
        wanted = ContentRange(at, state.length - 1, state.total)
        if head.status != 206 or span != wanted or head.content_encoding != state.content_encoding:
            return None
        came = b""
        for chunk in answer.chunks(size):
            came += chunk
            if len(came) > size:
                return None
    except answer.broken as error:
        msg = f"{check.url}: the bytes to compare did not come: {error}"
        raise RequestFailed(msg) from error
    finally:
        answer.close()
    part = PartFile(check.path)
    try:
        return at if came == part.tail(state.length, size) else None
    finally:
        part.close()


def plan_part(
    state: PartState,
    asking: PlannedRequest,
    known: StoredRepresentation | None = None,
    mode: Recovery = Recovery.NONE,
    *,
    fresh: bool,
) -> Plan:
    """Return the plan for a part; the fields of the request are judged when they are known, with its answer.

    A part whose end only the closed connection marked is probed (R33).
    """
    if state.total is None and state.proof is Proof.UNPROVEN and mode is Recovery.NONE:
        mode = Recovery.PROBE
    selecting = selecting_key((), {})
    vary = tuple(name for name in state.vary if name in ("*", "cookie"))
    plan = plan_request(
        replace(state, vary=vary, selecting=selecting_key(vary, {})),
        None if known is None else replace(known, vary=(), selecting=selecting),
        asking,
        mode,
        fresh=fresh,
    )
    match plan:
        case Resume() | ConfirmWhole() | PublishPart():
            return replace(plan, part=state)
        case _:
            return plan


def is_fresh(written_at: float) -> bool:
    """Whether bytes of that time may be used with no request (R7): by ``STREAMING_REVALIDATE``."""
    match settings().revalidate:
        case "always":
            return False
        case "never":
            return True
        case _:
            now = time.time()
            return is_recent(written_at, now - FRESH_DAYS * 86400, now)


def _another(ours: Validators, theirs: Validators) -> bool:
    """Whether the server speaks of another representation than the part is of."""
    if ours.etag is not None and theirs.etag is not None and not ours.etag.weak_equals(theirs.etag):
        return True
    dates = (ours.last_modified, theirs.last_modified)
    return None not in dates and dates[0] != dates[1]


def _decision(plan: Plan) -> ResumeDecision:
    headers, reason = {**ALWAYS, **plan.fields()}, str(plan.reason)
    match plan:
        case Resume():
            return ResumeDecision("resume", plan.first, headers, reason, plan)
        case PublishPart(part):
            return ResumeDecision("cached", part.length, {}, reason, plan)
        case ConfirmWhole(part):
            return ResumeDecision("cached", part.length, headers, reason, plan)
        case Revalidate(known):
            return ResumeDecision("cached", known.size, headers, reason, plan)
        case Fetch():
            return ResumeDecision("fresh", 0, headers, reason, plan)


# -- 2: what came ----------------------------------------------------------------------------


def try_streaming_io(  # noqa: PLR0913 - the contract of docs/adapter.md; all but two by keyword
    response: Any,
    part_path: str | os.PathLike[str],
    *,
    chunk_bytes: int = 65536,
    fsync: bool = True,
    progress_callback: Progress | None = None,
    request_headers: Any = None,
    fallback: bool = False,
) -> StreamMetrics | None:
    """Return what was written of *response* to the part; ``None`` if ``STREAMING_IO_ENABLED`` is off.

    *response* is one of httpx (``client.stream()``), requests (``stream=True``), urllib3
    (``preload_content=False``), urllib or Scrapy, with nothing read yet; it is closed at the end. A 206
    is joined to the part only on proof that it belongs to it, a 200 takes its place, a 304 says that it
    is whole. Octets are written as they came: a content coding that nobody asked for is taken off when
    the part is published. *request_headers* are those that were sent, where the library does not keep
    them (urllib). *progress_callback* gets the bytes that are there so far, and how many there will be,
    or ``None``. Raises ``TypeError`` for a wrong argument; ``AnswerRefused``, ``BodyConsumed``,
    ``BodyIncomplete`` and ``EndUnmarked`` (decide again, and ask again: what came is kept),
    ``IntegrityError``, ``StoreError`` (``part-busy``), ``WriteFailed``.
    """
    path = checked_path("part_path", part_path)
    size = _checked_number("chunk_bytes", chunk_bytes, 1)
    progress = checked_callback(progress_callback)
    if request_headers is not None and not isinstance(request_headers, Mapping):
        msg = f"request_headers must be a mapping, got {type(request_headers).__name__}"
        raise TypeError(msg)
    if is_off(why_no_streaming("io")):
        return None

    def receive() -> StreamMetrics:
        answer = answer_of(response)
        if request_headers is not None:
            asked = {str(name).lower(): str(value) for name, value in request_headers.items()}
            answer = replace(answer, asked=asked)
        try:
            part = PartFile(path, fsync=fsync and settings().fsync)
            try:
                return _PartStep(part, answer, size, progress).run()
            finally:
                part.close()
        finally:
            answer.close()

    return or_fall_back(fallback, receive)


class _PartStep:
    """One answer and the part that it is of."""

    def __init__(self, part: PartFile, answer: Answer, chunk_bytes: int, progress: Progress | None) -> None:
        self._part = part
        self._answer = answer
        self._chunk_bytes = chunk_bytes
        self._progress = progress
        self._started = time.monotonic()
        self._fsync_seconds = 0.0

    def run(self) -> StreamMetrics:
        stored = self._part.current()
        if self._answer.stored is not None:
            return self._take_stored(self._answer.stored)
        self._check_url(stored)
        plan = _plan_behind(self._answer, stored)
        asked = self._answer.asked or {}
        outcome = judge_response(plan, self._answer.head, SentRequest(asked, decodable=decodable()))
        match outcome:
            case Append() | Replace():
                return self._receive(stored, outcome)
            case AlreadyWhole(state, reason) if stored is not None:
                return self._confirm(stored, state, reason)
            case _:
                raise self._refused(stored, outcome)

    def _check_url(self, stored: StoredPart | None) -> None:
        """Refuse an answer that nothing connects with the part: the caller took the wrong path."""
        if stored is None or self._answer.redirected or self._answer.status not in (200, 203, 206):
            return
        if self._answer.url != stored.state.url:
            msg = (
                f"the part {self._part.path} is of {stored.state.url}, and the response is of "
                f"{self._answer.url}: give each URL a part of its own, or remove this one"
            )
            raise AnswerRefused(msg, reason=str(Reason.FOREIGN_PART))

    def _refused(self, stored: StoredPart | None, outcome: Outcome) -> AnswerRefused:
        status, url = self._answer.status, self._answer.url
        if isinstance(outcome, Refuse):
            self._after_refusal(stored, outcome.then)
            msg = f"{url}: the answer ({status}) was refused; {_NEXT[outcome.then]}"
            return AnswerRefused(msg, reason=str(outcome.reason))
        return AnswerRefused(
            f"{url}: an answer with status {status} is no file", reason=f"bad-status-{status}"
        )

    def _after_refusal(self, stored: StoredPart | None, then: Recovery) -> None:
        """See to it that the next decision does not lead to the same answer again."""
        if stored is None or then is Recovery.FAIL:
            return
        if then is Recovery.DISCARD:
            self._part.remove_files()
        elif not stored.state.whole:
            self._part.write_state(replace(stored.state, ranges_refused=True))
        else:
            self._part.write_state(replace(stored.state, validators=Validators()))

    def _receive(self, stored: StoredPart | None, outcome: Append | Replace) -> StreamMetrics:
        self._answer.check_unread()
        kept = outcome.state.length if isinstance(outcome, Append) else 0
        writer = self._open(stored, outcome)
        unmarked = stored.state if stored is not None else None
        marked = unmarked is not None and unmarked.total is None and unmarked.proof is Proof.UNPROVEN
        terms = replace(
            terms_of(settings(), self._chunk_bytes, self._part.directory),
            unmarked=unmarked.prefix_sha256 if unmarked is not None and marked else None,
            progress=self._progress,
        )
        reception = Reception(self._answer, self._without_unseen(outcome), writer, terms)
        try:
            finished = self._part.whole(reception.run())
        except AnswerRefused:
            if isinstance(outcome, Append):  # the body is not what its head said: no range is asked for again
                self._after_refusal(self._part.current(), Recovery.REFETCH)
            raise
        finally:
            self._part.keep_longer()
            self._fsync_seconds += reception.fsync_seconds
        wrong = broken_promise(finished, None)
        if wrong is not None:
            self._part.remove_files()
            msg = f"{finished.state.url}: the bytes hash to {finished.digest}, and the server said {wrong}"
            raise IntegrityError(msg)
        return self._metrics(reception.received, finished.digest.hex, kept)

    def _without_unseen(self, outcome: Append | Replace) -> Append | Replace:
        """Have a part never resumed that an unknown request selected among representations (R40).

        Nor are bytes ever confirmed that were joined without a validator (R19).
        """
        if isinstance(outcome, Append) and outcome.overlap:
            outcome = replace(outcome, state=unproven(outcome.state))
        state = outcome.state
        seen = self._answer.asked is not None or not set(state.vary) - {"accept-encoding"}
        return outcome if seen else replace(outcome, state=replace(state, selecting="unknown"))

    def _open(self, stored: StoredPart | None, outcome: Append | Replace) -> PartWriter:
        if isinstance(outcome, Replace) or stored is None:
            return self._part.create(KEY, 0, outcome.state)
        try:
            return self._part.reopen(stored, 0)
        except PartCorrupt:
            self._part.remove_files()
            raise

    def _confirm(self, stored: StoredPart, state: PartState, reason: Reason) -> StreamMetrics:
        """Note that the part is whole; nothing was received."""
        if reason is Reason.PROBED_WHOLE:
            state = replace(state, proof=Proof.LENGTH)
        whole = StoredPart(stored.name, state, stored.written_at)
        digest = self._part.complete_part(whole).digest
        self._part.write_state(state)
        return self._metrics(0, digest.hex, state.length)

    def _take_stored(self, part: CompletePart) -> StreamMetrics:
        """Take over a body that the package's own download handler received."""
        state = replace(part.state, total=part.length)
        answer = replace(self._answer, length=part.length)
        self._answer = answer
        return self._receive(None, Replace(state, Reason.FETCHED))

    def _metrics(self, written: int, sha256: str, kept: int) -> StreamMetrics:
        elapsed = time.monotonic() - self._started
        writing = max(elapsed - self._fsync_seconds, 1e-9)
        return StreamMetrics(
            bytes_written=written,
            sha256_hex=sha256,
            elapsed_ms=elapsed * 1000,
            fsync_ms=self._fsync_seconds * 1000,
            avg_write_mibps=written / (1 << 20) / writing,
            resumed_from_bytes=kept,
        )


_NEXT: Final[Mapping[Recovery, str]] = {
    Recovery.FAIL: "no other request would help",
    Recovery.DISCARD: "the part was of another representation and is gone: decide again, and ask again",
    Recovery.REFETCH: "the next decision asks for all of it",
    Recovery.REFETCH_NO_CACHE: "the next decision asks for all of it",
    Recovery.WITHOUT_RANGE: "the next decision asks for all of it",
    Recovery.CONFIRM: "the next decision asks for all of it",
    Recovery.PROBE: "decide again, and ask again",
    Recovery.ORIGINAL: "ask the URL that redirected here again",
}


def _plan_behind(answer: Answer, stored: StoredPart | None) -> Plan:
    """Return the plan that led to an answer, by the request's fields, else by what it can only have been."""
    if stored is None:
        return Fetch(Reason.NOTHING_STORED)
    state, asked = stored.state, answer.asked
    probe = state.total is None and state.proof is Proof.UNPROVEN
    if asked is None:
        ranged = answer.status != 304 and not state.whole
        conditional = answer.status == 304
    else:
        ranged = "range" in asked
        conditional = "if-none-match" in asked or "if-modified-since" in asked
    if ranged and state.length and not state.whole:
        if overlap := _overlap_of(answer, state):
            return Resume(state, Reason.TAIL_OVERLAP, overlap=overlap)
        return Resume(state, Reason.PROBE_END if probe else Reason.STRONG_VALIDATOR, probe=probe)
    return ConfirmWhole(state) if conditional else Fetch(Reason.BARE)


def _overlap_of(answer: Answer, state: PartState) -> int:
    """Return how many of the part's bytes were asked for again, to be compared (R19)."""
    if answer.asked is not None:
        match = _RANGE.fullmatch(answer.asked["range"])
        first = None if match is None or "if-range" in answer.asked else int(match[1])
    else:  # only a decision of ours leads to an answer that begins inside a part without a validator
        span = ContentRange.parse("".join(answer.head.content_ranges))
        first = None if span is None or state.validators.if_range() is not None else span.first
    return 0 if first is None else max(0, state.length - first)


# -- 3: what is stored -----------------------------------------------------------------------


def try_streaming_finalization(
    part_path: str | os.PathLike[str],
    *,
    store: str | os.PathLike[str],
    expected: Any = None,
    name: str | None = None,
    fallback: bool = False,
) -> FinalizedArtifact | None:
    """Return the published file; ``None`` if ``STREAMING_FINALIZATION_ENABLED`` is off.

    The part's bytes get a place by their content in *store* (a folder, as ``FILES_STORE``), durably and at
    once, and under *name* (a path below *store*) if it is given; then the part is gone. A content coding
    that nobody asked for is taken off. *expected* is the digest that they must have: ``sha256:<hex>``,
    hex, or ``{"sha256": hex}``. A file without a sidecar is taken for whole: its writer vouches for it.
    Raises ``TypeError`` for a wrong argument, ``BodyIncomplete`` for a part that is not whole,
    ``PartCorrupt``, ``IntegrityError`` (the part stays), ``Undecodable``, ``DecodedTooLarge``,
    ``StoreError``, ``WriteFailed``.
    """
    path, root = checked_path("part_path", part_path), checked_path("store", store)
    wanted, named = checked_digest(expected), checked_name(name)
    if is_off(why_no_streaming("finalization")):
        return None
    return or_fall_back(fallback, lambda: _finalize(path, root, wanted, named))


def _finalize(path: Path, root: Path, expected: Digest | None, name: str | None) -> FinalizedArtifact:
    # without the ledger: nothing is recorded, and store.json notes that there is more than a ledger knows
    with closing(Storage.open(replace(settings(root), schema_enabled=False))) as files:
        if name is not None:
            files.blobs.check_name(name)  # refused before anything is written
        part = PartFile(path, fsync=files.fsync)
        try:
            finished = _whole_part(part)
            if expected != finished.digest:
                finished = _decoded(part, finished)
            wrong = broken_promise(finished, expected)
            if wrong is not None:
                msg = f"{path}: the bytes hash to {finished.digest}, expected was {wrong}"
                raise IntegrityError(msg)
            published = files.blobs.publish(finished)
            target = blob_key(finished.digest)
            if name is not None:
                target = files.blobs.name(finished.digest, name, stamp=published.stamp, part=finished).path
            part.remove_files()
        finally:
            part.close()
    return FinalizedArtifact(root / target, str(finished.digest), finished.length, published.deduplicated)


def _whole_part(part: PartFile) -> CompletePart:
    stored = part.current()
    if stored is None:
        return _unvouched(part.path)
    if not stored.state.whole:
        state = stored.state
        of = "an unknown number" if state.total is None else state.total
        msg = f"{part.path}: {state.length} bytes of {of} are there; go on with the download first"
        raise BodyIncomplete(msg, state.length)
    return replace(part.complete_part(stored), path=part.path)


def _unvouched(path: Path) -> CompletePart:
    """Return a file that the caller wrote by other means, hashed now."""
    try:
        with path.open("rb") as stream:
            digest = Digest(file_digest(stream, "sha256").hexdigest())
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        msg = f"{path} cannot be published: {error.strerror}"
        raise WriteFailed(msg, reason="part-missing") from error
    state = PartState("", Validators(), length, digest.hex, length)
    return CompletePart(state, length, digest, path)


def _decoded(part: PartFile, finished: CompletePart) -> CompletePart:
    """Return the part without the codings that nobody asked for (R34)."""
    state = finished.state
    if state.coding_is_content and coded_twice(finished.chunks(), state.content_encoding):
        finished = replace(finished, state=replace(state, coding_is_content=False))
    if not finished.state.to_decode:
        return finished
    return part.decode(finished, KEY, 0, settings().max_size)
