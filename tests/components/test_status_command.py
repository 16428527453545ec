"""``scrapy streaming status``, through Scrapy's own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import scrapy


def test_status_says_what_is_on(tmp_path: Path) -> None:
    done = scrapy("streaming", "-s", f"FILES_STORE={tmp_path / 'store'}", "status", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("Streaming: enabled", "Idempotency: enabled", "Schema: enabled"):
        assert line in lines
    assert str(tmp_path / "store") in done.stdout
    assert not (tmp_path / "store").exists(), "status makes nothing"


def test_status_in_json(tmp_path: Path) -> None:
    done = scrapy("streaming", "-s", "FILES_STORE=store", "status", "--json", cwd=tmp_path)
    status = json.loads(done.stdout)
    assert status["Streaming"] == "enabled"
    assert "Scrapy" in status["Versions"]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://crawler:hunter2@db.example/crawl",
        "postgresql+psycopg://crawler:hun/ter2@db.example/crawl",
        "postgresql://db.example/crawl?user=crawler&password=hunter2&connect_timeout=3",
    ],
)
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_status_shows_no_password(url: str, as_json: list[str], tmp_path: Path) -> None:
    """E7."""
    settings = ["-s", "FILES_STORE=store", "-s", f"STREAMING_DATABASE_URL={url}"]
    done = scrapy("streaming", *settings, "status", *as_json, cwd=tmp_path)
    assert done.returncode == 0
    assert "db.example/crawl" in done.stdout
    assert "hun" not in done.stdout
    assert "ter2" not in done.stdout


@pytest.mark.parametrize(
    ("env", "options", "why"),
    [
        ({"SCRAPY_STREAMING_ENABLED": "0"}, ["-s", "FILES_STORE=store"], "STREAMING_ENABLED"),
        ({}, [], "FILES_STORE"),
    ],
)
def test_status_says_why_anything_is_off(
    env: dict[str, str], options: list[str], why: str, tmp_path: Path
) -> None:
    done = scrapy("streaming", *options, "status", env=env, cwd=tmp_path)
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Streaming:")]
    assert line.startswith("Streaming: disabled")
    assert why in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--yes"],
        ["status", "--repair"],
        ["status", "more"],
        ["fly"],
        [],
        ["-s", "STREAMING_RESTARTS=many", "-s", "FILES_STORE=store", "status"],
    ],
    ids=["unknown-option", "anothers-option", "leftover", "unknown-verb", "no-verb", "unreadable-setting"],
)
def test_a_wrong_call_is_refused(arguments: list[str], tmp_path: Path) -> None:
    done = scrapy("streaming", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Streaming: enabled" not in done.stdout
    assert not (tmp_path / "store").exists()


def test_the_module_is_light() -> None:
    """Every ``scrapy …`` call imports it."""
    code = "import sys, scrapy_streaming.cli.command; print(list(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("sqlalchemy", "twisted.internet.reactor", "scrapy_streaming.storage"):
        assert f"'{heavy}'" not in done.stdout
