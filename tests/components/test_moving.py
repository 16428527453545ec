"""``scrapy streaming adopt``, ``export``, ``import`` and ``detach`` on real stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from support.beside import FILES, files_in
from support.command import COMMAND, environment, ok, streaming
from support.crawl import Crawl, assert_stored, blobs, run_crawl, wait_until
from support.origin import Answer, Asked, Origin, Resource, put_files
from support.stores import open_store

from scrapy_streaming.storage import maintenance

STOCK = {**FILES, "ADDONS": {}}


def seen(store: Path) -> dict[str, tuple[bytes, int]]:
    """Return the bytes and the time of each name."""
    return {name: (body, (store / name).stat().st_mtime_ns) for name, body in files_in(store).items()}


def assert_nothing_fetched(origin: Origin, crawl: Crawl, store: Path, bodies: dict[str, bytes]) -> None:
    assert origin.requests == []
    for url, body in bodies.items():
        assert_stored(store, crawl.files[url], body)
        assert crawl.files[url]["status"] == "uptodate"


# -- adopt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("mode", ["auto", pytest.param("copy", marks=pytest.mark.soak)])
def test_a_store_is_adopted_ahead_of_the_crawl(origin: Origin, store: Path, mode: str, count: int) -> None:
    """C6: each file is hashed once, by the verb; it goes on where it was, and touches no name."""
    bodies = put_files(origin, count)
    run_crawl(list(bodies), store, settings=STOCK)
    origin.forget()
    before = seen(store)
    how = ["-s", f"STREAMING_LINK_MODE={mode}", "adopt"]
    first = json.loads(ok(streaming(store, *how, "--json")))
    total = sum(map(len, bodies.values()))
    numbers = {"files": count, "bytes": total, "adopted": count, "known": 0, "refused": []}
    assert first == numbers
    assert len(blobs(store)) == len(set(bodies.values()))
    second = ok(streaming(store, *how))
    assert second == f"adopt: {count} files, {total} bytes: 0 adopted, {count} were known, 0 refused\n"
    assert seen(store) == before
    counting = {**FILES, "STREAMING_LINK_MODE": mode, "EXTENSIONS": {"support.hooks.CountsHashing": 1}}
    crawl = run_crawl(list(bodies), store, settings=counting)
    assert crawl.stat("streaming/decision/adopted") == count
    assert crawl.stat("test/hashed") == 0, "the crawl has only to look up"
    assert_nothing_fetched(origin, crawl, store, bodies)
    assert ok(streaming(store, "health")).startswith("status\thealthy")


def test_what_adopt_cannot_take_is_named(store: Path, tmp_path: Path) -> None:
    """E2, F24: each with the word for why; the exit code is 1; nothing of it is touched."""
    (store / "full" / "deep").mkdir(parents=True)
    (store / "full" / "good.pdf").write_bytes(b"good")
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    (store / "full" / "link").symlink_to(outside)
    (store / "full" / "deep" / "out").symlink_to(tmp_path)
    os.mkfifo(store / "full" / "deep" / "pipe")
    (store / "full" / f".{'0' * 32}.tmp").write_bytes(b"ours")
    expected = {"full/link": "not-regular", "full/deep/out": "not-regular", "full/deep/pipe": "not-regular"}
    with (store / "full" / "busy.pdf").open("wb"):
        done = json.loads(ok(streaming(store, "adopt", "--json"), 1))
    expected["full/busy.pdf"] = "being-written"
    assert {one["path"]: one["reason"] for one in done["refused"]} == expected
    assert (done["files"], done["adopted"]) == (5, 1)
    assert outside.stat().st_nlink == 1
    text = ok(streaming(store, "adopt"), 1).splitlines()
    assert "not-regular\tfull/link" in text
    assert text[-1] == "adopt: 5 files, 4 bytes: 1 adopted, 1 were known, 3 refused"


def test_adopt_without_a_folder_says_so(store: Path) -> None:
    done = streaming(store, "adopt")
    ok(done, 1)
    assert "store-missing" in done.stderr
    assert not store.exists()


def test_the_ledger_among_the_files_is_no_file_of_the_stores(store: Path) -> None:
    store.mkdir()
    (store / "a.pdf").write_bytes(b"a")
    url = f"sqlite:///{store / 'jobs.sqlite3'}"
    done = json.loads(ok(streaming(store, "adopt", "--json", url=url)))
    assert (done["files"], done["refused"]) == (1, [])
    assert (store / "jobs.sqlite3").stat().st_nlink == 1


def test_adopt_that_is_interrupted_goes_on(store: Path) -> None:
    """Ctrl-C: what was done is kept; a kill costs a batch at most."""
    (store / "full").mkdir(parents=True)
    for number in range(300):
        (store / "full" / f"{number}").write_bytes(b"%d" % number)
    (store / "full" / "deep").mkdir()
    with (store / "full" / "deep" / "large").open("wb") as stream:  # the last; it takes minutes to read
        stream.truncate(200 << 30)
    command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "adopt", "--json"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        wait_until(lambda: reads(running.pid, "large"))
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "adopt: interrupted; what was done so far is kept" in errors
    assert time.monotonic() - began < 20
    (store / "full" / "deep" / "large").unlink()
    done = noted(store)
    again = json.loads(ok(streaming(store, "adopt", "--json")))
    assert again["files"] == 300
    assert again["known"] == done == 256


def reads(pid: int, name: str) -> bool:
    """Whether a process has a file of that name open."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if fd.readlink().name == name:
                return True
    return False


def noted(store: Path) -> int:
    """Count the files that were noted, with a look of its own."""
    import sqlite3

    try:
        with closing(sqlite3.connect(f"file:{store}/.streaming/ledger.sqlite3?mode=ro", uri=True)) as ledger:
            return int(ledger.execute("SELECT count(*) FROM ss_operation WHERE kind = 'adopt'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def test_files_are_noted_in_either_database(store: Path, ledger_url: str) -> None:
    store.mkdir()
    (store / "a\udcff.pdf").write_bytes(b"a")
    for known in (0, 1):
        with closing(open_store(store, ledger_url)) as opened:
            done = maintenance.adopt(opened, refused=refuse)
        assert (done.files, done.known) == (1, known)


def refuse(path: str, reason: str) -> None:
    raise AssertionError(path, reason)


# -- export and import -----------------------------------------------------------------------


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count", [12, pytest.param(2000, marks=pytest.mark.soak)])
def test_an_export_enters_an_empty_ledger(origin: Origin, tmp_path: Path, store: Path, count: int) -> None:
    """Exactly: exported again it is the same; twice is once; the crawl fetches nothing."""
    bodies = put_files(origin, count)
    tagged = origin.put("/tagged.pdf", b"tagged", default=conditional('"v1"'))
    bodies[tagged] = b"tagged"
    run_crawl([url for url in bodies if url != tagged], store, settings=STOCK)
    old = store / files_of(store)[0]
    os.utime(old, (time.time() - 7 * 86400,) * 2)
    run_crawl(list(bodies), store, settings=FILES)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    said = ok(streaming(store, "export", str(first)))
    total = sum(map(len, bodies.values()))
    assert said == f"export: {len(bodies)} lines, of files of {total} bytes, in {first}\n"
    shutil.rmtree(store / ".streaming")
    shutil.rmtree(store / "blobs")
    origin.forget()
    done = json.loads(ok(streaming(store, "import", str(first), "--json")))
    assert {name: done[name] for name in ("files", "imported", "known", "refused")} == {
        "files": len(bodies), "imported": len(bodies), "known": 0, "refused": [],
    }  # fmt: skip
    twice = ok(streaming(store, "import", str(first)))
    assert twice.startswith(
        f"import: {len(bodies)} files, {total} bytes: 0 imported, {len(bodies)} were known"
    )
    ok(streaming(store, "export", str(second)))
    assert lines_of(second) == lines_of(first)
    [line] = [line for line in lines_of(second) if line["url"] == tagged]
    assert (line["etag"], line["path"] in files_of(store), line["proof"]) == ('"v1"', True, "length")
    crawl = run_crawl(list(bodies), store, settings=FILES)
    assert_nothing_fetched(origin, crawl, store, bodies)
    assert {entry["reason"] for entry in crawl.files.values()} == {"stored"}
    always = run_crawl([tagged], store, settings=FILES | {"STREAMING_REVALIDATE": "always"})
    assert [asked.fields.get("if-none-match") for asked in origin.requests] == ['"v1"']
    assert always.files[tagged]["reason"] == "not-modified"
    assert ok(streaming(store, "health")).startswith("status\thealthy")


def conditional(tag: str) -> Any:
    """Answer with *tag*, or 304 to it."""

    def answer(asked: Asked, resource: Resource) -> Answer:
        if asked.fields.get("if-none-match") == tag:
            return Answer(304, {"ETag": tag})
        return Answer(200, {"ETag": tag, "Content-Type": "application/pdf"}, resource.body)

    return answer


def files_of(store: Path) -> list[str]:
    return sorted(files_in(store))


def test_an_export_enters_a_ledger_that_was_rebuilt(origin: Origin, tmp_path: Path, store: Path) -> None:
    """Though a ledger that was put back asks again what was done before (I16)."""
    bodies = put_files(origin, 3)
    run_crawl(list(bodies), store)
    export = tmp_path / "export.jsonl"
    ok(streaming(store, "export", str(export)))
    (store / ".streaming" / "ledger.sqlite3").unlink()
    ok(streaming(store, "rebuild"))
    origin.forget()
    ok(streaming(store, "import", str(export)))
    assert_nothing_fetched(origin, run_crawl(list(bodies), store), store, bodies)


def test_an_import_changes_nothing_that_is_newer(origin: Origin, tmp_path: Path, store: Path) -> None:
    url = origin.put("/a.pdf", b"old")
    run_crawl([url], store)
    export = tmp_path / "export.jsonl"
    ok(streaming(store, "export", str(export)))
    origin.put("/a.pdf", b"newer")
    run_crawl([url], store, settings={"STREAMING_REVALIDATE": "always"})
    said = ok(streaming(store, "import", str(export)), 1)
    assert said.splitlines()[0].split("\t")[:3] == ["1", "name-changed", url]
    assert "0 imported, 0 were known, 1 refused, 1 name-changed" in said
    document = lines_of(export)[0] | {"path": None}
    export.write_text(json.dumps(document) + "\n")
    assert "0 imported, 1 were known" in ok(streaming(store, "import", str(export)))
    origin.forget()
    assert_stored(store, run_crawl([url], store).files[url], b"newer")
    assert origin.requests == []


def test_what_cannot_be_imported_is_named_by_its_line(origin: Origin, tmp_path: Path, store: Path) -> None:
    """And the rest is imported."""
    urls = list(put_files(origin, 4))
    run_crawl(urls, store)
    export = tmp_path / "export.jsonl"
    ok(streaming(store, "export", str(export)))
    good = lines_of(export)
    (store / good[2]["path"]).unlink()
    (store / "blobs" / "sha256" / good[2]["digest"][7:9] / good[2]["digest"][7:]).unlink()
    shutil.rmtree(store / ".streaming")
    bad = [
        good[0],
        good[0] | {"format": "scrapy-streaming/9"},
        good[0] | {"size": "x"},
        good[0] | {"size": 7, "url": "http://127.0.0.1/other"},
        good[2],
        good[1] | {"path": "../../etc/passwd"},
        good[0] | {"work_id": "\0"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in bad) + '{"format": "cut'
    export.write_text(text + "\n[1, 2]\nnonsense\n" + json.dumps(good[3]) + "\n")
    said = ok(streaming(store, "import", str(export)), 1).splitlines()
    assert [line.split("\t")[:2] for line in said[:-1]] == [
        ["2", "newer-format"],
        ["3", "unreadable"],
        ["4", "length-mismatch"],
        ["5", "blob-missing"],
        ["7", "unusable-id"],
        ["8", "unreadable"],
    ]
    assert said[-1].startswith("import: ")
    assert "3 imported" in said[-1], "with what is named outside the store by its blob"


@pytest.mark.parametrize("feed", ["indented.json", "feed.csv", "stdin"])
def test_a_feed_of_files_pipeline_is_imported(origin: Origin, tmp_path: Path, store: Path, feed: str) -> None:
    """As Scrapy's own exporters write it; the crawl fetches nothing."""
    bodies, path = put_files(origin, 10), tmp_path / feed.replace("stdin", "feed.jsonl")
    urls = list(bodies)
    items = [{"file_urls": urls[:3]}, {"file_urls": urls[3:]}, {"file_urls": [origin.url("/missing")]}]
    kind = {".jsonl": "jsonlines"}.get(path.suffix, path.suffix[1:])
    options = {"format": kind, "indent": 4 if feed.startswith("indented") else None}
    run_crawl(items, store, settings=STOCK | {"FEEDS": {str(path): options}})
    origin.forget()
    before = seen(store)
    if feed == "stdin":
        command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "import", "-", "--work-id", "files"]
        with path.open("rb") as stream:
            done = subprocess.run(
                command, stdin=stream, env=environment(), capture_output=True, text=True, check=False
            )
    else:
        done = streaming(store, "import", str(path), "--work-id", "files")
    total = sum(map(len, bodies.values()))
    assert ok(done) == f"import: 10 files, {total} bytes: 10 imported, 0 were known, 0 refused\n"
    assert seen(store) == before
    again = ok(streaming(store, "-s", "STREAMING_WORK_ID=files", "import", str(path)))
    assert "0 imported, 10 were known" in again
    crawl = run_crawl(urls, store, settings=FILES)
    assert_nothing_fetched(origin, crawl, store, bodies)
    assert {entry["reason"] for entry in crawl.files.values()} == {"stored"}


def test_files_of_a_feed_that_are_others_by_now(origin: Origin, tmp_path: Path, store: Path) -> None:
    """The checksum is compared; the field may have another name; each has its job's work id."""
    urls, path = list(put_files(origin, 4)), tmp_path / "feed.jsonl"
    settings = STOCK | {"FEEDS": {str(path): {"format": "jsonlines"}}, "FILES_RESULT_FIELD": "papers"}
    crawl = run_crawl([{"file_urls": [url]} for url in urls], store, settings=settings)
    papers = {entry["url"]: entry["path"] for item in crawl.items for entry in item["papers"]}
    (store / papers[urls[0]]).write_bytes(b"changed")
    (store / papers[urls[1]]).unlink()
    with path.open("a") as stream:
        stream.write('{"papers": [{"url": "http://h/x"}, {"path": "y"}, 7]}\n{"papers": "z"}\n{"title": 1}\n')
    wrong = streaming(store, "-s", "FILES_RESULT_FIELD=papers", "import", str(path))
    assert "--work-id SPIDER" in wrong.stderr
    ok(wrong, 2)
    said = ok(streaming(store, "import", str(path), "--field", "papers", "--work-id", "w"), 1).splitlines()
    numbered = {line.split("\t")[2].split(" ")[0]: line.split("\t")[:2] for line in said[:-1]}
    order = [json.loads(line)["papers"][0]["url"] for line in path.read_text().splitlines()[:4]]
    assert numbered[urls[0]] == [str(order.index(urls[0]) + 1), "checksum-mismatch"]
    assert numbered[urls[1]] == [str(order.index(urls[1]) + 1), "not-found"]
    assert sorted(line.split("\t")[1] for line in said[:-1] if line[0] in "56") == [
        "no-path", "no-url", "unreadable", "unreadable",
    ]  # fmt: skip
    assert "2 imported" in said[-1]


def test_import_says_what_it_cannot_read(store: Path, tmp_path: Path) -> None:
    store.mkdir()
    done = streaming(store, "import", str(tmp_path / "none.jsonl"))
    ok(done, 1)
    assert "none.jsonl" in done.stderr
    (tmp_path / "empty").write_text("\n\n")
    assert "0 files" in ok(streaming(store, "import", str(tmp_path / "empty")))


def test_export_prints_to_a_pipe(store: Path) -> None:
    from support.stores import fetch

    with closing(open_store(store)) as crawl:
        fetch(crawl, 1, b"body")
    done = streaming(store, "export", "-")
    [line] = ok(done).splitlines()
    assert json.loads(line)["url"] == "https://example.org/1"
    assert done.stderr == "export: 1 lines, of files of 4 bytes\n"


# -- detach ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "hardlink", "symlink"])
def test_after_detach_blobs_and_ledger_can_be_deleted(origin: Origin, store: Path, mode: str) -> None:
    """And ``FilesPipeline`` finds every name, as it was; twice is once."""
    bodies = put_files(origin, 20)
    settings = FILES | {"STREAMING_LINK_MODE": mode}
    crawl = run_crawl(list(bodies), store, settings=settings)
    names = {url: store / entry["path"] for url, entry in crawl.files.items()}
    before, gone = seen(store), names.popitem()[1]
    (store / "mine.txt").write_text("mine")
    (store / "mine.link").symlink_to("mine.txt")
    os.link(store / "mine.txt", store / "mine.two")
    inode = (store / "mine.txt").stat().st_ino
    gone.unlink()
    shared = sum(path.is_symlink() or path.stat().st_nlink > 1 for path in names.values())
    first = json.loads(ok(streaming(store, "detach", "--json")))
    assert (first["detached"], first["made"], first["refused"]) == (shared, 1, [])
    assert first["remove"] == [str(store / "blobs"), str(store / ".streaming")]
    for path in (*names.values(), gone):
        assert (path.is_symlink(), path.stat().st_nlink) == (False, 1)
    assert (store / "mine.two").stat().st_ino == inode, "what is none of ours stays"
    assert (store / "mine.link").is_symlink()
    text = ok(streaming(store, "detach")).splitlines()
    assert text[0].startswith("detach: 23 names: 0 given bytes of their own, 0 made again, 23 had them, 0 ")
    again = run_crawl(list(bodies), store, settings=settings)
    assert {entry["status"] for entry in again.files.values()} == {"uptodate"}, "nobody need leave"
    ok(streaming(store, "detach"))
    assert text[1] == f"then, without the add-on in ADDONS: rm -r {store}/blobs {store}/.streaming"
    subprocess.run(["sh", "-c", text[1].partition(": ")[2]], check=True)
    assert {name: what for name, what in seen(store).items() if name in before} == before
    origin.forget()
    stock = run_crawl(list(bodies), store, settings=STOCK)
    assert {entry["status"] for entry in stock.files.values()} == {"uptodate"}
    assert origin.requests == []


def test_detach_says_what_still_needs_its_blob(origin: Origin, store: Path) -> None:
    urls = list(put_files(origin, 3))
    crawl = run_crawl(urls, store, settings={"STREAMING_LINK_MODE": "symlink"})
    damaged, missing = (store / crawl.files[url]["path"] for url in urls[:2])
    missing.resolve().unlink()
    damaged.resolve().chmod(0o644)
    damaged.resolve().write_bytes(b"damaged")
    damaged.unlink()
    done = json.loads(ok(streaming(store, "detach", "--json"), 1))
    assert {(store / one["path"], one["reason"]) for one in done["refused"]} == {
        (damaged, "bad-blob"), (missing, "blob-missing"),
    }  # fmt: skip
    assert (done["detached"], done["remove"]) == (1, [])
    run_crawl(urls, store, settings={"STREAMING_LINK_MODE": "none"})
    assert "\tblobs/sha256/" in ok(streaming(store, "detach"), 1)


def test_detach_is_refused_without_room_or_beside_a_crawl(origin: Origin, store: Path) -> None:
    urls = list(put_files(origin, 3))
    run_crawl(urls, store)
    before = {path: path.stat().st_ino for path in (store / "full").iterdir()}
    with closing(open_store(store)) as crawl:
        done = streaming(store, "detach")
        assert "store-busy" in ok(done, 1) + done.stderr
        if crawl.blobs.can_clone():
            pytest.skip("a copy needs no room here")
    done = streaming(store, "-s", f"STREAMING_MIN_FREE_BYTES={1 << 60}", "detach")
    assert "no-space" in ok(done, 1) + done.stderr
    assert {path: path.stat().st_ino for path in (store / "full").iterdir()} == before
    assert [path.name for path in store.rglob("*.tmp")] == []


def test_detach_that_is_killed_goes_on(store: Path) -> None:
    """No name is ever without its bytes."""
    from support.stores import publish

    with closing(open_store(store, STREAMING_LINK_MODE="hardlink")) as opened:
        for number in range(300):
            opened.blobs.name(publish(opened, b"%d" % number), f"full/{number}")

    def shared() -> int:
        return sum(path.stat().st_nlink > 1 for path in (store / "full").glob("[!.]*"))

    command = [*COMMAND, "streaming", "-s", f"FILES_STORE={store}", "detach"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as running:
        wait_until(lambda: shared() < 290)
        running.kill()
    left = shared()
    assert left > 0
    for number in range(300):
        assert (store / "full" / f"{number}").read_bytes() == b"%d" % number
    done = json.loads(ok(streaming(store, "detach", "--json")))
    assert (done["names"], done["detached"]) == (300, left)
    assert shared() == 0
