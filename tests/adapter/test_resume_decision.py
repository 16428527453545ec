"""What to ask for: every kind of part, what the server last said, and parts without a validator."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_kit import BODY, KIB, ask, client_of, decide, once, sha, whole
from support.origin import Answer, Origin, cut

from scrapy_streaming import integration
from scrapy_streaming.exceptions import AnswerRefused, BodyIncomplete, RequestFailed, StoreError
from scrapy_streaming.integration import FinalizedArtifact
from scrapy_streaming.protocol.planning import Fetch, PublishPart, Resume
from scrapy_streaming.protocol.validators import Validators

PLAIN = {"Accept-Encoding": "identity", "Want-Repr-Digest": "sha-256=10"}
AT = 128 * KIB


def begun(origin: Origin, part: Path, path: str = "/a", at: int = AT, **kind: Any) -> str:
    """Leave a part of *at* bytes of ``BODY``; return its URL."""
    url = origin.put(path, BODY, cut(at), **kind)
    with pytest.raises(BodyIncomplete):
        once("httpx", url, part)
    return url


def test_nothing_here_asks_for_all_of_it(part: Path) -> None:
    for state in (None, part, str(part)):
        decision = integration.try_streaming_resume_decision(None, state)
        assert decision is not None
        assert (decision.mode, decision.resume_byte_offset, decision.reason) == ("fresh", 0, "nothing-stored")
        assert decision.headers == PLAIN
        assert isinstance(decision.outcome, Fetch)
    assert not part.parent.exists()


def test_a_part_with_a_strong_tag_is_gone_on_with(origin: Origin, part: Path) -> None:
    url = begun(origin, part)
    decision = decide(part, url=url)
    assert (decision.mode, decision.resume_byte_offset, decision.reason) == ("resume", AT, "strong-validator")
    assert decision.headers == PLAIN | {"Range": f"bytes={AT}-", "If-Range": tag(BODY)}
    assert isinstance(decision.outcome, Resume)


def tag(body: bytes) -> str:
    return f'"{sha(body)[:16]}"'


def test_a_part_with_a_strong_date_alone_is_gone_on_with_by_it(origin: Origin, part: Path) -> None:
    begun(origin, part, etag="")
    decision = decide(part)
    assert decision.reason == "strong-date"
    assert decision.headers["If-Range"] == "Tue, 02 Jan 2024 03:04:05 GMT"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"etag": "", "last_modified": ""}, "no-validator"),
        ({"etag": 'W/"x"', "last_modified": ""}, "weak-validator"),
    ],
)
def test_a_part_without_a_strong_validator_begins_anew(
    origin: Origin, part: Path, kind: dict[str, str], reason: str
) -> None:
    begun(origin, part, **kind)
    decision = decide(part)
    assert (decision.mode, decision.reason) == ("fresh", reason)


def test_a_whole_part_needs_no_request_while_it_is_fresh(
    origin: Origin, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole("httpx", origin.put("/a", BODY), part)
    decision = decide(part)
    assert (decision.mode, decision.reason, decision.headers) == ("cached", "whole-part", {})
    assert isinstance(decision.outcome, PublishPart)
    monkeypatch.setenv("SCRAPY_STREAMING_REVALIDATE", "always")
    decision = decide(part)
    assert (decision.mode, decision.reason) == ("cached", "confirm-whole")
    assert decision.headers["If-None-Match"] == tag(BODY)


@pytest.mark.parametrize(
    "said",
    [
        {"ETag": '"other"'},
        {b"etag": [b'"other"']},
        httpx.Headers({"ETag": '"other"'}),
        Validators.from_fields(['"other"'], [], []),
        {"last_modified": "Wed, 03 Jan 2024 03:04:05 GMT"},
    ],
)
def test_what_the_server_says_now_is_heeded(origin: Origin, part: Path, said: Any) -> None:
    begun(origin, part)
    decision = integration.try_streaming_resume_decision(said, part)
    assert decision is not None
    assert (decision.mode, decision.reason) == ("fresh", "changed")
    same = integration.try_streaming_resume_decision({"etag": tag(BODY)}, part)
    assert same is not None
    assert same.mode == "resume"


def test_a_part_of_another_url_is_not_offered(origin: Origin, part: Path) -> None:
    begun(origin, part)
    assert decide(part, url=origin.url("/b")).reason == "foreign-part"


def test_bytes_that_changed_on_disk_are_not_offered(origin: Origin, part: Path) -> None:
    url = begun(origin, part)
    data = bytearray(part.read_bytes())
    data[77] ^= 1
    part.write_bytes(data)
    assert decide(part, url=url).mode == "fresh"
    assert whole("httpx", url, part).sha256_hex == sha(BODY)


def test_bytes_behind_the_checkpoint_are_cut_off(origin: Origin, part: Path) -> None:
    url = begun(origin, part)
    with part.open("ab") as stream:
        stream.write(b"\0" * 5000)
    assert decide(part, url=url).resume_byte_offset == AT
    assert once("requests", url, part).sha256_hex == sha(BODY)


def test_a_part_may_be_given_as_values(origin: Origin) -> None:
    state = {"length": 10, "total": 100, "etag": '"x"', "url": "https://example.org/a"}
    decision = integration.try_streaming_resume_decision(None, state)
    assert decision is not None
    assert decision.headers["Range"] == "bytes=10-"
    assert decision.headers["If-Range"] == '"x"'
    decision = integration.try_streaming_resume_decision({"ETag": '"y"'}, {"length": 10})
    assert decision is not None
    assert decision.headers["If-Range"] == '"y"'


def test_a_stored_file_is_asked_for_conditionally(tmp_path: Path) -> None:
    artifact = FinalizedArtifact(tmp_path / "a", f"sha256:{sha(b'')}", 0, deduplicated=False)
    decision = integration.try_streaming_resume_decision(
        {"ETag": '"x"'}, artifact, url="https://example.org/a"
    )
    assert decision is not None
    assert (decision.mode, decision.reason) == ("cached", "stored")
    assert decision.headers["If-None-Match"] == '"x"'


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"part_state": 3}, "part_state"),
        ({"part_state": {"length": "ten"}}, "part_state"),
        ({"part_state": {"length": -1}}, "part_state"),
        ({"part_state": b"path"}, "part_state"),
        ({"validators": "etag"}, "validators"),
        ({"validators": {"etag": 3}}, r"validators\['etag'\]"),
        ({"prefix_check_bytes": 0}, "prefix_check_bytes"),
        ({"prefix_check_bytes": 1.5}, "prefix_check_bytes"),
        ({"client": object(), "url": "http://x/"}, "client"),
        ({"client": "urllib"}, "url"),
        ({"url": 3}, "url"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], named: str) -> None:
    given = {"validators": None, "part_state": None} | arguments
    validators, state = given.pop("validators"), given.pop("part_state")
    with pytest.raises(TypeError, match=named):
        integration.try_streaming_resume_decision(validators, state, **given)


# -- without validators ----------------------------------------------------------------------


def unvalidated(origin: Origin, part: Path) -> str:
    return begun(origin, part, etag="", last_modified="")


@pytest.mark.parametrize("library", ["httpx", "requests", "urllib"])
def test_the_last_bytes_are_compared_before_and_while_it_goes_on(
    origin: Origin, part: Path, library: str
) -> None:
    """R6, R19."""
    url = unvalidated(origin, part)
    client = client_of(library) or "urllib"
    decision = decide(part, url=url, client=client, allow_without_validators=True, prefix_check_bytes=1000)
    assert (decision.mode, decision.resume_byte_offset) == ("resume", AT - 1000)
    assert decision.headers == PLAIN | {"Range": f"bytes={AT - 1000}-"}
    assert origin.requests[-1].fields["range"] == f"bytes={AT - 1000}-{AT - 1}"
    metrics = integration.try_streaming_io(ask(library, url, decision.headers), part)
    assert metrics is not None
    assert (metrics.resumed_from_bytes, metrics.bytes_written) == (AT, len(BODY) - AT)
    assert metrics.sha256_hex == sha(BODY)


def test_other_last_bytes_begin_anew(origin: Origin, part: Path) -> None:
    url = unvalidated(origin, part)
    other = BODY[: AT - 10] + b"x" + BODY[AT - 9 :]
    origin.put("/a", other, etag="", last_modified="")
    decision = decide(part, url=url, client=client_of("httpx"), allow_without_validators=True)
    assert (decision.mode, decision.reason) == ("fresh", "no-validator")


def test_another_length_begins_anew(origin: Origin, part: Path) -> None:
    url = unvalidated(origin, part)
    origin.put("/a", BODY + b"x", etag="", last_modified="")
    decision = decide(part, url=url, client=client_of("httpx"), allow_without_validators=True)
    assert decision.mode == "fresh"


def test_bytes_that_change_behind_the_check_are_not_joined(origin: Origin, part: Path) -> None:
    url = unvalidated(origin, part)
    decision = decide(part, url=url, client=client_of("httpx"), allow_without_validators=True)
    origin.put("/a", BODY[: AT - 10] + b"x" + BODY[AT - 9 :], etag="", last_modified="")
    with pytest.raises(AnswerRefused) as refused:
        integration.try_streaming_io(ask("httpx", url, decision.headers), part)
    assert refused.value.reason == "overlap-mismatch"
    assert part.read_bytes() == BODY[:AT]


def test_without_a_client_or_the_word_nothing_is_compared(origin: Origin, part: Path) -> None:
    url = unvalidated(origin, part)
    asked = len(origin.requests)
    assert decide(part, url=url, allow_without_validators=True).mode == "fresh"
    assert decide(part, url=url, client=client_of("httpx")).mode == "fresh"
    assert len(origin.requests) == asked


def test_a_server_that_is_away_is_said(origin: Origin, part: Path) -> None:
    url = unvalidated(origin, part)
    origin.put("/a", b"", Answer(raw=lambda: [b""], end="reset"))
    with pytest.raises(RequestFailed):
        decide(part, url=url, client=client_of("httpx"), allow_without_validators=True)


def test_a_busy_part_is_said(origin: Origin, part: Path) -> None:
    url = begun(origin, part)
    fd = os.open(part, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(StoreError) as busy:
            decide(part, url=url)
        assert busy.value.reason == "part-busy"
        with pytest.raises(StoreError):
            integration.try_streaming_io(ask("urllib", url), part)
    finally:
        os.close(fd)
    assert once("urllib", url, part).sha256_hex == sha(BODY)
