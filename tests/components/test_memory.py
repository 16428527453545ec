"""A body is never held in memory (S2, P2, F28 short)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.crawl import run_crawl
from support.servers import WebServer

MIB = 1 << 20


@pytest.mark.proves("I12")
def test_a_large_body_costs_no_more_memory_than_its_buffer(web: WebServer, store: Path) -> None:
    """300 MiB: peak resident at most 32 MiB over an idle crawl's; and DOWNLOAD_WARNSIZE is silent."""
    path = web.root / "huge.bin"
    piece = os.urandom(MIB)
    with path.open("wb") as stream:
        for _ in range(300):
            stream.write(piece)
    (web.root / "tiny.bin").write_bytes(b"x")
    idle = run_crawl([web.url("tiny.bin")], store, settings={"STREAMING_FSYNC": False})
    crawl = run_crawl([web.url("huge.bin")], store, settings={"STREAMING_FSYNC": False})
    path.unlink()
    entry = crawl.files[web.url("huge.bin")]
    assert entry["size"] == 300 * MIB
    assert crawl.rss - idle.rss <= 32 * MIB, (
        f"{(crawl.rss - idle.rss) / MIB:.1f} MiB over {idle.rss / MIB:.0f}"
    )
    assert "larger than" not in crawl.log
    assert "warn size" not in crawl.log
