"""Bad input: one clear line each; nothing is lost, nothing is made that should not be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.beside import loud
from support.crawl import Crawl, assert_stored, run_crawl
from support.origin import Origin
from support.servers import free_port

BAD = {
    "STREAMING_CHECKPOINT_BYTES": ("a lot", "1 or more"),
    "STREAMING_LINK_MODE": ("magic", "one of auto, reflink, hardlink, symlink, copy, none"),
    "STREAMING_STALL_TIMEOUT": (0, "seconds"),
    "STREAMING_ENABLED": ("perhaps", "True or False"),
    "STREAMING_REVALIDATE": ("sometimes", "one of always, expired, never"),
}


def said(crawl: Crawl, what: str) -> list[str]:
    return [line for line in crawl.log.splitlines() if what in line]


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_setting_stops_the_crawl_with_one_line(store: Path, name: str) -> None:
    value, allowed = BAD[name]
    crawl = run_crawl([], store, settings={name: value}, check=False)
    assert crawl.code not in (0, -9)
    (line,) = crawl.log.strip().splitlines()
    assert f"{name}={value!r}" in line
    assert allowed in line
    assert not store.exists()


def test_an_unreadable_environment_variable_is_named_as_it_stands_there(store: Path) -> None:
    crawl = run_crawl([], store, env={"SCRAPY_STREAMING_RESTARTS": "-1"}, check=False)
    assert crawl.code != 0
    (line,) = crawl.log.strip().splitlines()
    assert "SCRAPY_STREAMING_RESTARTS='-1'" in line


def test_a_setting_on_the_command_line_wins_over_the_environment(origin: Origin, store: Path) -> None:
    url = origin.put("/a", b"a")
    options = ["-s", "STREAMING_LINK_MODE=copy"]
    env = {"SCRAPY_STREAMING_LINK_MODE": "symlink"}
    for how, link in (({"options": options, "env": env}, False), ({"env": env}, True)):
        target = store / str(link)
        target.parent.mkdir(exist_ok=True)
        crawl = run_crawl([url], target, settings={"STREAMING_LINK_MODE": "none"}, **how)
        assert (target / crawl.files[url]["path"]).is_symlink() == link


def stopped(crawl: Crawl, store: Path) -> str:
    """The crawl stopped at its start; return the one line that says why."""
    assert crawl.code == 1
    assert crawl.items == []
    assert "Traceback" not in crawl.log
    [line] = [line for line in said(crawl, str(store)) if "FILES_STORE'" not in line]
    return line


def test_a_store_that_cannot_be_written_stops_the_crawl(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    url = origin.put("/a", b"a")
    beneath = {"FILES_STORE": str(tmp_path / "file" / "store")}
    crawl = run_crawl([url], tmp_path / "x", settings=beneath, check=False)
    assert "cannot be used" in stopped(crawl, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "no directory"
    assert origin.requests == []


def test_a_store_that_cannot_be_used_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    beneath = {"FILES_STORE": str(tmp_path / "file" / "store")}
    crawl = run_crawl([], tmp_path / "x", settings=beneath, check=False)
    assert crawl.code != 0
    assert "Traceback" not in crawl.log


def test_a_store_of_another_format_is_left_alone(origin: Origin, store: Path) -> None:
    text = '{"format": 99, "store_id": "x"}'
    (store / ".streaming").mkdir(parents=True)
    (store / ".streaming" / "store.json").write_text(text)
    crawl = run_crawl([origin.put("/a", b"a")], store, check=False)
    assert "store.json" in stopped(crawl, store)
    assert (store / ".streaming" / "store.json").read_text() == text
    assert origin.requests == []


def test_a_ledger_that_is_none_is_left_alone(origin: Origin, store: Path) -> None:
    """F13."""
    url = origin.put("/a", b"a")
    run_crawl([url], store)
    ledger = store / ".streaming" / "ledger.sqlite3"
    garbage = os.urandom(ledger.stat().st_size)
    ledger.write_bytes(garbage)
    crawl = run_crawl([url], store, check=False)
    assert "ledger.sqlite3" in stopped(crawl, store)
    assert ledger.read_bytes() == garbage


@pytest.mark.parametrize("reactor", [True, False])
def test_a_ledger_that_is_gone_is_reported_in_one_line(origin: Origin, store: Path, reactor: bool) -> None:
    """C17."""
    url = origin.put("/a", b"a")
    run_crawl([url], store)
    for path in (store / ".streaming").glob("ledger.sqlite3*"):
        path.unlink()
    crawl = run_crawl([url], store, settings={"TWISTED_REACTOR_ENABLED": reactor}, check=False)
    line = stopped(crawl, store)
    assert "CRITICAL: the crawl does not start: there is no ledger" in line
    assert loud(crawl) == [line]


@pytest.mark.parametrize("missing", ["server", "driver"])
def test_a_database_that_is_not_there_is_reported_in_one_line(store: Path, missing: str) -> None:
    """C17."""
    extensions = {"support.components.WithoutPsycopg": -1} if missing == "driver" else {}
    url = f"postgresql+psycopg://crawler:secret@127.0.0.1:{free_port()}/crawl"
    crawl = run_crawl(
        [], store, settings={"STREAMING_DATABASE_URL": url, "EXTENSIONS": extensions}, check=False
    )
    assert (crawl.code, crawl.items) == (1, [])
    assert "Traceback" not in crawl.log
    [line] = loud(crawl)
    assert "CRITICAL: the crawl does not start: " in line
    assert ("psycopg" if missing == "driver" else "Connection refused") in line
    assert "secret" not in line


def test_other_schemes_go_to_scrapy_as_always(origin: Origin, store: Path, tmp_path: Path) -> None:
    (tmp_path / "local.txt").write_bytes(b"local")
    urls = ["data:text/plain,hello", (tmp_path / "local.txt").as_uri(), "gopher://127.0.0.1/x"]
    good = origin.put("/good", b"good")
    stock = run_crawl(
        [*urls, good], tmp_path / "stock",
        settings={"ADDONS": {}, "ITEM_PIPELINES": {"scrapy.pipelines.files.FilesPipeline": 1}},
    )  # fmt: skip
    crawl = run_crawl([*urls, good], store)
    assert set(crawl.files) == set(stock.files) == {*urls[:2], good}
    for url, entry in crawl.files.items():
        assert entry["path"] == stock.files[url]["path"]
    assert_stored(store, crawl.files[urls[0]], b"hello")
    assert_stored(store, crawl.files[urls[1]], b"local")


def test_an_expected_digest_that_cannot_be_read_fails_its_file_alone(origin: Origin, store: Path) -> None:
    bad, good = origin.put("/bad", b"bad") + "#sha256=xyz", origin.put("/good", b"good")
    crawl = run_crawl([bad, good], store)
    assert set(crawl.files) == {good}
    assert origin.asked("/bad") == []


def test_an_unknown_streaming_setting_is_reported_with_the_nearest(origin: Origin, store: Path) -> None:
    crawl = run_crawl([origin.put("/a", b"a")], store, settings={"STREAMING_FSNYC": True})
    assert said(crawl, "STREAMING_FSNYC is no setting of scrapy-streaming; did you mean STREAMING_FSYNC?")
    assert len(crawl.files) == 1


def test_without_a_store_nothing_is_on_and_the_crawl_runs(store: Path) -> None:
    crawl = run_crawl([{"name": "no files"}], store, settings={"FILES_STORE": ""})
    assert crawl.items == [{"name": "no files"}]
    assert json.dumps(crawl.stats).count("streaming/") == 0


def test_names_from_the_url_never_leave_the_store(origin: Origin, store: Path) -> None:
    """F19, short form: a file_path() that takes what the URL says."""
    paths = ["/%2e%2e/%2e%2e/out", "/a/..%2f..%2f..%2fout2", "//etc/out3", "/x%00y", "/" + "n" * 300]
    urls = [origin.put(path, path.encode()) for path in paths]
    settings = {"ITEM_PIPELINES": {"support.components.OwnPath": 1}}
    run_crawl(urls, store, settings=settings)
    outside = [p for p in store.parent.rglob("*out*") if store not in p.parents]
    assert outside == []
    assert not Path("/etc/out3").exists()
