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
    """300 MiB: peak resident at most 32 MiB over an idle crawl's; and DOWNLOAD_WARNSIZE is silent.

    So it is although Scrapy takes the length of each body for its statistics, for the log of AutoThrottle
    and for the memory that spiders' responses take, and looks for a refresh in a page (C9).
    """
    path = web.root / "huge.bin"
    piece = os.urandom(MIB)
    with path.open("wb") as stream:
        for _ in range(300):
            stream.write(piece)
    (web.root / "huge.html").hardlink_to(path)
    (web.root / "own.html").hardlink_to(path)
    (web.root / "tiny.bin").write_bytes(b"x")
    settings = {
        "STREAMING_FSYNC": False, "AUTOTHROTTLE_ENABLED": True, "AUTOTHROTTLE_DEBUG": True,
        "AUTOTHROTTLE_START_DELAY": 0,
    }  # fmt: skip
    idle = run_crawl([web.url("tiny.bin")], store, settings=settings)
    urls, own = [web.url("huge.bin"), web.url("huge.html")], web.url("own.html")
    crawl = run_crawl(urls, store, spider="own", job={"own": [own]}, settings=settings)
    for each in (path, web.root / "huge.html", web.root / "own.html"):
        each.unlink()
    assert [crawl.files[url]["size"] for url in urls] == [300 * MIB] * 2
    assert {"own": own, "size": 300 * MIB} in crawl.notes
    assert crawl.stat("downloader/response_bytes") > 900 * MIB
    assert crawl.rss - idle.rss <= 32 * MIB, (
        f"{(crawl.rss - idle.rss) / MIB:.1f} MiB over {idle.rss / MIB:.0f}"
    )
    assert "larger than" not in crawl.log
    assert "warn size" not in crawl.log
    assert "WARNSIZE" not in crawl.log
