"""The first Ctrl-C: the crawl ends within seconds, the next one goes on where it stood (trap 12)."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scrapy import Request
from scrapy.pipelines.files import FilesPipeline
from support.command import scrapy, streaming
from support.crawl import (
    TESTS,
    Crawl,
    assert_sound,
    assert_stored,
    blobs,
    bytes_in_parts,
    jobs,
    kept,
    logs,
    parts,
    run_crawl,
    sha256,
    wait_until,
)
from support.origin import Answer, Asked, Origin, Resource, cut
from support.servers import WebServer, nginx
from w3lib.url import canonicalize_url

MIB = 1 << 20
SIZE = 160 * MIB
SETTINGS = {"LOG_LEVEL": "INFO", "STREAMING_CHECKPOINT_BYTES": 8 * MIB}
#: Seconds that a crawl may take to end, on a machine that is busy with other things, too. What a stop does
#: not wait for takes 60 seconds, or never comes.
AT_ONCE = 20


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with nginx(tmp_path_factory.mktemp("stopping"), rate="32m") as server:
        server.put("big.bin", os.urandom(MIB) * (SIZE // MIB))
        yield server


class Stop:
    """Signals a crawl once *when* holds; ``took`` is how many seconds it lived on."""

    def __init__(self, when: Callable[[], Any], how: signal.Signals = signal.SIGINT) -> None:
        self._when, self._how = when, how
        self._at = 0.0

    def __call__(self, process: subprocess.Popen[bytes]) -> None:
        wait_until(self._when)
        self._at = time.monotonic()
        process.send_signal(self._how)

    def took(self, crawl: Crawl) -> float:
        return crawl.ended - self._at


@pytest.mark.parametrize(
    ("how", "spider"),
    [
        (signal.SIGINT, "files"),
        pytest.param(signal.SIGTERM, "files", marks=pytest.mark.soak),
        (signal.SIGINT, "from-start"),
    ],
)
def test_a_large_download_is_broken_off_and_resumed_by_the_next_crawl(
    slow: WebServer, store: Path, how: signal.Signals, spider: str
) -> None:
    url, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()
    slow.forget()
    stop = Stop(lambda: kept(store) >= 24 * MIB, how)
    crawl = run_crawl([url], store, settings=SETTINGS, meanwhile=stop, spider=spider)
    assert stop.took(crawl) < AT_ONCE
    assert crawl.files == {}
    assert crawl.items == [], "half an item is not handed on"
    assert crawl.log.count("Dropped: crawl-stopping: 1 of its 1 files are left to the next crawl") == 1
    assert jobs(store) == {url: ("ready", 0)}
    assert f"stopped with 1 downloads broken off, {kept(store)} bytes of them kept" in crawl.log
    assert f"File (crawl-stopping): left to the next crawl: <GET {url}>" in crawl.log
    assert "Traceback" not in crawl.log
    assert crawl.stat("streaming/failed/crawl-stopping") == 1
    assert crawl.stat("retry/count") == 0
    done = kept(store)
    assert done >= 24 * MIB
    following = run_crawl([url], store, settings=SETTINGS, spider=spider)
    assert_stored(store, following.files.get(url), body)
    assert following.files[url]["resumed_from"] == done
    served = slow.served()
    assert [line.status for line in served] == [200, 206]
    assert sum(line.sent for line in served) <= SIZE + 8 * MIB, "what was on the way, no more"
    assert parts(store) == []


def test_heads_that_never_come_and_other_workers_jobs_are_not_waited_for(
    slow: WebServer, origin: Origin, store: Path
) -> None:
    held, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()
    silent = [origin.put(f"/{n}", b"never seen", default=Answer(200, before_head=60)) for n in range(40)]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(run_crawl, [held], store, settings=SETTINGS)
        wait_until(lambda: kept(store) > 0)
        stop = Stop(lambda: len(origin.requests) >= 8 and len(jobs(store)) > 20)
        crawl = run_crawl([held, *silent], store, settings=SETTINGS, meanwhile=stop)
        assert stop.took(crawl) < AT_ONCE
        assert crawl.files == {}
        assert crawl.items == []
        assert f"stopped with {len(origin.requests)} downloads broken off, 0 bytes" in crawl.log
        assert "Traceback" not in crawl.log
        assert {state for url, state in jobs(store).items() if url != held} == {("ready", 0)}
        assert_stored(store, other.result().files.get(held), body)


def test_a_download_delay_is_not_waited_for(origin: Origin, store: Path) -> None:
    """Requests that wait for their turn in the downloader's queue are refused at once."""
    urls = [origin.put(f"/{n}", b"body") for n in range(30)]
    stop = Stop(lambda: len(origin.requests) >= 2)
    crawl = run_crawl(urls, store, settings=SETTINGS | {"DOWNLOAD_DELAY": 2}, meanwhile=stop)
    assert stop.took(crawl) < AT_ONCE
    assert len(origin.requests) <= 3
    assert len(crawl.items) == len(crawl.files) < 30
    states = jobs(store)
    assert {states.pop(url) for url in crawl.files} == {("done", 1)}
    assert set(states.values()) == {("ready", 0)}


def test_a_spiders_own_download_is_broken_off_too(slow: WebServer, store: Path) -> None:
    url = slow.url("slow/big.bin")
    stop = Stop(lambda: kept(store) >= 8 * MIB)
    crawl = run_crawl(
        [{"url": url, "meta": {"streaming": True}}], store, spider="requests", settings=SETTINGS,
        meanwhile=stop,
    )  # fmt: skip
    assert stop.took(crawl) < AT_ONCE
    assert [note["error"] for note in crawl.notes if "failed" in note] == ["CrawlStopping"]
    assert jobs(store) == {url: ("ready", 0)}
    assert kept(store) >= 8 * MIB
    assert "Traceback" not in crawl.log


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param({"CLOSESPIDER_TIMEOUT": 1}, id="by-the-clock"),
        pytest.param({"CLOSESPIDER_ITEMCOUNT": 1}, id="by-items"),
    ],
)
def test_a_crawl_that_closes_itself_waits_for_its_downloads(
    slow: WebServer, store: Path, ends: dict[str, int]
) -> None:
    """CloseSpider is no Ctrl-C: what is begun is brought to its end, as Scrapy does."""
    body = os.urandom(MIB) * 64
    big, small = slow.put("middle.bin", body, "/slow"), slow.put("small.bin", b"small")
    crawl = run_crawl([big, small], store, settings=SETTINGS | ends)
    assert "Closing spider (closespider_" in crawl.log
    assert_stored(store, crawl.files.get(big), body)
    assert_stored(store, crawl.files.get(small), b"small")
    assert "broken off" not in crawl.log


def test_a_second_ctrl_c_leaves_a_part_that_the_next_crawl_can_use(slow: WebServer, store: Path) -> None:
    url, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()

    def twice(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) >= 16 * MIB)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)

    run_crawl([url], store, settings=SETTINGS, meanwhile=twice, check=False)
    assert_sound(store, [])
    done = kept(store)
    assert done >= 16 * MIB
    following = run_crawl([url], store, settings=SETTINGS)
    assert_stored(store, following.files.get(url), body)
    assert following.files[url]["resumed_from"] == done


def test_a_file_that_is_whole_when_the_crawl_stops_is_still_stored(origin: Origin, store: Path) -> None:
    urls = [origin.put(f"/{n}", os.urandom(300_000)) for n in range(8)]
    silent = origin.put("/silent", b"", default=Answer(200, before_head=60))
    stop = Stop(lambda: len(origin.requests) == 9 and (store / "full").is_dir())
    crawl = run_crawl([*urls, silent], store, settings=SETTINGS, meanwhile=stop)
    assert stop.took(crawl) < AT_ONCE
    states = jobs(store)
    for url in urls:
        assert (url in crawl.files) == (states[url][0] == "done")
    assert states[silent] == ("ready", 0)


def test_a_ledger_that_does_not_answer_is_not_waited_for(slow: WebServer, store: Path) -> None:
    """F11: locked when a lost lease is claimed again; the items are done with all the same."""
    url, took = slow.url("slow/big.bin"), []

    def lock(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) >= 8 * MIB)
        with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
            ledger.execute("BEGIN IMMEDIATE")
            wait_until(lambda: "lease renewal failed" in logs(store))
            time.sleep(0.5)
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            wait_until(lambda: "Spider closed" in logs(store))
            took.append(time.monotonic() - started)
            ledger.rollback()

    crawl = run_crawl([url], store, settings=SETTINGS | {"STREAMING_LEASE_SECONDS": 2}, meanwhile=lock)
    assert took[0] < AT_ONCE
    assert crawl.items == []
    assert "Traceback" not in crawl.log
    assert kept(store) >= 8 * MIB
    following = run_crawl([url], store, settings=SETTINGS)
    assert_stored(store, following.files.get(url), (slow.root / "big.bin").read_bytes())


def test_with_a_queue_that_forgets_a_second_ctrl_c_names_what_resume_finishes(
    slow: WebServer, store: Path
) -> None:
    """C3, C4: the first finishes and says how much there is to do, the second keeps the parts and ends."""
    url, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()
    small, page = slow.put("little.bin", b"little", "/slow"), slow.put("page.html", b"a page")
    jobdir = store.parent / "jobdir"

    def twice(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) >= 16 * MIB)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "the crawl stops: finishing" in logs(store))
        process.send_signal(signal.SIGINT)

    crawl = run_crawl(
        [url, small], store, spider="pages", job={"pages": [page]}, meanwhile=twice, check=False,
        settings=SETTINGS | {"JOBDIR": str(jobdir)},
    )  # fmt: skip
    [said] = [line for line in crawl.log.splitlines() if "the crawl stops: finishing" in line]
    assert "finishing 1 items and 1 downloads in flight" in said
    assert 0 < int(re.search(r"(\d+) bytes left", said)[1]) < SIZE
    assert re.search(rf"left unfinished, \d+ bytes came: {url}", crawl.log)
    assert "`scrapy streaming resume` finishes them" in crawl.log
    assert_sound(store, [b"little"])
    done = kept(store)
    assert done >= 16 * MIB

    slow.forget()
    finished = streaming(store, "resume")
    assert finished.returncode == 0, finished.stderr
    _, state, of, path = finished.stdout.strip().split("\t")
    assert (state, of) == ("done", url)
    assert (store / path).read_bytes() == body
    assert [line.status for line in slow.served()] == [206]
    assert jobs(store)[url][0] == "done"
    assert streaming(store, "resume", "--json").stdout == ""


def of_an_older_release(store: Path) -> None:
    """Take from the jobs what releases before 4 of the ledger's tables did not record of their requests."""
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE ss_job SET plain = NULL, asked_url = NULL, asked_name = NULL")


def test_resume_takes_only_what_is_proved_to_be_the_rest_of_the_same(origin: Origin, store: Path) -> None:
    """C4: of jobs of which nothing was recorded, the cookies, fields and the item may have been any."""
    body, tag = os.urandom(600_000), '"v1"'

    def private(asked: Asked, resource: Resource) -> Answer:
        if asked.fields.get("authorization") != "Bearer mine":
            return Answer(200, {"Content-Type": "text/html"}, b"PLEASE LOG IN")
        return cut(300_000, "stall")(asked, resource)

    def changed(asked: Asked, resource: Resource) -> Answer:
        return Answer(200, {"ETag": '"v2"'}, b"another")

    half, query = cut(300_000, "stall"), "?b=2&a=1&c"
    urls = {
        "resumed": origin.put("/resumed.bin", body, half, etag=tag) + query,
        "login": origin.put("/login.bin", body, default=private, etag=tag),
        "changed": origin.put("/changed.bin", body, half, default=changed, etag=tag),
        "untagged": origin.put("/untagged.bin", body, half, etag="", last_modified=""),
        "never": origin.put("/never.bin", body, Answer(200, before_head=60)),
    }
    settings = SETTINGS | {"ITEM_PIPELINES": {"support.components.PrivateLogin": 1}}
    stop = Stop(lambda: bytes_in_parts(store) >= 4 * 262_144 and len(origin.requests) == 5)
    first = run_crawl(list(urls.values()), store, settings=settings, meanwhile=stop)
    assert first.items == []
    of_an_older_release(store)
    origin.forget()
    finished = streaming(store, "-s", "LOG_ENABLED=False", "resume")
    assert finished.returncode == 3
    lines = {line.split("\t")[2]: line.split("\t")[1::2] for line in finished.stdout.splitlines()}
    assert lines.pop(canonicalize_url(urls["resumed"]))[0] == "done"
    name = FilesPipeline.file_path(None, Request(urls["resumed"]))
    assert (store / name).read_bytes() == body, "the name is that of the URL as it was asked"
    assert [asked.target for asked in origin.asked("/resumed.bin")] == [f"/resumed.bin{query}"]
    assert {state for state, _ in lines.values()} == {"left"}
    for name in ("never", "untagged", "login"):
        assert "(own-request)" in lines[urls[name]][1]
    assert "(changed)" in lines[urls["changed"]][1]
    assert list(blobs(store)) == [sha256(body)]
    assert kept(store) >= 3 * 262_144, "the parts of what was left are there"
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
        noted = ledger.execute("SELECT count(*) FROM ss_job WHERE plain IS NOT NULL").fetchone()
    assert noted == (0,), "the requests of resume itself make nothing plain"


def test_resume_leaves_names_of_the_projects_own_and_makes_no_store(origin: Origin, store: Path) -> None:
    url = origin.put("/own.bin", os.urandom(600_000), cut(300_000, "stall"), etag='"v1"')
    assert streaming(store, "resume").returncode == 1
    assert not store.exists()
    settings = SETTINGS | {"ITEM_PIPELINES": {"support.components.OwnPath": 1}}
    run_crawl([url], store, settings=settings, meanwhile=Stop(lambda: bytes_in_parts(store) >= 262_144))
    of_an_older_release(store)
    (base,) = store.parent.glob("crawl-*")
    project = {
        "SCRAPY_SETTINGS_MODULE": "crawl_settings", "CRAWL_BASE": str(base),
        "PYTHONPATH": os.pathsep.join([str(base), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    finished = scrapy("streaming", "resume", cwd=base, env=project)
    assert finished.returncode == 3, finished.stderr
    assert "(own-name)" in finished.stdout
    assert blobs(store) == {}
