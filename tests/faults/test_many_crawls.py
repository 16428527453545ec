"""Many real crawls at once over one store: whichever is killed or stopped, nothing is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from sqlalchemy import create_engine, inspect
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool
from support.crawl import (
    ADDON,
    Crawl,
    assert_sound,
    assert_stored,
    freeze,
    kept,
    parts,
    run_crawl,
    sha256,
    wait_until,
)
from support.ledger_checker import bound, claims, states, violations
from support.servers import WebServer, nginx

from scrapy_streaming.runtime.body_writer import BATCH

MIB = 1 << 20
RATE = 400 << 10  # bytes a second, of each connection
LEASE = 2
# kills come faster than the first files: a job that was at work five times in a row would rightly be dead
SETTINGS = {"LOG_LEVEL": "INFO", "STREAMING_LEASE_SECONDS": LEASE, "STREAMING_MAX_ATTEMPTS": 1000}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with nginx(tmp_path_factory.mktemp("many"), rate=f"{RATE >> 10}k") as server:
        yield server


class World:
    """Files on a server, by URL."""

    def __init__(self, server: WebServer, count: int, low: int, high: int) -> None:
        folder = f"files-{count}-{low}-{high}"
        self.server = server
        self.bodies = {}
        for number in range(count):
            rng = random.Random(number)
            body = rng.randbytes(rng.randrange(low, high))
            self.bodies[server.put(f"{folder}/{number}.bin", body, "/slow")] = body
        server.forget()

    @property
    def urls(self) -> list[str]:
        return list(self.bodies)

    def truth(self, url: str) -> set[str]:
        return {f"sha256:{sha256(self.bodies[url])}"}

    def assert_all_in(self, crawl: Crawl, store: Path) -> None:
        for url, body in self.bodies.items():
            assert url in crawl.files, [line for line in crawl.log.splitlines() if url in line]
            assert_stored(store, crawl.files[url], body)


class Crawls:
    """Crawls that run at the same time, each in its own process with its own order of the same URLs."""

    def __init__(self, world: World, store: Path, url: str, **settings: Any) -> None:
        self._world, self._store = world, store
        self._settings = {**SETTINGS, "STREAMING_DATABASE_URL": url, **settings}
        self._pool = ThreadPoolExecutor(64)
        self._rng = random.Random()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: list[Future[Crawl]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        self._pool.shutdown()

    def start(self, count: int = 1, *, check: bool = True) -> None:
        for _ in range(count):
            urls = self._rng.sample(self._world.urls, len(self._world.urls))
            self.ended.append(
                self._pool.submit(
                    run_crawl,
                    urls,
                    self._store,
                    settings=self._settings,
                    timeout=300,
                    check=check,
                    meanwhile=self.processes.append,
                )
            )

    def results(self) -> list[Crawl]:
        """Wait for all; return those that were not killed."""
        found = [future.result() for future in self.ended]
        return [crawl for crawl in found if crawl.code != -signal.SIGKILL]

    def at_work(self) -> list[subprocess.Popen[bytes]]:
        """Return the crawls that run and have brought an item home: no row of kills can stop them all."""
        return [process for process in self.processes if process.poll() is None and _has_items(process)]


def _has_items(process: subprocess.Popen[bytes]) -> bool:
    try:
        return (Path(f"/proc/{process.pid}/cwd").resolve() / "items.jsonl").exists()
    except OSError:
        return False


def _same_urls(world: World, store: Path, ledger_url: str, count: int) -> None:
    with Crawls(world, store, ledger_url, STREAMING_LEASE_SECONDS=60) as crawls:
        crawls.start(count)
        done = crawls.results()
    assert len(done) == count
    for crawl in done:
        world.assert_all_in(crawl, store)
    found = violations(ledger_url, store, truth=world.truth)
    whole = Counter(line.path for line in world.server.served() if line.status == 200 and line.sent)
    requests = sum(whole.values())
    most = max(claims(ledger_url).values())
    print(f"{count} crawls, {len(world.urls)} files: {requests} bodies, at most {most} claims of a file")
    assert found == []
    assert states(ledger_url) == {"done": len(world.urls)}
    assert requests == len(whole) == len(world.urls)
    assert parts(store) == []


@pytest.mark.proves("F14", "I4")
def test_four_crawls_over_the_same_urls_fetch_each_once_and_all_have_all(
    slow: WebServer, store: Path, ledger_url: str
) -> None:
    """S2, short form."""
    _same_urls(World(slow, 80, 1000, 20_000), store, ledger_url, 4)


@pytest.mark.soak
@pytest.mark.proves("F14", "I4")
def test_four_crawls_over_a_thousand_urls_fetch_each_once_and_all_have_all(
    slow: WebServer, store: Path, ledger_url: str
) -> None:
    """S2."""
    _same_urls(World(slow, 1000, 1000, 50_000), store, ledger_url, 4)


# -- killed, stopped, started again ----------------------------------------------------------


def _harass(crawls: Crawls, seconds: float, *, lease: float, kill: float) -> tuple[int, int]:
    """Kill a crawl and start another, with probability *kill*, else stop one past its lease.

    About twice a second from when two are at work, until *seconds* are over or the crawls are. Returns
    how often.
    """
    wait_until(lambda: len(crawls.at_work()) >= 2, 60)
    rng, ends, kills, stops = random.Random(), time.monotonic() + seconds, 0, 0
    suspended: dict[subprocess.Popen[bytes], float] = {}
    while time.monotonic() < ends and any(not future.done() for future in crawls.ended):
        time.sleep(rng.uniform(0.1, 0.9) if kills + stops else 0)
        for process in [process for process, resume_at in suspended.items() if time.monotonic() > resume_at]:
            process.send_signal(signal.SIGCONT)
            del suspended[process]
        awake = [process for process in crawls.at_work() if process not in suspended]
        if len(awake) < 2:
            continue
        victim = rng.choice(awake)
        if rng.random() < kill:
            victim.kill()
            kills += 1
            crawls.start(check=False)
        else:
            victim.send_signal(signal.SIGSTOP)
            stops += 1
            suspended[victim] = time.monotonic() + rng.uniform(1.2, 2.2) * lease
    for process in suspended:
        process.send_signal(signal.SIGCONT)
    return kills, stops


def _killed(world: World, store: Path, ledger_url: str, seconds: float) -> tuple[int, int]:
    with Crawls(world, store, ledger_url, CONCURRENT_REQUESTS_PER_DOMAIN=3) as crawls:
        crawls.start(4)
        kills, stops = _harass(crawls, seconds, lease=LEASE, kill=0.7)
        done = crawls.results()
        crawls.ended.clear()
        crawls.start()  # the last one finds all of it
        done += crawls.results()
    for crawl in done:
        assert crawl.code == 0, crawl.log[-4000:]
        world.assert_all_in(crawl, store)
    assert_sound(store, list(world.bodies.values()))
    found = violations(ledger_url, store, truth=world.truth)
    granted = sum(claims(ledger_url).values())
    print(
        f"{kills} kills, {stops} stops, {len(world.urls)} files, {granted} claims: {len(found)} violations"
        f" ({bound(granted)} of a claim)"
    )
    assert found == []
    assert states(ledger_url) == {"done": len(world.urls)}
    return kills, stops


@pytest.mark.long_on_postgres
@pytest.mark.proves("F2", "I3", "I4", "I5", "I10", "I17")
def test_crawls_killed_and_started_again_have_all_files_in_the_end(
    slow: WebServer, store: Path, ledger_url: str
) -> None:
    """S3, short form."""
    kills, stops = _killed(World(slow, 100, 40_000, 200_000), store, ledger_url, 5)
    assert kills + stops >= 1


@pytest.mark.soak
@pytest.mark.proves("F2", "I3", "I4", "I5", "I10", "I17")
def test_crawls_killed_every_second_for_a_minute_have_all_files_in_the_end(
    slow: WebServer, store: Path, ledger_url: str
) -> None:
    """S3."""
    kills, stops = _killed(World(slow, 2000, 40_000, 200_000), store, ledger_url, 60)
    assert kills + stops >= 15


@pytest.mark.proves("F2", "I3")
@pytest.mark.long_on_postgres
def test_crawls_without_guard_and_own_clock_are_noticed(
    slow: WebServer, store: Path, ledger_url: str
) -> None:
    """Mutant: a crawl that was stopped past its lease writes over the claim that replaced its own."""
    world = World(slow, 120, MIB, MIB + 200_000)  # the crawl that takes over needs seconds for each
    addons = {"support.worker.Unfenced": 200, **ADDON}
    began, stops, found = time.monotonic(), 0, []
    with Crawls(world, store, ledger_url, ADDONS=addons, STREAMING_LEASE_SECONDS=1) as crawls:
        crawls.start(4, check=False)
        while not found and time.monotonic() - began < 150:
            stops += _harass(crawls, 4, lease=1, kill=0)[1]
            if _made(ledger_url):
                found = [line for line in violations(ledger_url, store) if line.startswith("I3")]
    print(f"red after {time.monotonic() - began:.0f} s and {stops} stops: {found[:1]}")
    assert found


def _made(url: str) -> bool:
    """Whether there is a ledger yet."""
    engine = create_engine(url, poolclass=NullPool)
    with suppress(OperationalError), engine.connect() as connection:
        return inspect(connection).has_table("ss_event")
    return False


# -- a zombie --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with nginx(tmp_path_factory.mktemp("large"), rate="8m") as server:
        server.put("big.bin", random.Random(15).randbytes(24 * MIB))
        yield server


@pytest.mark.proves("F15", "I3", "I11")
@pytest.mark.long_on_postgres
def test_a_crawl_that_resumes_after_its_download_was_taken_over_changes_nothing(
    large: WebServer, store: Path, ledger_url: str
) -> None:
    body, url = (large.root / "big.bin").read_bytes(), large.url("slow/big.bin")
    large.forget()
    settings = {
        **SETTINGS, "STREAMING_DATABASE_URL": ledger_url, "STREAMING_CHECKPOINT_BYTES": MIB,
    }  # fmt: skip
    fds: list[int] = []
    sizes: list[int] = []
    stopped: list[subprocess.Popen[bytes]] = []

    def stop(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) >= 6 * MIB)
        freeze(process, store)
        fds.append(os.open(parts(store)[0], os.O_RDONLY))  # the crawl that takes over will remove the name
        sizes.append(os.fstat(fds[0]).st_size)
        stopped.append(process)

    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(run_crawl, [url], store, settings=settings, meanwhile=stop)
        try:
            wait_until(lambda: stopped or zombie.done(), 60)
            successor = run_crawl([url], store, settings=settings)
            assert_stored(store, successor.files.get(url), body)
            assert successor.files[url]["resumed_from"] >= 6 * MIB
            blob = store / "blobs" / "sha256" / sha256(body)[:2] / sha256(body)
            before = (blob.stat().st_ino, blob.stat().st_mtime_ns)
        finally:
            for process in stopped:
                process.send_signal(signal.SIGCONT)
        resumed = zombie.result()
    grown = os.fstat(fds[0]).st_size - sizes[0]
    os.close(fds[0])
    assert_stored(store, resumed.files.get(url), body)
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == before
    found = violations(ledger_url, store, truth=lambda _: {f"sha256:{sha256(body)}"})
    served = [(line.status, line.sent) for line in large.served()]
    print(f"the zombie wrote {grown} bytes after it woke up; {served}; {len(found)} violations")
    assert found == []
    assert grown <= BATCH
    assert states(ledger_url) == {"done": 1}
    assert parts(store) == []
    assert resumed.stat("streaming/leases_lost") == 1
