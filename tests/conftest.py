"""Fixtures for all tests, the profile of property tests, and which tests run unless asked for.

Servers live for the session, stores for one test. What starts a server is imported by the fixture that
starts it: the unit tests load none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from support.origin import Origin
    from support.postgres import PostgresServer
    from support.servers import Proxy, WebServer

#: Examples that a property test tries, unless it names a number; and while slow tests are left out.
EXAMPLES, FEW_EXAMPLES = 100, 20


@pytest.fixture(scope="session")
def nginx_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    from support.servers import nginx

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
    from support.servers import caddy

    with caddy(tmp_path_factory.mktemp("caddy")) as server:
        yield server


@pytest.fixture
def origin() -> Iterator[Origin]:
    from support.origin import Origin

    server = Origin()
    yield server
    server.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    from support.servers import Proxy

    server = Proxy()
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    from support.postgres import postgres

    with postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh database on a server that runs, even if the test before stopped it."""
    postgres_server.start()
    url = postgres_server.create()
    yield url
    postgres_server.start()
    postgres_server.drop(url)


def pytest_configure(config: pytest.Config) -> None:
    """Set what holds for every property test: a busy machine makes none of them fail."""
    examples = FEW_EXAMPLES if "not slow" in config.option.markexpr else EXAMPLES
    settings.register_profile("scrapy-streaming", deadline=None, max_examples=examples)
    settings.load_profile("scrapy-streaming")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that take minutes, unless ``-m soak`` (or any -m naming it) asks for them."""
    for item in items:
        if item.get_closest_marker("long_on_postgres") and "postgres" in item.name:
            item.add_marker("soak")
    if "soak" in config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
