"""A head, or what frames a body, that has no end costs no memory and no time (E5, F21)."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from support.crawl import Crawl, assert_stored, run_crawl
from support.origin import Answer, Origin, self_signed

from scrapy_streaming.handlers import StreamingDownloadHandler
from scrapy_streaming.handlers.twisted_tap import HeadLimit

MIB = 1 << 20
#: What a server sends at most in these tests: far beyond any bound, and yet no danger to the machine.
MOST = 192 * MIB
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b'ETag: "v1"\r\nTransfer-Encoding: chunked\r\n\r\n' + b"5\r\nhello\r\n"


def endless(begin: bytes, again: bytes) -> Callable[[], Iterable[bytes]]:
    """Return what sends *begin*, then *again* and again."""
    piece = again * (64 * 1024 // len(again) + 1)

    def pieces() -> Iterator[bytes]:
        yield begin
        yield from itertools.repeat(piece, MOST // len(piece))

    return pieces


HEADS = {
    "/lines": endless(OK, b"X-Filler: " + b"f" * 100 + b"\r\n"),
    "/one-line": endless(OK + b"X-Filler: ", b"f"),
    "/continued": endless(OK + b"X-Filler: f\r\n", b" " + b"f" * 100 + b"\r\n"),
    "/status": endless(b"HTTP/1.1 200 ", b"O"),
    "/informational": endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: " + b"f" * 2000 + b"\r\n\r\n"),
}
FRAMES = {
    "/extension": endless(CHUNKED + b"5;", b"f"),
    "/trailers": endless(CHUNKED + b"0\r\n", b"X-Filler: " + b"f" * 100 + b"\r\n"),
    "/trailer": endless(CHUNKED + b"0\r\nX-Filler: ", b"f"),
}
SETTINGS = {"RETRY_TIMES": 0, "STREAMING_FSYNC": False}


def serve(origin: Origin, paths: dict[str, Callable[[], Iterable[bytes]]]) -> dict[str, str]:
    return {path: origin.put(path, b"", default=Answer(raw=raw, end="close")) for path, raw in paths.items()}


def codes(store: Path) -> dict[str, tuple[str, str, int]]:
    """Return state, error code and attempts of the jobs, by path."""
    with sqlite3.connect(store / ".streaming" / "ledger.sqlite3") as ledger:
        rows = ledger.execute("SELECT url, state, error_code, attempts FROM ss_job").fetchall()
    ledger.close()
    return {"/" + url.rsplit("/", 1)[1]: (state, code, attempts) for url, state, code, attempts in rows}


def assert_bounded(crawl: Crawl, idle: Crawl, origin: Origin, paths: Iterable[str]) -> None:
    over = crawl.rss - idle.rss
    assert over <= 32 * MIB, f"{over / MIB:.0f} MiB over {idle.rss / MIB:.0f}"
    for path in paths:
        assert origin.asked(path)
        for asked in origin.asked(path):
            assert asked.sent < 16 * MIB, f"{path}: {asked.sent / MIB:.0f} MiB were taken"
            assert asked.left_at - asked.at < 10, path


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Crawl:
    """A crawl of the same settings over TLS that has nearly nothing to do."""
    folder = tmp_path_factory.mktemp("idle")
    origin = Origin(tls=self_signed(folder))
    crawl = run_crawl([origin.put("/good", b"good")], folder / "store", settings=SETTINGS)
    origin.close()
    return crawl


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_a_head_or_frame_without_end_breaks_its_file_off_at_once(
    idle: Crawl, tls: bool, tmp_path: Path, store: Path
) -> None:
    """F21: lines, a line, a continued line, a status line, informational answers; chunks and trailers."""
    server = Origin(tls=self_signed(tmp_path) if tls else None)
    urls, good = serve(server, HEADS | FRAMES), server.put("/good", b"good")
    crawl = run_crawl([*urls.values(), good], store, settings=SETTINGS)
    server.close()
    assert_bounded(crawl, idle, server, urls)
    assert set(crawl.files) == {good}
    assert_stored(store, crawl.files[good], b"good")
    assert {path: codes(store)[path] for path in HEADS} == dict.fromkeys(
        HEADS, ("ready", "head-too-large", 1)
    )
    assert crawl.stat("streaming/failed/head-too-large") == len(HEADS)


def test_the_head_of_a_proxys_tunnel_is_bounded_too(origin: Origin, store: Path) -> None:
    path = "127.0.0.1:1"
    origin.put(path, b"", default=Answer(raw=HEADS["/lines"], end="close"))
    env = {"https_proxy": origin.url("")}
    crawl = run_crawl([f"https://{path}/tunnelled"], store, settings=SETTINGS, env=env)
    (asked,) = origin.asked(path)
    assert asked.sent < 16 * MIB
    assert codes(store) == {"/tunnelled": ("ready", "head-too-large", 1)}
    assert crawl.stat("streaming/failed/head-too-large") == 1


def test_what_cannot_be_watched_is_logged_once_and_works_as_before(caplog: pytest.LogCaptureFixture) -> None:
    handler = object.__new__(StreamingDownloadHandler)
    handler._reported_unbounded = False
    limit = HeadLimit("http://h/", pytest.fail, handler._report_unbounded)
    connection = object()
    assert limit.watch(connection) is connection
    assert limit.watch(connection) is connection
    (line,) = caplog.messages
    assert line == "heads of answers are read without a bound: builtins.object cannot be watched"
