"""Arriving from ``FilesPipeline`` and going back to it: nothing is fetched, no file changes (C6, C11)."""

from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from support.beside import FILES, essence, files_in, levels
from support.crawl import Crawl, assert_stored, blobs, run_crawl
from support.origin import Origin, put_files

DAY = 86400
STOCK = {**FILES, "ADDONS": {}}
#: What makes root a user like any other.
ORDINARY = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
OFF = {"SCRAPY_STREAMING_ENABLED": "0"}


def looked(store: Path) -> dict[str, tuple[bytes, int, int]]:
    """Return what stock sees of a store: bytes, time and permissions of each name."""
    return {
        name: (body, (store / name).stat().st_mtime_ns, stat.S_IMODE((store / name).stat().st_mode))
        for name, body in files_in(store).items()
    }


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY,) * 2)


def assert_uptodate(crawl: Crawl, count: int) -> None:
    assert len(crawl.files) == count
    assert {entry["status"] for entry in crawl.files.values()} == {"uptodate"}
    assert crawl.stat("file_status_count/uptodate") == count


@pytest.mark.parametrize(
    ("user", "count"),
    [
        ("root", 20),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in [("ordinary", 20), ("root", 2000)]),
        pytest.param("ordinary", 2000, marks=pytest.mark.soak),
    ],
)
def test_there_and_back_again(origin: Origin, tmp_path: Path, user: str, count: int) -> None:
    """C6: from a filled store, back, forth, and back when a file has expired."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("this process is no root's")
    prefix = ORDINARY if user == "ordinary" and os.geteuid() == 0 else []
    store, bodies = tmp_path / "store", put_files(origin, count)
    how: dict[str, Any] = {"prefix": prefix, "timeout": 600}
    settings = {**FILES, "LOG_LEVEL": "INFO"}
    stock = run_crawl(list(bodies), store, settings=settings | {"ADDONS": {}}, **how)
    assert len(origin.requests) == count
    origin.forget()
    before = looked(store)

    arrived = run_crawl(list(bodies), store, settings=settings, **how)
    assert_uptodate(arrived, count)
    assert {entry["reason"] for entry in arrived.files.values()} == {"adopted"}
    for url, body in bodies.items():
        assert_stored(store, arrived.files[url], body)
        assert arrived.files[url]["path"] == stock.files[url]["path"]
    assert arrived.stat("streaming/decision/adopted") == count
    assert arrived.stat("streaming/bytes_saved") == sum(map(len, bodies.values()))
    assert levels(arrived) == levels(stock)
    first = [path for path in blobs(store).values() if path.stat().st_nlink == 2]
    assert len(first) in (0, len(blobs(store))), "no byte was copied that need not be"

    assert_uptodate(run_crawl(list(bodies), store, settings=settings, env=OFF, **how), count)
    again = run_crawl(list(bodies), store, settings=settings, **how)
    assert_uptodate(again, count)
    assert {entry["reason"] for entry in again.files.values()} == {"stored"}
    assert again.stat("streaming/files_hashed") <= count // 5, "of equal files adopted at once, at most"
    assert looked(store) == before
    assert origin.requests == []

    url, equal = origin.url("/0.pdf"), arrived.files[origin.url("/9.pdf")]
    origin.put("/0.pdf", b"newer")
    expired = store / arrived.files[url]["path"]
    age(expired, 100)
    refreshed = run_crawl(list(bodies), store, settings=settings, env=OFF, **how)
    assert refreshed.files[url]["status"] == "downloaded"
    assert [asked.path for asked in origin.requests] == ["/0.pdf"]
    assert expired.read_bytes() == b"newer"
    after = looked(store)
    name = arrived.files[url]["path"]
    assert {n: v for n, v in after.items() if n != name} == {n: v for n, v in before.items() if n != name}
    assert (store / equal["path"]).read_bytes() == bodies[origin.url("/9.pdf")]


def test_what_stock_would_fetch_again_is_fetched(origin: Origin, store: Path) -> None:
    """C6: what has expired, by a plain GET; and the age of the rest counts from when it was stored."""
    bodies = put_files(origin, 3)
    stock = run_crawl(list(bodies), store, settings=STOCK)
    origin.forget()
    old, ageing, young = bodies
    age(store / stock.files[old]["path"], 91)
    age(store / stock.files[ageing]["path"], 89)
    crawl = run_crawl(list(bodies), store, settings=FILES)
    assert [asked.path for asked in origin.requests] == ["/0.pdf"]
    assert {"if-none-match", "if-modified-since", "range"}.isdisjoint(origin.requests[0].fields)
    assert {url: entry["status"] for url, entry in crawl.files.items()} == {
        old: "downloaded", ageing: "uptodate", young: "uptodate",
    }  # fmt: skip
    for url, body in bodies.items():
        assert_stored(store, crawl.files[url], body)
    origin.forget()
    later = run_crawl(list(bodies), store, settings=FILES | {"FILES_EXPIRES": 88})
    assert [asked.path for asked in origin.requests] == ["/1.pdf"]
    assert later.files[ageing]["status"] == "downloaded"


def test_what_cannot_be_adopted_is_fetched_and_left_alone(
    origin: Origin, tmp_path: Path, store: Path
) -> None:
    """C6, E2, F24: through a link, of another owner; nothing is written through it, one line says why."""
    bodies = put_files(origin, 3)
    stock = run_crawl(list(bodies), store, settings=STOCK)
    linked, strange, plain = ((store / stock.files[url]["path"], url) for url in bodies)
    outside = tmp_path / "outside.pdf"
    shutil.move(linked[0], outside)
    linked[0].symlink_to(outside)
    if os.geteuid() == 0:
        os.chown(strange[0], 65533, 65533)
    origin.forget()
    crawl = run_crawl(list(bodies), store, settings=FILES)
    refused = {linked[1]: "not-regular"} | ({strange[1]: "other-owner"} if os.geteuid() == 0 else {})
    for reason in refused.values():
        assert f"File ({reason}): not adopted, the server is asked: " in crawl.log
    assert sorted(asked.path for asked in origin.requests) == [f"/{n}.pdf" for n in range(len(refused))]
    for url, body in bodies.items():
        assert_stored(store, crawl.files[url], body)
    assert outside.read_bytes() == bodies[linked[1]]
    assert outside.stat().st_nlink == 1
    assert crawl.files[plain[1]]["reason"] == "adopted"


def test_a_url_with_a_token_is_known_by_its_name(origin: Origin, tmp_path: Path) -> None:
    """C11: as in stock, in each crawl, also when the file was fetched by us."""
    pipelines = {"ITEM_PIPELINES": {"support.hooks.ByPath": 1}}
    store = tmp_path / "store"
    for number in range(3):
        url = origin.put("/a.pdf", b"body") + f"?token={number}"
        crawl = run_crawl([url], store, settings=pipelines)
        assert_stored(store, crawl.files[url], b"body")
        assert crawl.files[url]["status"] == ("uptodate" if number else "downloaded")
    assert len(origin.requests) == 1
    age(store / crawl.files[url]["path"], 91)
    url = origin.put("/a.pdf", b"newer") + "?token=9"
    assert_stored(store, run_crawl([url], store, settings=pipelines).files[url], b"newer")


@pytest.mark.parametrize("mode", ["copy", "hardlink", "symlink", "none"])
def test_a_filled_store_in_any_link_mode(origin: Origin, store: Path, mode: str) -> None:
    """C6: nothing is fetched, the names give the same bytes."""
    bodies = put_files(origin, 10)
    stock = run_crawl(list(bodies), store, settings=STOCK)
    before = {name: body for name, (body, *_) in looked(store).items()}
    origin.forget()
    for reason in ("adopted", "stored"):
        crawl = run_crawl(list(bodies), store, settings=FILES | {"STREAMING_LINK_MODE": mode})
        assert {entry["reason"] for entry in crawl.files.values()} == {reason}
        for url, body in bodies.items():
            assert_stored(store, crawl.files[url], body)
        assert {name: body for name, (body, *_) in looked(store).items()} == before
    assert origin.requests == []
    if mode != "none":  # there a path is the blob's
        assert essence(crawl) == essence(run_crawl(list(bodies), store, settings=STOCK))
    assert len(stock.files) == len(bodies)
