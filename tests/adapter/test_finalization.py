"""What is stored: by content, at once, under a name; or not at all."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest
from adapter_kit import BODY, KIB, decide, once, sha, whole
from support.origin import Answer, Origin, cut
from support.stores import open_store

from scrapy_streaming import integration
from scrapy_streaming.exceptions import BodyIncomplete, IntegrityError, PartCorrupt, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest

DIGEST = f"sha256:{sha(BODY)}"


@pytest.fixture
def made(origin: Origin, part: Path) -> Path:
    """A part of ``BODY``, whole."""
    whole("urllib", origin.put("/a", BODY), part)
    return part


@pytest.mark.parametrize(
    "expected", [None, DIGEST, sha(BODY).upper(), {"sha256": sha(BODY)}, Digest(sha(BODY))]
)
def test_a_part_is_published_under_its_name_and_gone(made: Path, store: Path, expected: Any) -> None:
    artifact = integration.try_streaming_finalization(made, store=store, expected=expected, name="docs/a.pdf")
    assert artifact is not None
    assert artifact.path == store / "docs" / "a.pdf"
    assert (artifact.digest, artifact.size, artifact.deduplicated) == (DIGEST, len(BODY), False)
    assert artifact.path.read_bytes() == BODY
    assert (store / "blobs" / "sha256" / sha(BODY)[:2] / sha(BODY)).read_bytes() == BODY
    assert list(made.parent.iterdir()) == []


def test_without_a_name_the_path_is_that_of_the_bytes(made: Path, store: Path) -> None:
    artifact = integration.try_streaming_finalization(made, store=str(store))
    assert artifact is not None
    assert artifact.path == store / "blobs" / "sha256" / sha(BODY)[:2] / sha(BODY)


def test_the_same_bytes_are_stored_once(made: Path, store: Path) -> None:
    twin = made.with_name("twin")
    twin.write_bytes(BODY)
    for path, had in ((made, False), (twin, True)):
        artifact = integration.try_streaming_finalization(path, store=store, name=f"{path.name}.bin")
        assert artifact is not None
        assert artifact.deduplicated == had
        assert artifact.path.read_bytes() == BODY


def test_a_file_of_the_callers_own_making_is_published(tmp_path: Path, store: Path) -> None:
    """Publishing alone may be adopted: nothing but the digest vouches for the bytes."""
    file = tmp_path / "own"
    file.write_bytes(b"mine")
    with pytest.raises(IntegrityError):
        integration.try_streaming_finalization(file, store=store, expected=DIGEST)
    assert file.read_bytes() == b"mine"
    assert integration.try_streaming_finalization(file, store=store, name="own") is not None
    assert not file.exists()


def test_half_a_part_is_refused(origin: Origin, part: Path, store: Path) -> None:
    url = origin.put("/a", BODY, cut(100 * KIB))
    with pytest.raises(BodyIncomplete):
        once("httpx", url, part)
    with pytest.raises(BodyIncomplete) as refused:
        integration.try_streaming_finalization(part, store=store, name="a")
    assert refused.value.kept == 100 * KIB
    assert not (store / "a").exists()
    assert decide(part).mode == "resume"


def test_a_part_that_was_changed_is_refused(made: Path, store: Path) -> None:
    data = bytearray(made.read_bytes())
    data[5] ^= 1
    made.write_bytes(data)
    with pytest.raises(PartCorrupt):
        integration.try_streaming_finalization(made, store=store, name="a")
    assert not (store / "a").exists()


@pytest.mark.parametrize("name", ["../a", "/../a", "", "blobs/sha256/a", ".streaming/a", "a\0b", "x" * 300])
def test_a_name_outside_the_store_is_refused(made: Path, store: Path, name: str) -> None:
    with pytest.raises(StoreError):
        integration.try_streaming_finalization(made, store=store, name=name)
    assert made.exists()


def test_a_missing_part_is_said(store: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="missing"):
        integration.try_streaming_finalization(tmp_path / "missing", store=store)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"store": None}, "store"),
        ({"store": ""}, "store"),
        ({"expected": "abc"}, "expected"),
        ({"expected": "md5:" + "0" * 32}, "expected"),
        ({"expected": {"md5": "0"}}, "expected"),
        ({"expected": 3}, "expected"),
        ({"name": 3}, "name"),
        ({"part_path": None}, "part_path"),
    ],
)
def test_a_wrong_argument_is_named(made: Path, store: Path, how: dict[str, Any], named: str) -> None:
    given = {"part_path": made, "store": store} | how
    with pytest.raises(TypeError, match=named):
        integration.try_streaming_finalization(given.pop("part_path"), **given)


def test_a_coding_that_is_the_content_stays(origin: Origin, part: Path, store: Path) -> None:
    """R34: mirrors call an archive's own compression a coding."""
    archive = gzip.compress(BODY)
    fields = {"Content-Encoding": "gzip", "Content-Type": "application/gzip"}
    url = origin.put("/a.tar.gz", archive, default=lambda a, r: Answer(200, fields, archive))
    once("httpx", url, part)
    artifact = integration.try_streaming_finalization(part, store=store, name="a.tar.gz")
    assert artifact is not None
    assert artifact.path.read_bytes() == archive


def test_a_crawl_finds_what_was_published(made: Path, store: Path) -> None:
    """Nothing is collected before the store was read: the ledger did not know of it."""
    assert integration.try_streaming_finalization(made, store=store) is not None
    opened = open_store(store)
    try:
        assert opened.blobs.verify(Digest(sha(BODY)))
        assert opened.ledger.standing().result().unread
    finally:
        opened.close()


def test_parts_may_lie_on_another_filesystem(origin: Origin, store: Path) -> None:
    """R68."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == store.parent.stat().st_dev:
        pytest.skip("there is one filesystem")
    path = shm / f"adapter-{os.getpid()}.part"
    whole("httpx", origin.put("/a", BODY), path)
    artifact = integration.try_streaming_finalization(path, store=store, name="a")
    assert artifact is not None
    assert artifact.path.read_bytes() == BODY
    assert not path.exists()
