"""Real static servers: killed in the middle, changed in every way that HTTP shows, asked again (S3)."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import pytest
from support import server_table
from support.crawl import assert_sound, assert_stored, run_crawl
from support.server_table import SERVERS, Facts
from support.servers import Proxy, WebServer, static

KIB = 1 << 10
SIZE = 1600 * KIB
#: Bytes of each broken-off answer; of these at least ``KEPT`` are durable when the crawl is killed.
SENT, KEPT = 1024 * KIB, 512 * KIB
SETTINGS = {
    "STREAMING_CHECKPOINT_BYTES": 256 * KIB,
    "STREAMING_REVALIDATE": "always",
    "CONCURRENT_REQUESTS_PER_DOMAIN": 16,
    "LOG_LEVEL": "INFO",
}
DAY = 86_400
LONG_AGO = "Mon, 01 Jan 2001 00:00:00 GMT"


@pytest.fixture
def server(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Iterator[WebServer]:
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent  # one for all processes of this run
    with static(request.param, tmp_path / "server", base / "npm") as running:
        yield running


def _bytes(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


#: What becomes of a file between two crawls: its new bytes, and how many seconds its date moves.
CHANGES = {
    "unchanged": (lambda old: old, 0),
    "rewritten": (lambda old: _bytes("rewritten", SIZE - 1000), 3600),
    "same-size": (lambda old: _bytes("same-size", SIZE), 3600),
    "restored": (lambda old: _bytes("restored", SIZE), -DAY),
    "shortened": (lambda old: _bytes("shortened", KEPT // 2), 3600),
    "appended-to": (lambda old: old + b"more", 3600),
}


def _sidecars(store: Path) -> dict[str, int]:
    """Return the bytes that are durable, by URL."""
    found = {}
    for path in (store / ".streaming" / "parts").glob("*.json"):
        try:
            sidecar = json.loads(path.read_text())
        except FileNotFoundError:
            continue  # its file is whole
        found[sidecar["url"]] = sidecar["length"]
    return found


def _completed(store: Path) -> int:
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
        return int(ledger.execute("SELECT count(*) FROM ss_completion").fetchone()[0])


def _change(server: WebServer, path: str, kind: str) -> bytes:
    target = server.root / path
    new, moved = CHANGES[kind]
    old, date = target.read_bytes(), int(target.stat().st_mtime)
    body = new(old)
    if body != old:
        target.write_bytes(body)
        os.utime(target, (date + moved, date + moved))
    return body


@pytest.mark.proves("F1", "F7", "I10")
@pytest.mark.parametrize("server", SERVERS, indirect=True)
def test_after_a_kill_what_is_unchanged_is_resumed_and_what_changed_is_right(
    server: WebServer, store: Path, request: pytest.FixtureRequest
) -> None:
    """Files whose transfer was cut, and files that were whole, in one crawl; then each is changed."""
    facts = SERVERS[request.node.callspec.params["server"]][2]
    paths = {(where, kind): f"bucket/{where}/{kind}.bin" for where in ("cut", "whole") for kind in CHANGES}
    urls = {at: server.put(path, _bytes(path, SIZE)) for at, path in paths.items()}
    cut = {urls["cut", kind] for kind in CHANGES}

    def half() -> bool:
        kept = _sidecars(store)
        return set(kept) == cut and min(kept.values()) >= KEPT and _completed(store) == len(CHANGES)

    proxy = Proxy(hold=SENT)
    killed = run_crawl(
        list(urls.values()), store, settings=SETTINGS, env={"http_proxy": proxy.url}, kill_when=half
    )
    proxy.close()
    assert killed.code == -9
    kept = _sidecars(store)
    assert_sound(store, [(server.root / path).read_bytes() for path in paths.values()])
    bodies = {at: _change(server, path, at[1]) for at, path in paths.items()}
    crawl = run_crawl(list(urls.values()), store, settings=SETTINGS)
    for at, url in urls.items():
        print(*at, {key: crawl.files.get(url, {}).get(key) for key in ("status", "reason", "resumed_from")})
    for at, url in urls.items():
        if at == ("whole", "restored") and not facts.shows_older:
            assert crawl.files[url]["reason"] == "not-modified"
        else:
            assert_stored(store, crawl.files.get(url), bodies[at])
    resumed = {kind: crawl.files[urls["cut", kind]]["resumed_from"] for kind in CHANGES}
    unchanged = kept[urls["cut", "unchanged"]] if facts.resumes else 0
    assert resumed == dict.fromkeys(CHANGES, 0) | {"unchanged": unchanged}


@pytest.mark.parametrize("server", SERVERS, indirect=True)
def test_a_server_sends_what_the_page_says(server: WebServer, request: pytest.FixtureRequest) -> None:
    facts = SERVERS[request.node.callspec.params["server"]][2]
    server.put("bucket/a.bin", b"0123456789")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)

    def ask(**fields: str) -> tuple[int, dict[str, str]]:
        given = {name.replace("_", "-"): value for name, value in fields.items()}
        connection.request("GET", "/bucket/a.bin", headers=given | {"Accept-Encoding": "identity"})
        response = connection.getresponse()
        connection.close()  # some send a length with a 412 and no such body
        return response.status, {name.lower(): value for name, value in response.getheaders()}

    status, plain = ask()
    assert status == 200
    tag, date = plain.get("etag", ""), plain.get("last-modified", "")
    other = {"If_Range": '"other"' if tag else LONG_AGO}
    later = formatdate((server.root / "bucket/a.bin").stat().st_mtime + 3600, usegmt=True)
    older_status, older = ask(If_Modified_Since=later)
    status, piece = ask(Range="bytes=4-")
    ranged = status if "content-range" in piece else 0
    assert facts == Facts(
        tag=("weak" if tag.startswith("W/") else "strong") if tag else "",
        date=bool(re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", date)),
        ranged=ranged,
        if_range=bool(ranged) and "content-range" not in ask(Range="bytes=4-", **other)[1],
        if_unmodified_since=ask(Range="bytes=4-", If_Unmodified_Since=LONG_AGO)[0] == 412,
        not_modified=ask(**({"If_None_Match": tag} if tag else {"If_Modified_Since": date}))[0] == 304,
        shows_older=bool(tag) or older_status == 200 or "last-modified" in older,
    )


def test_the_page_of_servers_is_that_of_the_table() -> None:
    def without_versions(page: str) -> str:
        return re.sub(r"^(\|[^|]+\|)[^|]+\|", r"\1|", page, flags=re.MULTILINE)

    written = server_table.PAGE.read_text()
    assert without_versions(written) == without_versions(server_table.page()), (
        "run `python tests/support/server_table.py`"
    )
