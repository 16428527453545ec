"""Schema versions: old ledgers are brought forward once, newer ones refused, and nothing dropped (I20, F27).

``fixtures/ledger-v1.sql`` was written by the code of version 1 (``fixtures/make_ledger_v1.py``): jobs in
all five states, completions of two generations, validators of each kind, a blob that is missing.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import (
    REQUEST,
    URL,
    Clock,
    Database,
    Opener,
    at_once,
    grant,
    hex_of,
    known,
    postgres_only,
    process,
    sqlite_only,
    view,
)
from sqlalchemy import text
from support.postgres import PostgresServer

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import (
    Completion,
    Dead,
    Done,
    Granted,
    Held,
    StoredRepresentation,
    Waiting,
    job_key,
)
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import SCHEMA_VERSION, JobRequest, Ledger, Repeat, ddl, postgres, schema

V1 = Path(__file__).with_name("fixtures") / "ledger-v1.sql"
V2 = Path(__file__).with_name("fixtures") / "ledger-v2.sql"
V3 = Path(__file__).with_name("fixtures") / "ledger-v3.sql"
AT = 1_700_000_000.25 + 5 + 2 * 61  # when the fixture was closed
OLD = ("job", "blob", "representation", "completion")
TAGGED = Validators(EntityTag("v1"), "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT")


def make_v1(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(V1.read_text())


@pytest.fixture
def old(tmp_path: Path, path: Path, clock: Clock) -> dict[str, list[dict[str, Any]]]:
    """A ledger of version 1 in the place of an empty one; returns what its tables said."""
    make_v1(path)
    clock.now = AT
    return rows_of(path, "ss_")


def rows_of(path: Path, prefix: str) -> dict[str, list[dict[str, Any]]]:
    found = {}
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        for name in OLD:
            found[name] = [
                dict(row) for row in connection.execute(f"SELECT * FROM {prefix}{name} ORDER BY 1, 2")
            ]
    return found


def a_job(name: str) -> tuple[str, JobRequest]:
    url = f"https://example.org/{name}?q=ä"
    return job_key("work", name, url), JobRequest("work", name, url, hex_of("GET"))


def version(database: Database) -> list[tuple[Any, ...]]:
    return database.rows("SELECT count(*), min(schema_version), max(schema_version) FROM ss_meta")


# -- 1 to 2 ------------------------------------------------------------------------------------------


@sqlite_only
@pytest.mark.proves("I20")
def test_every_row_of_version_1_is_as_it_was(
    opened: Opener, path: Path, database: Database, old: dict[str, list[dict[str, Any]]]
) -> None:
    """Column by column: hexadecimal text became bytes, names of workers became numbers."""
    assert {row["state"] for row in old["job"]} == {"ready", "leased", "done", "failed", "dead"}
    assert {row["generation"] for row in old["completion"]} == {1, 2}
    ledger = opened()
    assert version(database) == [(1, SCHEMA_VERSION, SCHEMA_VERSION)]
    [(ledger_id, epoch)] = database.rows("SELECT ledger_id, epoch FROM ss_meta")
    assert (ledger_id, epoch) == (ledger.ledger_id, 1)
    assert f"'{ledger_id}'" in V1.read_text()
    ledger.close()
    new = rows_of(path, "ss_")
    for name in OLD:
        assert len(new[name]) == len(old[name]) > 0
        keys = {"job": "id", "blob": "digest", "representation": "url_key"}.get(name, "claim_id")
        by_key = {as_text(row[keys]): row for row in new[name]}
        for row in old[name]:
            found = by_key[str(row[keys]).removeprefix("sha256:")]
            for column, value in row.items():
                if column == "completion_id":  # it is the claim's since version 2
                    continue
                told = found[column.replace("worker_id", "worker")]
                if column in ("worker_id", "not_before_by") and value is not None:
                    assert told == schema.worker_number(value)
                elif isinstance(told, bytes):
                    assert told.hex() == value.removeprefix("sha256:"), column
                else:
                    assert told == value, column
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def as_text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


@sqlite_only
@pytest.mark.proves("I20")
def test_the_old_tables_stay(opened: Opener, path: Path, old: dict[str, list[dict[str, Any]]]) -> None:
    """Nothing is ever dropped."""
    opened().close()
    assert rows_of(path, "ss_v1_") == old


@sqlite_only
@pytest.mark.proves("I20", "I19")
def test_every_job_of_version_1_answers_as_before(
    opened: Opener, old: dict[str, list[dict[str, Any]]], clock: Clock
) -> None:
    ledger = opened("new", max_attempts=2)

    def claim(name: str) -> object:
        return ledger.claim(*a_job(name)).result()

    done = claim("done")
    assert isinstance(done, Done)
    assert done.completion.known == StoredRepresentation(
        "sha256:" + hex_of("again"), 5, TAGGED, "https://cdn.example.org/elsewhere", "text/plain",
        ("accept", "user-agent"), "sel", done.completion.completed_at,
    )  # fmt: skip
    weak, plain = claim("weak"), claim("plain")
    assert isinstance(weak, Done)
    assert isinstance(plain, Done)
    assert weak.completion.known.validators == Validators(EntityTag("w", weak=True), None, None)
    assert weak.completion.known.final_url == a_job("weak")[1].url
    assert plain.completion.known.validators == Validators()
    missing = claim("missing")
    assert isinstance(missing, Granted)
    assert (missing.lease.generation, missing.lease.fence, missing.known) == (2, 2, None)
    assert isinstance(ledger.complete(missing.lease, known("missing")).result(), Completion)
    waits = claim("waits")
    assert isinstance(waits, Waiting)
    assert waits.error == "503"
    for name in ("backs off", "ready", "failed"):  # a back-off bound the run that set it
        granted = claim(name)
        assert isinstance(granted, Granted), name
        assert granted.lease.fence == 2
        assert not granted.taken_over
    assert claim("dead") == Dead(2, "every claim of this job ended without a word from its worker")
    held = claim("leased")
    assert isinstance(held, Held)
    assert held.worker_id == "host-1-ab"
    clock.now = held.until
    over = claim("leased")
    assert isinstance(over, Granted)
    assert (over.lease.fence, over.taken_over) == (2, True)
    with pytest.raises(LedgerError) as caught:
        opened(store_id="other")
    assert caught.value.reason == "ledger-foreign"


START = """
from scrapy_streaming.storage.ledger import JobRequest, Ledger
url, key, me = sys.argv[1:]
barrier()
with Ledger.open(url, store_id="store", worker_id=me) as ledger:
    print(type(ledger.claim(key, JobRequest("w", "a", "https://h/", key)).result()).__name__)
"""


@sqlite_only
@pytest.mark.proves("I20", "F27")
def test_sixteen_processes_at_once_migrate_once(
    url: str, path: Path, database: Database, old: dict[str, list[dict[str, Any]]]
) -> None:
    said = at_once(16, START, url, hex_of("k"))
    assert sorted(said) == ["Granted"] + ["Held"] * 15
    assert version(database) == [(1, SCHEMA_VERSION, SCHEMA_VERSION)]
    assert rows_of(path, "ss_v1_") == old
    assert database.rows("SELECT count(*) FROM ss_job") == [(len(old["job"]) + 1,)]
    assert database.rows("SELECT count(*) FROM ss_worker") == [(16 + 1,)]


@pytest.mark.proves("I20", "F27")
@pytest.mark.long_on_postgres
def test_processes_that_start_at_once_create_the_ledger_once(url: str, database: Database) -> None:
    said = at_once(8, START, url, hex_of("k"))
    assert sorted(said) == ["Granted"] + ["Held"] * 7
    assert version(database) == [(1, SCHEMA_VERSION, SCHEMA_VERSION)]
    assert database.rows("SELECT count(*), max(fence) FROM ss_job") == [(1, 1)]


@postgres_only
@pytest.mark.proves("I20", "F27")
def test_who_comes_while_another_migrates_waits_for_its_end(opened: Opener, database: Database) -> None:
    """PostgreSQL lets two create the same tables at once, and one of them fail."""
    with closing(database.connect()) as other, ThreadPoolExecutor() as pool:
        other.execute("BEGIN")
        other.execute("SELECT pg_advisory_xact_lock(%s)", (postgres.MIGRATION_LOCK,))
        coming = pool.submit(opened)
        time.sleep(0.5)
        assert not coming.done()
        assert database.rows("SELECT to_regclass('ss_meta')") == [(None,)]
        other.execute("COMMIT")
        assert grant(coming.result(10)).fence == 1


DIES = """
import sys
from scrapy_streaming.storage.ledger import Ledger
Ledger.open(sys.argv[1], store_id="store", worker_id="w").close()
"""


@sqlite_only
@pytest.mark.proves("I20", "F1", "F27")
@pytest.mark.parametrize("place", ["migration=kill:1", "migration=kill:4"])
def test_killed_in_the_migration_the_next_start_migrates(
    opened: Opener,
    url: str,
    path: Path,
    database: Database,
    old: dict[str, list[dict[str, Any]]],
    place: str,
) -> None:
    environment = os.environ | {"SCRAPY_STREAMING_FAILPOINTS": place}
    with process(DIES, url, env=environment) as victim:
        _, error = victim.communicate(timeout=60)
    assert (error, victim.returncode) == ("", -signal.SIGKILL)
    assert rows_of(path, "ss_") == old
    assert version(database) == [(1, 1, 1)]
    opened().close()
    assert version(database) == [(1, SCHEMA_VERSION, SCHEMA_VERSION)]
    assert rows_of(path, "ss_v1_") == old


@pytest.mark.proves("I20", "F1", "F27")
def test_killed_while_it_is_made_the_next_start_makes_it(
    opened: Opener, url: str, database: Database
) -> None:
    environment = os.environ | {"SCRAPY_STREAMING_FAILPOINTS": "schema-made=kill"}
    with process(DIES, url, env=environment) as victim:
        _, error = victim.communicate(timeout=60)
    assert (error, victim.returncode) == ("", -signal.SIGKILL)
    assert grant(opened()).fence == 1
    assert version(database) == [(1, SCHEMA_VERSION, SCHEMA_VERSION)]


@sqlite_only
@pytest.mark.proves("I20")
def test_a_migration_that_fails_leaves_the_ledger_as_it_was(
    opened: Opener, path: Path, old: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = schema.MIGRATIONS[1]

    def fails(connection: Any) -> None:
        real(connection)
        connection.execute(text("SELECT no_such_function()"))

    with monkeypatch.context() as patch:
        patch.setitem(schema.MIGRATIONS, 1, fails)
        with pytest.raises(LedgerError):
            opened()
    assert rows_of(path, "ss_") == old
    opened().close()
    assert rows_of(path, "ss_v1_") == old


# -- 2 to 3, 3 to 4 ----------------------------------------------------------------------------------


def all_rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]
            for name in sorted(tables)
        }


def columns(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: sorted(row[1:4] for row in connection.execute(f"PRAGMA table_info({name})"))
            for name in sorted(names)
        }


@sqlite_only
@pytest.mark.proves("I20")
@pytest.mark.parametrize(
    ("fixture", "kill"), [(V2, None), (V2, "migration=kill:3"), (V3, None), (V3, "migration=kill:2")]
)
def test_an_older_version_gets_its_new_columns_and_keeps_every_row(
    opened: Opener, url: str, path: Path, tmp_path: Path, fixture: Path, kill: str | None
) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(fixture.read_text())
    before = all_rows(path)
    assert [len(before[name]) for name in ("ss_job", "ss_completion", "ss_blob")] == [
        4 + (fixture == V3),
        2,
        2,
    ]
    if kill is not None:
        environment = os.environ | {"SCRAPY_STREAMING_FAILPOINTS": kill}
        with process(DIES, url, env=environment) as victim:
            _, error = victim.communicate(timeout=60)
        assert (error, victim.returncode) == ("", -signal.SIGKILL)
        assert all_rows(path) == before
    ledger = opened("new", clock=None)  # to the tests' own clock its dates are in the future
    seen = ledger.jobs().result()
    assert {(job.plain, job.asked_url, job.asked_name, job.named_by_url) for job in seen} == {
        (None, None, None, False)
    }
    assert isinstance(ledger.claim(*a_job("done")).result(), Done)
    ledger.close()
    after = all_rows(path)
    for table in before.keys() - {"ss_worker"}:
        new = (
            [{name: row[name] for name in before[table][0]} for row in after[table]] if before[table] else []
        )
        expected = before[table]
        if table == "ss_meta":
            expected = [row | {"schema_version": SCHEMA_VERSION} for row in expected]
        assert new == expected, table
    fresh = tmp_path / "fresh"
    Ledger.open(f"sqlite:///{fresh}", store_id="s", worker_id="w").close()
    ours, theirs = columns(path), columns(fresh)
    assert [(n, [c[:-2] for c in ours[n]]) for n in ours] == [
        (n, [c[:-2] for c in theirs[n]]) for n in theirs
    ]


IN_4 = (("ss_job", "plain"), ("ss_job", "asked_url"), ("ss_job", "asked_name"))
IN_3 = (
    ("ss_meta", "put_back_at"), ("ss_meta", "unread"), ("ss_blob", "stamp"),
    ("ss_representation", "proof"), ("ss_completion", "stamp"), ("ss_completion", "by_response"),
)  # fmt: skip


@pytest.mark.proves("I20")
@pytest.mark.parametrize(("before", "added"), [(2, IN_3 + IN_4), (3, IN_4)])
def test_what_later_versions_add_is_added_on_both_databases(
    opened: Opener, database: Database, before: int, added: tuple[tuple[str, str], ...]
) -> None:
    ledger = opened()
    lease = grant(ledger)
    ledger.close()
    wanted = database.everything()
    for table, column in added:
        database.rows(f"ALTER TABLE {table} DROP COLUMN {column}")
    database.rows("UPDATE ss_meta SET schema_version = ?", before)
    opened("second").close()
    found = database.everything()
    assert found.keys() == wanted.keys()
    third = opened("third")
    assert view(third).fence == lease.fence
    third.release(lease).result()
    repeat = Repeat(plain=True, url=URL + "#page=2", name="a/b")
    assert grant(third, request=replace(REQUEST, repeat=repeat)).fence == lease.fence + 1
    assert view(third).asked_url == URL + "#page=2"


# -- any version ----------------------------------------------------------------------------------------


@pytest.mark.proves("I20")
def test_a_newer_schema_is_refused_and_left_alone(opened: Opener, database: Database) -> None:
    opened().close()
    database.rows("UPDATE ss_meta SET schema_version = schema_version + 1")
    before = database.everything()
    with pytest.raises(LedgerError, match=str(SCHEMA_VERSION + 1)) as caught:
        opened("newcomer")
    assert caught.value.reason == "ledger-newer"
    assert database.everything() == before


@pytest.mark.proves("I20")
def test_steps_are_taken_in_order_and_each_once(
    opened: Opener, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened().close()
    taken = []

    def step(number: int) -> Any:
        def made(connection: Any) -> None:
            taken.append(number)
            connection.execute(text(f"CREATE TABLE ss_step_{number} (x INTEGER)"))

        return made

    monkeypatch.setattr(schema, "SCHEMA_VERSION", SCHEMA_VERSION + 2)
    for number in (SCHEMA_VERSION, SCHEMA_VERSION + 1):
        monkeypatch.setitem(schema.MIGRATIONS, number, step(number))
    for worker in ("a", "b"):
        opened(worker).close()
    assert taken == [SCHEMA_VERSION, SCHEMA_VERSION + 1]
    assert version(database) == [(1, SCHEMA_VERSION + 2, SCHEMA_VERSION + 2)]


def structure(database: Database) -> object:
    """Return tables, columns, constraints and indexes as the database itself tells of them."""
    if not database.postgres:
        return {
            (name, " ".join(sql.split()))
            for name, sql in database.rows("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        }
    return {
        "columns": database.rows(
            "SELECT table_name, column_name, ordinal_position, data_type, is_nullable, column_default"
            " FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 3"
        ),
        "constraints": database.rows(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2"
        ),
        "indexes": database.rows(
            "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1, 2"
        ),
    }


@pytest.mark.proves("I20")
def test_the_printed_statements_make_what_migrate_makes(
    opened: Opener, database: Database, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """Whoever may not let the crawl create tables runs these; the ledger then only adds its own row."""
    opened().close()
    url = postgres_server.create() if database.postgres else f"sqlite:///{tmp_path / 'printed'}"
    printed = Database(url)
    with closing(printed.connect()) as connection:
        statements = ddl("postgresql" if database.postgres else "sqlite")
        if database.postgres:
            connection.execute(statements)
        else:
            connection.executescript(statements)
    assert structure(printed) == structure(database)
    indexes = [line for line in statements.splitlines() if line.startswith("CREATE INDEX")]
    assert len(indexes) == len([line for line in indexes if "lease_until" not in line]) > 0


@sqlite_only
@pytest.mark.proves("I20")
def test_a_migrated_ledger_has_the_tables_of_a_new_one(
    opened: Opener, database: Database, old: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    opened().close()
    fresh = Database(f"sqlite:///{tmp_path / 'fresh'}")
    Ledger.open(fresh.url, store_id="s", worker_id="w").close()
    migrated = structure(database)
    wanted = structure(fresh)
    assert isinstance(migrated, set)
    assert isinstance(wanted, set)
    left = {(name, sql) for name, sql in migrated if not name.startswith("ss_v1_") and name != "ss_meta"}
    assert left == {(name, sql) for name, sql in wanted if name != "ss_meta"}
