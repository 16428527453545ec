"""C1: a list of 20,000 items straight from ``start()``, beside ``FilesPipeline``: rate, memory, leases."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row, Run, in_turn, nginx

SIZE = 4096


def run(*, quick: bool, pairs: int, only: str) -> list[Row]:
    """Measure with fsync on and off, on disk."""
    count, seconds = (500, 15.0) if quick else (20_000, 20.0)
    rows = []
    for fsync in (True, False):
        label = f"{count} items from start(), {'fsync' if fsync else 'no fsync'}: s for 1,000 files"
        if only in label:
            rows.append(_measure(label, fsync=fsync, count=count, seconds=seconds, pairs=pairs))
    return rows


def _measure(label: str, *, fsync: bool, count: int, seconds: float, pairs: int) -> Row:
    row = Row(label, "FilesPipeline", "≤ 1.0")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    notes: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=memory) as served, tempfile.TemporaryDirectory() as work:
        root = Path(served)
        root.chmod(0o755)  # nginx may run as another user
        for number in range(count):
            (root / f"{number}.bin").write_bytes(os.urandom(SIZE))
        with nginx(root, root) as base:

            def streamed() -> Run:
                done, note = _crawl(Path(work), base, count, seconds, fsync=fsync, addon=True)
                notes.append(note)
                return done

            def peer() -> Run:
                return _crawl(Path(work), base, count, seconds, fsync=fsync, addon=False)[0]

            row.runs, row.peer_runs = in_turn(pairs, streamed, peer)
    over = max(a.peak_mib for a in row.runs) - min(b.peak_mib for b in row.peer_runs)
    first, leased = (max(note[name] for note in notes) for name in ("first", "leased"))
    row.note = f"first file {first:.1f} s (goal < 5), {leased:.0f} leases (≤ 48), {over:+.0f} MiB (≤ 64)"
    return row


def _crawl(
    folder: Path, base: str, count: int, seconds: float, *, fsync: bool, addon: bool
) -> tuple[Run, dict[str, float]]:
    """Crawl for so many seconds, or to the end; return seconds for 1,000 files, and what was seen."""
    store, said = folder / "store", folder / "said.json"
    said.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "scrapy", "runspider", str(Path(__file__).parent / "list_spider.py"),
        "-a", f"base={base}", "-a", f"count={count}", "-a", f"said={said}",
        "-s", f"FILES_STORE={store}", "-s", f"STREAMING_FSYNC={fsync}", "-s", f"STREAMING_ENABLED={addon}",
        "-s", "LOG_LEVEL=WARNING", "-s", "TELNETCONSOLE_ENABLED=False",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    ends, leased = time.monotonic() + seconds, 0
    while time.monotonic() < ends and process.poll() is None:
        time.sleep(0.25)
        leased = max(leased, _leased(store / ".streaming" / "ledger.sqlite3"))
    process.kill()
    process.wait()
    seen = json.loads(said.read_text())
    shutil.rmtree(store)
    each = 1000 * (seen["at"] - seen["began"]) / seen["files"]
    return Run(each, seen["rss_mib"]), {"first": seen["first"], "leased": leased}


def _leased(ledger: Path) -> int:
    """Return how many jobs are leased just now."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db,
    ):
        return int(db.execute("SELECT count(*) FROM ss_job WHERE state = 'leased'").fetchone()[0])
    return 0
