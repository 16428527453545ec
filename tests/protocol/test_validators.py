"""Validators: which are strong, and which may be sent back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_kit import DATE, MODIFIED, OLDER, SOON

from scrapy_streaming.protocol.fields import MAX_FIELD, EntityTag
from scrapy_streaming.protocol.validators import Validators

TAG = EntityTag("v1")


@pytest.mark.parametrize(
    ("etags", "modified", "date", "kept"),
    [
        pytest.param(['"v1"'], [MODIFIED], [DATE], Validators(TAG, MODIFIED, DATE), id="R10-all-three"),
        pytest.param(['"v1"', '"v1"'], [], [], Validators(TAG), id="R10-same-tag-twice"),
        pytest.param([], [MODIFIED], [DATE], Validators(None, MODIFIED, DATE), id="R12-no-tag"),
        pytest.param(['"v1"', '"v2"'], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-two-tags"),
        pytest.param(
            ['"v1"', 'W/"v1"'], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-strong-and-weak"
        ),
        pytest.param(['"v1"', "v1"], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-one-of-two-odd"),
        pytest.param(["v1"], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-unquoted"),
        pytest.param(['w/"v1"'], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-lower-case-w"),
        pytest.param(['"v\xe9"'], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-obs-text"),
        pytest.param([""], [MODIFIED], [DATE], Validators(None, MODIFIED), id="R39-empty"),
        pytest.param(
            [], [MODIFIED, OLDER], [DATE], Validators(None, None, DATE), id="R72-two-dates-modified"
        ),
        pytest.param([], [MODIFIED], [DATE, SOON], Validators(None, MODIFIED), id="R72-two-dates"),
        pytest.param([], ["a\r\nX: y"], ["b\x00"], Validators(), id="R72-control-characters-are-not-echoed"),
        pytest.param([], ["\xe9"], ["\xa0"], Validators(), id="R72-obs-text-is-not-echoed"),
        pytest.param([], ["a" * (MAX_FIELD + 1)], [""], Validators(), id="R72-too-long-or-empty"),
        pytest.param(
            [], ["yesterday"], [], Validators(None, "yesterday"), id="R43-odd-date-is-echoed-as-it-is"
        ),
    ],
)
def test_validators_of_a_response(etags, modified, date, kept):
    assert Validators.from_fields(etags, modified, date) == kept


@pytest.mark.parametrize(
    ("validators", "value"),
    [
        pytest.param(Validators(TAG, MODIFIED, DATE), '"v1"', id="R10-strong-tag-before-date"),
        pytest.param(Validators(EntityTag(""), None, None), '""', id="R10-empty-tag"),
        pytest.param(Validators(None, MODIFIED, DATE), MODIFIED, id="R12-strong-date"),
        pytest.param(Validators(EntityTag("v1", weak=True)), None, id="R5-weak-tag"),
        pytest.param(
            Validators(EntityTag("v1", weak=True), MODIFIED, DATE), None, id="R5-date-beside-weak-tag"
        ),
        pytest.param(Validators(), None, id="R6-nothing"),
        pytest.param(Validators(None, None, DATE), None, id="R6-date-only"),
        pytest.param(Validators(None, MODIFIED, None), None, id="R72-no-date"),
        pytest.param(Validators(None, DATE, MODIFIED), None, id="R72-modified-after-date"),
        pytest.param(Validators(None, MODIFIED, MODIFIED), None, id="R72-same-second"),
        pytest.param(Validators(None, MODIFIED, SOON), None, id="R72-59-seconds"),
        pytest.param(
            Validators(None, MODIFIED, "Mon, 01 Jan 2024 00:01:00 GMT"), MODIFIED, id="R12-60-seconds"
        ),
        pytest.param(Validators(None, "yesterday", DATE), None, id="R72-unreadable-modified"),
        pytest.param(Validators(None, MODIFIED, "today"), None, id="R72-unreadable-date"),
        pytest.param(
            Validators.from_fields(["v1"], [MODIFIED], [DATE]), None, id="R39-no-date-in-place-of-odd-tag"
        ),
    ],
)
def test_if_range(validators, value):
    assert validators.if_range() == value


@pytest.mark.parametrize(
    ("validators", "fields"),
    [
        pytest.param(
            Validators(TAG, MODIFIED), {"If-None-Match": '"v1"', "If-Modified-Since": MODIFIED}, id="R43-both"
        ),
        pytest.param(Validators(EntityTag("v1", weak=True)), {"If-None-Match": 'W/"v1"'}, id="R47-weak-tag"),
        pytest.param(
            Validators(None, "yesterday"), {"If-Modified-Since": "yesterday"}, id="R43-date-byte-for-byte"
        ),
        pytest.param(Validators(None, None, DATE), {}, id="R6-nothing"),
    ],
)
def test_conditional_fields(validators, fields):
    assert validators.conditional_fields() == fields


VALUES = st.lists(st.text() | st.sampled_from(['"v1"', 'W/"v1"', "v1", MODIFIED, DATE, SOON]), max_size=3)


@given(VALUES, VALUES, VALUES)
def test_whatever_a_server_says_only_clean_values_are_sent_back(etags, modified, date):
    told = Validators.from_fields(etags, modified, date)
    sent = [*told.conditional_fields().values(), told.if_range() or "-"]
    assert all(0 < len(v) <= MAX_FIELD and all(" " <= c <= "~" for c in v) for v in sent)
    assert not (told.if_range() or "").startswith("W/")
    assert told.if_range() is None or told.etag is not None or not etags
