"""Statistics of whole crawls, and ``.streaming/metrics.json`` at their end."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from subprocess import Popen
from typing import Any

from support.beside import loud
from support.crawl import kept, run_crawl, wait_until
from support.origin import Answer, Origin

from scrapy_streaming.reporting.metrics import ALWAYS, SUMMARY
from scrapy_streaming.storage.durable import replace_file

LARGE = os.urandom(1 << 20)
SMALL = b"small" * 1000
SETTINGS = {"STREAMING_CHECKPOINT_BYTES": 1 << 18}


def metrics(store: Path) -> dict[str, Any]:
    """Return what the file says; nothing of writing it may be left."""
    assert list((store / ".streaming").glob("metrics.*")) == [store / ".streaming" / "metrics.json"]
    found: dict[str, Any] = json.loads((store / ".streaming" / "metrics.json").read_text())
    return found


def test_every_statistic_says_what_it_means(origin: Origin, store: Path, tmp_path: Path) -> None:
    """A killed crawl, the one that goes on, and one that finds all unchanged."""
    slow = Answer(200, {"ETag": '"1"', "Accept-Ranges": "bytes"}, LARGE, pace=0.05)
    large = origin.put("/large", LARGE, slow, etag='"1"')
    run_crawl([large], store, settings=SETTINGS, kill_when=lambda: kept(store) > 0)
    left = kept(store)
    assert 0 < left < len(LARGE)
    assert not (store / ".streaming" / "metrics.json").exists()

    (tmp_path / "local").write_bytes(SMALL)
    local = (tmp_path / "local").as_uri()
    urls = [large, origin.put("/small", SMALL), origin.put("/same", SMALL), local, origin.url("/gone")]
    crawl = run_crawl(urls, store, settings=SETTINGS | {"CONCURRENT_REQUESTS": 1})
    found = {name: crawl.stats[f"streaming/{name}"] for name in ALWAYS}
    decisions = {k: v for k, v in crawl.stats.items() if k.startswith("streaming/decision/")}
    latency = found.pop("average_latency_ms")
    assert found.pop("io_operations") >= 4 * 2, "each is published and named"
    assert found == {
        "resume_decisions_made": sum(decisions.values()),
        "fallbacks_to_existing": 1,  # file: is no scheme that is streamed from
        "bytes_received": len(LARGE) - left + 3 * len(SMALL) + len(b"not here"),
        "bytes_kept": left,
        "bytes_saved": 2 * len(SMALL),
        "blobs_published": 2,
        "deduplicated": 2,
        "leases_lost": 0,
        "recovered": 1,
    }
    assert 0 < latency < 10_000
    assert crawl.stats["streaming/failed/bad-status-404"] == 1
    assert crawl.stats["file_count"] == crawl.stats["file_status_count/downloaded"] == 4

    document = metrics(store)
    assert document["format"] == 1
    assert document["finish_reason"] == "finished"
    assert document["spider"] == "files"
    assert document["versions"].keys() == {"scrapy-streaming", "Python", "Scrapy", "Twisted", "SQLAlchemy"}
    assert document["settings"]["STREAMING_FSYNC"] is True
    assert document["started"] < document["finished"]
    assert document["streaming"] == {name: crawl.stats[f"streaming/{name}"] for name in SUMMARY}
    numbers = {k: v for k, v in crawl.stats.items() if k.startswith(("streaming/", "file_"))}
    assert document["stats"] == numbers

    revalidate = {"STREAMING_REVALIDATE": "always", "STREAMING_FSYNC": False}
    again = run_crawl(urls[:3], store, settings=SETTINGS | revalidate)
    assert again.stats["streaming/bytes_saved"] == len(LARGE) + 2 * len(SMALL)
    assert again.stats["streaming/bytes_received"] == 0
    assert again.stats["streaming/average_latency_ms"] == 0, "nothing was published"
    document = metrics(store)
    assert document["stats"]["file_status_count/uptodate"] == 3
    assert document["settings"]["STREAMING_FSYNC"] is False


def test_every_write_is_an_operation(origin: Origin, store: Path) -> None:
    """A large body is written in batches, a small one when it is published."""
    small, large = (run_crawl([origin.put(f"/{len(body)}", body)], store) for body in (SMALL, LARGE))
    batches = len(LARGE) // (256 << 10)
    assert large.stats["streaming/io_operations"] >= small.stats["streaming/io_operations"] + batches - 1


def test_ctrl_c_leaves_metrics_too(origin: Origin, store: Path) -> None:
    """Of the crawl that it ended, be it at once."""
    url = origin.put("/slow", LARGE, default=Answer(200, {"ETag": '"1"'}, LARGE, pace=0.1))

    def stop(process: Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 0)
        process.send_signal(signal.SIGINT)

    def twice(process: Popen[bytes]) -> None:
        errors = [path / "stderr" for path in store.parent.glob("crawl-*")]
        said = [path.read_text().count("the crawl stops: finishing") for path in errors]
        wait_until(lambda: [asked for asked in origin.asked("/slow") if asked.sent > 1 << 18])
        process.send_signal(signal.SIGINT)
        wait_until(lambda: [p.read_text().count("the crawl stops: finishing") for p in errors] != said)
        process.send_signal(signal.SIGINT)

    run_crawl([url], store, settings=SETTINGS, meanwhile=stop)
    assert metrics(store)["finish_reason"] == "shutdown"
    first = metrics(store)
    assert first["stats"]["streaming/failed/crawl-stopping"] == 1
    origin.forget()
    finishes = SETTINGS | {"STREAMING_STOP": "finish"}
    run_crawl([url], store, settings=finishes, meanwhile=twice, check=False)
    second = metrics(store)
    assert second["worker"] != first["worker"]
    assert second["finish_reason"] in (None, "shutdown"), "Scrapy may not come to say it"


def test_a_file_that_cannot_be_written_is_one_line(origin: Origin, store: Path) -> None:
    """The files are stored all the same, and the exit code says so."""
    (store / ".streaming" / "metrics.json" / "in the way").mkdir(parents=True)
    crawl = run_crawl([origin.put("/a", SMALL)], store)
    assert len(crawl.files) == 1
    [line] = loud(crawl)
    assert "metrics-unwritten" in line
    assert [path.name for path in (store / ".streaming").glob("metrics.*")] == ["metrics.json"]


def test_readers_see_a_whole_file_while_others_write(tmp_path: Path) -> None:
    """The last of several writers wins; none shows half of what it writes."""
    path = tmp_path / "metrics.json"
    replace_file(path, json.dumps([0] * 5000), fsync=False)
    writers = [
        threading.Thread(
            target=lambda n=number: [
                replace_file(path, json.dumps([n] * 5000), fsync=bool(n % 2)) for _ in range(40)
            ]
        )
        for number in range(4)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        numbers = json.loads(path.read_text())
        assert len(numbers) == 5000
        assert len(set(numbers)) == 1
        seen.add(numbers[0])
    assert len(seen) > 1, "the reader was there meanwhile"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
