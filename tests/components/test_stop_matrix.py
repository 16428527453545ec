"""C2, C3: wherever a stop by the user meets a file, the crawl ends and no file is lost or handed on half.

One file is met in each way; with a queue that will not ask again (JOBDIR) what is in work is finished,
else it is left to the next crawl, which has it once.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scrapy.core.scraper import Scraper
from support.crawl import Crawl, assert_stored, jobs, run_crawl, wait_until
from support.origin import Answer, Asked, Origin, Resource
from support.stores import open_store

from scrapy_streaming.protocol.jobs import job_key
from scrapy_streaming.storage.ledger import JobRequest

NUMBER = 4
SIZE = 600_000
#: Seconds that a crawl may take to end, where nothing is finished, on a machine that is busy, too.
AT_ONCE = 25


@dataclass(frozen=True)
class Case:
    item: str
    met: str
    io: bool
    jobdir: bool
    how: signal.Signals

    def __str__(self) -> str:
        return "-".join(
            (
                self.item,
                self.met,
                "streamed" if self.io else "buffered",
                "jobdir" if self.jobdir else "none",
                self.how.name,
            )
        )


MET = ("none-yet", "in-flight", "held", "delayed")
ALL = [
    Case(*values)
    for values in itertools.product(
        ("start", "callback"), MET, (True, False), (True, False), (signal.SIGINT, signal.SIGTERM)
    )
]
#: Where a file is met, from where its item came: each once; the rest in turn. ``test_stopping`` has SIGTERM.
SHORT = [
    Case(item, met, io=number % 2 == 0, jobdir=(number // 2 + number) % 2 == 0, how=signal.SIGINT)
    for number, (met, item) in enumerate(itertools.product(MET, ("start", "callback")))
]


def paced(asked: Asked, resource: Resource) -> Answer:
    """A body that takes four seconds."""
    return Answer(200, resource.fields(), resource.body, pace=0.4)


class Meeting:
    """Stops a crawl of NUMBER files when one of them is where *case* says."""

    def __init__(self, case: Case, origin: Origin, base: Path) -> None:
        self.case, self.origin, self.base = case, origin, base
        self.store = base / "store"
        self.took = 0.0
        self.bodies = {}
        for number in range(NUMBER):
            body = bytes([number]) * SIZE
            default = paced if case.met == "in-flight" else None
            how = {} if default is None else {"default": default}
            self.bodies[origin.put(f"/{base.name}/{number}.bin", body, **how)] = body
        self.page = origin.put(f"/{base.name}/page", b"a page")

    def run(self, **more: Any) -> Crawl:
        settings = {
            "STREAMING_IO_ENABLED": self.case.io,
            "DOWNLOAD_DELAY": 1 if self.case.met == "delayed" else 0,
            "LOG_LEVEL": "INFO",
        }
        if self.case.jobdir:
            settings["JOBDIR"] = str(self.base / "jobdir")
        if self.case.met == "none-yet":
            settings["ITEM_PIPELINES"] = {"support.components.Late": 0}
        spider = "from-start" if self.case.item == "start" else "pages"
        job = {"pages": [self.page]}
        return run_crawl(list(self.bodies), self.store, settings=settings, spider=spider, job=job, **more)

    def files_asked(self) -> list[Asked]:
        return [asked for asked in self.origin.requests if asked.path.startswith(f"/{self.base.name}/") and
                asked.path.endswith(".bin")]  # fmt: skip

    def reached(self) -> bool:
        match self.case.met:
            case "none-yet":
                return (self.store / "late").exists()
            case "held":
                return self.waiting()
            case _:
                return len(self.files_asked()) > 0

    def waiting(self) -> bool:
        """Whether the crawl has come to the job that another worker has."""
        free = set(self.bodies) - {next(iter(self.bodies))}
        return all(jobs(self.store).get(url, ("", 0))[0] == "done" for url in free)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        wait_until(self.reached)
        time.sleep(0.3)
        process.send_signal(self.case.how)
        stopped = time.monotonic()
        if self.case.jobdir and self.case.met == "held":
            time.sleep(0.5)
            self.give_up()
        wait_until(lambda: process.poll() is not None, 60)
        self.took = time.monotonic() - stopped

    give_up: Callable[[], object] = staticmethod(lambda: None)

    def first(self) -> Crawl:
        if self.case.met != "held":
            return self.run(meanwhile=self.stop)
        with closing(open_store(self.store)) as other:
            url, work = next(iter(self.bodies)), "from-start" if self.case.item == "start" else "pages"
            text = b"\n".join((b"GET", url.encode(), hashlib.sha256(b"").digest()))
            request = JobRequest(work, "", url, hashlib.sha256(text).hexdigest())
            lease = other.ledger.claim(job_key(work, "", url), request).result().lease
            self.give_up = lambda: other.ledger.release(lease).result()
            try:
                return self.run(meanwhile=self.stop)
            finally:
                if not self.case.jobdir:
                    self.give_up()


def tried(case: Case, origin: Origin, base: Path) -> str:
    """Try one case; return a line of the table."""
    meeting = Meeting(case, origin, base)
    first = meeting.first()
    finished = case.jobdir
    assert finished or meeting.took < AT_ONCE, meeting.took
    for item in first.items:
        assert len(item["files"]) == 1, "half an item"
    assert "Traceback" not in first.log
    if finished:
        assert len(first.files) == NUMBER
        assert first.log.count("the crawl stops: finishing") == 1
    else:
        assert len(first.files) < NUMBER
        assert first.log.count("Dropped: crawl-stopping") == NUMBER - len(first.files) or case.item == "start"
    second = meeting.run()
    repeats = not (case.jobdir and case.item == "callback")  # else the page is not asked again
    in_items = Counter(file["url"] for item in second.items for file in item["files"])
    if not repeats:
        in_items += Counter(file["url"] for item in first.items for file in item["files"])
    assert in_items == dict.fromkeys(meeting.bodies, 1)
    for url, body in meeting.bodies.items():
        assert_stored(meeting.store, (second if repeats else first).files[url], body)
    return f"{case!s:45} {meeting.took:5.1f} s  {len(first.files)} + {len(second.files)} of {NUMBER}"


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_stop_loses_no_file(case: Case, origin: Origin, tmp_path: Path) -> None:
    if (case.item, case.met) == ("start", "none-yet") and not hasattr(Scraper, "_start_itemproc_nowait"):
        pytest.skip("this Scrapy ends crawls while an item of start() is in another pipeline, stop or not")
    base = tmp_path / "case"
    base.mkdir()
    print(tried(case, origin, base))


@pytest.mark.soak
def test_a_stop_loses_no_file_wherever_it_comes(origin: Origin, tmp_path: Path) -> None:
    """All 64 cases; the table is printed."""

    def one(number: int) -> str:
        base = tmp_path / str(number)
        base.mkdir()
        try:
            return tried(ALL[number], origin, base)
        except (AssertionError, TimeoutError) as error:
            return f"{ALL[number]!s:45} FAILED {error}"

    with ThreadPoolExecutor(4) as pool:
        table = list(pool.map(one, range(len(ALL))))
    print("\n".join(table))
    assert not [line for line in table if "FAILED" in line]
