"""What a crawl does when it loses a lease, and while another worker holds a job (F11, F14, F15)."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from scrapy import Request
from scrapy.pipelines.files import FilesPipeline
from scrapy.settings import Settings
from support.crawl import (
    Crawl,
    assert_sound,
    assert_stored,
    freeze,
    kept,
    logs,
    parts,
    run_crawl,
    sha256,
    wait_until,
)
from support.origin import Answer, Origin, honest
from support.servers import WebServer

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Granted, Lease, StoredRepresentation, job_key
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.complete_part import small_part
from scrapy_streaming.storage.ledger import JobRequest
from scrapy_streaming.storage.store import Storage

MIB = 1 << 20

# -- in a crawl --------------------------------------------------------------------------------

FAST = {"STREAMING_LEASE_SECONDS": 2, "STREAMING_CHECKPOINT_BYTES": MIB, "LOG_LEVEL": "INFO"}


@pytest.fixture(scope="module")
def big(nginx_server: WebServer) -> bytes:
    """72 MiB, 3 seconds at nginx's slow rate."""
    body = os.urandom(MIB) * 72
    nginx_server.put("leased.bin", body)
    return body


@contextmanager
def another_worker(store: Path) -> Iterator[Storage]:
    storage = Storage.open(StreamingSettings.load(Settings({"FILES_STORE": str(store)}), {}))
    try:
        yield storage
    finally:
        storage.close()


def request_of(url: str) -> tuple[str, JobRequest]:
    """The job that the pipeline asks for."""
    text = b"\n".join((b"GET", url.encode(), hashlib.sha256(b"").digest()))
    return job_key("files", "", url), JobRequest("files", "", url, hashlib.sha256(text).hexdigest())


def take_over(storage: Storage, store: Path, url: str) -> Lease:
    """Claim a job as if its lease had run out; again if its owner renewed it in between."""
    for _ in range(20):
        with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3", timeout=10)) as ledger, ledger:
            ledger.execute("UPDATE ss_job SET lease_until = 1 WHERE state = 'leased'")
        claim = storage.ledger.claim(*request_of(url)).result()
        if isinstance(claim, Granted):
            return claim.lease
    msg = f"the job is not to be had: {claim}"
    raise AssertionError(msg)


def completions(store: Path) -> int:
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
        return ledger.execute("SELECT count(*) FROM ss_completion").fetchone()[0]


def test_a_download_whose_job_was_taken_over_resumes_when_the_job_is_free_again(
    web: WebServer, big: bytes, store: Path
) -> None:
    """F15: broken off within a heartbeat, resumed under the next lease."""
    url = web.url("slow/leased.bin")
    sizes: list[int] = []

    def steal(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 8 * MIB)
        with another_worker(store) as other:
            stolen = take_over(other, store, url)
            wait_until(lambda: "lease-lost" in logs(store))
            for _ in range(2):
                sizes.append(sum(part.stat().st_size for part in parts(store)))
                time.sleep(0.5)
            other.ledger.release(stolen).result()

    crawl = run_crawl([url], store, settings=FAST, meanwhile=steal)
    assert sizes[0] == sizes[1] < len(big), "nothing is written while another has the job"
    assert_stored(store, crawl.files.get(url), big)
    assert crawl.files[url]["resumed_from"] == sizes[1]
    assert crawl.stat("streaming/leases_lost") == 1
    assert crawl.stat("streaming/recovered") == 1
    assert len([line for line in crawl.log.splitlines() if "lease-lost" in line]) == 1
    assert f"lease-lost: job={request_of(url)[0][:12]}" in crawl.log
    assert [line.status for line in web.served()] == [200, 206]
    assert completions(store) == 1
    assert parts(store) == []


def test_a_download_whose_job_another_worker_completes_gets_that_result(
    web: WebServer, big: bytes, store: Path
) -> None:
    """The name stands for what the new owner stored: the worker that lost it writes nothing older."""
    url, newer = web.url("slow/leased.bin"), b"a newer representation"

    def steal_and_complete(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 8 * MIB)
        with another_worker(store) as other:
            stolen = take_over(other, store, url)
            wait_until(lambda: "lease-lost" in logs(store))
            part = small_part(PartState(url, Validators()), newer)
            other.blobs.publish(part)
            known = StoredRepresentation(str(part.digest), part.length, Validators(), url)
            other.ledger.complete(stolen, known).result()

    crawl = run_crawl([url], store, settings=FAST, meanwhile=steal_and_complete)
    assert_stored(store, crawl.files.get(url), newer)
    assert crawl.files[url]["status"] == "uptodate"
    assert crawl.files[url]["reason"] == "stored"
    assert crawl.stat("streaming/leases_lost") == 1
    assert crawl.stat("streaming/recovered") == 0
    assert crawl.stat("streaming/bytes_saved") == len(newer)
    assert completions(store) == 1


def test_a_worker_that_lost_its_lease_does_not_move_the_name(origin: Origin, store: Path) -> None:
    """F15: its download is whole, and older; the name is the new owner's."""
    old, new = os.urandom(500_000), os.urandom(400_000)
    url = origin.put("/late", old)

    def overtake(process: subprocess.Popen[bytes]) -> None:
        wait_until((store / "dawdling").exists)
        with another_worker(store) as other:
            stolen = take_over(other, store, url)
            part = small_part(PartState(url, Validators()), new)
            other.blobs.publish(part)
            path = FilesPipeline.file_path(None, Request(url))
            other.blobs.name(part.digest, path)
            known = StoredRepresentation(str(part.digest), part.length, Validators(), url)
            other.ledger.complete(stolen, known).result()
            wait_until(lambda: "lease-lost" in logs(store))
            (store / "go-on").touch()

    pipeline = {"ITEM_PIPELINES": {"support.components.Dawdling": 1}}
    crawl = run_crawl([url], store, settings=FAST | pipeline, meanwhile=overtake)
    assert_stored(store, crawl.files.get(url), new)
    assert (store / "named").read_text().split() == [sha256(new)]
    assert completions(store) == 1


def test_a_process_stopped_past_its_lease_continues_if_the_job_was_not_taken_over(
    web: WebServer, big: bytes, store: Path
) -> None:
    """F2: SIGSTOP, longer than the lease."""
    url = web.url("slow/leased.bin")

    def sleep(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 8 * MIB)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)

    crawl = run_crawl([url], store, settings=FAST, meanwhile=sleep)
    assert_stored(store, crawl.files.get(url), big)
    assert completions(store) == 1
    assert_sound(store, [big])


def test_a_process_stopped_while_another_did_its_job_gets_that_result(
    web: WebServer, big: bytes, store: Path
) -> None:
    """F2, F15: the stopped worker writes nothing under the name, and its item has its file."""
    url = web.url("slow/leased.bin")
    other: list[Crawl] = []
    name = store / "full"
    seen: list[int] = []

    def sleep(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 8 * MIB)
        freeze(process, store)
        other.append(run_crawl([url], store, settings=FAST))
        seen.extend(path.stat().st_ino for path in name.iterdir())
        process.send_signal(signal.SIGCONT)

    crawl = run_crawl([url], store, settings=FAST, meanwhile=sleep)
    assert_stored(store, other[0].files.get(url), big)
    assert other[0].stat("streaming/recovered") == 1
    assert other[0].files[url]["resumed_from"] > 8 * MIB
    assert crawl.files[url]["completion_id"] == other[0].files[url]["completion_id"]
    assert crawl.files[url]["status"] == "uptodate"
    assert [path.stat().st_ino for path in name.iterdir()] == seen
    assert crawl.stat("streaming/leases_lost") == 1
    assert completions(store) == 1
    assert parts(store) == []


def _two_at_once(web: WebServer, store: Path, held: str) -> tuple[dict[str, bytes], list[Crawl]]:
    """Run a second crawl over the same URLs while the first is in the middle of the large one."""
    slow = os.urandom(MIB) * 168  # 7 seconds: the second crawl has begun by then
    bodies = {web.put("both/slow.bin", slow, "/slow"): slow}
    for n in range(6):
        body = os.urandom(400_000)
        bodies[web.put(f"both/{n}.bin", body)] = body
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_crawl, list(bodies), store, settings=FAST)
        wait_until(lambda: kept(store) > MIB)
        second = pool.submit(run_crawl, list(bodies), store, settings=FAST | {"STREAMING_HELD": held})
        return bodies, [first.result(), second.result()]


def test_of_two_crawls_at_once_one_fetches_and_the_other_has_the_result(web: WebServer, store: Path) -> None:
    """F14: no body goes over the wire twice."""
    bodies, (first, second) = _two_at_once(web, store, "wait")
    served = web.served()
    assert sorted(line.path for line in served) == sorted(urlsplit(url).path for url in bodies)
    assert {line.status for line in served} == {200}
    assert completions(store) == len(bodies)
    for url, body in bodies.items():
        assert_stored(store, first.files.get(url), body)
        assert_stored(store, second.files.get(url), body)
        assert (first.files[url]["status"], second.files[url]["status"]) == ("downloaded", "uptodate")
        assert first.files[url]["completion_id"] == second.files[url]["completion_id"]
    assert second.ended - first.ended < 20, "resumed, not timed out"


def test_a_job_that_another_worker_holds_is_left_to_it_with_skip(web: WebServer, store: Path) -> None:
    bodies, (first, second) = _two_at_once(web, store, "skip")
    assert set(first.files) == set(bodies)
    assert set(second.files) == set(bodies) - {web.url("slow/both/slow.bin")}
    assert second.log.count("File (held): no request is sent: worker") >= 1
    assert second.ended < first.ended


@pytest.mark.parametrize("way", ["two-pipelines", "two-items"])
def test_a_job_that_this_crawl_holds_itself_is_waited_for_also_with_skip(
    origin: Origin, store: Path, way: str
) -> None:
    """C12: a crawl that skips other workers' jobs still gets its own."""
    body = os.urandom(300_000)
    url = origin.put("/twice", body, default=lambda a, r: Answer(200, r.fields(), r.body, pace=0.2))
    settings: dict = {"STREAMING_HELD": "skip", "LOG_LEVEL": "INFO"}
    urls = [url, f"{url}#sha256={sha256(body)}"]
    if way == "two-pipelines":
        pipeline = "scrapy_streaming.StreamingFilesPipeline"
        settings["ITEM_PIPELINES"] = {pipeline: 1, "support.components.Second": 1}
        urls = [url]
    crawl = run_crawl(urls, store, settings=settings)
    got = [[file["checksum"] for file in item["files"]] for item in crawl.items]
    assert got == [[sha256(body)]] * len(urls)
    assert len(origin.requests) == 1
    assert "File (held): no request is sent: worker" not in crawl.log


def test_a_ledger_that_does_not_answer_is_logged_once_and_once_when_it_does_again(
    web: WebServer, big: bytes, store: Path
) -> None:
    """F11: locked for longer than a lease; nothing is written meanwhile, then the same download goes on."""
    url = web.url("slow/leased.bin")

    def lock(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 8 * MIB)
        with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
            ledger.execute("BEGIN IMMEDIATE")
            wait_until(lambda: "lease renewal failed" in logs(store))
            time.sleep(FAST["STREAMING_LEASE_SECONDS"])
            ledger.rollback()

    crawl = run_crawl([url], store, settings=FAST, meanwhile=lock)
    assert_stored(store, crawl.files.get(url), big)
    assert crawl.log.count("lease renewal failed, retrying") == 1
    assert crawl.log.count("the ledger answers again") == 1
    assert "lease-lost" not in crawl.log
    assert [line.status for line in web.served()] == [200], "not fetched again"
    assert completions(store) == 1


# -- when the server says so -------------------------------------------------------------------

RETRIES_OFF = {"RETRY_ENABLED": False}


@pytest.mark.parametrize(
    ("status", "said", "binds"),
    [
        (503, "3600", True),
        (429, "3600", True),
        (503, "Wed, 01 Jan 2098 00:00:00 GMT", True),
        (503, "0", False),
        (503, "soon", False),
        (503, None, False),
        (404, "3600", False),
    ],
)
def test_retry_after_binds_the_next_run_too(
    origin: Origin, store: Path, status: int, said: str | None, binds: bool
) -> None:
    """Rule 9."""
    fields = {} if said is None else {"Retry-After": said}
    url = origin.put("/busy", b"body", Answer(status, fields), default=honest)
    first = run_crawl([url], store, settings=RETRIES_OFF)
    assert first.files == {}
    assert first.stat(f"streaming/failed/bad-status-{status}") == 1
    second = run_crawl([url], store, settings=RETRIES_OFF)
    assert len(origin.requests) == (1 if binds else 2)
    assert ("File (waiting): no request is sent: backing off" in second.log) is binds
    if not binds:
        assert second.files[url]["digest"] == str(Digest(sha256(b"body")))


def test_a_lease_lost_while_an_unrecorded_file_is_verified_is_claimed_again(
    origin: Origin, store: Path
) -> None:
    """I16: the file is recorded under the next lease, not fetched, and its item has it."""
    url = origin.put("/forgotten", b"kept")
    run_crawl([url], store)
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger, ledger:
        for table in ("completion", "event", "job", "representation", "blob"):
            ledger.execute(f"DELETE FROM ss_{table}")
    origin.forget()
    crawl = run_crawl([url], store, settings={"ITEM_PIPELINES": {"support.components.Robbed": 1}})
    assert crawl.files[url]["reason"] == "adopted"
    assert crawl.stat("streaming/leases_lost") == 1
    assert origin.requests == []
