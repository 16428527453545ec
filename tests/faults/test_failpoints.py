"""F1: a crawl killed at each of its boundaries, and the crawl after it."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.crawl import assert_sound, assert_stored, parts, run_crawl
from support.postgres import PostgresServer
from support.servers import WebServer

from scrapy_streaming.storage.failpoints import VARIABLE

SIZE = 3 << 20
SETTINGS = {"STREAMING_CHECKPOINT_BYTES": 1 << 20, "LOG_LEVEL": "INFO"}

#: Each place with the passage at which the crawl dies there.
PLACES = [
    "part-written=kill:5", "part-synced=kill:2", "sidecar-written=kill:1", "sidecar-written=kill:3",
    "sidecar-named=kill:2", "blob-synced=kill", "folder-made=kill", "folder-made=kill:3", "blob-linked=kill",
    "blob-durable=kill", "name-made=kill", "name-moved=kill", "commit=kill:1", "commit=kill:2",
    "committed=kill:1", "committed=kill:2", "schema-made=kill",
]  # fmt: skip
LEDGERS = ["commit=kill:1", "commit=kill:2", "committed=kill:2", "name-moved=kill", "schema-made=kill"]


def _crawl_dies_and_the_next_one_goes_on(
    web: WebServer, store: Path, place: str, settings: dict[str, object]
) -> None:
    bodies = {
        "fail/a.bin": random.Random(place).randbytes(SIZE),
        "fail/b.bin": random.Random(place + "b").randbytes(1000),
    }
    urls = [web.put(path, body) for path, body in bodies.items()]
    died = run_crawl(urls, store, settings=settings, env={VARIABLE: place})
    assert died.code == -9, f"{place} was not passed"
    assert_sound(store, list(bodies.values()))
    web.forget()
    crawl = run_crawl(urls, store, settings=settings)
    for path, body in bodies.items():
        assert_stored(store, crawl.files.get(web.url(path)), body)
    assert parts(store) == []
    again = run_crawl(urls, store, settings=settings)
    assert again.stat("file_status_count/uptodate") == 2
    assert again.stat("streaming/bytes_received") == 0


@pytest.mark.proves("F1", "I5", "I6", "I17")
@pytest.mark.parametrize("place", PLACES)
def test_a_crawl_killed_at_a_boundary_on_sqlite(web: WebServer, store: Path, place: str) -> None:
    _crawl_dies_and_the_next_one_goes_on(web, store, place, SETTINGS)
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as connection:
        assert connection.execute("SELECT state, count(*) FROM ss_job GROUP BY state").fetchall() == [
            ("done", 2)
        ]
        assert connection.execute("SELECT count(*) FROM ss_completion").fetchone() == (2,)
        assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)


@pytest.mark.proves("F1", "I5", "I6", "F27")
@pytest.mark.parametrize("place", LEDGERS)
def test_a_crawl_killed_at_a_boundary_on_postgresql(
    web: WebServer, store: Path, place: str, postgres_server: PostgresServer, postgres_url: str
) -> None:
    settings = SETTINGS | {"STREAMING_DATABASE_URL": postgres_url}
    _crawl_dies_and_the_next_one_goes_on(web, store, place, settings)
    states = postgres_server.query(postgres_url, "SELECT state, count(*) FROM ss_job GROUP BY state")
    assert states == [("done", 2)]
