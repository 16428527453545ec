"""P1 and P2: one large file, whole process, beside ``curl -o``, which does not hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Run, in_turn, nginx, timed

CHUNK = 1 << 24


def run(*, quick: bool, pairs: int, only: str) -> list[Row]:
    """Measure on memory with fsync off, and on disk with fsync on."""
    size = (64 << 20) if quick else (2 << 30)
    rows = []
    for name, folder, fsync in (("tmpfs, no fsync", "/dev/shm", False), ("disk, fsync", None, True)):
        label = f"{size >> 20} MiB, {name}"
        if only in label:
            rows.append(_measure(label, folder, fsync=fsync, size=size, count=pairs))
    return rows


def _measure(label: str, folder: str | None, *, fsync: bool, size: int, count: int) -> Row:
    row = Row(label, "curl + sync" if fsync else "curl", "≤ 1.3")
    curl = shutil.which("curl")
    if curl is None:
        row.note = "skipped: curl is not installed"
        return row
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as served, tempfile.TemporaryDirectory(dir=folder) as work:
        root, target = Path(served), Path(work)
        root.chmod(0o755)  # nginx may run as another user
        digest = _make(root / "large.bin", size)
        with nginx(root, root) as base:
            url = f"{base}/large.bin"
            idle = crawl(target, "", fsync=fsync)

            def streamed() -> Run:
                done = crawl(target, url, fsync=fsync)
                blob = target / "store" / "blobs" / "sha256" / digest[:2] / digest
                if not blob.is_file():
                    msg = "the crawl did not store the right bytes"
                    raise RuntimeError(msg)
                shutil.rmtree(target / "store")
                return done

            def peer() -> Run:
                copy = target / "copy.bin"
                script = f"{curl} -s -o {copy} {url}" + (f" && sync {copy}" if fsync else "")
                done = timed(["sh", "-c", script], cwd=target)
                copy.unlink()
                return done

            row.runs, row.peer_runs = in_turn(count, streamed, peer)
    over = max(run.peak_mib for run in row.runs) - idle.peak_mib
    row.note = f"peak {over:+.0f} MiB over an idle crawl (goal ≤ 32)"
    return row


def _make(path: Path, size: int) -> str:
    """Write *size* random bytes; return their SHA-256."""
    hasher = hashlib.sha256()
    block = os.urandom(CHUNK)
    with path.open("wb") as stream:
        for number in range(size // CHUNK):
            data = number.to_bytes(8, "big") + block[8:]
            hasher.update(data)
            stream.write(data)
    return hasher.hexdigest()


def crawl(folder: Path, url: str, *, fsync: bool) -> Run:
    """Run one whole Scrapy process that stores *url* (nothing if empty); timed to the item."""
    stamp = folder / "stamp"
    command = [
        sys.executable, "-m", "scrapy", "runspider", str(Path(__file__).parent / "spider.py"),
        "-a", f"url={url}", "-a", f"stamp={stamp}",
        "-s", f"FILES_STORE={folder / 'store'}", "-s", f"STREAMING_FSYNC={fsync}",
        "-s", "LOG_LEVEL=WARNING", "-s", "TELNETCONSOLE_ENABLED=False",
    ]  # fmt: skip
    return timed(command, cwd=folder, stamp=stamp if url else None)
