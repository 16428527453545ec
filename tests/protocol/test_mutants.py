"""The rules taken out one at a time: the oracle must notice each time (S9).

Each mutant replaces one function of the decisions by one that lacks a check. The same search
that finds nothing wrong with the real one has to find something then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from protocol_kit import (
    a_part,
    answer,
    judged,
    many,
    many_exchanges,
    random_plan,
    request_violations,
    resume,
    violations,
)

from scrapy_streaming.protocol import answers, judging, planning, ranges
from scrapy_streaming.protocol.answers import AlreadyWhole, ResponseHead
from scrapy_streaming.protocol.planning import ConfirmWhole, Resume
from scrapy_streaming.protocol.ranges import ContentRange
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.validators import Validators

pytestmark = pytest.mark.slow


def _wrong_exchanges() -> Iterator[list[str]]:
    for plan, got in many_exchanges():
        wrong = violations(plan, got, judged(plan, got))
        if wrong:
            yield wrong


def _wrong_exchange() -> list[str]:
    """Return what the oracle says against the first wrong outcome that it finds, if any."""
    return next(_wrong_exchanges(), [])


def _wrong_requests() -> set[str]:
    return {word for plan in many(random_plan, 2000) for word in request_violations(plan)}


def test_nothing_is_found_without_a_mutant():
    assert _wrong_exchange() == []
    assert _wrong_requests() == set()


# -- requests --------------------------------------------------------------------------------


def test_a_resume_without_if_range_is_noticed(monkeypatch):
    assert request_violations(resume()) == []
    monkeypatch.setattr(Resume, "fields", lambda plan: {"Range": f"bytes={plan.part.length}-"})
    assert request_violations(resume()) == ["Range without If-Range"]
    assert _wrong_requests() == {"Range without If-Range"}


def test_a_conditional_beside_range_is_noticed(monkeypatch):
    real = Resume.fields
    monkeypatch.setattr(Resume, "fields", lambda plan: real(plan) | plan.part.validators.conditional_fields())
    assert _wrong_requests() == {"another conditional beside Range"}


def test_a_weak_tag_in_if_range_is_noticed(monkeypatch):
    monkeypatch.setattr(Validators, "if_range", lambda v: None if v.etag is None else str(v.etag))
    assert _wrong_requests() == {"If-Range with a weak tag"}


@pytest.mark.parametrize(
    ("mutant", "word"),
    [
        (lambda v: v.last_modified, "If-Range with a date although there is a tag"),
        (lambda v: v.last_modified if v.etag is None else None, "If-Range with a weak date"),
    ],
)
def test_a_date_in_if_range_that_must_not_be_there_is_noticed(monkeypatch, mutant, word):
    monkeypatch.setattr(Validators, "if_range", mutant)
    assert word in _wrong_requests()


def test_range_at_offset_0_is_noticed(monkeypatch):
    monkeypatch.setattr(planning, "_plan_part", lambda part, *_: Resume(part, Reason.STRONG_VALIDATOR))
    assert "Range does not start behind the part" in _wrong_requests()


# -- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "swallowed",
    [
        Reason.RANGE_START,
        Reason.CHANGED_206,
        Reason.WEAKENED_206,
        Reason.UNPROVEN_206,
        Reason.UNKNOWN_TOTAL,
        Reason.TOTAL_CHANGED,
        Reason.RECODED_206,
    ],
)
def test_a_missing_check_before_joining_is_noticed(monkeypatch, swallowed):
    real = judging._why_not_combine

    def mutant(*arguments: Any) -> Reason | None:
        reason = real(*arguments)
        return None if reason is swallowed else reason

    monkeypatch.setattr(judging, "_why_not_combine", mutant)
    assert _wrong_exchange() != []


def test_joining_at_another_place_is_noticed(monkeypatch):
    """S9, the Content-Range check: a 206 that starts elsewhere."""
    got = answer(206, 901, etag='"v1"', content_range="bytes 99-999/1000")
    assert violations(resume(), got, judged(resume(), got)) == []
    monkeypatch.setattr(judging, "_why_not_combine", lambda *_: None)
    assert "joined at another place" in violations(resume(), got, judged(resume(), got))


def _taken_at_its_word(values: Sequence[str], _: int | None) -> ContentRange | None:
    """Read the first Content-Range whatever Content-Length and the others say."""
    return ContentRange.parse(values[0]) if values else None


def _taken_for_granted(values: Sequence[str], length: int | None) -> ContentRange | None:
    """Take a 206 without a readable Content-Range for the rest that was asked for."""
    return satisfied(values, length) or ContentRange(100, 999, 1000)


satisfied: Callable[..., ContentRange | None] = ranges.satisfied


@pytest.mark.parametrize("mutant", [_taken_at_its_word, _taken_for_granted])
def test_a_bad_content_range_that_is_taken_is_noticed(monkeypatch, mutant):
    """S9, the Content-Range check: missing, doubled, or against Content-Length."""
    monkeypatch.setattr(ranges, "satisfied", mutant)
    assert _wrong_exchange() != []


def test_a_slice_wearing_200_that_is_taken_is_noticed(monkeypatch):
    monkeypatch.setattr(ranges, "complete_length", lambda _, length: length)
    assert _wrong_exchange() != []


def test_a_foreign_304_that_is_taken_is_noticed(monkeypatch):
    monkeypatch.setattr(judging, "_agrees", lambda *_, **__: True)
    assert _wrong_exchange() != []


def test_a_short_part_taken_for_whole_is_noticed(monkeypatch):
    plan, got = ConfirmWhole(a_part(total=1000)), answer(304, etag='"v1"')
    assert violations(plan, got, judged(plan, got)) == []
    monkeypatch.setattr(judging, "_judge_304", lambda plan, _: AlreadyWhole(replace(plan.part, total=100)))
    assert violations(plan, got, judged(plan, got)) == ["a short part taken for whole"]


def test_a_multipart_body_that_is_joined_is_noticed(monkeypatch):
    real = ResponseHead.from_fields

    def mutant(status: int, url: str, fields: Any, length: int | None) -> ResponseHead:
        return replace(real(status, url, fields, length), media_type=None)

    monkeypatch.setattr(ResponseHead, "from_fields", mutant)
    assert _wrong_exchange() == ["several parts in one body"]


def test_a_body_with_two_lengths_that_is_taken_is_noticed(monkeypatch):
    monkeypatch.setattr(answers, "parse_content_length", lambda values: 0)
    assert _wrong_exchange() == ["lengths disagree"]
