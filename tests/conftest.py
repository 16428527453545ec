"""Fixtures for all tests: the servers live for the session, stores for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.origin import Origin
from support.postgres import PostgresServer, postgres
from support.servers import Proxy, WebServer, caddy, nginx


@pytest.fixture(scope="session")
def nginx_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with nginx(tmp_path_factory.mktemp("nginx"), rate="24m") as server:
        yield server


@pytest.fixture
def web(nginx_server: WebServer) -> WebServer:
    """nginx with an empty access log."""
    nginx_server.forget()
    return nginx_server


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest, store: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{store / '.streaming' / 'ledger.sqlite3'}"


@pytest.fixture(scope="session")
def caddy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with caddy(tmp_path_factory.mktemp("caddy")) as server:
        yield server


@pytest.fixture
def origin() -> Iterator[Origin]:
    server = Origin()
    yield server
    server.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    server = Proxy()
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh database on a server that runs, whatever the test before did to it."""
    postgres_server.start()
    url = postgres_server.create()
    yield url
    postgres_server.start()
    postgres_server.drop(url)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests that take minutes out, unless ``-m soak`` (or any -m naming it) asks for them."""
    for item in items:
        if item.get_closest_marker("long_on_postgres") and "postgres" in item.name:
            item.add_marker("soak")
    if "soak" in config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
