"""What a user sees of two crawls of one site, from real servers (S4, S5, S6)."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import pytest
from support.crawl import assert_sound, assert_stored, blobs, parts, run_crawl, sha256
from support.servers import WebServer

KEYS = {
    "url", "path", "checksum", "status", "digest", "size", "resumed_from", "reason", "proof", "media_type",
    "etag", "last_modified", "completion_id",
}  # fmt: skip


def fill(server: WebServer, folder: str, bodies: dict[str, bytes]) -> dict[str, bytes]:
    """Put files where *server* serves them; return them by URL."""
    return {server.put(f"{folder}/{name}", body): body for name, body in bodies.items()}


SOME = {
    "a.pdf": b"a" * 100,
    "big.bin": os.urandom(3 << 20),
    "one": b"x",
    "empty.txt": b"",
    "é ü.txt": b"names",
}


def test_a_second_crawl_asks_for_nothing(web: WebServer, store: Path) -> None:
    bodies = fill(web, "twice", SOME)
    first = run_crawl(list(bodies), store)
    for url, body in bodies.items():
        assert_stored(store, first.files.get(url), body)
        entry = first.files[url]
        assert set(entry) == KEYS
        assert entry["digest"] == f"sha256:{sha256(body)}"
        assert (entry["status"], entry["reason"], entry["resumed_from"]) == ("downloaded", "fetched", 0)
        assert entry["etag"].startswith('"')
        assert entry["last_modified"].endswith("GMT")
        assert len(entry["completion_id"]) == 32
    assert first.files[web.url("twice/a.pdf")]["media_type"] == "application/pdf"
    assert first.stat("file_count") == first.stat("file_status_count/downloaded") == len(bodies)
    assert first.stat("streaming/blobs_published") == len(bodies)
    assert first.stat("streaming/bytes_received") == sum(map(len, bodies.values()))
    assert first.log.count("Streaming architecture integrations: streaming=") == 1
    assert parts(store) == []
    web.forget()
    second = run_crawl(list(bodies), store)
    assert web.served() == []
    assert second.stat("file_status_count/uptodate") == len(bodies)
    assert second.stat("streaming/bytes_saved") == sum(map(len, bodies.values()))
    for url, entry in first.files.items():
        same = {"path", "checksum", "digest", "size", "etag", "last_modified", "completion_id", "media_type"}
        assert {k: second.files[url][k] for k in same} == {k: entry[k] for k in same}
        assert second.files[url]["status"] == "uptodate"


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_revalidating_an_unchanged_site_transfers_no_body(
    kind: str, request: pytest.FixtureRequest, store: Path
) -> None:
    """S4."""
    server: WebServer = request.getfixturevalue(f"{kind}_server")
    bodies = fill(server, "s4", SOME)
    first = run_crawl(list(bodies), store)
    assert len(first.files) == len(bodies)
    if kind == "nginx":
        server.forget()
    second = run_crawl(list(bodies), store, settings={"STREAMING_REVALIDATE": "always"})
    assert {entry["status"] for entry in second.files.values()} == {"uptodate"}
    assert second.stat("streaming/decision/not-modified") == len(bodies)
    assert second.stat("streaming/bytes_received") == 0
    assert second.stat("downloader/response_status_count/304") == len(bodies)
    for url, body in bodies.items():
        assert_stored(store, second.files.get(url), body)
    if kind == "nginx":
        served = server.served()
        assert [(line.status, line.sent) for line in served] == [(304, 0)] * len(bodies)


def test_one_content_at_two_urls_is_one_blob_and_a_change_moves_the_name(web: WebServer, store: Path) -> None:
    """S5."""
    old, new = os.urandom(400_000), os.urandom(500_000)
    bodies = fill(web, "s5", {"a.bin": old, "b.bin": old})
    first = run_crawl(list(bodies), store, settings={"STREAMING_LINK_MODE": "hardlink"})
    names = [store / first.files[url]["path"] for url in bodies]
    assert set(blobs(store)) == {sha256(old)}
    assert len({path.stat().st_ino for path in [*names, blobs(store)[sha256(old)]]}) == 1
    assert names[0] != names[1]
    assert first.stat("streaming/deduplicated") == 1
    web.put("s5/a.bin", new)
    always = {"STREAMING_LINK_MODE": "hardlink", "STREAMING_REVALIDATE": "always"}
    second = run_crawl(list(bodies), store, settings=always)
    assert second.files[web.url("s5/a.bin")]["path"] == first.files[web.url("s5/a.bin")]["path"]
    assert_stored(store, second.files[web.url("s5/a.bin")], new)
    assert_stored(store, second.files[web.url("s5/b.bin")], old)
    assert set(blobs(store)) == {sha256(old), sha256(new)}
    assert {oct(path.stat().st_mode & 0o777) for path in blobs(store).values()} == {"0o444"}


# -- S6: in the place of FilesPipeline, and back -----------------------------------------------

STOCK = {"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}}


@pytest.fixture(scope="module")
def library(nginx_server: WebServer) -> dict[str, bytes]:
    """Some hundred real files, empty ones among them, by their URL."""
    source = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        p for p in source.rglob("*.py") if "site-packages" not in p.parts and p.stat().st_size < 200_000
    )
    chosen = [p for p in files if p.stat().st_size == 0][:10] + files[::6]
    bodies = {}
    for path in dict.fromkeys(chosen[:300]):
        body = path.read_bytes()
        bodies[nginx_server.put(f"lib/{path.relative_to(source)}", body)] = body
    assert len(bodies) > 200
    assert b"" in bodies.values()
    return bodies


def test_paths_and_bytes_are_those_of_files_pipeline_and_it_finds_all_up_to_date(
    web: WebServer, library: dict[str, bytes], tmp_path: Path
) -> None:
    """S6."""
    streamed, stocks = tmp_path / "streamed", tmp_path / "stocks"
    stock = run_crawl(list(library), stocks, settings=STOCK)
    crawl = run_crawl(list(library), streamed)
    assert set(stock.files) == {url for url, body in library.items() if body}
    assert set(crawl.files) == set(library)
    for url, body in library.items():
        assert_stored(streamed, crawl.files[url], body)
        if body:
            assert crawl.files[url]["path"] == stock.files[url]["path"]
            assert (stocks / stock.files[url]["path"]).read_bytes() == body
    assert_sound(streamed, list(library.values()))
    web.forget()
    back = run_crawl(list(library), streamed, settings=STOCK)
    assert web.served() == []
    assert back.stat("file_status_count/uptodate") == back.stat("file_count") == len(library)
    # and arriving again: nothing is asked for either
    again = run_crawl(list(library), streamed)
    assert web.served() == []
    assert again.stat("file_status_count/uptodate") == len(library)


def test_a_subclass_keeps_its_own_paths(web: WebServer, library: dict[str, bytes], tmp_path: Path) -> None:
    """S6: file_path() overridden; settings under the class's own name."""
    urls = [url for url, body in library.items() if body][:20]
    mine = run_crawl(
        [{"docs": [url]} for url in urls], tmp_path / "streamed",
        settings={"ITEM_PIPELINES": {"support.components.OwnPath": 1},
                  "OWNPATH_FILES_URLS_FIELD": "docs", "OWNPATH_FILES_RESULT_FIELD": "files"},
    )  # fmt: skip
    stock = run_crawl(
        urls, tmp_path / "stocks",
        settings={"ADDONS": {}, "ITEM_PIPELINES": {"support.components.StockOwnPath": 1}},
    )  # fmt: skip
    assert set(mine.files) == set(urls)
    for url in urls:
        assert mine.files[url]["path"] == stock.files[url]["path"]
        assert mine.files[url]["path"].startswith("mine/lib/")
        assert_stored(tmp_path / "streamed", mine.files[url], library[url])


def test_files_that_files_pipeline_left_are_taken_over_whole(
    web: WebServer, library: dict[str, bytes], store: Path
) -> None:
    """Arriving: what stock calls up to date stays (C6), also a torn file, until the server is asked."""
    urls = [url for url, body in library.items() if body][:5]
    stock = run_crawl(urls, store, settings=STOCK)
    torn = store / stock.files[urls[0]]["path"]
    torn.write_bytes(b"torn")
    crawl = run_crawl(urls, store)
    assert crawl.files[urls[0]]["reason"] == "adopted"
    assert torn.read_bytes() == b"torn"
    for url in urls[1:]:
        assert_stored(store, crawl.files.get(url), library[url])
    asked = run_crawl(urls, store, settings={"STREAMING_REVALIDATE": "always"})
    for url in urls:
        assert_stored(store, asked.files.get(url), library[url])


# -- toggles -----------------------------------------------------------------------------------


def test_switched_off_everything_is_as_without_the_add_on(web: WebServer, tmp_path: Path) -> None:
    """STREAMING_ENABLED by setting and by environment."""
    bodies = fill(web, "toggle", {"a.bin": b"a" * 1000, "b.bin": os.urandom(600_000)})
    on = run_crawl(list(bodies), tmp_path / "on")
    pipeline = {"ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}}
    ways: dict[str, dict] = {
        "setting": {"settings": pipeline | {"STREAMING_ENABLED": "0"}},
        "environment": {"settings": pipeline, "env": {"SCRAPY_STREAMING_ENABLED": "no"}},
        "command line": {
            "settings": pipeline, "options": ["-s", "STREAMING_ENABLED=0"],
            "env": {"SCRAPY_STREAMING_ENABLED": "1"},
        },
    }  # fmt: skip
    for name, how in ways.items():
        store = tmp_path / name.replace(" ", "-")
        off = run_crawl(list(bodies), store, **how)
        assert set(off.files) == set(bodies), name
        assert {set(entry) == {"url", "path", "checksum", "status"} for entry in off.files.values()} == {True}
        assert sorted(path.name for path in store.iterdir()) == ["full"]
        assert not [stat for stat in off.stats if stat.startswith("streaming/")]
        for url, body in bodies.items():
            assert off.files[url]["path"] == on.files[url]["path"]
            assert (store / off.files[url]["path"]).read_bytes() == body


def test_without_streamed_bodies_the_result_is_the_same(web: WebServer, store: Path) -> None:
    """STREAMING_IO_ENABLED=0: Scrapy buffers, the pipeline stores; conditional requests go on."""
    bodies = fill(web, "io", {"a.bin": b"a" * 1000, "b.bin": os.urandom(600_000)})
    crawl = run_crawl(list(bodies), store, settings={"STREAMING_IO_ENABLED": False})
    for url, body in bodies.items():
        assert_stored(store, crawl.files.get(url), body)
    assert crawl.stat("streaming/bytes_received") == sum(map(len, bodies.values())), "by whichever handler"
    assert crawl.stat("streaming/fallbacks_to_existing") == 0, "it is what was asked for"
    settings = {"STREAMING_IO_ENABLED": False, "STREAMING_REVALIDATE": "always"}
    again = run_crawl(list(bodies), store, settings=settings)
    assert again.stat("file_status_count/uptodate") == len(bodies)
    assert again.stat("downloader/response_status_count/304") == len(bodies)


def test_without_resuming_no_conditional_field_is_sent(web: WebServer, store: Path) -> None:
    """STREAMING_RESUME_ENABLED=0."""
    bodies = fill(web, "resume", {"a.bin": os.urandom(600_000)})
    off = {"STREAMING_RESUME_ENABLED": False, "STREAMING_REVALIDATE": "always"}
    for _ in range(2):
        crawl = run_crawl(list(bodies), store, settings=off)
        for url, body in bodies.items():
            assert_stored(store, crawl.files.get(url), body)
    assert [line.status for line in web.served()] == [200, 200]


@pytest.mark.parametrize("mode", ["symlink", "copy", "none"])
def test_link_modes_name_the_blob(web: WebServer, store: Path, mode: str) -> None:
    bodies = fill(web, "links", {"a.bin": os.urandom(1000)})
    crawl = run_crawl(list(bodies), store, settings={"STREAMING_LINK_MODE": mode})
    (entry,) = crawl.files.values()
    (body,) = bodies.values()
    assert_stored(store, entry, body)
    path = store / entry["path"]
    assert path.is_symlink() == (mode == "symlink")
    assert entry["path"].startswith("blobs/" if mode == "none" else "full/")


def test_many_urls_of_one_content_at_once_share_one_file(web: WebServer, store: Path) -> None:
    """S5, R66: small bodies, published side by side from several threads."""
    body = os.urandom(200_000)
    bodies = fill(web, "same", {f"{n}.bin": body for n in range(24)})
    crawl = run_crawl(list(bodies), store, settings={"STREAMING_LINK_MODE": "hardlink"})
    paths = [store / crawl.files[url]["path"] for url in bodies]
    assert len({path.stat().st_ino for path in [*paths, blobs(store)[sha256(body)]]}) == 1
    assert crawl.stat("streaming/blobs_published") == 1
    assert crawl.stat("streaming/deduplicated") == 23


@pytest.mark.parametrize("revalidate", ["expired", "always"])
def test_stored_bytes_other_than_the_expected_ones_are_no_answer(
    web: WebServer, store: Path, revalidate: str
) -> None:
    """E9: a digest that is expected later is compared with what the ledger and a 304 would give, too."""
    url = web.put("expected.bin", b"first")
    run_crawl([url], store)
    wanted = hashlib.sha256(b"second").hexdigest()
    settings = {"STREAMING_REVALIDATE": revalidate}
    wrong = run_crawl([f"{url}#sha256={wanted}"], store, settings=settings)
    assert wrong.files == {}
    assert "(digest-mismatch)" in wrong.log
    assert wrong.stat("streaming/failed/digest-mismatch") == 1
    web.put("expected.bin", b"second")
    right = run_crawl([f"{url}#sha256={wanted}"], store, settings=settings)
    assert right.files[f"{url}#sha256={wanted}"]["digest"] == f"sha256:{wanted}"
