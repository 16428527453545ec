"""S5: leases of one second hold on a machine with twenty runnable processes; nothing is fetched twice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.crawl import run_crawl
from support.servers import WebServer

BURN = "while True: sum(range(10_000))"
SETTINGS = {"STREAMING_LEASE_SECONDS": 1, "LOG_LEVEL": "INFO"}


@contextmanager
def burning(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _crawled(web: WebServer, store: Path, ledger_url: str, *, files: int, beside: int) -> None:
    urls = [web.put(f"busy/{number}.bin", str(number).encode() * 10_000) for number in range(files)]
    web.forget()
    settings = SETTINGS | {"STREAMING_DATABASE_URL": ledger_url}
    with burning(beside):
        crawl = run_crawl(urls, store, settings=settings, timeout=600)
    bodies = [line for line in web.served() if line.status == 200]
    lost = crawl.log.count("lease-lost")
    print(f"{len(crawl.files)} files, {len(bodies)} bodies, {lost} lease-lost lines, {crawl.elapsed:.0f} s")
    assert len(crawl.files) == files
    assert len(bodies) == files
    assert lost == crawl.stat("streaming/leases_lost") == 0


def test_short_leases_hold_beside_busy_processes(web: WebServer, store: Path, ledger_url: str) -> None:
    _crawled(web, store, ledger_url, files=40, beside=4)


@pytest.mark.soak
def test_short_leases_hold_beside_twenty_busy_processes(web: WebServer, store: Path, ledger_url: str) -> None:
    _crawled(web, store, ledger_url, files=1000, beside=20)
