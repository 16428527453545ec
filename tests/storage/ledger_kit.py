"""What the ledger's tests share: names that are hexadecimal, a clock, SQL on either database, processes."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

import scrapy_streaming
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Granted, Lease, StoredRepresentation
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.ledger import JobRequest, Ledger
from scrapy_streaming.storage.ledger.prepared import Session

ROOT = Path(scrapy_streaming.__file__).parents[1]
LEASE = 60.0
ATTEMPTS = 3
URL = "https://example.org/a.bin"
TAGGED = Validators(EntityTag("v1"), "Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT")
DATABASES = ("sqlite", "postgres")
sqlite_only = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
postgres_only = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def hex_of(name: str) -> str:
    """Return what stands for *name* where the ledger wants a hash: 64 hex digits."""
    return hashlib.sha256(name.encode()).hexdigest()


def digest_of(name: str) -> str:
    return f"sha256:{hex_of(name)}"


KEY = hex_of("k1")
REQUEST = JobRequest("work", "artifact", URL, hex_of("GET"))


def known(name: str = "bytes", url: str = URL) -> StoredRepresentation:
    return StoredRepresentation(digest_of(name), len(name), TAGGED, url, "text/plain", ("accept",), "sel")


class Clock:
    """Time that only a test moves; read by SQL in the writer's thread."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Database:
    """A database beside the ledger's own connection; ``?`` stands for a value, bytes for a hash."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.postgres = url.startswith("postgresql")

    @property
    def path(self) -> Path:
        """The file, where it is SQLite."""
        assert not self.postgres
        return Path(self.url.removeprefix("sqlite:///"))

    def connect(self) -> Any:
        """Return a connection of the driver, which commits each statement."""
        if self.postgres:
            return psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True)
        return sqlite3.connect(self.path, isolation_level=None)

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with closing(self.connect()) as connection:
            return self.ask(connection, statement, *values)

    def ask(self, connection: Any, statement: str, *values: object) -> list[tuple[Any, ...]]:
        cursor = connection.execute(statement.replace("?", "%s") if self.postgres else statement, values)
        return [tuple(row) for row in cursor.fetchall()] if cursor.description else []

    def everything(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return the rows of all tables."""
        names = ("meta", "worker", "job", "blob", "representation", "completion", "operation", "event")
        with closing(self.connect()) as connection:
            return {
                name: sorted(self.ask(connection, f"SELECT * FROM ss_{name}"), key=repr) for name in names
            }


class Highest(Random):
    """Draws the highest number that may be drawn: the longest back-off."""

    def uniform(self, a: float, b: float) -> float:
        return b


Opener = Callable[..., Ledger]


def grant(ledger: Ledger, key: str = KEY, request: JobRequest = REQUEST, **how: Any) -> Lease:
    answer = ledger.claim(key, request, **how).result(60)
    assert isinstance(answer, Granted), answer
    return answer.lease


def view(ledger: Ledger, key: str = KEY) -> Any:
    seen = ledger.job(key).result(60)
    assert seen is not None
    return seen


def raw(ledger: Ledger, command: Callable[[Any], Any]) -> Any:
    """Run *command* on the driver's own connection, in the writer's thread."""
    return ledger._writer.submit(lambda s: command(s.connection.connection.dbapi_connection)).result(60)


def block(ledger: Ledger) -> threading.Event:
    """Keep the writer within a transaction until the event is set."""
    entered, leave = threading.Event(), threading.Event()

    def wait(_: Session) -> None:
        entered.set()
        assert leave.wait(60)

    ledger._writer.submit(wait)
    assert entered.wait(30)
    return leave


class Process(subprocess.Popen[str]):
    """As a context it is killed when the test fails: one that is stopped would never end."""

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(None, None, None)


def process(code: str, *arguments: object, **how: Any) -> Process:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE}
    return Process(command, cwd=ROOT, text=True, **(pipes | how))


#: Before the code of several processes: ``barrier()`` holds each until the test lets all go at once.
BARRIER = """
import sys
def barrier():
    print("here", flush=True)
    sys.stdin.readline()
"""


def at_once(count: int, code: str, *arguments: object) -> list[str]:
    """Run *code* in so many processes that start together at its ``barrier()``; return what each said."""
    started = [process(BARRIER + code, *arguments, f"w{number}") for number in range(count)]
    for one in started:
        assert one.stdout is not None
        line = one.stdout.readline()
        assert line == "here\n", one.communicate()[1]
    for one in started:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    said = [one.communicate(timeout=120) for one in started]
    assert [error for _, error in said] == [""] * count
    assert [one.returncode for one in started] == [0] * count
    return [answer.strip() for answer, _ in said]
