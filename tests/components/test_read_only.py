"""Verbs that only read change no byte, no time and no file; rights to read suffice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from support.command import streaming
from support.launch import TESTS
from support.postgres import PostgresServer
from support.stores import claim, fetch, key_of, open_store, sha, url_of

from scrapy_streaming import integration
from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.storage.ledger import ReadOnlyLedger, database_of
from scrapy_streaming.storage.ledger.database import ChangedMeanwhile, Reader
from scrapy_streaming.storage.ledger.sqlite_reader import SqliteReader

#: Each verb that only reads, with its exit code and a word of what it prints about the store of ``fill``.
VERBS: dict[tuple[str, ...], tuple[int, str]] = {
    ("status",): (0, "Streaming: enabled"),
    ("health",): (0, "healthy"),
    ("ls",): (0, url_of(0)),
    ("ls", "--state", "ready"): (0, url_of(2)),
    ("show", url_of(0)): (0, key_of(0)),
    ("show", sha(b"done")): (0, "file\tthere"),
    ("check",): (3, "1 of 3 jobs may still come"),
    ("failures",): (0, "bad-status-404"),
    ("export", "-"): (0, url_of(0)),
}
KILLED = """
import os, signal, sys
from pathlib import Path
from support.stores import fetch, open_store

fetch(open_store(Path(sys.argv[1])), 7, b"killed")
os.kill(os.getpid(), signal.SIGKILL)
"""

#: Not this process: it would drop SQLite's locks on the files that the test itself opens and closes.
OPEN = """
import sys
from pathlib import Path
from support.stores import open_store

store = open_store(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
store.close()
"""


def fill(store: Path, url: str | None = None) -> None:
    with closing(open_store(store, url)) as crawl:
        fetch(crawl, 0, b"done")
        crawl.ledger.fail(claim(crawl, 1).lease, "bad-status-404", "why", permanent=True).result()
        crawl.ledger.release(claim(crawl, 2).lease).result()


def leave_a_log(store: Path) -> None:
    """Have a worker die in the middle: its log was not copied back, its lease goes on."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store)], env=os.environ | {"PYTHONPATH": str(TESTS)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert (store / ".streaming" / "ledger.sqlite3-wal").stat().st_size


@contextmanager
def opened_elsewhere(store: Path) -> Iterator[None]:
    """Have another process keep the store open, as a crawl does."""
    with subprocess.Popen(
        [sys.executable, "-c", OPEN, str(store)],
        env=os.environ | {"PYTHONPATH": str(TESTS)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as crawl:  # fmt: skip
        assert crawl.stdout is not None
        assert crawl.stdout.readline() == b"\n"
        yield
    assert crawl.returncode == 0


def everything(store: Path) -> dict[str, tuple[object, ...]]:
    """Return what each file and folder of a store is: its bytes, its time, its mode, its inode."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [store, *store.rglob("*")]:
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(store))] = (content, info.st_mtime_ns, info.st_mode, info.st_ino)
    return found


def run_all(store: Path, url: str | None = None) -> None:
    for verb, (code, word) in VERBS.items():
        done = streaming(store, *verb, url=url)
        assert (done.returncode, word in done.stdout) == (code, True), (verb, done.stdout, done.stderr)


@contextmanager
def unchanged(store: Path) -> Iterator[None]:
    before = everything(store)
    yield
    after = everything(store)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


@pytest.mark.parametrize("state", ["closed", "open", "killed"])
def test_no_byte_and_no_time_changes(store: Path, tmp_path: Path, state: str) -> None:
    fill(store)
    exported = tmp_path / "exported.jsonl"
    with ExitStack() as stack:
        if state == "open":  # by this process: the verbs are others
            stack.enter_context(closing(open_store(store)))
        elif state == "killed":
            leave_a_log(store)
        with unchanged(store):
            if state != "killed":
                run_all(store)
            assert streaming(store, "export", str(exported)).returncode == 0
            assert streaming(store, "health").returncode == 0
            assert streaming(store, "ls").returncode == 0
            url = f"sqlite:///{store / '.streaming' / 'ledger.sqlite3'}"
            if state == "closed":
                assert (integration.check_database_health(url) or {})["status"] == "healthy"
    assert len(exported.read_text().splitlines()) == (2 if state == "killed" else 1)


@pytest.fixture
def read_only(store: Path) -> Iterator[Path]:
    """A filled store, part of its ledger in the log, on a filesystem that is mounted read-only."""
    if os.geteuid() != 0:
        pytest.skip("a folder is made read-only by a mount, which needs root; CI runs as root")
    fill(store)
    where = store.parent / "mounted"
    where.mkdir()
    with ExitStack() as stack:

        def mount(*options: str) -> bool:
            return subprocess.run(["mount", *options], check=False, capture_output=True).returncode == 0

        if not mount("--bind", str(store), str(where)):
            pytest.skip("no folder can be mounted here")
        stack.callback(subprocess.run, ["umount", "--lazy", str(where)], check=True)
        if not mount("-o", "remount,ro,bind", str(where)):
            pytest.skip("no folder can be mounted read-only here")
        with pytest.raises(OSError, match="Read-only"):
            (where / "new").touch()
        yield where


def test_a_store_on_a_read_only_filesystem_can_be_read(read_only: Path, store: Path) -> None:
    run_all(read_only)
    leave_a_log(store)
    assert sorted(line.split("\t")[4] for line in streaming(read_only, "ls").stdout.splitlines()) == [
        *map(url_of, (0, 1, 2, 7))
    ]
    assert streaming(read_only, "health").returncode == 0
    with opened_elsewhere(store):  # which the read-only folder shows, too
        assert streaming(read_only, "ls").returncode == 0


def test_a_log_without_its_index_is_named_with_the_remedy(store: Path) -> None:
    """It cannot be read without making a file, so nothing is made."""
    fill(store)
    leave_a_log(store)
    (store / ".streaming" / "ledger.sqlite3-shm").unlink()
    with unchanged(store):
        done = streaming(store, "ls")
    assert (done.returncode, done.stdout) == (1, "")
    assert "(ledger-unreadable)" in done.stderr
    assert "scrapy streaming migrate" in done.stderr
    assert streaming(store, "migrate").returncode == 0
    assert len(streaming(store, "ls").stdout.splitlines()) == 4


def test_an_older_ledger_is_not_migrated_by_reading_it(store: Path) -> None:
    fill(store)
    path = store / ".streaming" / "ledger.sqlite3"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE ss_meta SET schema_version = 3")
    with unchanged(store):
        for verb in ("health", "ls", "check", "failures", "export -", f"show {url_of(0)}"):
            done = streaming(store, *verb.split())
            assert done.returncode == 1, verb
            assert "scrapy streaming migrate" in done.stdout + done.stderr, verb
            assert "(ledger-older)" in done.stdout + done.stderr, verb
    assert streaming(store, "migrate").returncode == 0
    run_all(store)


def test_a_crawl_is_not_disturbed(store: Path) -> None:
    """Commits go on while verbs read; at its end the log is copied back as if nobody had read."""
    fill(store)
    with closing(open_store(store)) as crawl:
        stop, numbers = threading.Event(), iter(range(100, 100_000))

        def work() -> int:
            count = 0
            while not stop.is_set():
                fetch(crawl, next(numbers), b"meanwhile")
                count += 1
            return count

        counts: list[int] = []
        worker = threading.Thread(target=lambda: counts.append(work()))
        worker.start()
        try:
            for verb in ("ls", "health", "export -"):
                done = streaming(store, *verb.split())
                assert (done.returncode, done.stderr.replace("export", "")[:1]) in ((0, ""), (0, ":"))
        finally:
            stop.set()
            worker.join()
        assert counts[0] > 10
    assert not (store / ".streaming" / "ledger.sqlite3-wal").exists()


# -- how a file is read ----------------------------------------------------------------------


@pytest.fixture
def ledger_file(store: Path) -> Path:
    fill(store)
    return store / ".streaming" / "ledger.sqlite3"


WRITER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("UPDATE ss_job SET error = ?", [sys.argv[2]])
connection.close()
"""


def test_what_a_writer_changes_in_the_middle_is_read_again(ledger_file: Path) -> None:
    """A closed file is read without locks, so a writer that comes is noticed by what it leaves."""
    with ReadOnlyLedger(database_of(f"sqlite:///{ledger_file}"), None) as ledger:
        came = 0

        def read_slowly(session: object) -> set[str | None]:
            nonlocal came
            found = {row[0] for row in session.connection.exec_driver_sql("SELECT error FROM ss_job")}  # type: ignore[attr-defined]
            if not came:
                came = 1
                subprocess.run([sys.executable, "-c", WRITER, str(ledger_file), "changed"], check=True)
            return found

        assert ledger.submit(read_slowly).result() == {"changed"}
        reader = SqliteReader(ledger_file)
        with pytest.raises(ChangedMeanwhile), reader.transaction():
            subprocess.run([sys.executable, "-c", WRITER, str(ledger_file), "again"], check=True)


def test_a_writer_of_the_same_process_waits_for_a_reader(store: Path, ledger_file: Path) -> None:
    """SQLite would have them share the reader's index, to which nobody can write."""
    leave_a_log(store)
    opened: list[object] = []

    def crawl() -> None:
        with closing(open_store(store)) as crawl:
            fetch(crawl, 9, b"written")
            opened.append(crawl)

    thread = threading.Thread(target=crawl)
    reader = SqliteReader(ledger_file)
    with reader.transaction() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM ss_job").one()
        thread.start()
        thread.join(0.5)
        assert opened == []
    thread.join(30)
    assert len(opened) == 1


def test_a_reader_beside_a_writer_of_the_same_process(store: Path, ledger_file: Path) -> None:
    with closing(open_store(store)) as crawl, ReadOnlyLedger(crawl.ledger._database, None) as ledger:
        fetch(crawl, 9, b"written")
        assert len(ledger.jobs().result()) == 4
        ledger.wait_unlocked(0)
        fetch(crawl, 10, b"written")
        assert len(ledger.jobs().result()) == 5


# -- PostgreSQL ------------------------------------------------------------------------------


def test_a_role_that_may_only_select_suffices(
    store: Path, postgres_server: PostgresServer, postgres_url: str
) -> None:
    fill(store, postgres_url)
    name = postgres_url.rpartition("/")[2]
    query = postgres_server.query
    query("postgres", "DROP ROLE IF EXISTS reader")
    query("postgres", "CREATE ROLE reader LOGIN")
    try:
        query(name, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        url = postgres_url.replace("postgres@", "reader@")
        assert url != postgres_url
        tables = [
            row[0] for row in query(name, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        ]

        def rows() -> dict[str, list[object]]:
            return {table: sorted(map(repr, query(name, f'SELECT * FROM "{table}"'))) for table in tables}  # type: ignore[arg-type]

        before = rows()
        with unchanged(store):
            run_all(store, url)
        assert (integration.check_database_health(url) or {})["status"] == "healthy"
        assert rows() == before
        with pytest.raises(LedgerError) as caught:
            open_store(store, url)
        assert caught.value.reason == "ledger-unreadable"
    finally:
        query(name, "DROP OWNED BY reader")
        query("postgres", "DROP ROLE reader")


def test_the_server_refuses_a_write_by_a_reader(store: Path, postgres_url: str) -> None:
    """Also where the role might."""
    fill(store, postgres_url)
    database = database_of(postgres_url)

    def write(reader: Reader) -> None:
        with reader.transaction() as connection:
            connection.exec_driver_sql("UPDATE ss_meta SET epoch = 0")

    with database.reader() as reader, pytest.raises(Exception, match="read-only transaction") as caught:
        write(reader)
    known = database.translate(caught.value)
    assert isinstance(known, LedgerError)
    assert known.reason == "ledger-unreadable"
