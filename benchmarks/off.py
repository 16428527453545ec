"""C5: the add-on switched off beside Scrapy without it: time, CPU, imports, open files."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Row, Run, in_turn, nginx


@dataclass(frozen=True, slots=True)
class Seen:
    """What one crawl used: CPU seconds, imported modules, files that were open at its end."""

    cpu: float
    modules: frozenset[str]
    files: frozenset[str]


def run(*, quick: bool, pairs: int, only: str) -> list[Row]:
    """Measure crawls of pages alone."""
    count = 200 if quick else 3000
    label = f"{count} pages, STREAMING_ENABLED=False"
    return [_measure(label, count, pairs)] if only in label else []


def _measure(label: str, count: int, pairs: int) -> Row:
    row = Row(label, "Scrapy without the add-on", "1.00 ± 0.02")
    seen: dict[bool, list[Seen]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)  # nginx may run as another user
        for number in range(count):
            (root / f"{number}.html").write_text(f"<html><title>{number}</title>{'text ' * 200}</html>")
        with nginx(root, root) as base:

            def crawl(addon: bool) -> Run:
                done, what = _crawl(root, base, count, addon=addon)
                seen[addon].append(what)
                return done

            row.runs, row.peer_runs = in_turn(pairs, lambda: crawl(True), lambda: crawl(False))
    pairs_seen = list(zip(seen[True], seen[False], strict=True))[1:]
    cpu = statistics.median(on.cpu / off.cpu for on, off in pairs_seen)
    on, off = pairs_seen[0]
    more = sorted(on.modules - off.modules)
    files = sorted(on.files ^ off.files)
    row.note = (
        f"CPU {cpu:.3f}; more modules: {', '.join(more)}; other open files: {', '.join(files) or 'none'}"
    )
    return row


def _crawl(folder: Path, base: str, count: int, *, addon: bool) -> tuple[Run, Seen]:
    said = folder / "said.json"
    said.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "scrapy", "runspider", str(Path(__file__).parent / "pages_spider.py"),
        "-a", f"base={base}", "-a", f"count={count}", "-a", f"said={said}",
        "-s", "LOG_LEVEL=WARNING", "-s", "TELNETCONSOLE_ENABLED=False", "-s", "STREAMING_ENABLED=False",
        "-s", f"FILES_STORE={folder / 'store'}",
    ]  # fmt: skip
    if addon:
        command += ["-s", 'ADDONS={"scrapy_streaming.Addon": 300}']
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    what = json.loads(said.read_text())
    if what["pages"] != count or what["reason"] != "finished" or (folder / "store").exists():
        msg = f"{what['pages']} pages of {count}, ended as {what['reason']}"
        raise RuntimeError(msg)
    seen = Seen(usage.ru_utime + usage.ru_stime, frozenset(what["modules"]), frozenset(what["files"]))
    return Run(what["at"] - started, usage.ru_maxrss / 1024), seen
