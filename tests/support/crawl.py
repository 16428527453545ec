"""Crawls in a process of their own, run by Scrapy's own command line, as users run them.

What may live here: starting a crawl and waiting for it, and reading what it left: its log, its items, the
files, parts and jobs of its store.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from scrapy_streaming.statistics import PREFIX, is_declared
from support.launch import Forked, launch

TESTS = Path(__file__).parent.parent
ADDON = {"scrapy_streaming.Addon": 300}
#: What no crawl may ever log: an unhandled error, or something left open.
NEVER = re.compile(
    r"Unhandled|never awaited|never retrieved|Error caught on signal handler|ResourceWarning|"
    r"Error in handling|SAWarning|destroyed but it is pending"
)

Urls = Sequence[str | dict[str, Any]]
Process: TypeAlias = "subprocess.Popen[bytes] | Forked"


@dataclass
class Crawl:
    """What a crawl did. ``files`` by URL; ``rss`` peak resident bytes; ``elapsed`` seconds.

    ``ended`` is when, by the monotonic clock.
    """

    code: int
    log: str
    items: list[dict[str, Any]]
    stats: dict[str, Any]
    elapsed: float
    notes: list[dict[str, Any]] = field(default_factory=list)
    ended: float = 0.0

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return {entry["url"]: entry for item in self.items for entry in item.get("files") or []}

    def decisions(self, url: str) -> list[str]:
        """Return the words of all decisions on *url*, in order."""
        return re.findall(rf"streaming_resume_decision reason=(\S+) url={re.escape(url)} ", self.log)

    @property
    def rss(self) -> int:
        return int(self.stats["test/maxrss"])

    def stat(self, name: str) -> Any:
        return self.stats.get(name, 0)


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Return as soon as *condition* holds; raise ``TimeoutError`` if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        time.sleep(0.01)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_project(base: Path, store: Path, settings: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Write the settings module of a project, and what its spider does."""
    everything = {
        "ADDONS": ADDON,
        "FILES_STORE": str(store),
        "SPIDER_MODULES": ["support.spiders"],
        "TELNETCONSOLE_ENABLED": False,
        "RETRY_PRIORITY_ADJUST": 0,
        "LOG_LEVEL": "DEBUG",
        **settings,
    }
    module = "".join(f"{name} = {value!r}\n" for name, value in everything.items())
    (base / "crawl_settings.py").write_text(module)
    (base / "job.json").write_text(json.dumps(job))


def _environment(base: Path, env: Mapping[str, str]) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SCRAPY_", "COV_", "http_", "HTTP_"))},
        "PYTHONPATH": os.pathsep.join([str(base), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDEVMODE": "",
        "SCRAPY_SETTINGS_MODULE": "crawl_settings",
        "CRAWL_BASE": str(base),
        **env,
    }


def _forked(command: Sequence[str], arguments: list[str], env: dict[str, str], base: Path) -> Process:
    return launch(command[-1], arguments, env=env, cwd=base, output=base / "stderr")


def _spawned(command: Sequence[str], arguments: list[str], env: dict[str, str], base: Path) -> Process:
    with (base / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            [*command[:-1], sys.executable, "-m", command[-1], *arguments],
            env=env, cwd=base, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
        )  # fmt: skip


def run_crawl(
    urls: Urls,
    store: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    spider: str = "files",
    program: str = "scrapy",
    job: Mapping[str, Any] | None = None,
    timeout: float = 90,
    kill_when: Callable[[], bool] | None = None,
    meanwhile: Callable[[subprocess.Popen[bytes]], object] | None = None,
    prefix: Sequence[str] = (),
    check: bool = True,
) -> Crawl:
    """Run ``scrapy crawl`` over *urls* and return what it did.

    *settings* are the project's, *options* go to the command line. A crawl that *kill_when* says
    so of gets ``SIGKILL``. *meanwhile* is called once with the running process, to wait and signal
    as it likes. *prefix* is a command that runs the crawl's, *program* the module that is run.
    With *check* the crawl must end well and leave nothing behind.
    """
    base = Path(tempfile.mkdtemp(prefix="crawl-", dir=store.parent))
    _write_project(base, store, settings or {}, {"urls": list(urls), **(job or {})})
    started = time.monotonic()
    arguments = ["crawl", spider, *options]
    # Python itself reads its own variables when it starts, and a prefix makes it another user's process
    forked = not prefix and not any(name.startswith("PYTHON") for name in env or ())
    start = _forked if forked else _spawned
    process = start([*prefix, program], arguments, _environment(base, env or {}), base)
    try:
        if meanwhile is not None:
            meanwhile(process)
        code = _attend(process, timeout, kill_when)
    finally:
        process.kill()
    crawl = Crawl(
        code,
        (base / "stderr").read_text(errors="replace"),
        _lines(base / "items.jsonl"),
        json.loads(_text(base / "stats.json") or "{}"),
        time.monotonic() - started,
        _lines(base / "notes.jsonl"),
        time.monotonic(),
    )
    if check and code != -signal.SIGKILL:
        assert code == 0, crawl.log[-4000:]
        assert not NEVER.search(crawl.log), crawl.log[-8000:]
        assert undeclared(crawl.stats) == []
    return crawl


def undeclared(stats: Mapping[str, Any]) -> list[str]:
    """Return the statistics of ours that ``scrapy_streaming/statistics.py`` does not declare."""
    return [name for name in stats if name.startswith(PREFIX) and not is_declared(name.removeprefix(PREFIX))]


def _attend(process: subprocess.Popen[bytes], timeout: float, kill_when: Callable[[], bool] | None) -> int:
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        if kill_when is not None and kill_when():
            process.kill()
            return process.wait()
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            msg = f"the crawl was not done after {timeout} seconds"
            raise TimeoutError(msg)
        time.sleep(0.005 if kill_when else 0.02)
    return process.returncode


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).splitlines() if line.endswith("}")]


def _is_stopped(pid: int) -> bool:
    """Whether no thread of a process runs any more; also true if the process has ended."""
    states = []
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            states.append(task.read_text().rpartition(")")[2].split()[0])
    return all(state in "TtZX" for state in states)


def freeze(process: subprocess.Popen[bytes], store: Path) -> None:
    """Stop a crawl by SIGSTOP at a moment when it does not hold the ledger's lock."""
    turn = store / ".streaming" / "ledger.sqlite3-turn"
    while True:
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: _is_stopped(process.pid))  # a thread stops only once it leaves the kernel
        if not turn.exists():  # its ledger is on PostgreSQL
            return
        with turn.open("rb") as stream, suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def logs(store: Path) -> str:
    """Return the logs of all crawls on *store* so far, also of one that runs."""
    return "".join((base / "stderr").read_text() for base in store.parent.glob("crawl-*"))


# -- looking at a store ----------------------------------------------------------------------


def blobs(store: Path) -> dict[str, Path]:
    """Return the blobs by the digest they are named for; what a killed crawl left half written has none."""
    return {
        path.name: path for path in (store / "blobs").rglob("*") if re.fullmatch("[0-9a-f]{64}", path.name)
    }


def jobs(store: Path) -> dict[str, tuple[str, int]]:
    """State and attempts of the jobs, by URL."""
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
        rows = ledger.execute("SELECT url, state, attempts FROM ss_job").fetchall()
    return {url: (state, attempts) for url, state, attempts in rows}


def parts(store: Path) -> list[Path]:
    return sorted((store / ".streaming" / "parts").glob("*.part"))


def bytes_in_parts(store: Path) -> int:
    """Return the bytes of the part files, also those that no sidecar vouches for yet."""
    return sum(path.stat().st_size for path in parts(store))


def kept(store: Path) -> int:
    """Return how many bytes the sidecars of the store vouch for."""
    total = 0
    for path in (store / ".streaming" / "parts").glob("*.json"):
        try:
            total += json.loads(path.read_text())["length"]
        except (OSError, ValueError):
            continue  # being replaced
    return total


def assert_stored(store: Path, entry: dict[str, Any] | None, body: bytes) -> None:
    """The entry, the name and the blob all say *body*."""
    assert entry is not None
    assert entry["checksum"] == sha256(body)
    assert entry["size"] == len(body)
    assert (store / entry["path"]).read_bytes() == body
    assert blobs(store)[sha256(body)].read_bytes() == body


def assert_sound(store: Path, true: Sequence[bytes]) -> None:
    """Nothing is published but whole, true representations (I5, I10, I17)."""
    allowed = {sha256(body) for body in true}
    for name, path in blobs(store).items():
        assert sha256(path.read_bytes()) == name
        assert name in allowed, f"{name} is no representation of the server's"
    for path in (store / "full").rglob("[!.]*"):
        assert sha256(path.read_bytes()) in allowed, path
