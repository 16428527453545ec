"""C1: items straight from ``start()`` are let in as files are stored, and few jobs are leased at a time."""

from __future__ import annotations

import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from scrapy.settings import Settings
from scrapy.utils.defer import deferred_from_coro, maybe_deferred_to_future
from support.crawl import jobs, run_crawl, wait_until
from support.origin import Answer, Origin
from support.reactor import on_reactor
from twisted.internet.defer import Deferred

from scrapy_streaming.runtime.turns import Turns

# -- turns -------------------------------------------------------------------------------------


class Queue:
    """Takers of turns; ``has`` says in which order they got one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.has: list[str] = []

    def ask(self, host: str, name: str) -> None:
        async def take() -> None:
            await self.turns.take(host)
            self.has.append(name)

        deferred_from_coro(take())


async def soon() -> None:
    from twisted.internet import reactor

    waited: Deferred[None] = Deferred()
    reactor.callLater(0.02, waited.callback, None)
    await maybe_deferred_to_future(waited)


@on_reactor
async def test_no_more_turns_than_there_are_and_in_order() -> None:
    queue = Queue(Turns(3, 3))
    for name in "abcde":
        queue.ask("one", name)
    await soon()
    assert queue.has == list("abc")
    queue.turns.end("one")
    queue.turns.end("one")
    await soon()
    assert queue.has == list("abcde")


@on_reactor
async def test_one_host_leaves_room_for_others_and_the_least_busy_comes_next() -> None:
    queue = Queue(Turns(4, 3))
    for name in ("s1", "s2", "s3", "s4"):
        queue.ask("slow", name)
    await soon()
    assert queue.has == ["s1", "s2", "s3"]
    for name in ("a1", "a2"):
        queue.ask("a", name)
    queue.ask("b", "b1")
    await soon()
    assert queue.has == ["s1", "s2", "s3", "a1"]
    queue.turns.end("slow")
    await soon()
    assert queue.has[4:] == ["b1"], "it has none yet"
    queue.turns.end("b")
    await soon()
    assert queue.has[5:] == ["a2"]
    queue.turns.end("a")
    await soon()
    assert queue.has[6:] == ["s4"]


@on_reactor
async def test_a_stop_refuses_what_waits_for_a_turn() -> None:
    turns, refused = Turns(1, 1), []

    async def take() -> None:
        try:
            await turns.take("host")
        except KeyError as error:
            refused.append(error)

    for _ in range(3):
        deferred_from_coro(take())
    await soon()
    turns.break_off(KeyError)
    await soon()
    assert len(refused) == 2
    assert refused[0] is not refused[1]


@pytest.mark.parametrize(("concurrent", "total", "each"), [(16, 32, 24), (1, 2, 2), (0, 200, 150)])
def test_turns_go_by_scrapys_own_concurrency(concurrent: int, total: int, each: int) -> None:
    turns = Turns.of(Settings({"CONCURRENT_REQUESTS": concurrent}))
    assert (turns.total, turns._each) == (total, each)


# -- in crawls ---------------------------------------------------------------------------------


FEW = {"CONCURRENT_REQUESTS": 4, "CONCURRENT_ITEMS": 20, "LOG_LEVEL": "INFO"}


class Sampler:
    """Looks at a crawl's jobs while it runs."""

    def __init__(self, store: Path) -> None:
        self.ledger = store / ".streaming" / "ledger.sqlite3"
        self.leased: list[int] = []

    def __call__(self, process: subprocess.Popen[bytes]) -> None:
        wait_until(self.ledger.exists)
        while process.poll() is None:
            with closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True)) as ledger:
                rows: Any = []
                if ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'ss_job'").fetchone():
                    rows = ledger.execute("SELECT state, count(*) FROM ss_job GROUP BY state").fetchall()
            states = dict(rows)
            self.leased.append(states.get("leased", 0))
            time.sleep(0.01)


@pytest.mark.parametrize("spider", ["from-start", "files"])
def test_a_long_list_is_never_leased_all_at_once(origin: Origin, store: Path, spider: str) -> None:
    """At most 2 × CONCURRENT_REQUESTS + 16 leases; each file is fetched once, each item comes once."""
    urls = [origin.put(f"/{number}", str(number).encode()) for number in range(100)]
    sampler = Sampler(store)
    crawl = run_crawl(urls, store, spider=spider, settings=FEW, meanwhile=sampler)
    assert sorted(crawl.files) == sorted(urls)
    assert len(crawl.items) == len(origin.requests) == 100
    assert 0 < max(sampler.leased) <= 2 * 4 + 16


def test_start_is_read_as_files_are_stored(origin: Origin, store: Path) -> None:
    """What ``start()`` has given and what is done are never further apart than CONCURRENT_ITEMS."""
    urls = [origin.put(f"/{number}", str(number).encode()) for number in range(100)]
    crawl = run_crawl(urls, store, spider="from-start", settings=FEW)
    assert len(crawl.files) == 100
    assert 4 < max(note["inside"] for note in crawl.notes if "inside" in note) <= 21


def test_the_items_are_those_that_files_pipeline_gives(origin: Origin, store: Path) -> None:
    urls = [origin.put(f"/{number}", str(number).encode()) for number in range(40)]
    stock = {"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}}
    streaming = run_crawl(urls, store, spider="from-start", settings=FEW)
    # from a callback: Scrapy 2.15 alone gives no item of start() that waits for a file
    scrapys = run_crawl(urls, store.parent / "stock", settings=FEW | stock)
    wanted = [
        {(file["url"], file["path"], file["status"]) for file in item["files"]} for item in scrapys.items
    ]
    got = [
        {(file["url"], file["path"], file["status"]) for file in item["files"]} for item in streaming.items
    ]
    assert sorted(map(sorted, got)) == sorted(map(sorted, wanted))
    assert (streaming.code, streaming.stat("item_scraped_count")) == (
        scrapys.code,
        scrapys.stat("item_scraped_count"),
    )


@pytest.mark.parametrize("keeps", ["all", "some"])
def test_items_that_another_middleware_keeps_hold_nothing_up(origin: Origin, store: Path, keeps: str) -> None:
    urls = [origin.put(f"/{number}", str(number).encode()) for number in range(50)]
    settings = {
        "SPIDER_MIDDLEWARES": {"support.components.KeepsItems": -1},
        "KEEPS": keeps, "CONCURRENT_ITEMS": 1, "CONCURRENT_REQUESTS": 1, "LOG_LEVEL": "INFO",
    }  # fmt: skip
    crawl = run_crawl(urls, store, spider="from-start", settings=settings)
    assert len(crawl.files) == (0 if keeps == "all" else 25)


def test_hooks_that_do_not_call_super_hold_no_turn(origin: Origin, store: Path) -> None:
    """Their jobs are given back: nothing waits for ever, and no job is left leased."""
    missing = [origin.put(f"/{number}", b"", default=Answer(404)) for number in range(40)]
    own = [origin.put(f"/{number}-own", b"x") for number in range(40)]
    settings = FEW | {"ITEM_PIPELINES": {"support.components.OwnMedia": 1}}
    crawl = run_crawl([*missing, *own], store, spider="from-start", settings=settings)
    assert len(crawl.items) == 80
    assert sorted(crawl.files) == sorted(own)
    assert {state for state, _ in jobs(store).values()} == {"failed", "ready"}


def test_errors_behind_a_claim_hold_no_turn(origin: Origin, store: Path) -> None:
    urls = [origin.put(f"/{number}", b"x") for number in range(30)]
    settings = FEW | {"ITEM_PIPELINES": {"support.components.BadDisk": 1}}
    crawl = run_crawl(urls, store, spider="from-start", settings=settings)
    assert len(crawl.items) == 30
    assert crawl.files == {}
    assert {state for state, _ in jobs(store).values()} == {"ready"}


def test_a_spider_that_closes_itself_ends_with_items_of_start_in_work(origin: Origin, store: Path) -> None:
    """Scrapy does not look after such items when it closes, whatever the reason is."""
    slow = {"default": lambda a, r: Answer(200, r.fields(), r.body, pace=0.2)}
    urls = [origin.put(f"/{number}", bytes(200_000), **slow) for number in range(10)]
    settings = {"LOG_LEVEL": "INFO", "CLOSESPIDER_ITEMCOUNT": 2}
    crawl = run_crawl(urls, store, spider="from-start", settings=settings, timeout=40)
    assert "Closing spider (closespider_itemcount)" in crawl.log
    assert len(crawl.items) == len(crawl.files) == 10


def test_with_skip_another_spiders_job_of_the_same_process_is_waited_for(origin: Origin, store: Path) -> None:
    """C12."""
    slow = {"default": lambda a, r: Answer(200, r.fields(), r.body, pace=0.2)}
    urls = [origin.put(f"/{number}", bytes(300_000 + number), **slow) for number in range(4)]
    settings = {"LOG_LEVEL": "INFO", "STREAMING_HELD": "skip", "STREAMING_WORK_ID": "one"}
    crawl = run_crawl(urls, store, settings=settings, program="support.two_spiders")
    assert len(crawl.items) == 8
    assert all(len(item["files"]) == 1 for item in crawl.items)
    assert len(origin.requests) == 4
    assert "File (held): no request is sent: worker" not in crawl.log
