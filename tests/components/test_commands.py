"""``scrapy streaming …`` on real stores: what each verb prints, and how it ends (rows: I…, F…)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import PIPE

import pytest
from support.command import COMMAND, environment, ok, scrapy, streaming
from support.postgres import PostgresServer
from support.stores import (
    claim,
    fetch,
    files,
    flip,
    key_of,
    open_store,
    publish,
    sha,
    state,
    url_of,
)

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.digests import Digest

BODIES = {number: b"%d" % number * 1000 for number in range(4)}


def fill(store: Path, url: str | None = None) -> None:
    """Do four jobs, have one fail for good and one be tried again."""
    with closing(open_store(store, url)) as crawl:
        for number, data in BODIES.items():
            fetch(crawl, number, data)
        crawl.ledger.fail(claim(crawl, 7).lease, "bad-status-404", "gone", permanent=True).result()
        crawl.ledger.release(claim(crawl, 8).lease).result()


def blob_of(store: Path, data: bytes) -> Path:
    return store / "blobs" / "sha256" / sha(data)[:2] / sha(data)


def refused(done: subprocess.CompletedProcess[str], reason: str) -> str:
    """Return the one line that says so."""
    ok(done, 1)
    [line] = done.stderr.splitlines()
    assert reason in line
    return line


# -- looking ---------------------------------------------------------------------------------


def test_the_verbs_show_what_is_recorded(store: Path, database: str | None) -> None:
    fill(store, database)
    lines = [line.split("\t") for line in ok(streaming(store, "ls", url=database)).splitlines()]
    assert [line[1:] for line in lines] == [
        *(["done", "1", "1000", url_of(number)] for number in BODIES),
        ["failed", "1", "-", url_of(7)],
        ["ready", "0", "-", url_of(8)],
    ]
    assert lines[0][0] == key_of(0)
    found = ok(streaming(store, "ls", "--state", "done", "--json", url=database))
    assert [json.loads(line)["url"] for line in found.splitlines()] == [url_of(n) for n in BODIES]
    health = json.loads(ok(streaming(store, "health", "--json", url=database)))
    assert health["status"] == "healthy"
    assert (health["jobs"]["done"], health["jobs"]["failed"], health["jobs"]["ready"]) == (4, 1, 1)
    assert health["tables"]["ss_completion"] == 4
    assert isinstance(health["schema_version"], int)
    assert "status\thealthy" in ok(streaming(store, "health", url=database))
    migrated = json.loads(ok(streaming(store, "migrate", "--json", url=database)))
    assert migrated["from"] == migrated["to"] == health["schema_version"]
    assert "nothing to do" in ok(streaming(store, "migrate", url=database))


@pytest.mark.parametrize(
    "what", [url_of(1), key_of(1), key_of(1)[:6], f"sha256:{sha(BODIES[1])}", "url+user"]
)
def test_show_finds_a_job_by_anything_that_names_it(store: Path, what: str) -> None:
    fill(store)
    what = "https://me:secret@example.org/1" if what == "url+user" else what
    document = json.loads(ok(streaming(store, "show", what, "--json")))
    [job] = document["jobs"]
    assert (job["key"], job["state"], job["fence"], job["generation"]) == (key_of(1), "done", 1, 1)
    assert [one["path"] for one in job["completions"]] == ["full/1"]
    assert [one["to_state"] for one in job["history"]] == ["leased", "done"]
    text = ok(streaming(store, "show", what))
    assert f"  url\t{url_of(1)}" in text.splitlines()
    if "sha256" in what:
        [blob] = document["blobs"]
        assert (blob["state"], blob["size"], blob["file"]) == ("present", 1000, "there")
        assert (blob["jobs"], blob["represents"]) == ([key_of(1)], [url_of(1)])


def test_show_of_nothing_is_1(store: Path) -> None:
    fill(store)
    assert "https://example.org/none" in refused(
        streaming(store, "show", "https://example.org/none"), "not-f"
    )
    assert json.loads(streaming(store, "show", "0" * 64, "--json").stdout) == {"jobs": [], "blobs": []}
    wrong = streaming(store, "show", "http://[x")
    assert (wrong.returncode, "http://[x is no URL" in wrong.stdout + wrong.stderr) == (2, True)


def test_many_jobs_are_listed_in_pages(store: Path) -> None:
    with closing(open_store(store)) as crawl:
        from scrapy_streaming.storage.ledger import JobRequest

        asked = [
            crawl.ledger.claim(key_of(n), JobRequest("work", "", url_of(n), sha(b"GET"))) for n in range(2300)
        ]
        assert len([future.result() for future in asked]) == 2300
    lines = ok(streaming(store, "ls")).splitlines()
    assert sorted(line.split("\t")[4] for line in lines) == sorted(url_of(n) for n in range(2300))


def test_a_reader_that_closes_the_pipe_ends_ls_quietly(store: Path) -> None:
    with closing(open_store(store)) as crawl:
        for number in range(1500):
            claim(crawl, number)
    command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "ls"]
    with subprocess.Popen(command, env=environment(), stdout=PIPE, stderr=PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""


# -- wrong calls, and no store ---------------------------------------------------------------

VERBS = ["health", "ls", "show x", "verify", "gc", "requeue --failed", "migrate", "rebuild"]


@pytest.mark.parametrize(
    "call",
    [
        "ls --state flying",
        "ls more",
        "ls --repair",
        "show",
        "show a b",
        "verify --repair now",
        "gc --grace",
        "gc --grace -1",
        "gc --grace soon",
        "gc --grace inf",
        "requeue",
        "requeue --failed abcdef",
        "requeue xyz",
        "migrate --sq",
        "rebuild --force",
    ],
)
def test_a_wrong_call_is_2_and_changes_nothing(store: Path, call: str) -> None:
    done = streaming(store, *call.split())
    ok(done, 2)
    assert "error:" in done.stderr
    assert not store.exists()


@pytest.mark.parametrize("call", VERBS)
def test_without_a_store_each_verb_says_so_and_makes_none(store: Path, call: str) -> None:
    done = streaming(store, *call.split())
    assert "store-missing" in ok(done, 1) + done.stderr
    assert not store.exists()


def test_a_verb_without_a_setting_for_the_store_names_it(tmp_path: Path) -> None:
    assert "FILES_STORE" in refused(scrapy("streaming", "ls", cwd=tmp_path), "store-unusable")


def test_health_without_a_store_is_a_document_too(store: Path) -> None:
    document = json.loads(ok(streaming(store, "health", "--json"), 1))
    assert document["status"] == "unhealthy"
    assert "store-missing" in document["errors"][0]


def test_tables_are_printed_without_a_database(store: Path) -> None:
    text = ok(streaming(store, "migrate", "--sql"))
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(text)
        assert connection.execute("SELECT count(*) FROM ss_job").fetchone() == (0,)
    nowhere = "postgresql://nobody@127.0.0.1:9/nothing"
    document = json.loads(ok(streaming(store, "migrate", "--sql", "--json", url=nowhere)))
    assert document["dialect"] == "postgresql"
    assert "DOUBLE PRECISION" in document["sql"]
    assert not store.exists()


# -- doing -----------------------------------------------------------------------------------


def test_requeue_says_how_many_and_what_was_not_to_be(store: Path, database: str | None) -> None:
    fill(store, database)
    done = streaming(store, "requeue", key_of(7)[:8], key_of(1), "abcdef0123", url=database)
    assert ok(done, 1) == "requeue: 1 jobs are ready again\n"
    assert [line.split("(")[1] for line in done.stderr.splitlines()] == ["not-ended)", "not-found)"]
    assert ok(streaming(store, "requeue", "--failed", url=database)) == "requeue: 0 jobs are ready again\n"
    assert len(ok(streaming(store, "ls", "--state", "ready", url=database)).splitlines()) == 2


@pytest.mark.proves("F18")
def test_verify_is_1_on_damage_and_repairs(store: Path, database: str | None) -> None:
    fill(store, database)
    assert ok(streaming(store, "verify", url=database)).startswith(
        "verify: 4 blobs and 4 copies read (8000 bytes), 4 blobs good, 0 files"
    )
    flip(store / f"blobs/sha256/{sha(BODIES[2])[:2]}/{sha(BODIES[2])}")
    lines = ok(streaming(store, "verify", url=database), 1).splitlines()
    assert lines[0].split("\t")[:2] == ["bad-bytes", f"sha256:{sha(BODIES[2])}"]
    document = json.loads(ok(streaming(store, "verify", "--repair", "--json", url=database), 1))
    assert (document["damaged"], document["findings"][0]["repaired"]) == (1, "moved to quarantine")
    assert ok(streaming(store, "verify", url=database)).startswith("verify: 3 blobs and 3 copies read")
    health = json.loads(ok(streaming(store, "health", "--json", url=database), 1))
    assert health["status"] == "degraded"
    assert "quarantined" in health["warnings"][0]


def test_gc_lists_then_removes(store: Path, database: str | None) -> None:
    fill(store, database)
    with closing(open_store(store, database)) as crawl:
        publish(crawl, b"orphan")
        fetch(crawl, 1, b"newer")
    gc = ["gc", "--grace", "0"]
    lines = ok(streaming(store, *gc, "--dry-run", url=database)).splitlines()
    assert lines[0].split("\t") == ["orphans", "6", str(blob_of(store, b"orphan"))]
    assert lines[1].startswith("gc: would free 6 bytes: 1 orphans")
    document = json.loads(ok(streaming(store, *gc, "--dry-run", "--superseded", "--json", url=database)))
    assert [item["kind"] for item in document["items"]] == ["orphans", "superseded"]
    assert ok(streaming(store, "gc", url=database)).startswith("gc: freed 0 bytes: nothing to remove")
    document = json.loads(ok(streaming(store, *gc, "--superseded", "--json", url=database)))
    assert document["freed_bytes"] == 1006
    assert document["removed"]["orphans"] == {"count": 1, "bytes": 6}
    with closing(open_store(store, database)) as crawl:
        assert len(files(crawl)) == 4
    ok(streaming(store, "health", url=database))


def test_an_interrupted_verify_is_130_and_loses_nothing(store: Path) -> None:
    fill(store)
    large = store / "blobs/sha256/00" / ("0" * 64)
    large.parent.mkdir(exist_ok=True)
    with large.open("wb") as stream:
        stream.truncate(200 << 30)  # all of it holes
    command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "verify"]
    with subprocess.Popen(command, env=environment(), stderr=PIPE, text=True) as running:
        workers = store / ".streaming" / "workers"
        while not [path for path in workers.iterdir() if f"-{running.pid}-" in path.name]:
            time.sleep(0.05)
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=20)[1]
    assert running.returncode == 130, said
    assert said == "verify: interrupted; what was done so far is kept\n"
    large.unlink()
    ok(streaming(store, "health"))


def test_a_locked_database_does_not_hold_health_up(store: Path) -> None:
    fill(store)
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        document = json.loads(ok(streaming(store, "health", "--json"), 1))
        assert time.monotonic() - began < 15
    assert "ledger-locked" in document["errors"][0]


# -- a ledger that is lost (F13) -------------------------------------------------------------


def _overwritten(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        pages = [
            row[0] for row in connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ss_job'")
        ]
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as stream:
        stream.seek((pages[0] - 1) * size)
        stream.write(os.urandom(size))


def _truncated(path: Path) -> None:
    os.truncate(path, 3 * 4096 + 100)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "garbage": lambda path: path.write_bytes(b"this is no database" * 1000),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": _truncated,
    "page": _overwritten,
}


@pytest.mark.proves("F13", "I16")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_is_refused_and_rebuilt(store: Path, damage: str) -> None:
    fill(store)
    ledger = store / ".streaming" / "ledger.sqlite3"
    DAMAGE[damage](ledger)
    left = ledger.read_bytes() if ledger.exists() else None
    done = streaming(store, "ls")
    assert "scrapy streaming rebuild" in refused(done, "ledger-")
    health = json.loads(ok(streaming(store, "health", "--json"), 1))
    assert health["status"] == "unhealthy"
    assert "scrapy streaming rebuild" in health["errors"][0]
    said = ok(streaming(store, "rebuild"))
    assert said.startswith("rebuild: made a new ledger, 4 blobs recorded, 0 were known, 0 bad")
    aside = [path for path in ledger.parent.glob("ledger.sqlite3.damaged-*") if "-wal" not in path.name]
    aside = [path for path in aside if not path.name.endswith("-shm")]
    assert len(aside) == (damage in ("garbage", "truncated", "page"))
    if damage != "page":  # in which the refused ones still could note that they came
        assert all(path.read_bytes() == left for path in aside)
    with closing(open_store(store)) as crawl:
        assert all(state(crawl, Digest(sha(data))) == "present" for data in BODIES.values())
        assert crawl.ledger.jobs().result() == []
    ok(streaming(store, "health"))
    again = json.loads(ok(streaming(store, "rebuild", "--json")))
    assert (again["ledger"], again["known"], again["adopted"]) == ("completed", 4, 0)


KILLED = """
import os, sys
from pathlib import Path
from support.stores import fetch, open_store
store = open_store(Path(sys.argv[1]))
for number in range(4):
    fetch(store, number, b"%d" % number * 1000)
os._exit(0)
"""


@pytest.mark.proves("F13")
def test_a_ledger_without_its_log_is_refused_and_rebuilt(store: Path) -> None:
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED, str(store)], env=variables, check=True, timeout=60)
    for end in ("-wal", "-shm"):
        Path(f"{store}/.streaming/ledger.sqlite3{end}").unlink()
    with pytest.raises(LedgerError, match="scrapy streaming rebuild"):
        open_store(store)
    assert "4 blobs recorded" in ok(streaming(store, "rebuild"))
    ok(streaming(store, "health"))


@pytest.mark.proves("F13")
def test_rebuild_names_bad_blobs_and_records_the_rest(store: Path) -> None:
    fill(store)
    flip(blob_of(store, BODIES[2]))
    (store / ".streaming" / "ledger.sqlite3").unlink()
    lines = ok(streaming(store, "rebuild"), 1).splitlines()
    assert lines[0] == f"bad-bytes\tsha256:{sha(BODIES[2])}"
    assert "3 blobs recorded, 0 were known, 1 bad" in lines[1]


def test_rebuild_is_refused_while_a_crawl_runs(store: Path) -> None:
    """The crawl would continue with a ledger that no longer is the store's."""
    with closing(open_store(store)) as crawl:
        assert crawl.worker_id in refused(streaming(store, "rebuild"), "store-busy")
    ok(streaming(store, "rebuild"))


@pytest.mark.proves("F13")
def test_rebuild_on_a_server(store: Path, postgres_server: PostgresServer, postgres_url: str) -> None:
    """A database that lost its tables gets new ones; another store's is left alone."""
    fill(store, postgres_url)
    postgres_server.drop(postgres_url)
    postgres_server.create(postgres_url.rpartition("/")[2])
    assert "scrapy streaming rebuild" in refused(streaming(store, "ls", url=postgres_url), "ledger-missing")
    assert "made a new ledger, 4 blobs" in ok(streaming(store, "rebuild", url=postgres_url))
    ok(streaming(store, "health", url=postgres_url))
    other = store.parent / "other"
    shutil.copytree(store, other)
    (other / ".streaming" / "store.json").unlink()
    nothing = postgres_server.create()
    open_store(other, nothing).close()
    line = refused(streaming(other, "rebuild", url=postgres_url), "ledger-foreign")
    assert "an empty one, in STREAMING_DATABASE_URL" in line
    ok(streaming(store, "health", url=postgres_url))
    postgres_server.drop(nothing)
