"""Nothing that a server, a project or a store says acts on a terminal (E11)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.command import scrapy, streaming
from support.crawl import run_crawl
from support.origin import Answer, Origin

ACTING = "\x01\x1b[31m\x7f\x9b31m\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069"
#: All but the tab and the end of a line, which are ours.
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NAME = f"names/{ACTING}\udc80.bin"


def assert_plain(text: str) -> None:
    assert ACTS.findall(text) == []


@pytest.fixture
def odd(origin: Origin, store: Path) -> dict[str, str]:
    """A store with such texts in names, ids, media types and errors; the crawls' own lines are plain."""
    said = {"Content-Type": "text/\x1b[31m\x7fplain", "ETag": '"\x9b"', "Content-Disposition": "a\x9bb"}
    urls = {
        "done": origin.put("/done", b"done", default=Answer(200, said, b"done")),
        "failed": origin.put("/failed", b"", default=Answer(404)),
        "refused": origin.put("/refused", b"refused"),
    }
    paths = {"done": NAME, "failed": "failed", "refused": f"../{ACTING}"}
    settings = {
        "ITEM_PIPELINES": {"support.components.OddPath": 1}, "TEST_PATHS": json.dumps(paths),
        "STREAMING_WORK_ID": f"work {ACTING}", "STREAMING_LINK_MODE": "copy",
    }  # fmt: skip
    crawl = run_crawl([f"{url}?{ACTING}/{name}" for name, url in urls.items()], store, settings=settings)
    assert_plain("\n".join(line for line in crawl.log.splitlines() if "[scrapy_streaming" in line))
    return urls


def test_no_verb_prints_what_acts(origin: Origin, odd: dict[str, str], store: Path) -> None:
    (store / NAME).chmod(0o644)
    (store / NAME).write_bytes(b"DONE")  # for verify to name
    shown = streaming(store, "ls").stdout + streaming(store, "show", odd["done"]).stdout
    for arguments in (["ls"], ["health"], ["verify"], ["status"], ["gc", "--dry-run", "--grace", "0"]):
        done = streaming(store, *arguments)
        assert_plain(done.stdout + done.stderr)
    key = streaming(store, "ls", "--state", "done").stdout.split("\t")[0]
    done = streaming(store, "show", key)
    assert_plain(done.stdout + done.stderr + shown)
    for part in (r"\x1b[31m", r"\x9b", r"\u202e", r"\u2028", r"\udc80.bin"):
        assert part in done.stdout
    raw = streaming(store, "show", "--json", key).stdout
    assert raw.isascii()
    assert json.loads(raw)["jobs"][0]["completions"][0]["path"] == NAME
    assert [json.loads(line)["state"] for line in streaming(store, "ls", "--json").stdout.splitlines()]


def test_no_refusal_prints_what_acts(store: Path) -> None:
    run_crawl([], store)
    for arguments in (
        ["show", f"http://h/{ACTING}"],
        ["requeue", ACTING],
        ["ls", "--state", ACTING],
        ["gc", "--grace", ACTING],
        ["ls", ACTING],
        [ACTING],
    ):
        done = streaming(store, *arguments)
        assert done.returncode != 0
        assert_plain(done.stdout + done.stderr)
    bad = scrapy("streaming", "-s", f"STREAMING_HELD={ACTING}", "ls", cwd=store.parent)
    nowhere = streaming(store.parent / f"no {ACTING}", "status")
    assert_plain(bad.stdout + bad.stderr + nowhere.stdout + nowhere.stderr)
