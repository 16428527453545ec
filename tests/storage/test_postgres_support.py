"""The PostgreSQL of the tests does what they take for granted: it dies, recovers, hangs, loses answers."""

from __future__ import annotations

import os
import pwd
import socket
import struct
from contextlib import nullcontext
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from support.cutting_proxy import CuttingProxy
from support.postgres import PostgresServer


@pytest.fixture
def table(postgres_server: PostgresServer, postgres_url: str) -> str:
    """The URL of a database with the empty table ``t``."""
    postgres_server.query(postgres_url, "create table t (n integer primary key)")
    return postgres_url


def direct(url: str) -> str:
    return url.replace("+psycopg", "")


def through(proxy: CuttingProxy, server: PostgresServer, url: str) -> str:
    return server.url(url.rpartition("/")[2], port=proxy.port)


def rows(server: PostgresServer, url: str) -> list[int]:
    return [row[0] for row in server.query(url, "select n from t order by n")]


def add(url: str, number: int) -> None:
    """Add a row as the ledger would: SQLAlchemy, a transaction, COMMIT at the end."""
    engine = create_engine(url, poolclass=NullPool, isolation_level="READ COMMITTED")
    with engine.begin() as connection:
        connection.execute(text("insert into t values (:n)"), {"n": number})


def test_databases_are_utf8_in_the_c_locale_and_apart(postgres_server: PostgresServer, table: str) -> None:
    other = postgres_server.create()
    assert postgres_server.query(other, "select to_regclass('t'), %s::text", "ä") == [(None, "ä")]
    found = postgres_server.query(
        table,
        "select pg_encoding_to_char(encoding), datcollate, current_setting('fsync'),"
        " current_setting('listen_addresses'), current_setting('unix_socket_directories')"
        " from pg_database where datname = current_database()",
    )
    assert found == [("UTF8", "C", "on", "127.0.0.1", "")]
    postgres_server.drop(other)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        postgres_server.query(other, "select 1")


def test_it_is_never_run_by_root(postgres_server: PostgresServer) -> None:
    assert postgres_server.data.stat().st_uid == (os.geteuid() or pwd.getpwnam("nobody").pw_uid)


@pytest.mark.parametrize("how", ["kill", "immediate", "fast"])
def test_what_was_committed_outlives_it(postgres_server: PostgresServer, table: str, how: str) -> None:
    add(table, 1)
    with psycopg.connect(direct(table)) as open_one:
        open_one.execute("insert into t values (2)")
        if how == "kill":
            postgres_server.kill()
        else:
            postgres_server.stop("fast" if how == "fast" else "immediate")
        with pytest.raises(psycopg.OperationalError):
            open_one.commit()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(direct(table))
    postgres_server.start()
    assert rows(postgres_server, table) == [1]


def test_paused_it_takes_connections_and_says_nothing(postgres_server: PostgresServer, table: str) -> None:
    with psycopg.connect(direct(table), autocommit=True) as session:
        postgres_server.pause()
        session.pgconn.send_query(b"insert into t values (1)")
        with socket.create_connection(("127.0.0.1", postgres_server.port), timeout=0.3) as another:
            another.sendall(struct.pack("!ii", 8, 80877103))  # may we talk TLS?
            with pytest.raises(TimeoutError):
                another.recv(1)
        session.pgconn.consume_input()
        assert session.pgconn.is_busy()
        postgres_server.resume()
        result = session.pgconn.get_result()
        assert result is not None
        assert result.command_tuples == 1
        assert session.pgconn.get_result() is None
    assert rows(postgres_server, table) == [1]


def test_killed_while_paused_it_starts_again(postgres_server: PostgresServer, table: str) -> None:
    add(table, 1)
    postgres_server.pause()
    postgres_server.kill()
    postgres_server.start()
    assert rows(postgres_server, table) == [1]


def test_backup_is_put_back_under_open_sessions(
    postgres_server: PostgresServer, table: str, tmp_path: Path
) -> None:
    add(table, 1)
    with psycopg.connect(direct(table), autocommit=True) as session:
        postgres_server.dump(table, tmp_path / "backup")
        add(table, 2)
        assert session.execute("select count(*) from t").fetchall() == [(2,)]
        postgres_server.restore(table, tmp_path / "backup")
        assert session.execute("select n from t").fetchall() == [(1,)]
    with pytest.raises(RuntimeError, match="pg_restore failed"):
        postgres_server.restore(table, tmp_path / "missing")


def test_sessions_end_by_their_name(postgres_server: PostgresServer, table: str) -> None:
    with (
        psycopg.connect(direct(table), autocommit=True, application_name="store-1") as ours,
        psycopg.connect(direct(table), autocommit=True, application_name="other") as other,
    ):
        assert postgres_server.terminate_sessions("store-") == 1
        assert other.execute("select 1").fetchall() == [(1,)]
        with pytest.raises(psycopg.OperationalError, match="terminating connection"):
            ours.execute("select 1")


def test_cut_after_commit_it_took_effect(
    postgres_server: PostgresServer, table: str, cutting: CuttingProxy
) -> None:
    url = through(cutting, postgres_server, table)
    cutting.cut_after_commit = 2
    add(url, 1)
    with pytest.raises(OperationalError):
        add(url, 2)
    assert rows(postgres_server, table) == [1, 2]
    add(url, 3)
    assert (cutting.commits, cutting.cuts, cutting.cut_after_commit) == (3, 1, 0)


def test_cut_before_commit_it_did_not(
    postgres_server: PostgresServer, table: str, cutting: CuttingProxy
) -> None:
    url = through(cutting, postgres_server, table)
    cutting.cut_before_commit = 2
    add(url, 1)
    with pytest.raises(OperationalError):
        add(url, 2)
    add(url, 2)  # not there: it would be refused, or wait for the transaction that was cut
    assert rows(postgres_server, table) == [1, 2]
    assert (cutting.commits, cutting.cuts, cutting.cut_before_commit) == (3, 1, 0)


@pytest.mark.parametrize("pipeline", [False, True], ids=["binary", "pipeline"])
@pytest.mark.parametrize(("when", "expected"), [("after", [1]), ("before", [])])
def test_commit_is_seen_in_the_extended_protocol(
    postgres_server: PostgresServer,
    table: str,
    cutting: CuttingProxy,
    when: str,
    expected: list[int],
    *,
    pipeline: bool,
) -> None:
    setattr(cutting, f"cut_{when}_commit", 1)
    with psycopg.connect(direct(through(cutting, postgres_server, table))) as session:
        session.execute("insert into t values (%s)", (1,))
        with pytest.raises(psycopg.OperationalError), session.pipeline() if pipeline else nullcontext():
            session.execute("commit", binary=True)
    assert cutting.cuts == 1
    assert rows(postgres_server, table) == expected


def test_down_nobody_listens_and_sessions_end(
    postgres_server: PostgresServer, table: str, cutting: CuttingProxy
) -> None:
    url = through(cutting, postgres_server, table)
    with psycopg.connect(direct(url), autocommit=True) as session:
        session.execute("insert into t values (1)")
        cutting.down = True
        with pytest.raises(psycopg.OperationalError):
            session.execute("insert into t values (2)")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(direct(url))
    cutting.down = False
    add(url, 3)
    assert rows(postgres_server, table) == [1, 3]
    assert cutting.cuts == 1
