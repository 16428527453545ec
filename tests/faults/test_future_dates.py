"""A clock that was a year ahead once: what is dated then is asked of the server again (I14, F16)."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from support.command import streaming
from support.crawl import assert_stored, blobs, run_crawl
from support.origin import Origin

YEAR = 365 * 86400.0


@pytest.mark.proves("I14", "F16")
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_files_done_in_the_future_are_confirmed_or_fetched(
    origin: Origin, store: Path, request: pytest.FixtureRequest, database: str
) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgres" else None
    settings = {"STREAMING_DATABASE_URL": url} if url else {}
    urls = [origin.put(f"/{name}", name.encode() * 1000) for name in ("same", "changed")]
    run_crawl(urls, store, settings=settings)
    ahead = f"UPDATE ss_job SET finished_at = {time.time() + YEAR}"
    if url:
        with closing(psycopg.connect(url.replace("+psycopg", ""), autocommit=True)) as connection:
            connection.execute(ahead)
    else:
        with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as other, other:
            other.execute(ahead)
    origin.put("/changed", b"other" * 1000)
    origin.requests.clear()
    second = run_crawl(urls, store, settings=settings)
    assert_stored(store, second.files[urls[0]], b"same" * 1000)
    assert_stored(store, second.files[urls[1]], b"other" * 1000)
    assert second.files[urls[0]]["reason"] == "not-modified"
    assert sorted(asked.path for asked in origin.requests) == ["/changed", "/same"]
    if url is None:  # dated by the clock that is right, they are fresh
        assert run_crawl(urls, store).files[urls[0]]["reason"] == "stored"
        assert len(origin.requests) == 2


@pytest.mark.proves("I14", "I16")
def test_a_name_of_the_future_is_not_adopted_unasked(origin: Origin, store: Path) -> None:
    urls = [origin.put(f"/{name}", name.encode() * 1000) for name in ("now", "ahead")]
    first = run_crawl(urls, store, settings={"STREAMING_LINK_MODE": "copy"})
    ahead = blobs(store)[first.files[urls[1]]["checksum"]]
    (store / ".streaming" / "ledger.sqlite3").unlink()
    assert streaming(store, "rebuild").returncode == 0
    for path in (ahead, store / first.files[urls[1]]["path"]):
        os.utime(path, (time.time(), time.time() + YEAR))
    origin.requests.clear()
    second = run_crawl(urls, store, settings={"STREAMING_LINK_MODE": "copy"})
    for url, body in zip(urls, (b"now", b"ahead"), strict=True):
        assert_stored(store, second.files[url], body * 1000)
    assert [asked.path for asked in origin.requests] == ["/ahead"]
