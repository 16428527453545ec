"""Values, strategies and the oracle that the tests of ``protocol`` share.

The oracle reads an answer's raw fields with patterns of its own, not with the parsers under
test, and returns what is wrong as words: an empty list is a pass. ``test_mutants.py`` shows
that it finds something when a rule is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

from scrapy_streaming.protocol.answers import (
    AlreadyWhole,
    Append,
    Outcome,
    PassOn,
    Refuse,
    Replace,
    ResponseHead,
    SentRequest,
    Unchanged,
)
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import StoredRepresentation
from scrapy_streaming.protocol.judging import judge_response
from scrapy_streaming.protocol.parts import PartState
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
from scrapy_streaming.protocol.reasons import Recovery
from scrapy_streaming.protocol.selecting import PLAN_FIELDS, selecting_key
from scrapy_streaming.protocol.validators import Validators

T = TypeVar("T")

URL = "https://example.org/a.bin"
ELSEWHERE = "https://mirror.example.net/a.bin"
MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"
OLDER = "Sun, 31 Dec 2023 00:00:00 GMT"
DATE = "Tue, 02 Jan 2024 00:00:00 GMT"
SOON = "Mon, 01 Jan 2024 00:00:59 GMT"
JUST = "Mon, 01 Jan 2024 00:00:01 GMT"
DIGEST = Digest("0" * 64)
SHA_0 = "sha-256=:" + "A" * 43 + "=:"
SHA_1 = "sha-256=:" + "A" * 42 + "E=:"
SENT = {"accept-encoding": "identity"}
ASKING = PlannedRequest(URL, {"accept-encoding": "gzip, deflate"})


@dataclass(frozen=True)
class Answer:
    """An answer as it came: status, URL, raw fields, and the client's idea of its length."""

    status: int
    fields: dict[str, list[str]] = field(default_factory=dict)
    length: int | None = None
    url: str = URL

    @property
    def head(self) -> ResponseHead:
        return ResponseHead.from_fields(self.status, self.url, self.fields, self.length)

    def values(self, name: str) -> list[str]:
        return [value.strip(" \t") for value in self.fields.get(name, [])]


def answer(status: int, length: int | None = None, url: str = URL, **fields: str | list[str]) -> Answer:
    """Return an answer; ``content_range="…"`` stands for one field, a list for several."""
    return Answer(
        status,
        {k.replace("_", "-"): [v] if isinstance(v, str) else v for k, v in fields.items()},
        length,
        url,
    )


def validators(etag: str | None = None, modified: str | None = None, date: str | None = DATE) -> Validators:
    return Validators.from_fields(
        [] if etag is None else [etag], [] if modified is None else [modified], [] if date is None else [date]
    )


STRONG = validators('"v1"', MODIFIED)
WEAK = validators('W/"v1"', MODIFIED)
DATED = validators(None, MODIFIED)
NOTHING = validators()


def a_part(told: Validators = STRONG, length: int = 100, total: int | None = 1000, **more: Any) -> PartState:
    """Return a part of URL that was asked for without credentials: 100 of 1000 bytes."""
    values: dict[str, Any] = {
        "url": URL,
        "validators": told,
        "length": length,
        "prefix_sha256": "ab" * 32,
        "total": total,
        "selecting": selecting_key(more.get("vary", ()), SENT),
    } | more
    return PartState(**values)


def a_known(told: Validators = STRONG, **more: Any) -> StoredRepresentation:
    values: dict[str, Any] = {
        "digest": str(DIGEST),
        "size": 1000,
        "validators": told,
        "final_url": URL,
        "selecting": selecting_key(more.get("vary", ()), SENT),
        "proof": "length",
    } | more
    return StoredRepresentation(**values)


def resume(part: PartState | None = None) -> Resume:
    """Return the plan for a part that can be resumed; the planner has to agree that it can."""
    plan = plan_request(a_part() if part is None else part, None, ASKING)
    assert isinstance(plan, Resume), plan
    return plan


def judged(plan: Plan, got: Answer) -> Outcome:
    return judge_response(plan, got.head, SentRequest(SENT))


# -- the oracle ------------------------------------------------------------------------------

_RANGE = re.compile(r"[Bb][Yy][Tt][Ee][Ss] ([0-9]{1,1000})-([0-9]{1,1000})/([0-9]{1,1000}|\*)")
_TAG = re.compile(r'(W/)?"[!#-~]*"')
_STRONG_TAG = re.compile(r'"[!#-~]*"')
_CLEAN = re.compile(r"[ -~]{1,1024}")


def request_violations(plan: Plan) -> list[str]:
    """Return what is wrong with the fields a plan sends (RFC 9110 §13, §14)."""
    sent = plan.fields()
    wrong = [f"{name} is not clean" for name, value in sent.items() if _CLEAN.fullmatch(value) is None]
    if isinstance(plan, Resume):
        conditional = set(sent) & {"If-None-Match", "If-Modified-Since", "If-Match"}
        if conditional or {"If-Range", "If-Unmodified-Since"} <= set(sent):
            wrong.append("another conditional beside Range")
        if sent.get("Range") != f"bytes={plan.part.length}-" or plan.part.length <= 0:
            wrong.append("Range does not start behind the part")
        if "If-Unmodified-Since" in sent:
            wrong += _unmodified_since_violations(plan.part, sent["If-Unmodified-Since"])
        elif "If-Range" in sent or not plan.probe:
            wrong += _if_range_violations(plan.part, sent.get("If-Range"))
    elif {"Range", "If-Range"} & set(sent):
        wrong.append("Range where nothing is resumed")
    if isinstance(plan, Fetch | PublishPart) and set(sent) & set(PLAN_FIELDS):
        wrong.append("a plain request is conditional")
    return wrong


def _unmodified_since_violations(part: PartState, value: str) -> list[str]:
    told = part.validators
    checks = {
        "If-Unmodified-Since without a weak tag": told.etag is not None and told.etag.weak,
        "If-Unmodified-Since with a date that is not ours": value == told.last_modified,
        "If-Unmodified-Since with a weak date": _old_enough(told.last_modified, told.date),
    }
    return [word for word, fine in checks.items() if not fine]


def _old_enough(modified: str | None, date: str | None) -> bool:
    try:
        apart = parsedate_to_datetime(str(date)) - parsedate_to_datetime(str(modified))
    except ValueError:
        return False
    return apart.total_seconds() >= 60


def _if_range_violations(part: PartState, value: str | None) -> list[str]:
    if value is None:
        return ["Range without If-Range"]
    if _STRONG_TAG.fullmatch(value):
        mine = part.validators.etag
        return [] if mine is not None and str(mine) == value else ["If-Range with a tag that is not ours"]
    if value.startswith("W/"):
        return ["If-Range with a weak tag"]
    if part.validators.etag is not None:
        return ["If-Range with a date although there is a tag"]
    modified, date = part.validators.last_modified, part.validators.date
    if value != modified or date is None:
        return ["If-Range with a date that is not ours"]
    return [] if _old_enough(modified, date) else ["If-Range with a weak date"]


def violations(plan: Plan, got: Answer, outcome: Outcome) -> list[str]:
    """Return what is wrong with taking *got*, the answer to *plan*, for *outcome*."""
    match outcome:
        case Append():
            return _append_violations(plan, got, outcome)
        case Replace():
            return _replace_violations(got, outcome) + _racy_violations(got, outcome)
        case Unchanged(known):
            return _unchanged_violations(plan, got, known)
        case AlreadyWhole(state):
            return _whole_violations(plan, got, state)
        case PassOn():
            return ["a representation passed on"] if got.status in (200, 203, 206, 304) else []
        case Refuse(_, then):
            return _refusal_violations(plan, got, then)


def _span(got: Answer) -> tuple[int, int, int | None] | None:
    ranges = got.values("content-range")
    match = _RANGE.fullmatch(ranges[0]) if len(ranges) == 1 else None
    if match is None:
        return None
    first, last, total = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    if first > last or (total is not None and last >= total):
        return None
    return None if got.length is not None and got.length != last - first + 1 else (first, last, total)


def _codings(got: Answer) -> list[str]:
    named = [c.strip(" \t").lower() for value in got.values("content-encoding") for c in value.split(",")]
    return [c for c in named if c not in ("", "identity")]


def _digest_differs(part: PartState, got: Answer) -> bool:
    said = got.values("repr-digest")
    return part.repr_digest is not None and said != [] and said == [SHA_1]


def _lengths_agree(got: Answer) -> bool:
    return any(got.values("transfer-encoding")) or len(set(got.values("content-length"))) <= 1


def _append_violations(plan: Plan, got: Answer, outcome: Append) -> list[str]:
    if not isinstance(plan, Resume):
        return ["joined to a part although nothing was resumed"]
    part, span = plan.part, _span(got)
    if got.status not in (200, 206) or span is None:
        return ["joined without the one valid Content-Range of a 206"]
    if got.status == 200 and (got.length is None or got.values("etag") != [str(part.validators.etag)]):
        return ["joined a 200 that is no proven slice"]
    first, last, total = span
    known_end = total is not None or part.total == last + 1
    checks = {
        "joined at another place": first == part.length == outcome.state.length,
        "another end than Content-Range says": outcome.until == last + 1,
        "another complete length": None in (total, part.total) or total == part.total,
        "nothing says where the representation ends": known_end,
        "the complete length got lost": outcome.state.total == (part.total if total is None else total),
        "another coding": ", ".join(_codings(got)) == part.content_encoding == outcome.state.content_encoding,
        "another digest": not _digest_differs(part, got),
        "several parts in one body": not "".join(got.values("content-type")).startswith("multipart/"),
        "lengths disagree": _lengths_agree(got),
        "the prefix is not the part's": outcome.state.prefix_sha256 == part.prefix_sha256,
        "counts before its end was seen": outcome.provisional
        or (got.length is not None and outcome.content_digest is None),
    }
    return [word for word, fine in checks.items() if not fine] + _identity_violations(part, got, total)


def _identity_violations(part: PartState, got: Answer, total: int | None) -> list[str]:
    """Return what speaks against an answer being of the part's representation (R10 to R14)."""
    tags, modified = set(got.values("etag")), set(got.values("last-modified"))
    mine = part.validators.etag
    same_total = total is not None and total == part.total
    same_date = modified == {part.validators.last_modified}
    same_digest = part.repr_digest is not None and got.values("repr-digest") == [SHA_0]
    if got.url != part.url:
        return [] if same_total and same_digest else ["of another URL, and nothing proves it the same"]
    odd = len(tags) > 1 or any(_TAG.fullmatch(tag) is None for tag in tags)
    weak = mine is not None and mine.weak
    if odd or (mine is not None and not weak and any(tag.startswith("W/") for tag in tags)):
        return ["a tag that is not strong"]
    readable = len(modified) == 1 and all(_CLEAN.fullmatch(m) for m in modified)
    if readable and part.validators.last_modified not in (None, *modified):
        return ["another date"]
    if mine is None and tags:
        return ["a tag that the part never had"]
    if mine is None or weak:
        dated = _old_enough(part.validators.last_modified, part.validators.date)
        same_tag = all(tag.removeprefix("W/") == str(mine).removeprefix("W/") for tag in tags)
        return [] if same_total and same_date and dated and same_tag else ["not the same date and length"]
    if tags:
        return [] if tags == {str(mine)} else ["another tag"]
    return [] if same_total and (same_date or same_digest) else ["untagged and unproven"]


def _replace_violations(got: Answer, outcome: Replace) -> list[str]:
    span, state = _span(got), outcome.state
    checks = {
        "not a representation": got.status in (200, 203, 206),
        "a 206 that is not whole": got.status != 206 or span is not None,
        "a proxy's bytes under the origin's validators": got.status != 203
        or (state.validators == Validators() and state.repr_digest is None),
        "lengths disagree": _lengths_agree(got),
        "a new part is not empty": state.length == 0 and state.prefix_sha256 == "",
        "the length that was said is not checked": got.length in (None, state.total),
        "the coding got lost": state.content_encoding == ", ".join(_codings(got)),
        "another URL": state.url == got.url,
    }
    if got.values("content-range"):
        whole = span is not None and (span[0], span[1] + 1) == (0, span[2]) and state.total == span[2]
        a_slice = span is not None and (span[0] > 0 or span[2] not in (None, span[1] + 1))
        checks["a slice taken for the whole"] = whole if got.status == 206 else not a_slice
        checks["its Content-Range is not checked"] = got.status != 206 or outcome.ranged
    return [word for word, fine in checks.items() if not fine]


def _racy_violations(got: Answer, outcome: Replace) -> list[str]:
    """Return what is wrong with the validators of a body that was just modified (R75)."""
    modified, date = got.values("last-modified"), got.values("date")
    if len(set(modified)) != 1 or len(set(date)) != 1 or got.values("etag"):
        return []
    try:
        apart = parsedate_to_datetime(date[0]) - parsedate_to_datetime(modified[0])
    except ValueError:
        return []
    racy = apart.total_seconds() < 2 and all(_CLEAN.fullmatch(v) for v in (*modified, *date))
    return (
        ["a just modified body has validators"] if racy and outcome.state.validators != Validators() else []
    )


def _unchanged_violations(plan: Plan, got: Answer, known: StoredRepresentation) -> list[str]:
    if got.status != 304 or not isinstance(plan, Revalidate):
        return ["unchanged, but nobody asked or answered so"]
    old, tags = plan.known, set(got.values("etag"))
    mine = None if old.validators.etag is None else str(old.validators.etag)
    if mine is None and (len(tags) > 1 or not any(_TAG.fullmatch(tag) for tag in tags)):
        tags = set()  # R39: no usable tag, neither then nor now
    modified = set(got.values("last-modified"))
    other_date = len(modified) == 1 and all(_CLEAN.fullmatch(m) for m in modified)
    checks = {
        "another strong tag": {tag for tag in tags if _STRONG_TAG.fullmatch(tag)} <= {mine},
        "another weak tag": all(tag.removeprefix("W/") == (mine or "").removeprefix("W/") for tag in tags),
        "another date": not other_date or old.validators.last_modified in {None, *modified},
        "of another URL": got.url == old.final_url,
        "other bytes": (known.digest, known.size) == (old.digest, old.size),
    }
    return [word for word, fine in checks.items() if not fine]


def _whole_violations(plan: Plan, got: Answer, state: PartState) -> list[str]:
    if isinstance(plan, Resume) and plan.probe:
        fine = got.status == 416 and got.values("content-range") == [f"bytes */{plan.part.length}"]
        length = state.total == state.length == plan.part.length > 0
        return [] if fine and length else ["whole, but no 416 with its length said so"]
    if got.status != 304 or not isinstance(plan, ConfirmWhole):
        return ["whole, but nobody asked or answered so"]
    part, tags = plan.part, set(got.values("etag"))
    mine = None if part.validators.etag is None else str(part.validators.etag)
    checks = {
        "a short part taken for whole": part.total in (None, part.length),
        "another tag": tags <= {mine} or (part.total is not None and _weakly(tags) == _weakly({mine})),
        "of another URL": got.url == part.url,
        "no length": state.total == state.length == part.length > 0,
    }
    return [word for word, fine in checks.items() if not fine]


def _weakly(tags: set[str | None]) -> set[str]:
    """Return tags as If-None-Match compares them."""
    return {str(tag).removeprefix("W/") for tag in tags}


def _refusal_violations(plan: Plan, got: Answer, then: Recovery) -> list[str]:
    wrong = []
    if then is Recovery.CONFIRM and (got.status, got.values("content-range")) != (
        416,
        [f"bytes */{plan.part.length}"] if isinstance(plan, Resume) else [],
    ):
        wrong.append("asks whether the part is whole though no 416 said so")
    if isinstance(plan, Fetch) and then is not Recovery.FAIL and (plan.no_cache or got.status != 304):
        wrong.append("a plain request is repeated")
    return wrong


# -- exchanges at random ---------------------------------------------------------------------

TAGS = (
    '"v1"',
    'W/"v1"',
    '"v2"',
    '"v1-gzip"',
    'w/"v1"',
    "v1",
    '""',
    '"v\xe9"',
    '"v1", "v2"',
    '"v1"\r\nX: y',
    '"a\x00"',
)
DATES = (MODIFIED, OLDER, SOON, DATE, JUST, "yesterday", "Mon, 01 Jan 2024 00:00:00 GMT\r\nX: y", "")
CODINGS = ("", "gzip", "identity", "gzip, br", "GZIP", "compress")
KNOWN = (None, None, a_known(STRONG), a_known(WEAK), a_known(DATED), a_known(NOTHING))
#: What a request may be planned as; ``DISCARD`` is planned as ``REFETCH``, ``ORIGINAL`` as ``NONE``.
RECOVERIES = (
    Recovery.NONE,
    Recovery.REFETCH,
    Recovery.WITHOUT_RANGE,
    Recovery.SINGLE_SHOT,
    Recovery.REFETCH_NO_CACHE,
    Recovery.CONFIRM,
    Recovery.PROBE,
)
KEYS = (selecting_key((), SENT), selecting_key(("accept-encoding",), SENT), "")


def _mostly(rng: Random, usual: T, *others: T) -> T:
    """Return the usual three times out of four: near to right finds more than far from it."""
    return usual if rng.random() < 0.75 else rng.choice(others)


def random_part(rng: Random) -> PartState:
    """Return a part as a response head left it: with any validators, in any state."""
    told = random_fields(rng, rng.choice([STRONG, DATED, WEAK, NOTHING]))
    got = answer(200, **told)
    vary = _mostly(rng, (), ("accept-encoding",), ("accept",), ("*",), ("cookie",))
    return PartState(
        url=_mostly(rng, URL, ELSEWHERE),
        validators=_mostly(rng, rng.choice([STRONG, DATED]), WEAK, NOTHING, got.head.validators),
        length=_mostly(rng, 100, 0, 1, 999, 1000, 2000),
        prefix_sha256="ab" * 32,
        total=_mostly(rng, rng.choice([1000, 1000, None]), 100, 1001),
        content_encoding=_mostly(rng, "", "gzip"),
        vary=vary,
        selecting=_mostly(rng, selecting_key(vary, SENT), *KEYS),
        repr_digest=_mostly(rng, None, DIGEST),
        ranges_refused=_mostly(rng, False, True),
    )


def random_fields(rng: Random, like: Validators = STRONG) -> dict[str, list[str]]:
    """Return the fields of an answer: near to right, but any of them may be wrong or doubled."""
    tag = [] if like.etag is None else [str(like.etag)]
    got = {
        "etag": _mostly(rng, tag, [], ['"v1"', '"v2"'], *([t] for t in TAGS)),
        "last-modified": _mostly(rng, [MODIFIED], [], [MODIFIED, OLDER], *([d] for d in DATES)),
        "date": _mostly(rng, [DATE], [], *([d] for d in DATES)),
        "content-encoding": _mostly(rng, [], *([c] for c in CODINGS)),
        "repr-digest": _mostly(rng, [], [SHA_0], [SHA_1], ["sha-256=junk"]),
        "content-digest": _mostly(rng, [], [SHA_0], [SHA_1]),
        "vary": _mostly(rng, [], ["Accept-Encoding"], ["*"], ["Cookie"]),
        "content-type": _mostly(rng, ["text/plain"], [], ["multipart/byteranges; boundary=x"]),
        "accept-ranges": _mostly(rng, [], ["none"], ["bytes"]),
        "content-length": _mostly(rng, [], ["900"], ["900", "901"], ["-1"]),
    }
    return {name: values for name, values in got.items() if values}


def random_answer(rng: Random, start: int = 100, likely: int = 206) -> Answer:
    status = rng.choice([likely, likely, likely, likely, 206, 200, 304, 416, 412, 203, 301, 403, 503])
    got = random_fields(rng, rng.choice([STRONG, STRONG, DATED, WEAK, NOTHING]))
    first = _mostly(rng, start, 0, start - 1, start + 1)
    total = _mostly(rng, "1000", "*", "1001", "100", str(start), "9" * 5000)
    last = _mostly(rng, 999, 998, 0, first, 1000)
    span = f"bytes {first}-{last}/{total}"
    got["content-range"] = _mostly(
        rng,
        [] if status == 200 else [f"bytes */{start}"] if status == 416 else [span],
        [],
        [span],
        [span, span],
        ["bytes */100"],
        ["bytes */*"],
        ["bytes */99"],
        [f"items {span[6:]}"],
        [span + "\x0b"],
        ["bytes 0-999/1000"],
        [span.upper()],
        [span.replace(" ", "=")],
        [span[:-1]],
    )
    length = _mostly(rng, None, last - first + 1, 1000, 373)
    return Answer(status, got, length, _mostly(rng, URL, URL, ELSEWHERE))


def random_plan(rng: Random) -> Plan:
    part = _mostly(rng, random_part(rng), None)
    return plan_request(
        part,
        rng.choice(KNOWN),
        ASKING,
        _mostly(rng, Recovery.NONE, *RECOVERIES, Recovery.CONFIRM, Recovery.CONFIRM),
    )


def random_exchange(rng: Random) -> tuple[Plan, Answer]:
    """Return a plan and an answer to it."""
    plan = random_plan(rng)
    if isinstance(plan, Resume):
        return plan, random_answer(rng, plan.part.length, rng.choice([206, 206, 416]))
    return plan, random_answer(rng, likely=200 if isinstance(plan, Fetch) else 304)


def many(make: Callable[[Random], T], count: int) -> Iterator[T]:
    """Return *count* values at random, the same ones each time."""
    rng = Random(9110)
    return (make(rng) for _ in range(count))


@cache
def many_exchanges() -> list[tuple[Plan, Answer]]:
    """Return exchanges that reach every outcome and every reason, the same ones each time."""
    return list(many(random_exchange, 12_000))


RANDOM = st.randoms(use_true_random=False)
plans = RANDOM.map(random_plan)
answers = RANDOM.map(random_answer)
exchanges = RANDOM.map(random_exchange)
