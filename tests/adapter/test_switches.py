"""What is on, by the environment alone, and what off means: nothing done, nothing hidden."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_kit import ask
from support.origin import Origin

from scrapy_streaming import integration
from scrapy_streaming.exceptions import AnswerRefused, SettingError

ROOT = Path(integration.__file__).parents[2]
FLAGS = {
    "ENABLED": ["streaming_enabled", "idempotency_enabled", "schema_enabled", "use_streaming_for_resume",
                "use_streaming_for_io", "use_streaming_for_finalization"],
    "RESUME_ENABLED": ["use_streaming_for_resume"],
    "IO_ENABLED": ["use_streaming_for_io"],
    "FINALIZATION_ENABLED": ["use_streaming_for_finalization"],
    "IDEMPOTENCY_ENABLED": ["idempotency_enabled"],
    "SCHEMA_ENABLED": ["schema_enabled", "idempotency_enabled"],
}  # fmt: skip


def run(code: str, *arguments: object) -> str:
    """Run *code* in a process of its own; return what it printed."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_switches_off_its_own_functions(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = FLAGS["ENABLED"]
    assert [name for name in every if not getattr(integration, name)()] == []
    monkeypatch.setenv(f"SCRAPY_STREAMING_{flag}", "0")
    assert {name for name in every if not getattr(integration, name)()} == set(FLAGS[flag])


def test_a_flag_that_cannot_be_read_is_said_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_ENABLED", "perhaps")
    with pytest.raises(SettingError, match="SCRAPY_STREAMING_ENABLED='perhaps'"):
        integration.streaming_enabled()


def test_the_status_is_what_the_flags_say_and_the_line_is_that_of_a_crawl(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_IDEMPOTENCY_ENABLED", "off")
    assert integration.integration_status() == {"streaming": True, "idempotency": False, "schema": True}
    with caplog.at_level(logging.INFO):
        line = integration.log_integration_status()
    assert line == "Streaming architecture integrations: streaming=True idempotency=False schema=True"
    assert caplog.messages == [line]


@pytest.mark.parametrize("flag", ["ENABLED", "RESUME_ENABLED", "IO_ENABLED", "FINALIZATION_ENABLED"])
def test_off_gives_none_and_touches_nothing(
    flag: str, origin: Origin, part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = origin.put("/a", b"bytes")
    tmp_path.joinpath("made").write_bytes(b"whole")
    monkeypatch.setenv(f"SCRAPY_STREAMING_{flag}", "0")
    got = [
        integration.try_streaming_resume_decision(None, part),
        integration.try_streaming_io(ask("urllib", url), part),
        integration.try_streaming_finalization(tmp_path / "made", store=tmp_path / "store"),
        integration.download(url, store=tmp_path / "other"),
    ]
    off = {"ENABLED": [0, 1, 2, 3], "RESUME_ENABLED": [0], "IO_ENABLED": [1, 3], "FINALIZATION_ENABLED": [2]}
    assert [number for number, value in enumerate(got) if value is None] == off[flag]
    if flag == "ENABLED":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]
        assert len(origin.requests) == 1


@pytest.mark.parametrize("flag", ["ENABLED", "SCHEMA_ENABLED"])
def test_without_the_database_nothing_is_opened(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"SCRAPY_STREAMING_{flag}", "0")
    url = f"sqlite:///{tmp_path / 'ledger.sqlite3'}"
    key = integration.generate_job_key("w", "a", "https://example.org/")
    with integration.get_streaming_database(url) as db:
        assert db is None
        assert integration.acquire_or_reuse_job(db, key, "me") is None
        assert integration.run_effect(db, key, lambda: 1 / 0) is None
        assert integration.complete_job(db, None, None) is None
    assert integration.check_database_health(url) is None
    assert list(tmp_path.iterdir()) == []


def test_idempotency_off_leaves_the_database_and_runs_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_IDEMPOTENCY_ENABLED", "0")
    key = "0" * 64
    with integration.get_streaming_database(f"sqlite:///{tmp_path / 'ledger.sqlite3'}") as db:
        assert db is not None
        assert integration.acquire_or_reuse_job(db, key, "me") is None
        assert integration.run_effect(db, key, lambda: 1 / 0) is None


HEAVY = """
import json, sys
from scrapy_streaming import integration
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_it_is_imported_without_scrapy_twisted_and_sqlalchemy() -> None:
    loaded = set(json.loads(run(HEAVY)))
    assert {"scrapy_streaming", "w3lib"} <= loaded
    assert loaded & {"scrapy", "twisted", "sqlalchemy", "httpx", "requests"} == set()


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sqlalchemy", "scrapy", "twisted"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from scrapy_streaming import integration as it
url, folder = sys.argv[1], Path(sys.argv[2])
print(it.integration_status())
import urllib.request
decision = it.try_streaming_resume_decision(None, folder / "part", url=url)
response = urllib.request.urlopen(urllib.request.Request(url, headers=decision.headers))
print(it.try_streaming_io(response, folder / "part").bytes_written)
print(it.try_streaming_finalization(folder / "part", store=folder / "store", name="a.bin").size)
first, second = (it.download(url, store=folder / "other") for _ in range(2))
print(first["status"], first["size"], second["status"], second["digest"] == first["digest"])
key = it.generate_job_key("w", "a", url)
with it.get_streaming_database(f"sqlite:///{folder / 'db'}") as db:
    print(db, it.acquire_or_reuse_job(db, key, "me"), it.run_effect(db, key, lambda: 1 / 0))
print(it.check_database_health(f"sqlite:///{folder / 'db'}"), (folder / "db").exists())
"""


def test_without_sqlalchemy_all_but_the_ledger_works(origin: Origin, tmp_path: Path) -> None:
    url = origin.put("/a.bin", b"0123456789" * 1000)
    assert run(WITHOUT, url, tmp_path).splitlines() == [
        "{'streaming': True, 'idempotency': False, 'schema': False}",
        "10000",
        "10000",
        "downloaded 10000 uptodate True",
        "None None None",
        "None False",
    ]


def test_a_refused_answer_raises_or_falls_back_and_is_counted(
    origin: Origin, part: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = origin.url("/missing")
    with pytest.raises(AnswerRefused) as refused:
        integration.try_streaming_io(ask("httpx", url), part)
    assert refused.value.reason == "bad-status-404"
    before = integration.fallback_counts().get("bad-status-404", 0)
    with caplog.at_level(logging.WARNING):
        assert integration.try_streaming_io(ask("httpx", url), part, fallback=True) is None
    assert caplog.messages[-1].startswith("falling back: bad-status-404")
    assert integration.fallback_counts()["bad-status-404"] == before + 1
    with pytest.raises(TypeError, match="chunk_bytes"):  # a mistake is never hidden
        integration.try_streaming_io(ask("httpx", url), part, chunk_bytes=0, fallback=True)


def test_each_step_falls_back_alike(tmp_path: Path, part: Path) -> None:
    part.parent.mkdir()
    part.write_bytes(b"bytes")
    store = tmp_path / "store"
    for step in (
        lambda: integration.try_streaming_finalization(part, store=store, expected="0" * 64, fallback=True),
        lambda: integration.try_streaming_finalization(part, store=store, name="../out", fallback=True),
        lambda: integration.try_streaming_finalization(tmp_path / "no", store=store, fallback=True),
    ):
        assert step() is None
    counted = integration.fallback_counts()
    assert {"digest-mismatch", "store-unsafe", "part-missing"} <= set(counted)
    assert part.read_bytes() == b"bytes"
