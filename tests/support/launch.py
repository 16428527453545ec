"""Processes that tests start by the hundred, forked from one that has imported the libraries already.

Most of a short crawl's time goes into importing Scrapy, Twisted and SQLAlchemy. What is forked here is a
process of its own all the same: its arguments, environment, folder and output are its own, its reactor is
installed and its ledger opened by itself, and signals and ``kill -9`` meet it alone. Python's own switches
in the environment it does not see: such processes are started anew, and so are those of the tests about
starting. What may live here: the process that forks, and what stands for a forked process in the tests.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scrapy_streaming.storage import failpoints

TESTS = Path(__file__).parent.parent
PRELOADED = (
    "scrapy.cmdline", "scrapy.crawler", "scrapy.commands.crawl", "scrapy.core.engine", "scrapy.core.scraper",
    "scrapy.core.downloader.handlers.http11", "scrapy.core.downloader.contextfactory",
    "scrapy.extensions.remote_control", "scrapy.pipelines.files", "scrapy.spiders", "tldextract",
    "sqlalchemy.dialects.sqlite", "sqlalchemy.dialects.postgresql", "psycopg",
    "queuelib.rrqueue", "scrapy.contracts", "scrapy.core.downloader.handlers.datauri",
    "scrapy.core.downloader.handlers.file", "scrapy.core.downloader.handlers.ftp",
    "scrapy.core.downloader.handlers.s3", "scrapy.dupefilters", "scrapy.logformatter", "scrapy.pqueues",
    "scrapy.shell", "scrapy.squeues", "scrapy.statscollectors", "scrapy.utils.console", "scrapy.utils.engine",
    *(
        f"scrapy.extensions.{name}"
        for name in (
            "closespider", "corestats", "logcount", "logstats", "memdebug", "memusage", "spiderstate",
            "telnet", "throttle",
        )
    ),
    "twisted.conch.telnet", "scrapy_streaming.cli.command",
    "scrapy_streaming.addon", "scrapy_streaming.wiring", "scrapy_streaming.extension",
    "scrapy_streaming.handlers", "scrapy_streaming.storage.ledger",
    "scrapy_streaming.middleware", "scrapy_streaming.pipeline",
)  # fmt: skip
#: Packages all of whose modules a crawl may load; none of them installs a reactor.
PACKAGES = ("scrapy.commands", "scrapy.downloadermiddlewares", "scrapy.spidermiddlewares")


# -- in the process that forks ---------------------------------------------------------------


def _serve() -> dict[str, Any] | None:
    """Fork what is asked for; return the order in the forked process, ``None`` when the tests are over."""
    for package in map(importlib.import_module, PACKAGES):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    for name in PRELOADED:
        if importlib.util.find_spec(name) is not None:  # older Scrapys have fewer
            importlib.import_module(name)
    _warm_up()
    assert "twisted.internet.reactor" not in sys.modules, "each process installs its own"
    gc.freeze()
    ended: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            answer = _poll(order["poll"], ended)
        elif (answer := os.fork()) == 0:
            return order
        else:
            ended.pop(answer, None)  # the system gives numbers again
        print(json.dumps(answer), flush=True)
    return None


def _warm_up() -> None:
    """Fill the caches of libraries: what SQLAlchemy compiles with, and what Scrapy says of the machine."""
    from scrapy.utils.versions import get_versions

    from scrapy_streaming.storage.ledger import database_of, ddl
    from scrapy_streaming.storage.ledger.statements import Statements, WorkerIdentity

    for url in ("sqlite:////nowhere", "postgresql+psycopg://nobody@nowhere/nothing"):
        database = database_of(url)
        Statements(WorkerIdentity("nobody", 60.0, 5, database.now), database.dialect)
        ddl(database.dialect.name)
    get_versions()  # which runs a program


def _poll(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _become(order: dict[str, Any]) -> None:
    """Be what ``python -m MODULE ARGUMENTS`` is, in the order's folder and environment."""
    above = [str(Path.cwd()), *filter(None, os.environ["PYTHONPATH"].split(os.pathsep))]
    libraries = [entry for entry in sys.path if entry not in above]
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    own = filter(None, order["env"]["PYTHONPATH"].split(os.pathsep))
    sys.path[:] = [order["cwd"], *own, *libraries]
    for stream, path in enumerate((os.devnull, order["output"], order["errors"])):
        opened = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    failpoints.ACTIVE.update(failpoints.parse(os.environ.get(failpoints.VARIABLE, "")))
    sys.argv = [order["module"], *order["arguments"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


# -- in the tests ----------------------------------------------------------------------------


class Forked:
    """As much of ``subprocess.Popen`` as tests use."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.args = [order["module"], *order["arguments"]]
        self.returncode: int | None = None
        self.pid: int = _ask(order)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    output: Path,
    errors: Path | None = None,
) -> Forked:
    """Run ``python -m MODULE ARGUMENTS``; *env* is all of its environment.

    What it writes is appended to the file *output*, and to *errors* if that is given.
    """
    for path in filter(None, (output, errors)):
        path.touch()
    order = {"module": module, "arguments": list(arguments), "env": dict(env), "cwd": str(cwd)}
    return Forked(order | {"output": str(output), "errors": str(errors or output)})


_lock = threading.Lock()
_forker: list[subprocess.Popen[str]] = []


def _ask(order: dict[str, Any]) -> Any:
    with _lock:
        if not _forker:
            _forker.append(_start())
        stdin, stdout = _forker[0].stdin, _forker[0].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())


def _start() -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SCRAPY_", "COV_"))}
    forker = subprocess.Popen(
        [sys.executable, "-m", "support.launch"],
        env=environment | {"PYTHONPATH": path, "PYTHONDEVMODE": ""}, cwd=TESTS,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(_end, forker)
    return forker


def _end(forker: subprocess.Popen[str]) -> None:
    forker.communicate()


if __name__ == "__main__":
    ordered = _serve()
    if ordered is not None:
        _become(ordered)
