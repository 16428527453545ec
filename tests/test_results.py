"""When what is stored is the result of a file, and the entry made of its completion."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from support.stores import open_store

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, Granted, Lease, StoredRepresentation
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.results import (
    adopt_fresh,
    adopted_representation,
    answers,
    entry_of,
    is_unexpected,
    may_adopt,
    refresh_before,
)
from scrapy_streaming.storage.job_request import JobRequest

HEX, OTHER = "ab" * 32, "cd" * 32
URL = "https://example.org/a.pdf"
DAY = 86400.0


def known(vary: tuple[str, ...] = (), **sent: str) -> StoredRepresentation:
    validators = Validators.from_fields(['"tag"'], ["Sat, 01 Nov 2025 10:00:00 GMT"], [])
    selecting = selecting_key(vary, sent)
    return StoredRepresentation(
        f"sha256:{HEX}", 7, validators, URL, "application/pdf", vary, selecting, proof=Proof.STRONG
    )


def test_an_entry_is_what_the_completion_records() -> None:
    completion = Completion("c1", known(), 1.0, 7)
    entry = entry_of(
        completion, URL, "full/a.pdf", status="downloaded", reason=Reason.FETCHED, resumed_from=3
    )
    assert entry == {
        "url": URL,
        "path": "full/a.pdf",
        "checksum": HEX,
        "status": "downloaded",
        "digest": f"sha256:{HEX}",
        "size": 7,
        "resumed_from": 3,
        "reason": "fetched",
        "media_type": "application/pdf",
        "etag": '"tag"',
        "last_modified": "Sat, 01 Nov 2025 10:00:00 GMT",
        "proof": "strong",
        "completion_id": "c1",
    }
    assert {type(value) for value in entry.values()} == {str, int}


@pytest.mark.parametrize(
    ("revalidate", "before"), [("always", math.inf), ("never", None), ("expired", 1000 * DAY - 90 * DAY)]
)
def test_bytes_are_fresh_by_the_setting_and_their_age(revalidate: str, before: float | None) -> None:
    assert refresh_before(revalidate, 90, 1000 * DAY) == before


def test_other_bytes_than_expected_answer_no_request() -> None:
    """E9."""
    assert not is_unexpected(None, known())
    assert not is_unexpected(Digest(HEX), None)
    assert not is_unexpected(Digest(HEX), known())
    assert is_unexpected(Digest(OTHER), known())
    assert answers(known(), Digest(HEX), None)
    assert not answers(known(), Digest(OTHER), {})


def test_bytes_answer_only_a_request_that_selects_them() -> None:
    """R40."""
    varied = known(("accept-language",), **{"accept-language": "fr"})
    assert answers(known(("accept-encoding",)), None, None)
    assert answers(varied, None, {"accept-language": "fr"})
    assert not answers(varied, None, {"accept-language": "de"})
    assert not answers(varied, None, None)


@pytest.mark.parametrize(
    ("artifact", "generation", "previous", "has_part", "before", "expected"),
    [
        ("", 1, None, False, 0.0, True),
        ("", 1, None, False, None, True),
        ("cover", 1, None, False, 0.0, False),
        ("", 2, None, False, 0.0, False),
        ("", 1, known(), False, 0.0, False),
        ("", 1, None, True, 0.0, False),
        ("", 1, None, False, math.inf, False),
    ],
    ids=["first", "never-old", "artifact", "again", "known", "part", "revalidated"],
)
def test_a_file_is_adopted_only_for_the_first_claim_of_a_url(
    artifact: str,
    generation: int,
    previous: StoredRepresentation | None,
    has_part: bool,
    before: float | None,
    expected: bool,
) -> None:
    """C6, C11."""
    lease = Lease(1, HEX, 1, "claim", math.inf, generation)
    job = JobRequest("work", artifact, URL, OTHER)
    granted = Granted(lease, previous)
    assert may_adopt(granted, job, has_part=has_part, refresh_before=before) is expected


def test_a_fresh_file_becomes_a_blob_and_an_old_one_stays_a_file(store: Path) -> None:
    """I14."""
    opened = open_store(store)
    try:
        file = store / "full" / "a"
        file.parent.mkdir()
        file.write_bytes(b"content")
        os.utime(file, (1000 * DAY, 1000 * DAY))
        assert adopt_fresh(opened.blobs, "full/a", None, 1001 * DAY) is None
        assert adopt_fresh(opened.blobs, "full/b", None, None) is None
        assert list(opened.blobs.blobs()) == []
        found = adopt_fresh(opened.blobs, "full/a", None, 999 * DAY)
        assert found is not None
        representation = adopted_representation(found, URL)
        assert (representation.size, representation.final_url) == (7, URL)
        assert (representation.validators, representation.stored_at) == (Validators(), 1000 * DAY)
        assert [blob.digest for blob in opened.blobs.blobs()] == [Digest.parse(representation.digest)]
    finally:
        opened.close()
