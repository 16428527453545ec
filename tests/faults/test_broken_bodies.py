"""Bodies that break off, stall, trickle, or lie about their length (F4, F5, F6)."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.crawl import Crawl, assert_sound, assert_stored, run_crawl, sha256
from support.origin import DATE, LAST_MODIFIED, Answer, Origin, Script, cut, honest, start_of

from scrapy_streaming.runtime.body_writer import BATCH

SIZE = 400_000
BODY = random.Random(5).randbytes(SIZE)
FIELDS = {"ETag": '"a"', "Last-Modified": LAST_MODIFIED, "Date": DATE}
SHORT = 250_000


# -- F4 ----------------------------------------------------------------------------------------


def _resets(origin: Origin, store: Path, files: int) -> None:
    rng = random.Random(4)
    bodies = {f"/{n}.bin": rng.randbytes(rng.randrange(300_000, 1_500_000)) for n in range(files)}

    def reset(asked, resource):
        answer = honest(asked, resource)
        return honest(asked, resource, cut=rng.randrange(len(answer.body)), end="reset")

    urls = {path: origin.put(path, body, reset, reset, reset) for path, body in bodies.items()}
    crawl = run_crawl(list(urls.values()), store, settings={"RETRY_TIMES": 3}, timeout=600)
    for path, url in urls.items():
        assert_stored(store, crawl.files.get(url), bodies[path])
    for path, body in bodies.items():
        # a reset may take what the kernel held; what was read is kept to the byte
        assert sum(asked.sent for asked in origin.asked(path)) <= 1.05 * len(body) + 3 * (1 << 20)
    assert all(start_of(a) or i == 0 for p in bodies for i, a in enumerate(origin.asked(p)) if a.sent > SIZE)
    total = sum(map(len, bodies.values()))
    assert crawl.stat("streaming/bytes_received") <= 1.02 * total


@pytest.mark.proves("F4")
def test_resets_at_random_bytes_cost_no_byte_twice(origin: Origin, store: Path) -> None:
    """F4, short form: 40 files × 3 resets."""
    _resets(origin, store, 40)


@pytest.mark.proves("F4")
@pytest.mark.soak
def test_three_thousand_resets(origin: Origin, store: Path) -> None:
    """F4."""
    _resets(origin, store, 1000)


# -- F5 ----------------------------------------------------------------------------------------


def repr_digest(body: bytes) -> dict[str, str]:
    return {"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"}


def closing(body: bytes = BODY, *, length: int | None = None, **more: Any) -> Answer:
    return Answer(200, FIELDS, body, end="close", length=length, **more)


#: name → (answer, bytes that may be published, fragment of the URL)
TRUNCATED: dict[str, tuple[Script, bytes | None, str]] = {
    "honest-length-close": (cut(SHORT, "close"), None, ""),
    "honest-length-reset": (cut(SHORT, "reset"), None, ""),
    "honest-length-no-byte": (cut(0, "close"), None, ""),
    "no-length-short": (closing(BODY[:SHORT]), None, ""),
    "no-length-whole-but-unmarked": (closing(BODY), None, ""),
    "no-length-whole-by-digest": (closing(BODY), BODY, f"#sha256={sha256(BODY)}"),
    "no-length-short-by-digest": (closing(BODY[:SHORT]), None, f"#sha256={sha256(BODY)}"),
    "no-length-reset": (closing(BODY, cut=SHORT), None, ""),
    "length-too-large": (closing(BODY, length=SIZE + 1), None, ""),
    "length-too-small-by-digest": (
        Answer(200, FIELDS | repr_digest(BODY), BODY, end="close", length=SHORT), None, "",
    ),
    "chunked-cut": (Answer(200, FIELDS, BODY, end="close", cut=SHORT, chunked=True), None, ""),
    "chunked-cut-at-the-end": (Answer(200, FIELDS, BODY, end="close", cut=SIZE, chunked=True), None, ""),
    "chunked-reset": (Answer(200, FIELDS, BODY, end="reset", cut=SHORT, chunked=True), None, ""),
    "chunked-whole": (Answer(200, FIELDS, BODY, chunked=True), BODY, ""),
    "two-lengths": (
        Answer(200, (*FIELDS.items(), ("Content-Length", "5"), ("Content-Length", "9")), BODY, length=None),
        None, "",
    ),
    "length-garbage": (Answer(200, {**FIELDS, "Content-Length": "x"}, BODY, length=None), None, ""),
    "length-negative": (Answer(200, {**FIELDS, "Content-Length": "-5"}, BODY, length=None), None, ""),
    "empty": (Answer(200, FIELDS, b""), b"", ""),
    "digest-wrong": (Answer(200, FIELDS | repr_digest(b"other"), BODY), None, ""),
    "digest-right": (Answer(200, FIELDS | repr_digest(BODY), BODY), BODY, ""),
}  # fmt: skip


@dataclass
class Ran:
    store: Path
    origin: Origin
    crawl: Crawl


@pytest.fixture(scope="module")
def truncated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    store, origin = tmp_path_factory.mktemp("truncated") / "store", Origin()
    for name, (answer, _, _) in TRUNCATED.items():
        origin.put(f"/{name}.bin", BODY, answer, default=Answer(404))
    urls = [origin.url(f"/{name}.bin") + fragment for name, (_, _, fragment) in TRUNCATED.items()]
    yield Ran(store, origin, run_crawl(urls, store, settings={"RETRY_ENABLED": False}))
    origin.close()


@pytest.mark.proves("F5")
@pytest.mark.parametrize("name", TRUNCATED)
def test_only_whole_bodies_are_published(truncated: Ran, name: str) -> None:
    """F5; R31, R32, R33, R36, R38, R63."""
    _, body, fragment = TRUNCATED[name]
    entry = truncated.crawl.files.get(truncated.origin.url(f"/{name}.bin") + fragment)
    if body is None:
        assert entry is None
    else:
        assert_stored(truncated.store, entry, body)


@pytest.mark.proves("F5", "I17")
def test_no_short_body_is_in_the_store(truncated: Ran) -> None:
    """F5, I17."""
    assert_sound(truncated.store, [BODY, b""])


def test_a_body_without_an_end_mark_is_logged(truncated: Ran) -> None:
    """R33."""
    assert truncated.crawl.log.count("(close-delimited)") >= 2


def test_truncated_bodies_resume_where_they_broke(truncated: Ran) -> None:
    """R31 → R10: the next crawl asks for the rest only."""
    names = ["honest-length-close", "chunked-cut"]
    for name in names:
        truncated.origin.put(f"/{name}.bin", BODY, etag='"a"' if "chunked" in name else None)
    truncated.origin.forget()
    urls = [truncated.origin.url(f"/{name}.bin") for name in names]
    crawl = run_crawl(urls, truncated.store)
    for name, url in zip(names, urls, strict=True):
        assert_stored(truncated.store, crawl.files.get(url), BODY)
        assert crawl.files[url]["resumed_from"] == SHORT
        assert [asked.fields["range"] for asked in truncated.origin.asked(f"/{name}.bin")] == [
            f"bytes={SHORT}-"
        ]


# -- F6 ----------------------------------------------------------------------------------------

STALL = 1.5
HEAD, NO_HEAD = 2.0, 30.0


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    store, origin = tmp_path_factory.mktemp("stalled") / "store", Origin()
    origin.put("/after-head", BODY, cut(0, "stall"))
    origin.put("/mid-body", BODY, cut(SHORT, "stall"))
    origin.put("/no-head", BODY, Answer(200, FIELDS, BODY, before_head=NO_HEAD))
    origin.put("/slow", BODY[:10], Answer(200, FIELDS, BODY[:10], pace=0.5, piece=1))
    origin.put("/fast", BODY)
    settings = {"RETRY_ENABLED": False, "STREAMING_STALL_TIMEOUT": STALL, "DOWNLOAD_TIMEOUT": HEAD}
    urls = [origin.url(path) for path in ("/after-head", "/mid-body", "/no-head", "/slow", "/fast")]
    yield Ran(store, origin, run_crawl(urls, store, settings=settings))
    origin.close()


@pytest.mark.proves("F6")
@pytest.mark.parametrize("path", ["/after-head", "/mid-body"])
def test_a_stalled_body_is_ended_within_the_stall_window(stalled: Ran, path: str) -> None:
    """F6: within the window + 10 %, and 0.4 s for a loaded machine."""
    (asked,) = stalled.origin.asked(path)
    assert STALL - 0.1 <= asked.left_at - asked.sent_at <= STALL * 1.1 + 0.4
    assert stalled.origin.url(path) not in stalled.crawl.files
    assert "no byte for 1.5 seconds" in stalled.crawl.log


@pytest.mark.proves("F6")
def test_a_slow_living_body_has_no_deadline(stalled: Ran) -> None:
    """F6: 5 s at 2 bytes a second, with DOWNLOAD_TIMEOUT=2."""
    (asked,) = stalled.origin.asked("/slow")
    assert asked.sent_at - asked.at > 2 * HEAD
    assert_stored(stalled.store, stalled.crawl.files.get(stalled.origin.url("/slow")), BODY[:10])


@pytest.mark.proves("F6")
def test_a_missing_head_is_ended_by_the_download_timeout(stalled: Ran) -> None:
    """F6: the wait for the head is still DOWNLOAD_TIMEOUT's."""
    assert stalled.origin.url("/no-head") not in stalled.crawl.files
    assert f"took longer than {HEAD}" in stalled.crawl.log
    assert stalled.crawl.elapsed < NO_HEAD


def test_other_downloads_continue_meanwhile(stalled: Ran) -> None:
    (asked,) = stalled.origin.asked("/fast")
    broken_off = [stalled.origin.asked(path)[0].left_at for path in ("/after-head", "/mid-body")]
    assert asked.sent_at < min(broken_off)
    assert_stored(stalled.store, stalled.crawl.files.get(stalled.origin.url("/fast")), BODY)


def test_a_body_that_comes_too_slowly_is_resumed(origin: Origin, store: Path) -> None:
    """STREAMING_MIN_RATE, and STREAMING_STALL_TIMEOUT for the window."""
    url = origin.put("/crawling", BODY, lambda a, r: honest(a, r, pace=0.1, piece=3000))
    settings = {"STREAMING_MIN_RATE": 100_000, "STREAMING_STALL_TIMEOUT": 1}
    crawl = run_crawl([url], store, settings=settings)
    assert_stored(store, crawl.files.get(url), BODY)
    assert crawl.files[url]["resumed_from"] >= 3000
    assert "too-slow" in crawl.log


# -- retries -----------------------------------------------------------------------------------


def test_retries_that_made_progress_are_not_counted(origin: Origin, store: Path) -> None:
    """R61: six cuts with progress pass RETRY_TIMES=2; three without any do not."""
    cuts = [cut(50_000, "close")] * 6
    progress = origin.put("/progress", BODY, *cuts)
    none = origin.put("/none", BODY, cut(50_000, "close"), *[cut(0, "close")] * 6)
    crawl = run_crawl([progress, none], store, settings={"RETRY_TIMES": 2})
    assert_stored(store, crawl.files.get(progress), BODY)
    assert crawl.files[progress]["resumed_from"] == 300_000
    assert len(origin.asked("/progress")) == 7
    assert none not in crawl.files
    assert len(origin.asked("/none")) == 4  # one that left bytes does not count, then two retries


@pytest.mark.parametrize("end", ["close", "reset"])
def test_ten_cuts_cost_no_more_than_a_checkpoint_each(origin: Origin, store: Path, end: str) -> None:
    """R61: total bytes are at most the size and ten times checkpoint and batch."""
    rng = random.Random(end)
    body, checkpoint = rng.randbytes(24 << 20), 1 << 20
    cuts = sorted(rng.randrange(1, len(body)) for _ in range(10))

    def cut_at(at: int) -> Script:
        return lambda asked, resource: honest(asked, resource, cut=at - start_of(asked), end=end)

    url = origin.put("/ten.bin", body, *map(cut_at, cuts))
    crawl = run_crawl([url], store, settings={"STREAMING_CHECKPOINT_BYTES": checkpoint})
    assert_stored(store, crawl.files.get(url), body)
    asked = origin.asked("/ten.bin")
    assert len(asked) == 11
    came = crawl.stat("streaming/bytes_received")
    print(f"{end}: {came - len(body)} bytes again, {sum(a.sent for a in asked) - len(body)} sent again")
    assert came <= len(body) + 10 * (checkpoint + BATCH)
    if end == "close":  # all that was sent has arrived
        assert sum(one.sent for one in asked) <= len(body) + 10 * (checkpoint + BATCH)
