"""A file that fails: one line in the log, its entry in the item, as stock otherwise (C18)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.beside import Beside, beside, essence, loud
from support.crawl import jobs, parts, run_crawl
from support.origin import Answer, Asked, Origin, Resource, cut, honest
from support.servers import free_port

from scrapy_streaming.explanations import explain

BODY = bytes(range(256)) * 2000
CUT = 300_000
SETTINGS = {
    "RETRY_TIMES": 1,
    "DOWNLOAD_MAXSIZE": 600_000,
    "STREAMING_MAX_SIZE": 600_000,
    "STREAMING_FAILURES_FIELD": "failures",
}


def nothing(asked: Asked, resource: Resource) -> Answer:
    """Break off before the first byte."""
    return honest(asked, resource, cut=0, end="reset")


@dataclass
class Case:
    """One URL that fails: why, with which status, after how many requests, with how many bytes kept."""

    url: str
    reason: str
    status: int | None
    attempts: int
    kept: int = 0


@dataclass
class Failed:
    found: Beside
    good: str
    cases: dict[str, Case]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failed]:
    """A crawl with stock and one with the package, in which all but one file fail."""
    origin = Origin()
    put, base = origin.put, tmp_path_factory.mktemp("failed")
    good = put("/good", BODY)
    cases = [
        Case(origin.url("/gone"), "bad-status-404", 404, 1),
        Case(put("/busy", BODY, default=Answer(503, {}, b"busy")), "bad-status-503", 503, 2),
        Case(f"http://127.0.0.1:{free_port()}/unreachable", "connection-refused", None, 2),
        Case(put("/large", BODY * 2), "too-large", None, 1),
        Case(put("/wrong", BODY) + "#sha256=" + "0" * 64, "digest-mismatch", 200, 1),
        Case(put("/mistake", BODY), "KeyError", 200, 1),
        Case(put("/timeout", BODY), "TimeoutError", 200, 1),
        Case(put("/refused", BODY), "refused-by-hook", 200, 1),
        Case(put("/leaves", BODY), "store-unsafe", None, 0),
        Case("gopher://127.0.0.1/x", "unsupported-scheme", None, 1),
        # the first break brought bytes, so it does not count as a try of RETRY_TIMES
        Case(put("/broken", BODY, cut(CUT), default=nothing), "incomplete", None, 3, CUT),
        Case(
            put("/then-busy", BODY, cut(CUT), default=Answer(503, {}, b"busy")), "bad-status-503", 503, 3, CUT
        ),
    ]
    urls = [good, *(case.url for case in cases)]
    scripts = {"/broken": [cut(CUT)], "/then-busy": [cut(CUT)]}
    found = beside(
        base, urls, settings=SETTINGS, check=False,
        stock={"ITEM_PIPELINES": {"support.hooks.FailingStock": 1}},
        streaming={"ITEM_PIPELINES": {"support.hooks.FailingStreaming": 1}},
        meanwhile=lambda _: [origin.script(path, *script) for path, script in scripts.items()],
    )  # fmt: skip
    yield Failed(found, good, {case.url: case for case in cases})
    origin.close()


def of(case: Case, lines: list[str]) -> list[str]:
    return [line for line in lines if f"{case.url}>" in line]


def test_a_failed_file_is_one_line_with_its_reason_and_what_to_do(failed: Failed) -> None:
    """C18: at WARNING; stock says it three times, and Scrapy once more that it gave up retrying."""
    crawl = failed.found.streaming
    lines = loud(crawl)
    for case in failed.cases.values():
        [line] = of(case, lines)
        assert f"File ({case.reason})" in line
        assert explain(case.reason).remedy in line
        assert (f"; {case.kept} bytes are kept; " in line) == bool(case.kept)
        foreseen = case.reason not in ("KeyError", "TimeoutError")
        assert f"] {'WARNING' if foreseen else 'ERROR'}: " in line
    assert len(lines) == len(failed.cases)
    assert len(loud(failed.found.stock)) > 2 * len(failed.cases), "the comparison is one"
    assert "Gave up retrying" not in crawl.log


def test_a_mistake_in_a_hook_shows_its_traceback_once(failed: Failed) -> None:
    """C18: nobody foresaw it, so stock's traceback is there; of all other failures there is none."""
    log = failed.found.streaming.log
    traces = re.findall(r"Traceback.*\n(?:[ \t].*\n)+(\w+): (.*)", log)
    assert sorted(traces) == [("KeyError", "'no such key'"), ("TimeoutError", "the hook's own")]
    assert 'return {}["no such key"]' in log


def test_the_items_are_stocks(failed: Failed) -> None:
    """C18, but for what stock does not look at: expected digests, and names outside the store."""
    ours, stock = failed.found.streaming, failed.found.stock
    assert ours.code == stock.code == 0
    without = [{k: v for k, v in item.items() if k != "failures"} for item in essence(ours)]
    assert [item for item in without if not unseen(item)] == [i for i in essence(stock) if not unseen(i)]
    assert set(ours.files) == {failed.good}


def unseen(item: dict[str, Any]) -> bool:
    return any(name in item["file_urls"][0] for name in ("/wrong", "/leaves"))


def test_the_field_lists_the_failed_files_of_an_item(failed: Failed) -> None:
    """Also for a subclass's ``item_completed``, which finds it filled."""
    listed = {item["file_urls"][0]: item["failures"] for item in failed.found.streaming.items}
    assert listed.pop(failed.good) == []
    assert listed == {
        url: [
            {"url": url, "reason": c.reason, "status": c.status, "attempts": c.attempts, "kept": c.kept}
        ]
        for url, c in failed.cases.items()
    }  # fmt: skip
    noted = [note["completed"] for note in failed.found.streaming.notes if "completed" in note]
    assert sorted(noted, key=repr) == sorted([[], *listed.values()], key=repr)
    assert [path.stat().st_size for path in parts(failed.found.store)] == [CUT, CUT], "it is there"
    assert all("failures" not in item for item in failed.found.stock.items)


def test_each_failure_is_counted_once_by_its_reason(failed: Failed) -> None:
    counted: dict[str, int] = {}
    for case in failed.cases.values():
        counted[case.reason] = counted.get(case.reason, 0) + 1
    found = {
        name.removeprefix("streaming/failed/"): number
        for name, number in failed.found.streaming.stats.items()
        if name.startswith("streaming/failed/")
    }
    assert found == counted
    states = {url.rpartition("/")[2]: state for url, (state, _) in jobs(failed.found.store).items()}
    assert states["gone"] == "failed"
    assert states["busy"] == states["broken"] == "ready", "the next crawl tries again"


def test_items_without_the_field_lose_nothing_and_one_line_says_so(origin: Origin, store: Path) -> None:
    urls = [origin.put("/good", BODY), origin.url("/gone")]
    crawl = run_crawl(urls, store, settings=SETTINGS, spider="typed")
    assert len(crawl.items) == 3
    for item in crawl.items:
        assert [entry["url"] for entry in item["files"]] == urls[:1]
        entries: list[dict[str, Any]] = item.get("failures", [])
        assert [entry["reason"] for entry in entries] == ["bad-status-404"] * ("failures" in item)
    assert sum("failures" in item for item in crawl.items) == 1
    lines = [line for line in loud(crawl) if "STREAMING_FAILURES_FIELD" in line]
    assert len(lines) == 1
    assert "have no field failures" in lines[0]
    assert len(loud(crawl)) == 2, "and one for the file"


def test_what_the_only_try_brought_is_kept(origin: Origin, store: Path) -> None:
    url = origin.put("/cut", BODY, default=cut(CUT))
    crawl = run_crawl([url], store, settings=SETTINGS | {"RETRY_ENABLED": False})
    [[entry]] = [item["failures"] for item in crawl.items]
    assert entry == {"url": url, "reason": "incomplete", "status": None, "attempts": 1, "kept": CUT}
    assert [path.stat().st_size for path in parts(store)] == [CUT]


def test_what_a_hook_refused_is_not_kept_however_many_requests_brought_it(
    origin: Origin, store: Path
) -> None:
    """A whole part would be given to each later crawl with no request (R7)."""
    url = origin.put("/mistake", BODY, cut(CUT))
    crawl = run_crawl(
        [url], store, settings=SETTINGS | {"ITEM_PIPELINES": {"support.hooks.FailingStreaming": 1}}
    )
    [[entry]] = [item["failures"] for item in crawl.items]
    assert (entry["reason"], entry["attempts"], entry["kept"]) == ("KeyError", 2, 0)
    assert parts(store) == []


def test_without_the_setting_items_have_no_such_field(origin: Origin, store: Path) -> None:
    crawl = run_crawl([origin.url("/gone")], store)
    assert [set(item) for item in crawl.items] == [{"file_urls", "files"}]


def test_hooks_that_call_none_of_the_classs_keep_working(origin: Origin, store: Path) -> None:
    """``media_failed`` of the project's own raises what it likes; the line is ours all the same."""
    url = origin.url("/gone")
    pipelines = {"ITEM_PIPELINES": {"support.components.OwnMedia": 1}}
    crawl = run_crawl([url], store, settings=SETTINGS | pipelines)
    [line] = loud(crawl)
    assert "File (bad-status-404)" in line
    assert "Traceback" not in crawl.log
    [[entry]] = [item["failures"] for item in crawl.items]
    assert (entry["url"], entry["status"]) == (url, 404)


def test_what_no_request_may_leave_for_is_no_loud_failure(origin: Origin, store: Path) -> None:
    """A file that robots.txt forbids is Scrapy's to say, as in stock; the item lists it."""
    origin.put("/robots.txt", b"User-agent: *\nDisallow: /secret\n")
    url = origin.put("/secret", BODY)
    crawl = run_crawl([url], store, settings=SETTINGS | {"ROBOTSTXT_OBEY": True})
    assert loud(crawl) == []
    [[entry]] = [item["failures"] for item in crawl.items]
    assert (entry["reason"], entry["status"], entry["attempts"]) == ("filtered", None, 0)
