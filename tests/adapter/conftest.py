"""Fixtures of the adapter's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_kit import close_clients


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No syncs: what they are for is tested where a machine loses its power."""
    monkeypatch.setenv("SCRAPY_STREAMING_FSYNC", "0")
    yield
    close_clients()


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "work" / "file.part"
