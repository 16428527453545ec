"""Digests, and those that callers and URLs expect."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scrapy_streaming.protocol.digests import Digest, expected_digest

A, B = "a1" * 32, "b2" * 32


@given(st.binary(min_size=32, max_size=32))
def test_digest_parse_undoes_print(octets):
    digest = Digest(octets.hex())
    assert Digest.parse(str(digest)) == digest


def test_algorithm_and_digits_may_be_upper_case():
    assert Digest.parse(f"SHA256:{A.upper()}") == Digest(A)


@pytest.mark.parametrize(
    "text",
    [
        "",
        A,
        f"sha512:{A}",
        f"sha256:{A}0",
        f"sha256:{A[:-1]}",
        f"sha256:{A[:-1]}g",
        f"sha256:{A}\n",
        f"sha256: {A}",
    ],
)
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(ValueError, match="hex digits"):
        Digest.parse(text)


def test_digits_are_lower_case_in_the_value():
    with pytest.raises(ValueError, match="64 lower-case"):
        Digest(A.upper())


@given(st.text())
def test_any_text_is_a_digest_or_a_value_error(text):
    for candidate in (text, f"sha256:{text}"):
        with suppress(ValueError):
            assert len(Digest.parse(candidate).hex) == 64


@pytest.mark.parametrize(
    ("given_", "checksums", "fragment", "digest"),
    [
        pytest.param(None, None, "", None, id="nobody-said"),
        pytest.param(f"sha256:{A}", None, "", A, id="given"),
        pytest.param(None, {"sha256": A.upper()}, "", A, id="checksums"),
        pytest.param(None, {"md5": "0" * 32}, "", None, id="other-algorithm-only"),
        pytest.param(None, None, f"sha256={A}", A, id="fragment"),
        pytest.param(None, None, f"SHA256={A.upper()}", A, id="fragment-in-upper-case"),
        pytest.param(None, None, "page=2", None, id="other-fragment"),
        pytest.param(f"sha256:{A}", {"sha256": A}, f"sha256={A}", A, id="all-agree"),
    ],
)
def test_expected_digest(given_, checksums, fragment, digest):
    expected = expected_digest(given_, checksums, fragment)
    assert (None if expected is None else expected.hex) == digest


@pytest.mark.parametrize(
    ("given_", "checksums", "fragment"),
    [
        pytest.param("md5:" + "0" * 32, None, "", id="given-is-no-sha-256"),
        pytest.param(None, {"sha256": "junk"}, "", id="checksum-is-junk"),
        pytest.param(None, None, "sha256=junk", id="fragment-is-junk"),
        pytest.param(None, None, "sha256", id="fragment-without-value"),
        pytest.param(f"sha256:{A}", {"sha256": B}, "", id="two-disagree"),
        pytest.param(None, {"sha256": A}, f"sha256={B}", id="two-others-disagree"),
    ],
)
def test_a_wrong_expectation_never_passes_for_none(given_, checksums, fragment):
    with pytest.raises(ValueError, match=r"hex digits|disagree"):
        expected_digest(given_, checksums, fragment)
