"""An older copy of the ledger put back: what was stored since is neither turned back nor collected (I16)."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.backups import Backup
from support.command import streaming
from support.crawl import Crawl, assert_stored, blobs, run_crawl, sha256, wait_until
from support.origin import Answer, Asked, Origin, Resource, honest
from support.stores import open_store

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.ledger import Ledger
from scrapy_streaming.storage.store import PUT_BACK

#: Without a second name for its bytes nothing but the ledger keeps a blob from ``gc``.
COPIES = {"STREAMING_LINK_MODE": "copy", "RETRY_ENABLED": False}
DOWN = Answer(503, {"Retry-After": "0"}, b"away")


def body_of(name: str, version: int) -> bytes:
    return f"{name} in version {version}, ".encode() * 1000


@dataclass
class Scene:
    """A site of files, a store, a ledger and its older copy."""

    origin: Origin
    store: Path
    url: str | None
    backup: Backup

    def serve(self, name: str, version: int) -> str:
        return self.origin.put(f"/{name}", body_of(name, version))

    def crawl(self, urls: list[str], **settings: object) -> Crawl:
        own = {"STREAMING_DATABASE_URL": self.url} if self.url else {}
        return run_crawl(urls, self.store, settings=COPIES | own | settings)

    def run(self, *verb: str) -> tuple[int, str]:
        done = streaming(self.store, *verb, url=self.url)
        return done.returncode, done.stdout + done.stderr

    def asked(self, name: str) -> list[dict[str, str]]:
        return [one.fields for one in self.origin.requests if one.path == f"/{name}"]

    def noted(self) -> tuple[str, object]:
        """Return what the store and its ledger say of each other."""
        identity = (self.store / ".streaming" / "store.json").read_text()
        own = json.loads(identity)
        url = self.url or f"sqlite:///{self.store / '.streaming' / 'ledger.sqlite3'}"
        with Ledger.open(url, store_id=own["store_id"], worker_id="looker", epoch=own["epoch"]) as ledger:
            return identity, ledger.standing().result()


@pytest.fixture(params=["sqlite", "postgres"])
def scene(request: pytest.FixtureRequest, origin: Origin, store: Path, tmp_path: Path) -> Scene:
    if request.param == "sqlite":
        url, server = None, None
        where = f"sqlite:///{store / '.streaming' / 'ledger.sqlite3'}"
    else:
        server = request.getfixturevalue("postgres_server")
        where = url = request.getfixturevalue("postgres_url")
    return Scene(origin, store, url, Backup(where, tmp_path, server))


@pytest.mark.proves("I15", "I16", "F12")
@pytest.mark.long_on_postgres
def test_an_older_ledger_turns_nothing_back_and_gc_takes_nothing(scene: Scene) -> None:
    """What is fresh by the older ledger is asked again; ``gc`` waits until the store has been read."""
    names = ["changed", "down", "same"]
    urls = [scene.serve(name, 1) for name in names]
    first = scene.crawl(urls)
    scene.backup.take()
    urls = [scene.serve(name, 1 if name == "same" else 2) for name in names] + [scene.serve("new", 2)]
    second = scene.crawl(urls, STREAMING_REVALIDATE="always")
    newest = {url: second.files[url]["checksum"] for url in urls}
    assert newest[urls[0]] != first.files[urls[0]]["checksum"]
    scene.backup.put_back()

    stored, noted = set(blobs(scene.store)), scene.noted()
    code, said = scene.run("health")
    assert (code, "degraded" in said, "(ledger-put-back)" in said) == (1, True, True), said
    for verb in (["status"], ["ls"], ["show", urls[0]], ["verify"]):
        assert scene.run(*verb)[0] == 0
    for options in ([], ["--superseded"], ["--dry-run"]):
        code, said = scene.run("gc", "--grace", "0", *options)
        assert (code, "ledger-put-back" in said) == (1, True), said
    assert set(blobs(scene.store)) == stored
    assert scene.noted() == noted, "looking changed something"

    scene.origin.requests.clear()
    scene.origin.put("/down", b"", default=lambda asked, resource: DOWN)
    revalidate = "never" if scene.url else "expired"
    third = scene.crawl(urls, STREAMING_REVALIDATE=revalidate)
    assert_stored(scene.store, third.files[urls[0]], body_of("changed", 2))
    assert_stored(scene.store, third.files[urls[2]], body_of("same", 1))
    assert_stored(scene.store, third.files[urls[3]], body_of("new", 2))
    assert urls[1] not in third.files
    down = scene.store / second.files[urls[1]]["path"]
    assert sha256(down.read_bytes()) == newest[urls[1]], "turned back without a word of the server"
    assert [entry["reason"] for url, entry in third.files.items() if url == urls[2]] == ["not-modified"]
    assert "if-none-match" in scene.asked("changed")[0]
    assert scene.asked("new") == []  # the ledger never called it done: its name says what is stored
    [told] = [line for line in third.log.splitlines() if "(ledger-put-back)" in line]
    assert "WARNING" in told
    assert "gc` refuses" in told

    assert "(ledger-put-back)" not in scene.run("health")[1]
    code, said = scene.run("gc", "--grace", "0", "--superseded")
    assert code == 0, said
    assert set(newest.values()) <= set(blobs(scene.store))
    fourth = scene.crawl(urls)
    assert "ledger-put-back" not in fourth.log
    assert fourth.files[urls[0]]["status"] == "uptodate"


@pytest.mark.proves("I15", "I16")
@pytest.mark.long_on_postgres
def test_rebuild_reads_the_store_at_once(scene: Scene) -> None:
    """And what the older ledger calls done is still asked of the server."""
    url = scene.serve("a", 1)
    scene.crawl([url])
    scene.backup.take()
    scene.serve("a", 2)
    scene.crawl([url], STREAMING_REVALIDATE="always")
    scene.backup.put_back()
    code, said = scene.run("rebuild")
    assert (code, "1 blobs recorded" in said) == (0, True), said
    assert scene.run("health")[0] == 0
    assert scene.run("gc", "--grace", "0", "--superseded")[0] == 0
    assert sha256(body_of("a", 2)) in blobs(scene.store)
    third = scene.crawl([url])
    assert_stored(scene.store, third.files[url], body_of("a", 2))
    assert "(ledger-put-back)" not in third.log
    assert str(Digest(sha256(body_of("a", 2)))) == third.files[url]["digest"]


@pytest.mark.proves("I16", "F12")
def test_a_copy_of_a_crawls_middle_put_back_under_it_is_noticed(
    origin: Origin, store: Path, tmp_path: Path
) -> None:
    """The crawl raises the epoch now and then, and reads the store when the ledger is behind it."""
    ledger = store / ".streaming" / "ledger.sqlite3"
    backup, gate = Backup(f"sqlite:///{ledger}", tmp_path), threading.Event()

    def epoch() -> int:
        return int(json.loads((store / ".streaming" / "store.json").read_text())["epoch"])

    def held(asked: Asked, resource: Resource) -> Answer:
        assert gate.wait(90)
        return honest(asked, resource)

    urls = [origin.put("/early", b"early" * 1000), origin.put("/held", b"held" * 1000, held)]

    def meanwhile(_: object) -> None:
        wait_until(lambda: len(origin.requests) == 2, 60)
        backup.take()
        copied = epoch()
        wait_until(lambda: blobs(store) and epoch() > copied + 1, 60)
        backup.put_back()
        wait_until(lambda: _meta(ledger) == (True, False), 60)
        gate.set()

    often = {"EXTENSIONS": {"support.components.RaisesTheEpoch": 0}, "STREAMING_LEASE_SECONDS": 1}
    crawled = run_crawl(urls, store, settings=often, meanwhile=meanwhile)
    for url, body in zip(urls, (b"early", b"held"), strict=True):
        assert_stored(store, crawled.files.get(url), body * 1000)
    [told] = [line for line in crawled.log.splitlines() if "(ledger-put-back)" in line]
    assert "WARNING" in told


def _meta(ledger: Path) -> tuple[bool, bool]:
    """Return whether a copy was found to be put back, and whether the store is still unread."""
    with closing(sqlite3.connect(ledger, timeout=30)) as connection:
        [(put_back_at, unread)] = connection.execute("SELECT put_back_at, unread FROM ss_meta").fetchall()
    return put_back_at is not None, bool(unread)


def test_the_recovery_page_has_what_is_said_word_for_word(store: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recovery.md").read_text()
    with closing(open_store(store)) as opened:
        assert opened.ledger.raise_epoch(opened.ledger.epoch + 1).result().unread
        [said] = maintenance.health(opened).warnings
    for text in (PUT_BACK, said):
        assert f"\n> {text}\n" in page
