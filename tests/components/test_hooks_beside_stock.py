"""Middlewares and pipeline hooks of users see of a streamed file what they see of any other (S5).

One site, one project, many hooks; with ``FilesPipeline`` alone, and with the add-on.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.crawl import Crawl, assert_sound, parts, run_crawl, sha256
from support.hooks import changed
from support.once import once
from support.origin import Answer, Asked, Origin, OriginRecord, Resource, Script, cut, honest

LOGIN = b"<html><title>please log in</title>" + b" " * 400_000
PAGE = b"<html><head><meta charset=utf-8><title>Gr\xc3\xbc\xc3\x9fe</title>"
SMALL, LARGE = 3000, 600_000
BOTH = ("above", "below")


def body_of(path: str, size: int) -> bytes:
    return random.Random(path).randbytes(size)


def empty(asked: Asked, resource: Resource) -> Answer:
    return Answer(200, {"Content-Type": "application/octet-stream"}, b"")


def login(asked: Asked, resource: Resource) -> Answer:
    return Answer(200, {"Content-Type": "text/html", "ETag": '"login"'}, LOGIN)


def with_fields(fields: dict[str, str]) -> Script:
    """An honest answer with more fields, which a 304 lacks."""

    def answer(asked: Asked, resource: Resource) -> Answer:
        answer = honest(asked, resource)
        return answer if answer.status == 304 else replace(answer, fields={**answer.fields, **fields})

    return answer


def attached(name: str) -> Script:
    return with_fields({"Content-Disposition": f'attachment; filename="{name}"'})


@dataclass
class Case:
    """A file and what the hooks make of it.

    ``stored``: what is on disk in the end, ``None`` for a file that is refused. ``reason`` in the
    entry. ``again``: whether a conditional request may confirm it.
    """

    path: str
    body: bytes
    stored: bytes | None
    reason: str = "fetched"
    script: tuple[Script, ...] = ()
    default: Script = honest
    kind: dict[str, Any] = field(default_factory=dict)

    @property
    def transformed(self) -> bool:
        return self.reason == "transformed"


def same(path: str, size: int = SMALL, body: bytes = b"", **more: Any) -> Case:
    """A file that is stored as the origin has it."""
    body = body or body_of(path, size)
    return Case(path, body, body, **more)


def made(path: str, size: int) -> Case:
    """One that a hook changes."""
    body = body_of(path, size)
    return Case(path, body, changed(body), "transformed")


HTML = {"media_type": "text/html; charset=utf-8"}
CASES = [
    same("/look/small.bin"),
    same("/look/large.bin", LARGE),
    same("/look/page.html", body=PAGE + b" " * 100, kind=HTML),
    same("/look/large-page.html", body=PAGE + b" " * LARGE, kind=HTML),
    same("/look/text", body=b"a text that only its bytes show to be one " * 10),
    same("/look/large-text", body=b"a text that only its bytes show to be one " * 20_000),
    same("/look/typed.csv", body=b"a;b\n" * 100, kind={"media_type": "text/csv"}),
    same("/look/broken.bin", LARGE, reason="resumed", script=(cut(LARGE // 2, "close"),)),
    *(
        made(f"/{place}/{name}.bin", size)
        for place in BOTH
        for name, size in (("replace-small", SMALL), ("replace-large", LARGE), ("new", LARGE))
    ),
    made("/hook/replace.bin", LARGE),
    made("/media/replace.bin", LARGE),
    *(same(f"/{place}/{name}.bin", LARGE) for place in BOTH for name in ("same", "rewrapped")),
    *(Case(f"/{place}/emptied.bin", b"x" * LARGE, None) for place in BOTH),
    *(Case(f"/{place}/failed.bin", b"x" * LARGE, None) for place in BOTH),
    *(same(f"/{place}/again-empty.bin", script=(empty,), reason="fetched") for place in BOTH),
    *(same(f"/{place}/again-login.bin", LARGE, script=(login,)) for place in BOTH),
    Case("/hook/refused.bin", LOGIN, None),
    same("/disposition/a.pdf", LARGE, default=attached("report-7.pdf")),
    same("/disposition/b.pdf", default=attached("report-8.pdf")),
    same("/disposition/none.pdf"),
    same("/content/one.bin"),
    same("/content/two.bin", LARGE),
    same("/folder/a.bin"),
]
LATE = [same(f"/{place}/late.bin", LARGE) for place in BOTH]
WRONG = {"Repr-Digest": "sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:"}
BAD = [
    Case(f"/{place}/replace-wrong.bin", b"x" * LARGE, None, default=with_fields(WRONG)) for place in BOTH
]  # fmt: skip
SITE = [*CASES, *LATE, *BAD]
STORED = [case for case in CASES if case.stored is not None]


def ids(cases: list[Case]) -> list[str]:
    return [case.path.strip("/") for case in cases]


@dataclass
class Runs:
    """The crawls of one site: by ``FilesPipeline``, by us, by us again, by us asking conditionally."""

    origin: OriginRecord
    stock: Crawl
    streaming: Crawl
    again: Crawl
    confirmed: Crawl
    stock_store: Path
    store: Path
    asked: dict[str, list[Asked]]
    asked_again: list[Asked]
    left: list[Path]

    def file(self, crawl: Crawl, case: Case) -> dict[str, Any] | None:
        return crawl.files.get(self.origin.url(case.path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return once(tmp_path_factory, "hooks", run_all)


def run_all(base: Path) -> Runs:
    origin = Origin()

    def crawl(store: Path, pipeline: str, folder: str, **settings: Any) -> Crawl:
        for case in SITE:
            script = case.script if not store.exists() else ()
            origin.put(case.path, case.body, *script, default=case.default, **case.kind)
        origin.forget()
        items = [{"file_urls": [origin.url(case.path)], "folder": folder} for case in SITE]
        return run_crawl(
            [*items, {"title": "without files"}], store, timeout=200,
            settings={
                "DOWNLOADER_MIDDLEWARES": {"support.hooks.Above": 500, "support.hooks.Below": 700},
                "ITEM_PIPELINES": {f"support.hooks.{pipeline}": 1},
                "RETRY_TIMES": 2, "DOWNLOAD_WARNSIZE": LARGE - 1,
                "AUTOTHROTTLE_ENABLED": True, "AUTOTHROTTLE_DEBUG": True,
                "AUTOTHROTTLE_START_DELAY": 0, "AUTOTHROTTLE_TARGET_CONCURRENCY": 16,
                **settings,
            },
        )  # fmt: skip

    stock_store, store = base / "stock", base / "streaming"
    stock = crawl(stock_store, "OverStock", "f", ADDONS={})
    streaming = crawl(store, "OverStreaming", "f")
    left = parts(store)
    again = crawl(store, "OverStreaming", "g")
    asked_again = list(origin.requests)
    confirmed = crawl(store, "OverStreaming", "g", STREAMING_REVALIDATE="always", LATE=True)
    asked = {case.path: origin.asked(case.path) for case in CASES}
    origin.close()
    record = OriginRecord.by(origin)
    return Runs(record, stock, streaming, again, confirmed, stock_store, store, asked, asked_again, left)


def essence(entry: dict[str, Any] | None) -> dict[str, Any] | None:
    return entry and {name: entry[name] for name in ("url", "path", "status")}


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_items_and_files_are_as_stocks(runs: Runs, case: Case) -> None:
    """C9, R76: the same entry, the same bytes under the same name."""
    stock, streaming = runs.file(runs.stock, case), runs.file(runs.streaming, case)
    assert essence(streaming) == essence(stock)
    assert (case.stored is None) == (streaming is None)
    if streaming is not None and stock is not None:
        assert (runs.store / streaming["path"]).read_bytes() == case.stored
        assert (runs.stock_store / stock["path"]).read_bytes() == case.stored
        assert streaming["checksum"] == sha256(case.stored or b"")
        assert streaming["reason"] == case.reason
        if case.transformed:
            assert (streaming["etag"], streaming["last_modified"]) == (None, None)


LOOKED = [case for case in CASES if "/look" in case.path]


@pytest.mark.parametrize("case", LOOKED, ids=ids(LOOKED))
def test_hooks_see_what_they_see_of_stocks(runs: Runs, case: Case) -> None:
    """C9: body, length, text, class, status and fields, on both sides of the middleware and in a pipeline."""

    def seen(crawl: Crawl) -> list[dict[str, Any]]:
        notes = [note for note in crawl.notes if "looked" in note and note["url"].endswith(case.path)]
        return sorted(notes, key=json.dumps)

    assert seen(runs.streaming) == seen(runs.stock)
    assert len(seen(runs.streaming)) == 4
    after_304 = {(note["status"], note["length"], note["sha1"]) for note in seen(runs.confirmed)}
    assert after_304 == {(304, len(case.body), hashlib.sha1(case.body).hexdigest())}
    warned = re.findall(rf"WARNING: response.body reads (\d+) bytes.*{case.path};", runs.streaming.log)
    assert warned == ([str(len(case.body))] if len(case.body) >= LARGE else [])


def test_hooks_are_called_as_stocks(runs: Runs) -> None:
    """``item_completed`` gets the same results, and the log has no error that stock's has not."""

    def completed(crawl: Crawl) -> list[str]:
        return sorted(json.dumps(note) for note in crawl.notes if "completed" in note)

    wrong = sorted(json.dumps({"completed": [runs.origin.url(c.path)], "ok": [False]}) for c in BAD)
    better = [note for note in completed(runs.stock) if not any(c.path in note for c in BAD)]
    assert completed(runs.streaming) == sorted(better + wrong)
    assert levels(runs.streaming)["ERROR"] <= levels(runs.stock)["ERROR"] + len(BAD)
    assert levels(runs.streaming)["CRITICAL"] == 0
    assert [item for item in runs.streaming.items if "title" in item] == [
        item for item in runs.stock.items if "title" in item
    ]
    assert runs.streaming.stat("streaming/decision/transformed") == sum(case.transformed for case in CASES)
    assert runs.streaming.stat("streaming/failed/empty-content") == 2
    assert runs.streaming.stat("streaming/failed/digest-mismatch") == 2, (
        "nothing is made of wrong bytes (R63)"
    )
    sent = sum(len(case.body) for case in CASES)
    for crawl in (
        runs.streaming,
        runs.stock,
    ):  # the statistics of Scrapy count bodies, whichever handler took them
        assert crawl.stat("downloader/response_bytes") > sent
    sound = [case.stored for case in STORED] + [case.body for case in [*CASES, *LATE]]
    assert_sound(runs.store, sound + [changed(case.body) for case in LATE])
    assert runs.left == [], "nothing of what was changed or refused is left to go on from"


def levels(crawl: Crawl) -> Counter[str]:
    return Counter(line.split("] ")[1].partition(":")[0] for line in crawl.log.splitlines() if "] " in line)


@pytest.mark.parametrize("case", STORED, ids=ids(STORED))
def test_names_stay_without_a_response_and_follow_the_item(runs: Runs, case: Case) -> None:
    """C7: from the ledger, and after a 304, which lacks what the name was made of."""
    first = runs.file(runs.streaming, case)
    for crawl in (runs.again, runs.confirmed):
        entry = runs.file(crawl, case)
        assert first is not None
        assert entry is not None
        moved = case.path.startswith("/folder")
        assert entry["path"] == (first["path"].replace("f/", "g/") if moved else first["path"])
        assert (runs.store / entry["path"]).read_bytes() == case.stored
    assert case.path not in {asked.path for asked in runs.asked_again}


@pytest.mark.parametrize("case", LATE, ids=ids(LATE))
def test_what_is_changed_after_a_304_is_made_of_the_stored_bytes(runs: Runs, case: Case) -> None:
    """R76: the answer has no body; a middleware that changes bodies gets the blob's."""
    before, after = runs.file(runs.again, case), runs.file(runs.confirmed, case)
    assert before is not None
    assert after is not None
    assert before["checksum"] == sha256(case.body)
    assert (after["reason"], after["checksum"]) == ("transformed", sha256(changed(case.body)))
    assert (runs.store / after["path"]).read_bytes() == changed(case.body)


@pytest.mark.parametrize("case", STORED, ids=ids(STORED))
def test_what_was_changed_is_never_confirmed(runs: Runs, case: Case) -> None:
    """R76: no validator is recorded of it, so it is fetched anew; anything else is asked for by 304."""
    last = runs.asked[case.path][-1]
    assert (last.status, "if-none-match" in last.fields) == (
        (200, False) if case.transformed else (304, True)
    )


def test_items_that_ask_for_nothing_stay_as_they_are(tmp_path: Path) -> None:
    """C20: of any kind, through any last pipeline, where no ``FilesPipeline`` is set."""
    feed = {"format": "csv", "item_classes": ["builtins.dict"]}
    stock, streaming = (
        run_crawl(
            [], tmp_path / name / "store", spider="kinds",
            settings={
                "ITEM_PIPELINES": {"support.hooks.Last": 900},
                "FEEDS": {str(tmp_path / name / "items.csv"): feed}, **more,
            },
        )
        for name, more in (("stock", {"ADDONS": {}}), ("streaming", {}))
        if (tmp_path / name).mkdir() is None
    )  # fmt: skip
    assert streaming.items == stock.items
    assert len(streaming.items) == 11
    csv = (tmp_path / "streaming" / "items.csv").read_text()
    assert csv == (tmp_path / "stock" / "items.csv").read_text()
    assert csv.startswith("title\n")
    assert levels(streaming)["ERROR"] == levels(stock)["ERROR"] == 0
    assert "UninvitedFilesPipeline" in streaming.log
