"""``scrapy streaming resume`` finishes downloads by plain GETs, under the recorded names (C4)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from scrapy import Request, Spider
from scrapy.pipelines.files import FilesPipeline
from scrapy.utils.test import get_crawler
from support.command import streaming
from support.crawl import blobs, bytes_in_parts, logs, run_crawl, sha256, wait_until
from support.origin import Answer, Asked, Origin, Resource, cut, honest
from support.stores import open_store

from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Granted, Lease, job_key
from scrapy_streaming.repeating import UNLIKE, Repeats
from scrapy_streaming.storage.ledger import JobRequest, Repeat
from scrapy_streaming.storage.store import Storage

SETTINGS = {"STREAMING_CHECKPOINT_BYTES": 1 << 18, "STREAMING_FSYNC": False}
TITLED = SETTINGS | {"ITEM_PIPELINES": {"support.components.Titled": 1}}
SILENT = Answer(200, before_head=60)
HALF = cut(300_000, "stall")


def wanted(url: str, name: str, **ask: Any) -> dict[str, Any]:
    return {"title": "Annual Reports", "name": name, "file_urls": [url], "ask": ask}


def ledger_rows(store: Path, columns: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger:
        return ledger.execute(f"SELECT {columns} FROM ss_job ORDER BY url").fetchall()


def begun(store: Path) -> int:
    return sum(count for (count,) in ledger_rows(store, "state = 'leased' AND begun"))


def command(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb with the pipeline of the crawls."""
    pipeline = 'ITEM_PIPELINES={"support.components.Titled": 1}'
    return streaming(store, "-s", "LOG_ENABLED=False", "-s", pipeline, *arguments)


def outcomes(finished: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Return state and path, or reason, by the URL's path."""
    lines = [line.split("\t") for line in finished.stdout.splitlines()]
    return {url.partition("//")[2].partition("/")[2]: (state, said) for _, state, url, said in lines}


def test_ls_distinguishes_jobs_of_running_and_of_dead_workers(store: Path) -> None:
    """Also when its lease still runs: a process that is gone holds no lock."""
    leave(store, "https://example.org/ready", None)
    with closing(open_store(store)) as alive:
        request = JobRequest("files", "", "https://example.org/held", sha256(b"GET"))
        alive.ledger.claim(sha256(b"held"), request).result()
        [line] = command(store, "ls", "--state", "ready").stdout.splitlines()
        assert line.split("\t")[1::3] == ["ready", "https://example.org/ready"]
        (lock,) = [
            path for path in (store / ".streaming" / "workers").iterdir() if path.name == alive.worker_id
        ]
        lock.unlink()
        found = command(store, "ls", "--state", "ready").stdout.splitlines()
        assert [line.split("\t")[1] for line in found] == ["ready", "leased"]
        assert ledger_rows(store, f"lease_until > {time.time()}") == [(1,), (None,)]


@pytest.mark.proves("F1")
def test_what_a_killed_crawl_left_is_finished_under_the_items_names(origin: Origin, store: Path) -> None:
    """E7, E9: with a part or with nothing, with validators or none; not what was asked with fields."""
    body, right = os.urandom(600_000), os.urandom(50_000)
    url = {
        "half": origin.put("/half.bin", body, HALF) + "?b=2&a=1",
        "untagged": origin.put("/untagged.bin", body[::-1], HALF, etag="", last_modified=""),
        "never": origin.put("/never.bin", b"never", SILENT),
        "expected": origin.put("/expected.bin", right, SILENT) + f"#sha256={sha256(right)}",
        "wrong": origin.put("/wrong.bin", b"wrong", SILENT) + f"#sha256={sha256(right)}",
        "meta": origin.put("/meta.bin", b"others", SILENT),
        "login": origin.put("/login.bin", b"PLEASE LOG IN", SILENT),
        "cookie": origin.put("/cookie.bin", b"PLEASE LOG IN", SILENT),
        "user": origin.put("/user.bin", b"of a user", SILENT).replace("//", "//me:passw0rd@"),
        "escaped": origin.put("/escaped.bin", b"escaped", SILENT),
    }
    ask: dict[str, dict[str, Any]] = {
        "login": {"headers": {"Authorization": "Bearer mine"}},
        "cookie": {"cookies": {"session": "1"}, "meta": {"cookiejar": "own"}},
        "meta": {"meta": {"streaming": {"digest": f"sha256:{sha256(right)}"}}},
    }
    items = [wanted(url[name], f"{name}.pdf", **ask.get(name, {})) for name in url]
    settings = TITLED | {"CONCURRENT_REQUESTS_PER_DOMAIN": len(items)}
    sent = len(items) - 1  # Scrapy itself sends none to a URL with a user
    killed = run_crawl(
        items, store, settings=settings,
        kill_when=lambda: len(origin.requests) == sent == begun(store) and bytes_in_parts(store) >= 2 << 18,
    )  # fmt: skip
    assert killed.code == -signal.SIGKILL
    assert blobs(store) == {}
    assert b"passw0rd" not in b"".join(file.read_bytes() for file in (store / ".streaming").glob("ledger*"))
    seen = {job["url"]: job for job in map(json.loads, command(store, "--json", "ls").stdout.splitlines())}
    job = seen[url["half"].replace("b=2&a=1", "a=1&b=2")]
    assert (job["plain"], job["asked_url"], job["asked_name"]) == (
        True,
        url["half"],
        "Annual Reports/half.pdf",
    )
    assert [seen[url[name]]["plain"] for name in ("never", "login", "cookie")] == [True, False, False]
    with closing(sqlite3.connect(store / ".streaming" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE ss_job SET asked_name = '../out.pdf' WHERE url = ?", (url["escaped"],))

    origin.forget()
    finished = command(store, "resume")
    assert finished.returncode == 3, finished.stderr
    found = outcomes(finished)
    assert len(finished.stdout.splitlines()) == len(found) == len(items), "each job is told of once"
    done = {"half": body, "untagged": body[::-1], "never": b"never", "expected": right}
    for name, data in done.items():
        path = f"Annual Reports/{name}.pdf"
        assert found.pop(f"{name}.bin" + ("?a=1&b=2" if name == "half" else "")) == ("done", path)
        assert (store / path).read_bytes() == data
    assert {state for state, _ in found.values()} == {"left"}
    why = {name.partition(".")[0]: said for name, (_, said) in found.items()}
    assert {name: next(word for word in REASONS if word in said) for name, said in why.items()} == {
        "wrong": "digest-mismatch", "meta": "digest-mismatch", "login": "own-request",
        "cookie": "own-request", "user": "own-request", "escaped": "store-unsafe",
    }  # fmt: skip
    assert [asked.target for asked in origin.asked("/half.bin")] == ["/half.bin?b=2&a=1"]
    assert origin.asked("/half.bin")[0].fields["range"].startswith("bytes=")
    assert not origin.asked("/login.bin") + origin.asked("/cookie.bin") + origin.asked("/escaped.bin")
    assert not (store.parent / "out.pdf").exists()

    origin.forget()
    following = run_crawl([item for item in items if item["name"][:-4] in done], store, settings=TITLED)
    assert origin.requests == [], "the next crawl fetches nothing"
    assert {item["files"][0]["path"]: item["files"][0]["status"] for item in following.items} == {
        f"Annual Reports/{name}.pdf": "uptodate" for name in done
    }


REASONS = ("digest-mismatch", "own-name", "own-request", "store-unsafe")


def test_after_a_second_ctrl_c_the_jobs_of_a_queue_that_forgets_are_named_and_finished(
    origin: Origin, store: Path
) -> None:
    """C3: nothing of it is on the disk, and with JOBDIR no crawl comes to its page again."""
    page, url = origin.put("/page.html", b"a page"), origin.put("/a.bin", b"the bytes", SILENT)
    settings = TITLED | {"JOBDIR": str(store.parent / "jobdir")}
    job = {"pages": [page]}

    def twice(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: origin.asked("/a.bin") and begun(store))
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "the crawl stops: finishing" in logs(store))
        process.send_signal(signal.SIGINT)

    items = [wanted(url, "a.pdf")]
    first = run_crawl(items, store, spider="pages", job=job, meanwhile=twice, check=False, settings=settings)
    assert "`scrapy streaming ls --state ready` names their files" in first.log
    named = command(store, "ls", "--state", "ready").stdout.splitlines()
    assert [line.split("\t")[4] for line in named] == [url]
    assert outcomes(command(store, "resume")) == {"a.bin": ("done", "Annual Reports/a.pdf")}
    origin.forget()
    anew = run_crawl(items, store, spider="pages", job=job, settings=TITLED)
    assert [asked.path for asked in origin.requests] == ["/page.html"]
    assert anew.items[0]["files"][0]["path"] == "Annual Reports/a.pdf"


def leave(store: Path, url: str, repeat: Repeat | None, work: str = "files") -> str:
    """Leave a job as a stopped crawl does; return its key."""
    with closing(open_store(store)) as crawl:
        lease = claim(crawl, url, repeat, work)
        crawl.ledger.release(lease).result()
    return lease.job_key


def claim(crawl: Storage, url: str, repeat: Repeat | None, work: str = "files") -> Lease:
    text = b"\n".join((b"GET", url.encode(), hashlib.sha256(b"").digest()))
    request = JobRequest(work, "", url, sha256(text), repeat)
    granted = crawl.ledger.claim(job_key(work, "", url), request).result()
    assert isinstance(granted, Granted)
    return granted.lease


def test_each_job_is_asked_for_by_what_was_recorded_of_it(origin: Origin, store: Path) -> None:
    """C7: two works on one URL, a hook that reads the response, stock's name, no name, an older release."""

    def disposed(asked: Asked, resource: Resource) -> Answer:
        fields = resource.fields() | {"Content-Disposition": "report.pdf"}
        return Answer(200, fields, resource.body)

    url = {name: origin.put(f"/{name}", name.encode(), default=disposed) for name in "abcdefg"}
    keys = {
        leave(store, url["a"], Repeat(plain=True, url=url["a"], name="one.pdf"), "one"): "one.pdf",
        leave(store, url["a"], Repeat(plain=True, url=url["a"], name="two.pdf"), "two"): "two.pdf",
        leave(store, url["b"], Repeat(plain=True, url=url["b"], name="unnamed/b")): "named/report.pdf",
        leave(store, url["c"], Repeat(plain=True, url=url["c"] + "#page=2", name="")): stock(
            url["c"] + "#page=2"
        ),
        leave(store, url["d"], Repeat(plain=True, url=url["d"])): "own-name",
        leave(store, url["e"], None): "own-name",
        leave(store, url["f"], UNLIKE): "own-request",
        leave(store, url["g"], Repeat(plain=True, url=url["a"], name="g")): "g",
    }
    finished = streaming(
        store, "-s", "LOG_ENABLED=False", "-s", 'ITEM_PIPELINES={"support.components.Disposed": 1}', "resume"
    )
    found = {line.split("\t")[0]: line.split("\t")[3] for line in finished.stdout.splitlines()}
    assert len(finished.stdout.splitlines()) == len(keys), finished.stderr
    assert found.keys() == keys.keys()
    for key, expected in keys.items():
        assert expected in found[key]
    assert (finished.returncode, len(origin.requests)) == (3, 5)
    assert (store / "two.pdf").read_bytes() == b"a"
    assert (store / "named" / "report.pdf").read_bytes() == b"b"


def test_a_job_of_a_dead_worker_that_fails_is_reported_once(origin: Origin, store: Path) -> None:
    """It is ready then, and ready ones are looked at after those that were held."""
    urls = [origin.put(f"/{number}", b"", default=Answer(503)) for number in range(40)]
    with closing(open_store(store)) as crawl:
        for url in urls:
            claim(crawl, url, Repeat(plain=True, url=url, name=""))
    few = [f"-s{name}=1" for name in ("CONCURRENT_ITEMS", "CONCURRENT_REQUESTS")]
    finished = streaming(store, "-s", "LOG_ENABLED=False", "-s", "RETRY_ENABLED=False", *few, "resume")
    assert sorted(line.split("\t")[2] for line in finished.stdout.splitlines()) == sorted(urls)
    assert {state for (state,) in ledger_rows(store, "state")} == {"ready"}


def test_no_other_job_is_made_of_one_that_was_left(origin: Origin, store: Path) -> None:
    """Where the project's fingerprinter counts what resume itself sets, the job's spider has to run."""
    url = origin.put("/a.bin", b"bytes")
    leave(store, url, Repeat(plain=True, url=url, name="a"))
    counts = "REQUEST_FINGERPRINTER_CLASS=support.components.CountsEditions"
    finished = streaming(store, "-s", "LOG_ENABLED=False", "-s", counts, "resume")
    assert "another request for its URL is another job here (own-request)" in finished.stdout
    assert (finished.returncode, origin.requests) == (3, [])
    assert ledger_rows(store, "url, state") == [(url, "ready")]


def stock(url: str) -> str:
    return FilesPipeline.file_path(None, Request(url))


# -- which requests are plain ------------------------------------------------------------------------


class HasUser(Spider):
    name = "user"
    http_user = "me"


class OwnSettings(Spider):
    name = "own"
    custom_settings: ClassVar[dict[str, Any]] = {"DEFAULT_REQUEST_HEADERS": {"X-Token": "mine"}}


URL = "https://example.org/a"


def repeat_of(request: Request, spider: type[Spider] = Spider, expected: Digest | None = None) -> Repeat:
    crawler = get_crawler(spider, {"DEFAULT_REQUEST_HEADERS": {"Accept": "*/*"}, "HTTPAUTH_USER": "project"})
    crawler.spider = spider.from_crawler(crawler, name="name")
    crawler.get_downloader_middleware = lambda kind: None  # as with COOKIES_ENABLED off
    return Repeats(crawler).of(request, expected, "a name", by_url=False)


@pytest.mark.parametrize(
    ("plain", "request_"),
    [
        (True, Request(URL)),
        (True, Request(URL, meta={"title": "for file_path()"})),
        (True, Request(URL, headers={"Accept": "*/*"})),
        (False, Request(URL, headers={"Accept": "text/html"})),
        (False, Request(URL, headers={"Authorization": "Bearer mine"})),
        (False, Request(URL, headers={"X-Own": "yes"})),
        (False, Request(URL, meta={"http_user": "me", "http_pass": "secret"})),
        (False, Request(URL, meta={"proxy": "http://proxy:3128"})),
        (False, Request(URL, cookies={"own": "1"})),
        (False, Request(URL, method="HEAD")),
        (False, Request(URL, body=b"which")),
        (False, Request("ftp://me:secret@example.org/a")),
    ],
)
def test_a_plain_request_has_nothing_of_its_own(request_: Request, plain: bool) -> None:
    found = repeat_of(request_)
    assert found == (Repeat(True, URL, "a name") if plain else UNLIKE)


@pytest.mark.parametrize(("plain", "spider"), [(True, Spider), (False, HasUser), (False, OwnSettings)])
def test_what_only_the_spider_has_no_other_crawl_repeats(spider: type[Spider], plain: bool) -> None:
    assert repeat_of(Request(URL), spider).plain is plain


@pytest.mark.parametrize(("fragment", "kept"), [("", ""), ("#page=2", ""), ("#SHA256={}", "#SHA256={}")])
def test_the_expected_digest_is_in_the_fragment(fragment: str, kept: str) -> None:
    digest = Digest(sha256(b"bytes"))
    found = repeat_of(Request(URL + fragment.format(digest.hex)), expected=digest)
    assert found.url == URL + (kept or "#sha256={}").format(digest.hex)


ADDED: dict[str, dict[str, Any]] = {
    "page": {"DOWNLOAD_DELAY": 60},  # the file's request waits for its turn, never sent
    "middleware": {"DOWNLOADER_MIDDLEWARES": {"support.components.LogsIn": 550}},
    "fingerprinter": {"REQUEST_FINGERPRINTER_CLASS": "support.components.CountsEditions"},
}


@pytest.mark.parametrize("by", ADDED)
def test_what_the_crawl_itself_adds_is_noticed(origin: Origin, store: Path, by: str) -> None:
    """A session that a page began is seen when the job is claimed, a middleware's field when it is sent."""

    def session(asked: Asked, resource: Resource) -> Answer:
        answer = honest(asked, resource)
        return replace(answer, fields={**answer.fields, "Set-Cookie": "session=1"})

    page = origin.put("/page.html", b"a page", default=session if by == "page" else honest)
    url = origin.put("/a.bin", b"of the session", SILENT)
    sent = by != "page"
    crawl = run_crawl(
        [wanted(url, "a.pdf", meta={"edition": "2"})], store,
        spider="pages", job={"pages": [page]}, settings=TITLED | ADDED[by],
        kill_when=lambda: (
            bool(origin.asked("/a.bin" if sent else "/page.html"))
            and ledger_rows(store, "state, begun") == [("leased", sent)]
        ),
    )  # fmt: skip
    assert crawl.code == -signal.SIGKILL
    assert ledger_rows(store, "plain, asked_url, asked_name") == [(0, None, None)]
    origin.forget()
    finished = streaming(store, "-s", "LOG_ENABLED=False", "resume")
    assert "(own-request)" in finished.stdout
    assert (finished.returncode, origin.requests) == (3, [])
