"""``kill -9`` of a real crawl, and the crawl after it (S3, F1 short)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.crawl import assert_sound, assert_stored, kept, parts, run_crawl
from support.servers import WebServer, nginx

MIB = 1 << 20
SIZE = 48 * MIB
RATE = 48  # MiB a second
CHECKPOINT = 2 * MIB
SETTINGS = {"STREAMING_CHECKPOINT_BYTES": CHECKPOINT, "LOG_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with nginx(tmp_path_factory.mktemp("slow"), rate=f"{RATE}m") as server:
        server.put("big.bin", random.Random(3).randbytes(SIZE))
        yield server


def _killed_and_resumed(slow: WebServer, store: Path, moments: list[int]) -> None:
    """Kill a crawl as soon as so many bytes are durable, each; then let one finish."""
    body, url = (slow.root / "big.bin").read_bytes(), slow.url("slow/big.bin")
    slow.forget()
    for moment in moments:
        crawl = run_crawl(
            [url], store, settings=SETTINGS, kill_when=lambda moment=moment: kept(store) >= moment
        )
        assert crawl.code == -9, "killed too late"
        assert crawl.files == {}
        assert_sound(store, [])
    done = kept(store)
    last = run_crawl([url], store, settings=SETTINGS)
    assert_stored(store, last.files.get(url), body)
    assert last.files[url]["resumed_from"] == done >= moments[-1]
    assert parts(store) == []
    served = [line for line in slow.served() if line.path == "/slow/big.bin"]
    assert [line.status for line in served] == [200] + [206] * len(moments)
    # what a killed crawl had in its socket or not yet synced is sent again, no more
    assert sum(line.sent for line in served) <= SIZE + len(moments) * (CHECKPOINT + 8 * MIB)


def test_a_killed_crawl_goes_on_where_it_stopped(slow: WebServer, store: Path) -> None:
    """S3, short form."""
    _killed_and_resumed(slow, store, [SIZE // 2])


def test_three_kills_at_random_moments_leave_the_right_bytes(slow: WebServer, store: Path) -> None:
    """S3."""
    rng = random.Random()
    moments = [third * 14 * MIB + rng.randrange(MIB, 6 * MIB) for third in range(3)]
    print("moments", moments)  # shown when it fails
    _killed_and_resumed(slow, store, moments)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills_at_random_moments(slow: WebServer, store: Path, seed: int) -> None:
    """S3: twenty times, twenty right digests."""
    _killed_and_resumed(slow, store, [random.Random(seed).randrange(MIB, SIZE - 8 * MIB)])


@pytest.mark.proves("F1")
def test_a_crawl_killed_among_small_files_repeats_none_that_was_recorded(web: WebServer, store: Path) -> None:
    """F1: 300 files, killed when about half are there; the next crawl fetches the rest."""
    bodies = {f"small/{n}.bin": random.Random(n).randbytes(1000 + n) for n in range(300)}
    urls = [web.put(path, body) for path, body in bodies.items()]

    def half() -> bool:
        return (store / "full").is_dir() and len(list((store / "full").iterdir())) >= 120

    killed = run_crawl(urls, store, settings={"LOG_LEVEL": "INFO"}, kill_when=half)
    assert killed.code == -9
    assert_sound(store, list(bodies.values()))
    web.forget()
    crawl = run_crawl(urls, store, settings={"LOG_LEVEL": "INFO"})
    for path, body in bodies.items():
        assert_stored(store, crawl.files.get(web.url(path)), body)
    assert crawl.stat("file_status_count/uptodate") >= 60
    assert len(web.served()) == crawl.stat("file_status_count/downloaded")
    assert parts(store) == []
