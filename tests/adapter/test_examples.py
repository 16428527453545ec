"""The examples of the documentation, as they stand: cut and killed in the middle, switched off, run twice."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from adapter_kit import Cutter, sha
from support.servers import WebServer

import scrapy_streaming
from scrapy_streaming.exceptions import BodyIncomplete

ROOT = Path(scrapy_streaming.__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
MIB = 1 << 20
SIZE = 8 * MIB
CHECKPOINT = MIB
BATCH = 64 << 10
NAMES = ("resume_decision", "streaming_io", "idempotency", "persistent_state")
Run = Callable[..., list[str]]


@pytest.fixture
def cutter(web: WebServer) -> Iterator[Cutter]:
    """What stands before nginx, and cuts the first answer off."""
    made = Cutter(web.port, SIZE // 4)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_CHECKPOINT_BYTES", str(CHECKPOINT))
    monkeypatch.setenv("SCRAPY_STREAMING_LEASE_SECONDS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example here; gives the lines that it printed."""

    def run_here(name: str, how: str, url: str, folder: Path) -> list[str]:
        folder.mkdir(exist_ok=True)
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        example[how]([url] if name == "persistent_state" else url, folder)
        return capsys.readouterr().out.splitlines()

    return run_here


def numbers(lines: list[str]) -> list[int]:
    return [int(line) for line in lines if line.strip().isdigit()]


def killed(name: str, url: str, folder: Path) -> int:
    """Run an example in a process of its own, and kill it in the middle; return how many bytes it had."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "after", url, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.strip().isdigit() and int(line) >= SIZE // 2:
            process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    return max(numbers(lines))


def stored(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix == ".bin" and ".streaming" not in p.parts]


def asked(web: WebServer) -> list[int]:
    """Return where each answered request began, in bytes."""
    found = [re.match(r"bytes=(\d+)-", line.range) for line in web.served()]
    return [int(match[1]) if match else 0 for match in found]


def cut_killed_and_finished(
    name: str, web: WebServer, cutter: Cutter, folder: Path, run: Run, capsys: Any
) -> dict[str, Any]:
    """Cut the first try, kill the second, finish; return what was there each time, and what was asked for."""
    body = os.urandom(SIZE)
    web.put(f"{name}.bin", body)
    url = web.url(f"{name}.bin", "/slow").replace(str(web.port), str(cutter.port))
    had = []
    if name != "persistent_state":  # there download() goes on by itself
        with pytest.raises((requests.RequestException, BodyIncomplete)):
            run(name, "after", url, folder)
        had.append(max(numbers(capsys.readouterr().out.splitlines())))
        assert not (folder / "store").exists()
    had.append(killed(name, url, folder))
    run(name, "after", url, folder)
    assert [sha(path.read_bytes()) for path in stored(folder)] == [sha(body)]
    begun = asked(web)
    if name == "persistent_state":
        assert begun[1] == pytest.approx(SIZE // 4, abs=BATCH * 4)  # after the cut, in the same process
        del begun[1]
    again = [at - start for at, start in zip(had, begun[1:], strict=True)]
    return {"had": had, "asked from": begun[1:], "fetched again": again}


@pytest.mark.parametrize("name", NAMES)
def test_each_example_goes_on_after_a_cut_and_a_kill(
    web: WebServer, cutter: Cutter, tmp_path: Path, name: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """S3: right bytes, and no more than a checkpoint and a batch fetched again each time."""
    found = cut_killed_and_finished(name, web, cutter, tmp_path / "work", run, capsys)
    with capsys.disabled():
        if os.environ.get("SHOW"):
            print("S3 example", name, found)
    assert all(start > 0 for start in found["asked from"])
    assert all(-BATCH <= again <= CHECKPOINT + BATCH for again in found["fetched again"])


@pytest.mark.parametrize("name", NAMES)
def test_what_came_before_still_runs(
    web: WebServer, tmp_path: Path, name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is what runs while the package is switched off."""
    body = os.urandom(MIB)
    url = web.put("small.bin", body)
    for number, (how, enabled) in enumerate([("before", "1"), ("after", "0"), ("after", "1")]):
        monkeypatch.setenv("SCRAPY_STREAMING_ENABLED", enabled)
        folder = tmp_path / str(number)
        run(name, how, url, folder)
        assert [path.read_bytes() == body for path in stored(folder)] == [True]
        assert (folder / "store").exists() == (number == 2 and name != "resume_decision")


def test_what_was_told_once_is_not_told_again(web: WebServer, tmp_path: Path, run: Run) -> None:
    url, folder = web.put("small.bin", b"report" * 1000), tmp_path / "work"
    for _ in range(2):
        run("idempotency", "after", url, folder)
    assert (folder / "outbox.txt").read_text() == "a report of 6000 bytes\n"
    assert len(web.served()) == 1


def test_what_is_done_is_not_asked_for_again(web: WebServer, tmp_path: Path, run: Run) -> None:
    url, folder = web.put("small.bin", b"report" * 1000), tmp_path / "work"
    said = [run("persistent_state", "after", url, folder) for _ in range(2)]
    assert said[0][-2:] == [f"downloaded 0 {url}", "recorded 1"]
    assert said[1] == [f"uptodate 0 {url}", "recorded 1"]
    assert len(web.served()) == 1
