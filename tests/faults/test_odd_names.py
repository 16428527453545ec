"""Names that no file or no database takes: stored as stock stores them, or refused before the download."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from support.command import streaming
from support.crawl import Crawl, assert_stored, run_crawl, sha256
from support.origin import Origin

from scrapy_streaming.exceptions import UnusableId
from scrapy_streaming.storage.ledger import JobRequest

#: What file_path() of the components ``OddPath`` and ``StockOddPath`` gives for the last part of a URL.
STORED = {
    "bytes": "o\udcff/b\udc80.bin", "controls": "c\x9b\u202e.bin", "line": "a\nb.bin",
    "absolute": "/full/x.bin", "dots": "./d//e/../f.bin", "slash": "g/h.bin/",
    "blobs": "blobs/annual.pdf", "path": "PATH:p/q.bin",
}  # fmt: skip
REFUSED = {"half": "s\ud800.bin", "null": "x\0y", "long": "n" * 300, "half-folder": "\udfff/x"}
#: What stock puts outside the store, or among our own files.
REFUSED = {"outside": "a/../../outside.bin", "ours": "blobs/sha256/ab/x", "state": "z/../.streaming/x"}
STOCK = {"ADDONS": {}, "ITEM_PIPELINES": {"support.components.StockOddPath": 1}}
STREAMING = {"ITEM_PIPELINES": {"support.components.OddPath": 1}}


def jobs(store: Path) -> dict[str, tuple[str, str | None]]:
    with sqlite3.connect(store / ".streaming" / "ledger.sqlite3") as ledger:
        rows = ledger.execute("SELECT url, state, error_code FROM ss_job").fetchall()
    ledger.close()
    return {url.rsplit("/", 1)[1]: (state, code) for url, state, code in rows}


def serve(origin: Origin) -> dict[str, str]:
    return {
        name: origin.put(f"/{path.encode('utf-8', 'replace').hex()[:40]}/{name}", name.encode())
        for name, path in (STORED | REFUSED | REFUSED).items()
    }


def settings(base: dict[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    return base | {"RETRY_TIMES": 0, "TEST_PATHS": json.dumps(paths)}


def test_what_stock_stores_is_stored_and_the_rest_is_refused_before_the_download(
    origin: Origin, store: Path
) -> None:
    """C8: a crawl beside stock's; the second asks for nothing that is stored, nor for what was refused."""
    urls = serve(origin)
    paths, refused = STORED | REFUSED | REFUSED, REFUSED | REFUSED
    stock_store = store.parent / "deep" / "stock"
    (stock_store / "d" / "e").mkdir(parents=True)  # stock makes no folder "d/e/.."
    ordinary = [url for name, url in urls.items() if name not in REFUSED]
    stock = run_crawl(ordinary, stock_store, settings=settings(STOCK, paths))
    assert set(stock.files) == {urls[name] for name in STORED}
    for again in range(2):
        origin.forget()
        crawl = run_crawl(urls.values(), store, settings=settings(STREAMING, paths))
        assert set(crawl.files) == set(stock.files)
        asked = {request.path.rsplit("/", 1)[1] for request in origin.requests}
        assert asked == (set() if again else set(STORED)), crawl.log[-3000:]
        for name, path in STORED.items():
            entry, inside = crawl.files[urls[name]], path.removeprefix("PATH:").strip("/")
            assert entry["path"] == stock.files[urls[name]]["path"], "as file_path() gave it"
            assert_stored(store, entry | {"path": os.path.normpath(inside)}, name.encode())
            assert Path(os.path.normpath(store / inside)).read_bytes() == (stock_store / inside).read_bytes()
        assert jobs(store) == dict.fromkeys(STORED, ("done", None))
        assert crawl.stat("streaming/failed/store-unsafe") == len(refused)
        for path in refused.values():
            lines = [line for line in crawl.log.splitlines() if "WARNING" in line and repr(path) in line]
            assert len(lines) == 1, repr(path)
            assert "File (store-unsafe): no request is sent: file_path() gave" in lines[0]


def test_a_name_that_is_no_text_is_shown_and_verified(origin: Origin, store: Path) -> None:
    url = origin.put("/bytes", b"bytes")
    run_crawl([url], store, settings=settings(STREAMING, STORED) | {"STREAMING_LINK_MODE": "copy"})
    shown = json.loads(streaming(store, "show", "--json", url).stdout)
    assert shown["jobs"][0]["completions"][0]["path"] == STORED["bytes"]
    assert r"path=o\udcff/b\udc80.bin" in streaming(store, "show", url).stdout
    assert streaming(store, "verify").returncode == 0
    (store / STORED["bytes"]).chmod(0o644)
    (store / STORED["bytes"]).write_bytes(b"Bytes")
    done = streaming(store, "verify")
    assert done.returncode == 1
    assert r"o\udcff/b\udc80.bin" in done.stdout


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x\udcff"])
@pytest.mark.parametrize("name", ["work_id", "artifact_id"])
def test_an_id_that_no_database_can_store_is_refused(name: str, value: str) -> None:
    ids = {"work_id": "w", "artifact_id": "a"} | {name: value}
    with pytest.raises(UnusableId, match=f"^{name}=") as caught:
        JobRequest(**ids, url="http://h/", request_hash="00")
    assert caught.value.reason == "unusable-id"


def said(crawl: Crawl, what: str) -> list[str]:
    return [line for line in crawl.log.splitlines() if "WARNING" in line and what in line]


def test_an_item_with_such_a_work_id_is_refused_with_one_line_each_time(origin: Origin, store: Path) -> None:
    bad, good = origin.put("/bad", b"bad"), origin.put("/good", b"good")
    items = [{"file_urls": [bad], "batch": "a\0b"}, {"file_urls": [good], "batch": "b"}]
    for _ in range(2):
        crawl = run_crawl(items, store, settings={"STREAMING_WORK_ID_FIELD": "batch"})
        assert set(crawl.files) == {good}
        assert len(said(crawl, r"(unusable-id): no request is sent: work_id='a\x00b'")) == 1
        assert crawl.stat("streaming/failed/unusable-id") == 1
    assert origin.asked("/bad") == []
    assert jobs(store) == {"good": ("done", None)}
    assert sha256(b"good") == crawl.files[good]["checksum"]
