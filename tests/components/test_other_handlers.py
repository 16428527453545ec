"""Pages and files with any download handler, beside stock Scrapy (C15)."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.beside import beside, levels
from support.command import scrapy
from support.crawl import ADDON, assert_stored, run_crawl, wait_until
from support.origin import Answer, Origin
from support.servers import WebServer, caddy

BODY = os.urandom(300_000)
PAGE = b"<html><body>a page</body></html>"
HANDLERS = "scrapy.core.downloader.handlers"
HTTP11 = f"{HANDLERS}.http11.HTTP11DownloadHandler"
AIOHTTP = f"{HANDLERS}._aiohttp.AiohttpDownloadHandler"
HTTPX = f"{HANDLERS}._httpx.HttpxDownloadHandler"
H2 = f"{HANDLERS}.http2.H2DownloadHandler"
NEWER = find_spec(f"{HANDLERS}._aiohttp") is not None
MISSING = [
    (None, "no_such_module.Handler"),
    ("support.components.NoHandler", "support.components.Unconfigured"),
    ("support.components.Broken", None),
]
SAID = "falling back to buffered bodies for"


@pytest.fixture(scope="module")
def http2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with caddy(tmp_path_factory.mktemp("http2"), tls=True) as server:
        yield server


def by(handler: str, scheme: str = "http") -> dict[str, Any]:
    return {"DOWNLOAD_HANDLERS": {scheme: handler}}


def said(log: str) -> list[tuple[str, str]]:
    """Return the scheme and the handler of each line that says that bodies are buffered."""
    return re.findall(rf"WARNING: {SAID} (\w+): (\S+) ", log)


OTHERS = [
    pytest.param({"TWISTED_REACTOR_ENABLED": False}, AIOHTTP if NEWER else HTTPX, id="reactorless"),
    pytest.param(by(HTTPX), HTTPX, id="httpx"),
    pytest.param(by("support.components.OldHandler"), "support.components.OldHandler", id="old-style"),
    pytest.param(
        {"ADDONS": {"scrapy_streaming.Addon": 300, "support.components.LateHandlers": 400}},
        "support.components.Around",
        id="a-later-add-ons",
    ),
]


@pytest.mark.parametrize(("settings", "handler"), OTHERS)
def test_pages_and_files_are_as_stocks_and_one_line_says_that_bodies_are_buffered(
    origin: Origin, tmp_path: Path, settings: dict[str, Any], handler: str
) -> None:
    """C15."""
    pages = [origin.put(f"/page{n}", PAGE, media_type="text/html") for n in range(2)]
    urls = [origin.put(f"/{n}.bin", BODY) for n in range(3)]
    kept = {"stock": {"ADDONS": {"support.components.LateHandlers": 400}}} if "ADDONS" in settings else {}
    found = beside(tmp_path, urls, settings=settings, spider="pages", job={"pages": pages}, **kept)
    found.assert_same(SAID)
    for url in urls:
        assert_stored(found.store, found.streaming.files.get(url), BODY)
    assert said(found.streaming.log) == [("http", handler)]
    assert "STREAMING_IO_ENABLED=False" in found.streaming.log
    if "TWISTED_REACTOR_ENABLED" not in settings:
        return
    silent = {**settings, "STREAMING_IO_ENABLED": False, "STREAMING_REVALIDATE": "always"}
    again = run_crawl(urls, found.store, settings=silent)
    assert again.stat("file_status_count/uptodate") == 3, "asked by a conditional request, by any handler"
    assert SAID not in again.log, "a user who asks for buffered bodies is not warned of them"
    assert levels(again) == levels(found.stock)


def test_http2_is_as_stock(http2_server: WebServer, tmp_path: Path) -> None:
    """C15: the only handler that has a pool, too, and another one."""
    page, url = http2_server.put("page.html", PAGE), http2_server.put("a.bin", BODY)
    found = beside(tmp_path, [url], settings=by(H2, "https"), spider="pages", job={"pages": [page]})
    found.assert_same(SAID)
    assert_stored(found.store, found.streaming.files.get(url), BODY)
    assert said(found.streaming.log) == [("https", H2)]


def test_a_handler_that_is_not_there_is_missed_as_in_stock(origin: Origin, tmp_path: Path) -> None:
    """C15: of any kind; it is asked for as often, the lines are the same, nothing is said of buffers."""
    pages = [origin.put("/page", PAGE), origin.url("/page").replace("http:", "https:")]
    for number, (plain, secure) in enumerate(MISSING):
        settings = {"DOWNLOAD_HANDLERS": {"http": plain, "https": secure}}
        job = {"pages": [*pages, *pages]}
        found = beside(tmp_path / str(number), [], settings=settings, spider="pages", job=job)
        found.assert_same()
        assert found.streaming.stat("test/no_handler") == found.stock.stat("test/no_handler")
    assert origin.requests == []


def test_handlers_of_a_spiders_own_settings_are_wrapped(origin: Origin, store: Path) -> None:
    """C15: they stand above the project's, and above an add-on's."""
    page, url = origin.put("/page", PAGE), origin.put("/a.bin", BODY)
    job = {"pages": [page], "handlers": {"http": "support.components.MyHandler", "https": None}}
    crawl = run_crawl([url], store, spider="own-handlers", job=job)
    assert_stored(store, crawl.files.get(url), BODY)
    assert crawl.stat("test/my_handler") == 2
    assert crawl.stat("streaming/bytes_received") == len(BODY)
    assert said(crawl.log) == []


def test_ctrl_c_ends_a_reactorless_crawl_as_it_ends_stocks(origin: Origin, tmp_path: Path) -> None:
    """C15, C2: the item comes whole, in this crawl or the next."""
    page = origin.put("/page", PAGE)
    url = origin.put("/slow.bin", BODY, default=Answer(200, {}, BODY, pace=0.3))

    def stop(process: Any) -> None:
        wait_until(lambda: origin.asked("/slow.bin"))
        process.send_signal(signal.SIGINT)
        origin.forget()

    settings = {"TWISTED_REACTOR_ENABLED": False}
    found = beside(tmp_path, [url], settings=settings, spider="pages", job={"pages": [page]}, meanwhile=stop)
    assert found.streaming.code == found.stock.code == 0
    assert "'finish_reason': 'shutdown'" in found.streaming.log
    assert levels(found.streaming, SAID) == levels(found.stock)
    following = run_crawl([url], found.store, settings=settings)
    assert_stored(found.store, following.files.get(url), BODY)


def test_status_shows_which_handler_streams(tmp_path: Path) -> None:
    """C15: per scheme, also as JSON; of a handler that is off there is nothing to say."""
    (tmp_path / "scrapy.cfg").write_text("[settings]\ndefault = project\n")
    handlers = {"http": "support.components.MyHandler", "https": H2, "ftp": None, "new": "no_such.Handler"}
    project = {"ADDONS": ADDON, "FILES_STORE": "store", "DOWNLOAD_HANDLERS": handlers}
    lines = [f"{name} = {value!r}\n" for name, value in project.items()]
    (tmp_path / "project.py").write_text("".join(lines))

    def status(*options: str) -> Any:
        return json.loads(scrapy("streaming", *options, "status", "--json", cwd=tmp_path).stdout)["Handlers"]

    found = status()
    assert found["http"] == {"handler": "support.components.MyHandler", "streams": True}
    assert (found["https"]["handler"], found["https"]["streams"]) == (H2, False)
    assert "DOWNLOAD_HANDLERS" in found["https"]["why"]
    assert found["new"]["streams"] is False
    assert "ftp" not in found
    shown = scrapy("streaming", "status", cwd=tmp_path).stdout.splitlines()
    assert "Handler of http: support.components.MyHandler, streams" in shown
    [line] = [line for line in shown if line.startswith("Handler of https:")]
    assert line.startswith(f"Handler of https: {H2}, buffers (")
    plain = status("-s", "DOWNLOAD_HANDLERS={}")
    assert plain["http"] == plain["https"] == {"handler": HTTP11, "streams": True}
    reactorless = status("-s", "DOWNLOAD_HANDLERS={}", "-s", "TWISTED_REACTOR_ENABLED=0")
    assert reactorless["http"]["streams"] is False
    assert "TWISTED_REACTOR_ENABLED" in reactorless["http"]["why"]
    off = status("-s", "STREAMING_IO_ENABLED=0")
    assert off["http"] == {
        "handler": "support.components.MyHandler",
        "streams": False,
        "why": "STREAMING_IO_ENABLED is off",
    }
    assert not (tmp_path / "store").exists()
