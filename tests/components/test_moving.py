"""``scrapy streaming adopt``, ``export``, ``import`` and ``detach`` on real stores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from support.beside import FILES, files_in
from support.command import COMMAND, environment, streaming
from support.crawl import Crawl, assert_stored, blobs, run_crawl, wait_until
from support.origin import Origin
from support.stores import open_store

from scrapy_streaming.storage import maintenance

STOCK = {**FILES, "ADDONS": {}}


def ok(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def site(origin: Origin, count: int) -> dict[str, bytes]:
    """Put files on the origin; every tenth has the bytes of another."""
    bodies = {n: b"%d " % (n - n % 10 if n % 10 == 9 else n) * 500 for n in range(count)}
    return {origin.put(f"/{number}.pdf", body): body for number, body in bodies.items()}


def seen(store: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of each name."""
    return {name: (body, (store / name).stat().st_mtime_ns) for name, body in files_in(store).items()}


def assert_nothing_fetched(origin: Origin, crawl: Crawl, store: Path, bodies: dict[str, bytes]) -> None:
    assert origin.requests == []
    for url, body in bodies.items():
        assert_stored(store, crawl.files[url], body)
        assert crawl.files[url]["status"] == "uptodate"


# -- adopt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("mode", ["auto", "copy"])
def test_a_store_is_adopted_ahead_of_the_crawl(origin: Origin, store: Path, mode: str, count: int) -> None:
    """C6: each file is hashed once, by the verb; it goes on where it was, and touches no name."""
    bodies = site(origin, count)
    run_crawl(list(bodies), store, settings=STOCK)
    origin.forget()
    before = seen(store)
    how = ["-s", f"STREAMING_LINK_MODE={mode}", "adopt"]
    first = json.loads(ok(streaming(store, *how, "--json")))
    total = sum(map(len, bodies.values()))
    numbers = {"files": count, "bytes": total, "adopted": count, "known": 0, "refused": []}
    assert first == numbers
    assert len(blobs(store)) == len(set(bodies.values()))
    second = ok(streaming(store, *how))
    assert second == f"adopt: {count} files, {total} bytes: 0 taken over, {count} were known, 0 refused\n"
    assert seen(store) == before
    counting = {**FILES, "STREAMING_LINK_MODE": mode, "EXTENSIONS": {"support.hooks.CountsHashing": 1}}
    crawl = run_crawl(list(bodies), store, settings=counting)
    assert crawl.stat("streaming/decision/adopted") == count
    assert crawl.stat("test/hashed") == 0, "the crawl has only to look up"
    assert_nothing_fetched(origin, crawl, store, bodies)
    assert ok(streaming(store, "health")).startswith("status\thealthy")


def test_what_adopt_cannot_take_is_named(store: Path, tmp_path: Path) -> None:
    """E2, F24: each with the word for why; the exit code is 1; nothing of it is touched."""
    (store / "full" / "deep").mkdir(parents=True)
    (store / "full" / "good.pdf").write_bytes(b"good")
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    (store / "full" / "link").symlink_to(outside)
    (store / "full" / "deep" / "out").symlink_to(tmp_path)
    os.mkfifo(store / "full" / "deep" / "pipe")
    (store / "full" / f".{'0' * 32}.tmp").write_bytes(b"ours")
    expected = {"full/link": "not-regular", "full/deep/out": "not-regular", "full/deep/pipe": "not-regular"}
    with (store / "full" / "busy.pdf").open("wb"):
        done = json.loads(ok(streaming(store, "adopt", "--json"), 1))
    expected["full/busy.pdf"] = "being-written"
    assert {one["path"]: one["reason"] for one in done["refused"]} == expected
    assert (done["files"], done["adopted"]) == (5, 1)
    assert outside.stat().st_nlink == 1
    text = ok(streaming(store, "adopt"), 1).splitlines()
    assert "not-regular\tfull/link" in text
    assert text[-1] == "adopt: 5 files, 4 bytes: 1 taken over, 1 were known, 3 refused"


def test_adopt_without_a_folder_says_so(store: Path) -> None:
    done = streaming(store, "adopt")
    ok(done, 1)
    assert "store-missing" in done.stderr
    assert not store.exists()


def test_the_ledger_among_the_files_is_no_file_of_the_stores(store: Path) -> None:
    store.mkdir()
    (store / "a.pdf").write_bytes(b"a")
    url = f"sqlite:///{store / 'jobs.sqlite3'}"
    done = json.loads(ok(streaming(store, "adopt", "--json", url=url)))
    assert (done["files"], done["refused"]) == (1, [])
    assert (store / "jobs.sqlite3").stat().st_nlink == 1


def test_adopt_that_is_interrupted_goes_on(store: Path) -> None:
    """Ctrl-C: what was done is kept; a kill costs a batch at most."""
    (store / "full").mkdir(parents=True)
    for number in range(300):
        (store / "full" / f"{number}").write_bytes(b"%d" % number)
    (store / "full" / "deep").mkdir()
    with (store / "full" / "deep" / "large").open("wb") as stream:  # the last; it takes minutes to read
        stream.truncate(200 << 30)
    command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "adopt", "--json"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        wait_until(lambda: noted(store) >= 256)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "adopt: interrupted; what was done so far is kept" in errors
    assert time.monotonic() - began < 20
    (store / "full" / "deep" / "large").unlink()
    done = noted(store)
    again = json.loads(ok(streaming(store, "adopt", "--json")))
    assert again["files"] == 300
    assert again["known"] == done == 256


def noted(store: Path) -> int:
    """Count the files that were noted, with a look of its own."""
    import sqlite3

    try:
        with closing(sqlite3.connect(f"file:{store}/.streaming/ledger.sqlite3?mode=ro", uri=True)) as ledger:
            return int(ledger.execute("SELECT count(*) FROM ss_operation WHERE kind = 'adopt'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_files_are_noted_in_either_database(store: Path, ledger_url: str) -> None:
    store.mkdir()
    (store / "a\udcff.pdf").write_bytes(b"a")
    for known in (0, 1):
        with closing(open_store(store, ledger_url)) as opened:
            done = maintenance.adopt(opened, refused=refuse)
        assert (done.files, done.known) == (1, known)


def refuse(path: str, reason: str) -> None:
    raise AssertionError(path, reason)
