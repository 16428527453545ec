"""Fixtures of the ledger's tests: each runs on a file of its own, and on a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ledger_kit import ATTEMPTS, DATABASES, LEASE, Clock, Database, Opener
from support.cutting_proxy import CuttingProxy
from support.postgres import PostgresServer
from support.stores import open_files

from scrapy_streaming.storage.ledger import Ledger


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database: the tests that ask for it run on both kinds."""
    if request.param == "postgres":
        return Database(request.getfixturevalue("postgres_url"))
    return Database(f"sqlite:///{tmp_path / 'ledger.sqlite3'}")


@pytest.fixture
def url(database: Database) -> str:
    return database.url


@pytest.fixture
def path(database: Database) -> Path:
    """The ledger's file; for tests of SQLite only."""
    return database.path


@pytest.fixture
def opened(url: str, clock: Clock) -> Iterator[Opener]:
    """Opens ledgers in the database, each for another worker, and closes them."""
    ledgers: list[Ledger] = []

    def make(worker: str = "a", **how: Any) -> Ledger:
        given: dict[str, Any] = {
            "store_id": "store",
            "lease_seconds": LEASE,
            "max_attempts": ATTEMPTS,
            "fsync": False,
        }
        given["patience"] = 20.0  # a test that waits for more has failed
        ledger = Ledger.open(**({"url": url, "worker_id": worker, "clock": clock} | given | how))
        ledgers.append(ledger)
        return ledger

    yield make
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def ledger(opened: Opener) -> Ledger:
    return opened()


@pytest.fixture
def cutting(postgres_server: PostgresServer) -> Iterator[CuttingProxy]:
    """A proxy in front of PostgreSQL that cuts connections when a test says so."""
    with closing(CuttingProxy(postgres_server.port)) as proxy:
        yield proxy


@pytest.fixture
def no_descriptor_is_leaked() -> Iterator[None]:
    """Fail a test that leaves a file open."""
    before = open_files()
    yield
    assert open_files() == before
