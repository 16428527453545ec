"""Fixtures of the tests of components and commands."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of a fresh PostgreSQL database; ``None`` stands for the SQLite file of the store."""
    return request.getfixturevalue("postgres_url") if request.param == "postgres" else None
