"""Each part behind a toggle of its own: every combination stores what stock stores (issue: phases)."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.beside import FILES, files_in, loud
from support.command import scrapy, streaming
from support.crawl import TESTS, Crawl, assert_sound, blobs, kept, parts, run_crawl, sha256, wait_until
from support.origin import Answer, Asked, Origin, Resource
from support.servers import WebServer

MIB = 1 << 20
PHASES = ("RESUME", "IO", "FINALIZATION", "IDEMPOTENCY")
COMBINATIONS = list(itertools.product((True, False), repeat=len(PHASES)))
ALWAYS = {"STREAMING_REVALIDATE": "always"}


def switched(*on: bool) -> dict[str, Any]:
    return {f"STREAMING_{phase}_ENABLED": each for phase, each in zip(PHASES, on, strict=True)}


@pytest.fixture(scope="module")
def site() -> Iterator[dict[str, bytes]]:
    """Files of many sizes, two of one content."""
    origin, seven = Origin(), random.Random(7)
    sizes = [1, 1000, 70_000, 300_000, 3_000_000]
    bodies = {f"/f/{size}.bin": seven.randbytes(size) for size in sizes}
    bodies |= {f"/twin/{name}.pdf": b"twins" * 9000 for name in "ab"}
    yield {origin.put(path, body): body for path, body in bodies.items()}
    origin.close()


@pytest.fixture(scope="module")
def stock(site: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What stock Scrapy stores."""
    store = tmp_path_factory.mktemp("stock") / "store"
    run_crawl(list(site), store, settings={"ADDONS": {}, **FILES})
    return files_in(store)


@pytest.mark.parametrize("on", COMBINATIONS, ids=lambda on: "".join("01"[each] for each in on))
def test_every_combination_stores_what_stock_stores(
    site: dict[str, bytes], stock: dict[str, bytes], store: Path, on: tuple[bool, ...]
) -> None:
    crawl = run_crawl(list(site), store, settings=switched(*on))
    assert files_in(store) == stock
    assert not loud(crawl)
    assert {entry["status"] for entry in crawl.files.values()} == {"downloaded"}
    _, _, finalization, idempotency = on
    assert (store / "blobs").exists() == finalization
    assert (store / ".streaming" / "ledger.sqlite3").exists() == idempotency
    assert parts(store) == []
    assert {url: entry["checksum"] for url, entry in crawl.files.items()} == {
        url: sha256(body) for url, body in site.items()
    }


@pytest.mark.parametrize("flag", [*PHASES, "SCHEMA"])
def test_each_flag_can_come_from_the_environment(
    site: dict[str, bytes], stock: dict[str, bytes], store: Path, flag: str
) -> None:
    crawl = run_crawl(list(site), store, env={f"SCRAPY_STREAMING_{flag}_ENABLED": "0"})
    assert files_in(store) == stock
    records = flag not in ("IDEMPOTENCY", "SCHEMA")
    said = f"idempotency={records} schema={flag != 'SCHEMA'}"
    assert f"Streaming architecture integrations: streaming=True {said}" in crawl.log
    assert (store / ".streaming" / "ledger.sqlite3").exists() == records
    if not records:
        assert crawl.log.count(f"(STREAMING_{flag}_ENABLED is off)") == 1


def test_what_one_phase_stored_is_up_to_date_for_every_other(
    site: dict[str, bytes], stock: dict[str, bytes], store: Path
) -> None:
    """Forth and back between the phases, nothing is transferred and no file changes."""
    way = [(1, 1), (0, 1), (1, 1), (0, 0), (1, 1), (1, 0), (0, 1), (0, 0), (1, 0), (1, 1)]
    for number, (finalization, idempotency) in enumerate(way):
        phases = switched(True, True, bool(finalization), bool(idempotency))
        crawl = run_crawl(list(site), store, settings=phases)
        assert files_in(store) == stock
        assert not loud(crawl)
        kind = "uptodate" if number else "downloaded"
        assert {entry["status"] for entry in crawl.files.values()} == {kind}, (number, phases)


@pytest.mark.parametrize(("finalization", "idempotency"), [(0, 1), (0, 0), (1, 0)])
def test_a_store_begun_in_an_early_phase_goes_on_in_the_last(
    site: dict[str, bytes],
    stock: dict[str, bytes],
    store: Path,
    finalization: int,
    idempotency: int,
) -> None:
    early = switched(True, True, bool(finalization), bool(idempotency))
    run_crawl(list(site), store, settings=early)
    for settings in (early, {}, {}, early):
        crawl = run_crawl(list(site), store, settings=settings)
        assert {entry["status"] for entry in crawl.files.values()} == {"uptodate"}
        assert not loud(crawl)
        assert files_in(store) == stock
    confirmed = run_crawl(list(site), store, settings=ALWAYS)
    assert files_in(store) == stock
    assert not loud(confirmed)


def test_names_only_changed_and_missing_files_are_fetched_again(origin: Origin, store: Path) -> None:
    """R77 without blobs: what was changed from outside is kept aside, what is gone is fetched."""
    names = switched(True, True, False, True)
    urls = [origin.put(f"/{name}.bin", name.encode() * 500) for name in "abc"]
    first = run_crawl(urls, store, settings=names)
    changed, gone = (store / first.files[url]["path"] for url in urls[:2])
    changed.write_bytes(b"another program's work")
    gone.unlink()
    again = run_crawl(urls, store, settings=names)
    assert [again.files[url]["status"] for url in urls] == ["downloaded", "downloaded", "uptodate"]
    assert {line.split("WARNING: ")[1].split(":")[0] for line in loud(again)} == {"bad-name", "name-missing"}
    assert changed.read_bytes() == b"a" * 500
    assert gone.read_bytes() == b"b" * 500
    aside = [path.read_bytes() for path in (store / ".streaming" / "quarantine").iterdir()]
    assert b"another program's work" in aside


def test_names_only_a_new_representation_takes_the_old_ones_place(origin: Origin, store: Path) -> None:
    names = {**switched(True, True, False, True), **ALWAYS}
    url = origin.put("/page.bin", b"old" * 100)
    run_crawl([url], store, settings=names)
    origin.put("/page.bin", b"new" * 200)
    crawl = run_crawl([url], store, settings=names)
    assert (store / crawl.files[url]["path"]).read_bytes() == b"new" * 200
    assert not loud(crawl)
    assert run_crawl([url], store, settings=names).files[url]["reason"] == "not-modified"


@pytest.mark.parametrize("finalization", [True, False])
@pytest.mark.parametrize("idempotency", [True, False])
def test_a_killed_crawl_goes_on_in_any_phase(
    slow: WebServer, store: Path, finalization: bool, idempotency: bool
) -> None:
    settings = {
        **switched(True, True, finalization, idempotency),
        "STREAMING_CHECKPOINT_BYTES": MIB,
        "LOG_LEVEL": "INFO",
    }
    url, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()
    killed = run_crawl([url], store, settings=settings, kill_when=lambda: kept(store) >= 4 * MIB)
    assert killed.code == -9
    assert_sound(store, [])
    done = kept(store)
    crawl = run_crawl([url], store, settings=settings)
    assert crawl.files[url]["resumed_from"] == done >= 4 * MIB
    assert (store / crawl.files[url]["path"]).read_bytes() == body
    assert parts(store) == []


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    from support.servers import nginx

    with nginx(tmp_path_factory.mktemp("slow"), rate="24m") as server:
        server.put("big.bin", random.Random(3).randbytes(16 * MIB))
        yield server


@pytest.mark.parametrize("finalization", [True, False])
def test_two_crawls_without_a_ledger_end_with_the_right_bytes(
    slow: WebServer, store: Path, finalization: bool
) -> None:
    """They know nothing of each other: each downloads, none writes into the other's part."""
    settings = {**switched(True, True, finalization, False), "STREAMING_CHECKPOINT_BYTES": MIB}
    url, body = slow.url("slow/big.bin"), (slow.root / "big.bin").read_bytes()
    others: list[Crawl] = []

    def second(_process: Any) -> None:
        wait_until(lambda: kept(store) >= 2 * MIB)
        others.append(run_crawl([url], store, settings=settings))

    first = run_crawl([url], store, settings=settings, meanwhile=second)
    for crawl in (first, *others):
        assert crawl.files[url]["checksum"] == sha256(body)
    assert files_in(store) == {first.files[url]["path"]: body}
    assert parts(store) == []


def test_gc_reads_what_was_stored_without_the_ledger_first(origin: Origin, store: Path) -> None:
    """A blob that a crawl without a ledger stored is no orphan."""
    url = origin.put("/a.bin", b"a" * 999)
    run_crawl([origin.put("/b.bin", b"b")], store)
    run_crawl([url], store, settings={"STREAMING_IDEMPOTENCY_ENABLED": False})
    assert json.loads((store / ".streaming" / "store.json").read_text())["unrecorded"] is True
    crawl = run_crawl([origin.url("/b.bin")], store)
    assert "the store has been read: 1 blobs recorded" in crawl.log
    assert json.loads((store / ".streaming" / "store.json").read_text())["unrecorded"] is False


def test_status_says_what_is_off_and_why(store: Path) -> None:
    off = [f"-sSTREAMING_{flag}_ENABLED=0" for flag in ("SCHEMA", "FINALIZATION")]
    done = scrapy("streaming", f"-sFILES_STORE={store}", *off, "status", "--json", cwd=store.parent)
    found = json.loads(done.stdout)
    why = "disabled (STREAMING_SCHEMA_ENABLED is off)"
    assert (found["Streaming"], found["Idempotency"], found["Schema"]) == ("enabled", why, why)
    assert found["Publishing by content"] == "disabled (STREAMING_FINALIZATION_ENABLED is off)"
    assert found["Database"] == "not opened (STREAMING_SCHEMA_ENABLED is off)"


NO_SQLALCHEMY = "import sys\nsys.modules['sqlalchemy'] = None\n"


def test_without_sqlalchemy_the_first_three_phases_work(
    site: dict[str, bytes], stock: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_SQLALCHEMY)
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(TESTS), os.environ.get("PYTHONPATH", "")])
    }
    for kind in ("downloaded", "uptodate"):
        crawl = run_crawl(list(site), store, env=env)
        assert files_in(store) == stock
        assert {entry["status"] for entry in crawl.files.values()} == {kind}
        assert crawl.log.count("no job is recorded (SQLAlchemy is not installed)") == 1


LOADED = """
import sys
from scrapy.crawler import Crawler
from scrapy import Spider
crawler = Crawler(Spider, {"ADDONS": {"scrapy_streaming.Addon": 300}, "STREAMING_ENABLED": False})
crawler.addons.load_settings(crawler.settings)
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("scrapy_streaming", "sqlalchemy")))
"""


def test_switched_off_the_add_on_imports_none_of_the_components() -> None:
    """C5: no cost at the start."""
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert eval(done.stdout) == [
        "scrapy_streaming",
        "scrapy_streaming.addon",
        "scrapy_streaming.exceptions",
        "scrapy_streaming.reasons",
        "scrapy_streaming.redaction",
        "scrapy_streaming.setting_kinds",
        "scrapy_streaming.settings",
    ]


GUIDE = TESTS.parent / "docs" / "adoption.md"


def snippet(heading: str) -> dict[str, Any]:
    """Return the settings that the guide shows under a heading."""
    section = GUIDE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    return {name: value for name, value in found.items() if name.isupper()}


def test_the_guide_s_phases_do_what_it_says(
    site: dict[str, bytes], stock: dict[str, bytes], tmp_path: Path
) -> None:
    """Each phase by the guide's own settings, on a store of its own; the figures it names."""
    off = run_crawl(list(site), tmp_path / "off", settings={**snippet("Before: what it is today"), **FILES})
    assert files_in(tmp_path / "off") == stock
    assert not [name for name in off.stats if name.startswith("streaming/")]

    settings, count = snippet("Phase 1: plan each request, judge each answer"), len(site)
    found = {}
    for phase in ("asks", "streams", "by-content", "remembers"):
        store = tmp_path / phase
        first, second = (run_crawl(list(site), store, settings=settings) for _ in range(2))
        assert files_in(store) == stock
        found[phase] = first, second
        if phase != "remembers":
            del settings[next(name for name in settings if name.startswith("STREAMING_"))]
    assert found["asks"][0].stat("streaming/resume_decisions_made") == 2 * count
    assert "falling back to buffered bodies" not in found["streams"][0].log
    assert found["by-content"][0].stat("streaming/deduplicated") == 1
    assert found["remembers"][1].stat("streaming/bytes_saved") == sum(map(len, site.values()))
    assert settings == {"ADDONS": snippet("Before: what it is today")["ADDONS"]}


def test_verify_reads_names_where_there_are_no_blobs(origin: Origin, store: Path) -> None:
    """And ``--repair`` makes blobs of them where those are on."""
    urls = [origin.put(f"/{name}.bin", name.encode() * 500) for name in "abc"]
    crawl = run_crawl(urls, store, settings={"STREAMING_FINALIZATION_ENABLED": False})
    assert streaming(store, "verify").returncode == 0
    (store / crawl.files[urls[0]]["path"]).write_bytes(b"other")
    (store / crawl.files[urls[1]]["path"]).unlink()
    damaged = streaming(store, "verify", "--repair")
    assert damaged.returncode == 1
    assert damaged.stdout.count("missing\tsha256:") == 2
    assert list(blobs(store)) == [sha256(b"c" * 500)]
    again = run_crawl(urls, store)
    assert [again.files[url]["status"] for url in urls] == ["downloaded", "downloaded", "uptodate"]
    assert streaming(store, "verify").returncode == 0


BACK = {
    "phase-3": switched(True, True, True, False),
    "phase-2": switched(True, True, False, False),
    "phase-1": switched(True, False, False, False),
    "stock": {"STREAMING_ENABLED": False, **FILES},
}


@pytest.mark.parametrize("mode", ["auto", "copy"])
@pytest.mark.parametrize("back", BACK)
def test_what_an_earlier_phase_fetched_anew_is_never_turned_back(
    origin: Origin, store: Path, back: str, mode: str
) -> None:
    """What stands under a name and is not what was recorded may be newer: the server is asked."""
    links = {"STREAMING_LINK_MODE": mode}
    urls = [
        origin.put(f"/{name}.bin", b"version 1") for name in "ab"
    ]  # one of them is the blob's second name
    first = run_crawl(urls, store, settings=links)
    for url in urls:
        origin.put(url.removeprefix(origin.url("")), b"version 2")
        (store / first.files[url]["path"]).unlink()
    run_crawl(urls, store, settings={**links, **BACK[back]})
    origin.forget()
    for number in range(2):
        again = run_crawl(urls, store, settings=links)
        for url in urls:
            assert (store / again.files[url]["path"]).read_bytes() == b"version 2"
            assert again.files[url]["checksum"] == sha256(b"version 2")
        assert len(origin.requests) == 2, number
    assert not loud(again)


def test_a_name_that_was_written_to_costs_one_request(origin: Origin, store: Path) -> None:
    """R77: the server says that nothing changed, and the name is made again; the other bytes are kept."""
    url = origin.put("/a.bin", b"right")
    first = run_crawl([url], store, settings={"STREAMING_LINK_MODE": "copy"})
    (store / first.files[url]["path"]).write_bytes(b"wrong")
    origin.forget()
    again = run_crawl([url], store, settings={"STREAMING_LINK_MODE": "copy"})
    assert again.files[url]["reason"] == "not-modified"
    assert (store / again.files[url]["path"]).read_bytes() == b"right"
    assert [asked.fields.get("if-none-match") is not None for asked in origin.requests] == [True]
    assert again.stat("streaming/tampered/bad-name") == 1


@pytest.mark.parametrize(
    "on", [(True, False, False, False), (True, False, True, True)], ids=["phase-1", "io-off"]
)
def test_a_buffered_body_without_a_marked_end_is_stored_once_it_came_twice(
    origin: Origin, store: Path, on: tuple[bool, ...]
) -> None:
    """R33, as stock stores it; one that comes differently each time is refused."""

    def unmarked(asked: Asked, resource: Resource) -> Answer:
        return Answer(200, {}, resource.body, end="close", length=None)

    def differs(asked: Asked, resource: Resource) -> Answer:
        return Answer(200, {}, random.randbytes(500), end="close", length=None)

    url = origin.put("/cgi", b"x" * 5000, default=unmarked)
    other = origin.put("/random", b"y", default=differs)
    crawl = run_crawl([url, other], store, settings=switched(*on))
    assert (store / crawl.files[url]["path"]).read_bytes() == b"x" * 5000
    assert (crawl.files[url]["proof"], crawl.files[url]["etag"]) == ("unproven", None)
    assert len(origin.asked("/cgi")) == 2
    assert other not in crawl.files
