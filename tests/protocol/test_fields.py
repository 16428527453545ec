"""Grammars: entity-tags, Content-Range, Content-Length, dates, Repr-Digest, Vary."""

from __future__ import annotations

import base64
import calendar
import re
from datetime import UTC
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol.fields import (
    MAX_FIELD,
    EntityTag,
    parse_content_length,
    parse_digest,
    parse_http_date,
    parse_vary,
)
from scrapy_streaming.protocol.ranges import ContentRange

LATIN = st.text(st.characters(max_codepoint=0xFF)) | st.binary().map(lambda octets: octets.decode("latin-1"))
ANY = st.text() | LATIN
TAG_CHARACTERS = "".join(chr(c) for c in range(0x21, 0x7F) if c != 0x22)
OPAQUE = st.text(TAG_CHARACTERS, max_size=MAX_FIELD - 4)
NUMBER = st.integers(0, 10**30)

# -- entity-tags -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        pytest.param('"v1"', EntityTag("v1"), id="R10-strong-tag"),
        pytest.param('W/"v1"', EntityTag("v1", weak=True), id="R5-weak-tag"),
        pytest.param('""', EntityTag(""), id="R10-empty-opaque-part-is-valid"),
        pytest.param('"a\\b"', EntityTag("a\\b"), id="R10-backslash-escapes-nothing"),
        pytest.param("v1", None, id="R39-unquoted"),
        pytest.param('w/"v1"', None, id="R39-lower-case-w"),
        pytest.param('W/ "v1"', None, id="R39-space-behind-w"),
        pytest.param("W/v1", None, id="R39-weak-unquoted"),
        pytest.param("'v1'", None, id="R39-single-quotes"),
        pytest.param('"v1', None, id="R39-unclosed"),
        pytest.param('"v1" ', None, id="R39-trailing-space"),
        pytest.param('"v1"\n', None, id="R39-trailing-line-feed"),
        pytest.param('"v 1"', None, id="R39-space-inside"),
        pytest.param('"v"1"', None, id="R39-quote-inside"),
        pytest.param('"v1", "v2"', None, id="R39-list"),
        pytest.param('"v1\r\nX: y"', None, id="R39-line-break-inside"),
        pytest.param('"v1\x00"', None, id="R39-nul-inside"),
        pytest.param('"v1\x7f"', None, id="R39-delete-inside"),
        pytest.param('"v\xe9"', None, id="R39-obs-text-is-not-sent-back"),
        pytest.param('"€"', None, id="R39-not-even-latin"),
        pytest.param("", None, id="R39-empty"),
        pytest.param('"' + "a" * (MAX_FIELD - 2) + '"', EntityTag("a" * (MAX_FIELD - 2)), id="R10-longest"),
        pytest.param('"' + "a" * (MAX_FIELD - 1) + '"', None, id="R39-too-long"),
    ],
)
def test_entity_tag(value, tag):
    assert EntityTag.parse(value) == tag


@given(OPAQUE, st.booleans())
def test_entity_tag_parse_undoes_print(opaque, weak):
    tag = EntityTag(opaque, weak=weak)
    assert EntityTag.parse(str(tag)) == tag


@given(ANY | OPAQUE.map(lambda o: f'"{o}"') | LATIN.map(lambda o: f'"{o}"') | LATIN.map(lambda o: f'W/"{o}"'))
def test_only_clean_quoted_text_is_an_entity_tag(value):
    tag = EntityTag.parse(value)
    clean = re.fullmatch(r'(W/)?"[!#-~]*"', value) is not None and len(value) <= MAX_FIELD
    assert (tag is not None) == clean
    if tag is not None:
        assert str(tag) == value
        assert tag.weak == value.startswith("W/")


# RFC 9110 §8.8.3.2, the table
@pytest.mark.parametrize(
    ("one", "other", "strongly", "weakly"),
    [
        pytest.param('W/"1"', 'W/"1"', False, True, id="R14-both-weak"),
        pytest.param('W/"1"', 'W/"2"', False, False, id="R14-both-weak-and-different"),
        pytest.param('W/"1"', '"1"', False, True, id="R14-one-weak"),
        pytest.param('"1"', '"1"', True, True, id="R10-both-strong"),
        pytest.param('"1"', '"1-gzip"', False, False, id="R14-suffix-is-not-stripped"),
        pytest.param('"a"', '"A"', False, False, id="R10-octets-not-letters"),
    ],
)
def test_entity_tags_compare_as_the_rfc_says(one, other, strongly, weakly):
    a, b = EntityTag.parse(one), EntityTag.parse(other)
    assert a.strong_equals(b) == b.strong_equals(a) == strongly
    assert a.weak_equals(b) == b.weak_equals(a) == weakly


# -- Content-Range ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        pytest.param("bytes 0-0/1", ContentRange(0, 0, 1), id="R10-one-byte"),
        pytest.param("bytes 100-999/1000", ContentRange(100, 999, 1000), id="R10-to-the-end"),
        pytest.param("BYTES 100-999/1000", ContentRange(100, 999, 1000), id="R10-unit-in-any-case"),
        pytest.param("bytes 100-999/*", ContentRange(100, 999, None), id="R18-unknown-total"),
        pytest.param("bytes */1000", ContentRange(None, None, 1000), id="R50-unsatisfied"),
        pytest.param("bytes 007-008/0009", ContentRange(7, 8, 9), id="R10-leading-zeros"),
        pytest.param("bytes */*", None, id="R21-nothing-known"),
        pytest.param("bytes 9-8/10", None, id="R21-last-before-first"),
        pytest.param("bytes 9-8/*", None, id="R21-last-before-first-of-unknown"),
        pytest.param("bytes 0-10/10", None, id="R21-total-not-above-last"),
        pytest.param("bytes 0-0/0", None, id="R21-of-nothing"),
        pytest.param("items 0-9/10", None, id="R21-other-unit"),
        pytest.param("bytes=0-9/10", None, id="R21-equals-sign"),
        pytest.param("bytes  0-9/10", None, id="R21-two-spaces"),
        pytest.param("bytes 0-9", None, id="R21-no-total"),
        pytest.param("bytes 0-/10", None, id="R21-no-last"),
        pytest.param("bytes -9/10", None, id="R21-no-first"),
        pytest.param("bytes -1-9/10", None, id="R21-negative"),
        pytest.param("bytes +1-9/10", None, id="R21-sign"),
        pytest.param("bytes 1_0-1_1/1_2", None, id="R21-underscores-python-would-take"),
        pytest.param("bytes ٠-٩/١٠", None, id="R21-digits-python-would-take"),
        pytest.param("bytes 0-9/10, bytes 0-9/10", None, id="R21-list"),
        pytest.param("bytes 0-9/10\n", None, id="R21-trailing-line-feed"),
        pytest.param("", None, id="R21-empty"),
        pytest.param(f"bytes 0-9/{'9' * 5000}", None, id="R21-more-digits-than-int-takes"),
        pytest.param(f"bytes */{'9' * 5000}", None, id="R53-more-digits-than-int-takes"),
    ],
)
def test_content_range(value, parsed):
    assert ContentRange.parse(value) == parsed


@given(NUMBER, NUMBER, st.none() | st.integers(1, 10**30))
def test_content_range_parse_undoes_print(first, more, beyond):
    span = ContentRange(first, first + more, None if beyond is None else first + more + beyond)
    assert ContentRange.parse(str(span)) == span


@given(NUMBER)
def test_unsatisfied_range_parse_undoes_print(total):
    assert ContentRange.parse(str(ContentRange(None, None, total))) == ContentRange(None, None, total)


@given(
    ANY
    | st.builds(
        "bytes {}-{}/{}".format, st.integers(-2, 12), st.integers(-2, 12), st.integers(-2, 12) | st.just("*")
    )
    | st.from_regex(r"\Abytes [0-9*]{0,9}-?[0-9]{0,9}/[0-9*]{0,9}\Z")
)
def test_accepted_content_range_is_in_order(value):
    span = ContentRange.parse(value)
    if span is None:
        return
    if span.first is None:
        assert (span.last, span.total is None) == (None, False)
    else:
        assert 0 <= span.first <= span.last
        assert span.total is None or span.last < span.total


@given(
    st.integers(4301, 20000), st.sampled_from(["bytes {}-9/10", "bytes 0-{}/*", "bytes 0-9/{}", "bytes */{}"])
)
def test_numbers_beyond_what_int_reads_are_no_range(digits, form):
    assert ContentRange.parse(form.format("9" * digits)) is None
    assert parse_content_length(("9" * digits,)) is None


# -- Content-Length --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "length"),
    [
        pytest.param(("42",), 42, id="R27-one"),
        pytest.param(("0",), 0, id="R36-zero"),
        pytest.param((), None, id="R32-absent"),
        pytest.param(("42, 42",), 42, id="R38-same-twice-in-one-field"),
        pytest.param(("42", "42"), 42, id="R38-same-twice-in-two-fields"),
        pytest.param(("42", "042"), 42, id="R38-same-number-other-digits"),
        pytest.param(("42", "43"), None, id="R38-conflict"),
        pytest.param(("42, 43",), None, id="R38-conflict-in-one-field"),
        pytest.param(("42,",), None, id="R38-empty-member"),
        pytest.param(("-42",), None, id="R38-negative"),
        pytest.param(("+42",), None, id="R38-sign"),
        pytest.param(("42.0",), None, id="R38-fraction"),
        pytest.param(("4_2",), None, id="R38-underscore"),
        pytest.param(("٤٢",), None, id="R38-other-digits"),
        pytest.param(("forty",), None, id="R38-garbage"),
        pytest.param(("",), None, id="R38-empty"),
    ],
)
def test_content_length(values, length):
    assert parse_content_length(values) == length


@given(st.lists(ANY | NUMBER.map(str)).map(tuple))
def test_content_length_is_total(values):
    length = parse_content_length(values)
    assert length is None or length >= 0


# -- dates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT", 784111777, id="R72-the-rfc-example"),
        pytest.param("Thu, 01 Jan 1970 00:00:00 GMT", 0, id="R72-epoch"),
        pytest.param("Thu, 29 Feb 2024 12:00:00 GMT", 1709208000, id="R72-leap-day"),
        pytest.param("Sunday, 06-Nov-94 08:49:37 GMT", None, id="R72-obsolete-form"),
        pytest.param("Sun Nov  6 08:49:37 1994", None, id="R72-asctime-form"),
        pytest.param("Sun, 06 Nov 1994 08:49:37 CET", None, id="R72-other-zone"),
        pytest.param("Sun, 06 Nov 1994 08:49:37 +0000", None, id="R72-numeric-zone"),
        pytest.param("Sun, 06 nov 1994 08:49:37 GMT", None, id="R72-case-matters"),
        pytest.param("Wed, 31 Feb 2024 08:49:37 GMT", None, id="R72-no-such-day"),
        pytest.param("Sun, 06 Nov 1994 25:00:00 GMT", None, id="R72-no-such-hour"),
        pytest.param("Sun, 06 Nov 1994 23:59:60 GMT", None, id="R72-leap-second-is-not-counted-on"),
        pytest.param("Sun, 06 Nov 0000 08:49:37 GMT", None, id="R72-no-such-year"),
        pytest.param("Sun, 06 Nov 1994 08:49:37 GMT\n", None, id="R72-trailing-line-feed"),
        pytest.param("Sun, ٠٦ Nov 1994 08:49:37 GMT", None, id="R72-other-digits"),
        pytest.param("0", None, id="R72-number"),
        pytest.param("", None, id="R72-empty"),
    ],
)
def test_http_date(value, seconds):
    assert parse_http_date(value) == seconds


@given(st.datetimes(timezones=st.just(UTC)))
def test_http_date_parse_undoes_print(moment):
    printed = format_datetime(moment, usegmt=True)
    assert parse_http_date(printed) == calendar.timegm(moment.timetuple())


@given(
    ANY
    | st.from_regex(r"\A[SMTWF][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT\Z")
)
def test_http_date_is_total(value):
    seconds = parse_http_date(value)
    assert seconds is None or len(value) == 29


# -- Repr-Digest -----------------------------------------------------------------------------

ZEROS = base64.b64encode(bytes(32)).decode()


@pytest.mark.parametrize(
    ("values", "digits"),
    [
        pytest.param((f"sha-256=:{ZEROS}:",), "0" * 64, id="R13-sha-256"),
        pytest.param((f"sha-512=:{'A' * 86}==:, sha-256=:{ZEROS}:",), "0" * 64, id="R13-among-others"),
        pytest.param((f"sha-512=:{'A' * 86}==:", f"sha-256=:{ZEROS}:"), "0" * 64, id="R13-in-two-fields"),
        pytest.param((f"sha-256=:{ZEROS}:;q=1",), "0" * 64, id="R13-with-parameter"),
        pytest.param((), None, id="R13-absent"),
        pytest.param(("",), None, id="R13-empty"),
        pytest.param((f"sha-512=:{'A' * 86}==:",), None, id="R13-other-algorithm-only"),
        pytest.param((f"sha-256={ZEROS}",), None, id="R13-obsolete-form-without-colons"),
        pytest.param((f"SHA-256=:{ZEROS}:",), None, id="R13-upper-case-key"),
        pytest.param(("sha-256=:AAAA:",), None, id="R13-too-short"),
        pytest.param(("sha-256",), None, id="R13-bare-key"),
        pytest.param((f"sha-256=(:{ZEROS}:)",), None, id="R13-list-of-one"),
        pytest.param((f'sha-256="{ZEROS}"',), None, id="R13-string"),
        pytest.param(("sha-256=:\xe9:",), None, id="R13-not-ascii"),
        pytest.param((f"sha-256=:{ZEROS}:" + " " * MAX_FIELD,), None, id="R13-too-long"),
    ],
)
def test_repr_digest(values, digits):
    digest = parse_digest({"repr-digest": values}, whole=False)
    assert (None if digest is None else digest.hex) == digits


@given(st.binary(min_size=32, max_size=32))
def test_repr_digest_parse_undoes_print(octets):
    printed = f"sha-256=:{base64.b64encode(octets).decode()}:"
    assert parse_digest({"repr-digest": [printed]}, whole=False).hex == octets.hex()


@given(
    st.lists(ANY | st.text('sha-256=:,;()@?%"\\1. *AZaz').map(lambda t: f"sha-256={t}"), max_size=3).map(
        tuple
    )
)
def test_repr_digest_is_total(values):
    digest = parse_digest({"repr-digest": values}, whole=False)
    assert digest is None or "sha-256" in ", ".join(values)


ONES = base64.b64encode(b"\1" * 32).decode()
MD5 = base64.b64encode(bytes(16)).decode()


@pytest.mark.parametrize(
    ("fields", "whole", "digits"),
    [
        pytest.param({"digest": [f"SHA-256={ZEROS}"]}, False, "00", id="R63-instance-digest"),
        pytest.param({"digest": [f"md5={MD5},sha-256={ZEROS}"]}, True, "00", id="R63-instance-digest-of-two"),
        pytest.param({"digest": [f"sha-256={ZEROS}", f"SHA-256={ONES}"]}, True, None, id="R63-disagree"),
        pytest.param({"digest": [f"unixsum-sha-256={ZEROS}"]}, True, None, id="R63-another-name"),
        pytest.param({"digest": ["sha-256=AAAA"]}, True, None, id="R63-too-short"),
        pytest.param({"digest": ["sha-256=AAA=A"]}, True, None, id="R63-bad-base64"),
        pytest.param({"content-digest": [f"sha-256=:{ZEROS}:"]}, True, "00", id="R63-content-is-all"),
        pytest.param({"content-digest": [f"sha-256=:{ZEROS}:"]}, False, None, id="R64-content-is-a-slice"),
        pytest.param({"x-amz-checksum-sha256": [f" {ZEROS} "]}, True, "00", id="R63-s3"),
        pytest.param({"x-amz-checksum-sha256": [ZEROS]}, False, None, id="R64-s3-slice"),
        pytest.param({"x-amz-checksum-sha256": [f"{ZEROS}-2"]}, True, None, id="R65-s3-composite"),
        pytest.param(
            {"x-amz-checksum-sha256": [ZEROS], "x-amz-checksum-type": ["COMPOSITE"]},
            True,
            None,
            id="R65-s3-said-composite",
        ),
        pytest.param(
            {"x-amz-checksum-sha256": [ZEROS], "x-amz-checksum-type": ["full_object"]},
            True,
            "00",
            id="R63-s3-full-object",
        ),
        pytest.param(
            {"repr-digest": [f"sha-256=:{ZEROS}:"], "digest": [f"sha-256={ONES}"]},
            True,
            "00",
            id="R63-repr-digest-first",
        ),
        pytest.param(
            {"repr-digest": ["sha-256"], "digest": [f"sha-256={ONES}"]}, True, "01", id="R63-odd-one-passed"
        ),
        pytest.param(
            {
                "content-md5": [MD5],
                "repr-digest": [f"md5=:{MD5}:"],
                "digest": [f"md5={MD5}"],
                "x-goog-hash": [f"md5={MD5}", "crc32c=AAAAAA=="],
            },
            True,
            None,
            id="R65-weak-algorithms-only",
        ),
        pytest.param({"digest": [f"sha-256={ZEROS}" + " " * MAX_FIELD]}, True, None, id="R63-too-long"),
        pytest.param({}, True, None, id="R63-nothing-said"),
    ],
)
def test_a_digest_counts_for_what_it_speaks_of(fields, whole, digits):
    digest = parse_digest(fields, whole=whole)
    assert (None if digest is None else digest.hex) == (None if digits is None else digits * 32)


@given(
    st.dictionaries(
        st.sampled_from(["digest", "content-digest", "x-amz-checksum-sha256", "x-amz-checksum-type"]),
        st.lists(ANY | st.text('sha-256=:,-" AZaz0').map(lambda t: f"sha-256={t}"), max_size=2),
    ),
    st.booleans(),
)
def test_digest_fields_are_total(fields, whole):
    parse_digest(fields, whole=whole)


@given(st.binary(min_size=32, max_size=32))
def test_instance_and_s3_digests_parse_undoes_print(octets):
    printed = base64.b64encode(octets).decode()
    for fields in ({"digest": [f"sha-256={printed}"]}, {"x-amz-checksum-sha256": [printed]}):
        assert parse_digest(fields, whole=True).hex == octets.hex()


# -- Vary ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "names"),
    [
        pytest.param((), (), id="R4-absent"),
        pytest.param(("",), (), id="R4-empty"),
        pytest.param(
            ("Accept-Encoding, ACCEPT", "accept"), ("accept", "accept-encoding"), id="R4-sorted-once"
        ),
        pytest.param(
            (" Accept ,,\tUser-Agent ",), ("accept", "user-agent"), id="R4-white-space-and-empty-members"
        ),
        pytest.param(("*",), ("*",), id="R40-star"),
        pytest.param(("Accept, *",), ("*",), id="R40-star-among-others"),
        pytest.param(("Accept Encoding",), ("*",), id="R40-not-a-name"),
        pytest.param(("Accept\x0b",), ("*",), id="R40-control-character"),
        pytest.param(("é",), ("*",), id="R40-not-ascii"),
        pytest.param((", ".join(f"x-{n}" for n in range(300)),), ("*",), id="R40-too-long"),
    ],
)
def test_vary(values, names):
    assert parse_vary(values) == names


@given(st.lists(ANY, max_size=3).map(tuple))
def test_vary_is_total_and_stable(values):
    names = parse_vary(values)
    assert parse_vary((", ".join(names),)) == names
