"""``failures``, ``check``, ``compare``: their output and exit codes, and that they change nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from support.command import environment, streaming
from support.crawl import kept, run_crawl, wait_until
from support.launch import launch
from support.origin import Answer, Origin
from support.stores import claim, fetch, key_of, open_store, sha, url_of

from scrapy_streaming.explanations import explain
from scrapy_streaming.protocol.jobs import Dead
from scrapy_streaming.storage.ledger import SCHEMA_VERSION, JobRequest

BODY = b"body" * 1000


def rows(done: subprocess.CompletedProcess[str], code: int = 0) -> list[list[str]]:
    """Return the printed rows, split at their tabs."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stderr == ""
    return [line.split("\t") for line in done.stdout.splitlines()]


def refused(done: subprocess.CompletedProcess[str], reason: str) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert f"({reason})" in line
    return line


def on_terminal(store: Path, *arguments: str) -> str:
    """Return what a verb prints on a terminal."""
    ours, theirs = pty.openpty()
    options = ["streaming", "-s", f"FILES_STORE={store}", *arguments]
    terminal = Path(os.ttyname(theirs))
    process = launch("support.command", options, env=environment(), cwd=store.parent, output=terminal)
    printed = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.01)[0]:
            printed += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert process.returncode in (0, 3, 4)
    return printed.decode().replace("\r\n", "\n")


def fill(store: Path, url: str | None) -> None:
    """Do one job and have others fail: two for good, two for now."""
    with closing(open_store(store, url, STREAMING_MAX_ATTEMPTS=1)) as crawl:
        fetch(crawl, 0, b"done")
        for number, code, permanent in (
            (1, "bad-status-404", True),
            (2, "bad-status-404", True),
            (3, "stalled", False),
            (4, "KeyError", False),
        ):
            crawl.ledger.fail(claim(crawl, number).lease, code, "why", permanent=permanent).result()


# -- failures --------------------------------------------------------------------------------


def test_failures_are_grouped_by_reason_with_the_remedy(store: Path) -> None:
    fill(store, None)
    lines = rows(streaming(store, "failures"))
    assert lines == [
        ["bad-status-404", "2", "example.org=2", url_of(1), explain("bad-status-404").remedy],
        ["KeyError", "1", "example.org=1", url_of(4), explain("KeyError").remedy],
        ["stalled", "1", "example.org=1", url_of(3), explain("stalled").remedy],
    ]
    document = json.loads(streaming(store, "failures", "--json").stdout)
    assert document["files"] == 4
    assert document["failures"][0] == {
        "reason": "bad-status-404",
        "files": 2,
        "states": {"failed": 2},
        "hosts": {"example.org": 2},
        "example": url_of(1),
        "meaning": explain("bad-status-404").meaning,
        "remedy": explain("bad-status-404").remedy,
    }
    urls = rows(streaming(store, "failures", "--urls"))
    assert urls == [[url_of(number)] for number in (1, 2, 3, 4)]
    urls = rows(streaming(store, "failures", "--urls", "--reason", "stalled"))
    assert urls == [[url_of(3)]]


def test_a_job_that_was_done_since_or_is_in_work_is_no_failure(store: Path) -> None:
    fill(store, None)
    with closing(open_store(store)) as crawl:
        fetch(crawl, 3, b"at last")
        claim(crawl, 4)
        assert [line[0] for line in rows(streaming(store, "failures"))] == ["bad-status-404"]


def test_people_see_the_reason_what_it_means_and_what_to_do(origin: Origin, store: Path) -> None:
    urls = [
        origin.put("/good", BODY),
        origin.url("/gone"),
        origin.put("/wrong", BODY) + "#sha256=" + "0" * 64,
    ]
    run_crawl([*urls, origin.url("/gone/too")], store)
    printed = on_terminal(store, "failures")
    assert printed.startswith("bad-status-404: 2 files, 127.0.0.1\n")
    for reason in ("bad-status-404", "digest-mismatch"):
        assert f"  why     {explain(reason).meaning}\n" in printed
        assert f"  to do   {explain(reason).remedy}\n" in printed
    assert re.search(rf"^  such as {re.escape(urls[1])}(/too)?$", printed, re.MULTILINE)
    assert printed.endswith("failures: 3 files; a crawl that requests them tries again\n")
    table = on_terminal(store, "check").splitlines()
    assert table[0] == "state   jobs"
    assert "failed     2" in table
    assert table[-1] == "check: 1 of 4 jobs may still come (exit code 3)"


def test_a_job_whose_workers_died_is_named_and_can_be_requeued(store: Path) -> None:
    with closing(open_store(store, STREAMING_MAX_ATTEMPTS=1)) as crawl:
        claim(crawl, 5)
        crawl.ledger.end_worker_leases(crawl.worker_id).result()
        request = JobRequest("work", "", url_of(5), sha(b"GET"))
        assert isinstance(crawl.ledger.claim(key_of(5), request).result(), Dead)
    [[reason, *_, remedy]] = rows(streaming(store, "failures"))
    assert (reason, remedy) == ("attempts-exhausted", explain("attempts-exhausted").remedy)
    assert on_terminal(store, "failures").endswith(
        "except 1 that are dead: `scrapy streaming requeue --failed` makes them ready again\n"
    )
    assert rows(streaming(store, "check"), 4)[4] == ["dead", "1"]
    assert streaming(store, "requeue", "--failed").returncode == 0
    assert rows(streaming(store, "check"), 3)[4] == ["dead", "0"]


# -- check -----------------------------------------------------------------------------------


def test_the_exit_code_says_how_the_jobs_stand(store: Path, database: str | None) -> None:
    """C19: 3 as long as something may come, then 4 while something failed, then 0."""

    def check(code: int, *arguments: str) -> list[list[str]]:
        return rows(streaming(store, "check", *arguments, url=database), code)

    fill(store, database)
    assert check(3) == [
        ["ready", "2"],
        ["leased", "0"],
        ["done", "1"],
        ["failed", "2"],
        ["dead", "0"],
        ["check: 2 of 5 jobs may still come (exit code 3)"],
    ]
    assert check(3, "--work-id", "work") == check(3)
    failures = rows(streaming(store, "failures", url=database))
    assert [line[:2] for line in failures] == [["bad-status-404", "2"], ["KeyError", "1"], ["stalled", "1"]]
    line = refused(streaming(store, "check", "--work-id", "typo", url=database), "not-found")
    assert "no job has the work id typo" in line
    with closing(open_store(store, database)) as crawl:
        for number in (3, 4):
            fetch(crawl, number, b"at last")
    [*_, last] = check(4)
    assert last == [
        "check: 2 of 5 jobs failed or are dead: `scrapy streaming failures` says why (exit code 4)"
    ]
    with closing(open_store(store, database)) as crawl:
        for number in (1, 2):
            fetch(crawl, number, b"come back")
    document = json.loads(streaming(store, "check", "--json", url=database).stdout)
    assert document["exit_code"] == 0
    assert document["jobs"] == {"ready": 0, "leased": 0, "done": 5, "failed": 0, "dead": 0}
    assert check(0)[-1] == ["check: all 5 jobs are done (exit code 0)"]


def test_reading_verbs_change_nothing_also_beside_a_crawl_and_after_a_kill(
    origin: Origin, store: Path
) -> None:
    """No row, no epoch, no worker, no log copied back; what is there is seen all the same."""

    def everything() -> dict[str, bytes]:
        paths = [path for path in store.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
        return {path.name: path.read_bytes() for path in paths}

    url = origin.put("/slow", BODY * 500, default=Answer(200, {"ETag": '"1"'}, BODY * 500, pace=0.3))

    def look(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: kept(store) > 0)
        process.send_signal(signal.SIGSTOP)
        before = everything()
        assert rows(streaming(store, "check"), 3)[1] == ["leased", "1"]
        assert rows(streaming(store, "failures")) == []
        assert everything() == before
        process.kill()

    run_crawl([url], store, settings={"STREAMING_CHECKPOINT_BYTES": 1 << 18}, meanwhile=look)
    before = everything()
    assert before["ledger.sqlite3-wal"], "a log that was not copied back"
    for _ in range(2):
        assert rows(streaming(store, "check"), 3)[1] == ["leased", "1"]
        assert everything() == before


def test_a_ledger_that_cannot_be_read_is_refused_in_one_line(store: Path) -> None:
    refused(streaming(store, "check"), "store-missing")
    fill(store, None)
    ledger = store / ".streaming" / "ledger.sqlite3"
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE ss_meta SET schema_version = 2")
    assert "scrapy streaming migrate" in refused(streaming(store, "failures"), "ledger-older")
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE ss_meta SET schema_version = 99")
    refused(streaming(store, "failures"), "ledger-newer")
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute(f"UPDATE ss_meta SET schema_version = {SCHEMA_VERSION}, store_id = 'another'")
    refused(streaming(store, "check"), "ledger-foreign")
    ledger.write_bytes(b"no ledger at all" * 1000)
    refused(streaming(store, "check"), "ledger-corrupt")
    ledger.unlink()
    refused(streaming(store, "check"), "ledger-missing")
    assert not ledger.exists()
    ledger.symlink_to("/dev/null")
    refused(streaming(store, "check"), "store-unsafe")


# -- compare ---------------------------------------------------------------------------------


def test_compare_says_what_changed(origin: Origin, store: Path) -> None:
    urls = [origin.put("/a", BODY), origin.put("/b", BODY * 2)]
    run_crawl(urls, store)
    metrics, before = store / ".streaming" / "metrics.json", store.parent / "before.json"
    shutil.copy(metrics, before)
    run_crawl([*urls, origin.url("/gone")], store, settings={"STREAMING_FSYNC": False})
    lines = rows(streaming(store, "compare", str(before), str(metrics)))
    changed = {line[0]: line[1:] for line in lines}
    assert changed["STREAMING_FSYNC"] == ["True", "False", "-"]
    assert changed["streaming/failed/bad-status-404"] == ["0", "1", "-"]
    assert changed["streaming/bytes_received"] == [str(3 * len(BODY)), "8", "0.00"]
    assert changed["streaming/resume_decisions_made"] == ["4", "1", "0.25"]
    assert not changed.keys() & {"worker", "started", "finish_reason", "STREAMING_ENABLED", "file_count"}
    document = json.loads(streaming(store, "compare", "--json", str(before), str(metrics)).stdout)
    found = {change.pop("name"): change for change in document["changes"]}
    assert found.keys() == changed.keys()
    assert found["streaming/resume_decisions_made"] == {"before": 4, "after": 1, "ratio": 0.25}
    assert rows(streaming(store, "compare", str(before), str(before))) == [["compare: nothing changed"]]
    table = on_terminal(store, "compare", str(before), str(metrics)).splitlines()
    assert re.fullmatch(r"changed +A +B +B/A", table[0])
    assert len({len(line) for line in table}) == 1, "columns"


def test_files_that_compare_cannot_read_are_named(store: Path) -> None:
    """1 for a file, 2 for a wrong call; a pipe is not waited for."""
    store.mkdir()
    good, bad, pipe = store / "good.json", store / "bad.json", store / "pipe"
    good.write_text(json.dumps({"format": 1, "stats": {}}))
    os.mkfifo(pipe)
    assert "no.json" in refused(
        streaming(store, "compare", str(good), str(store / "no.json")), "metrics-missing"
    )
    for text in ("{", "[]", "{}", '{"format": 1}', "\x00", '{"format": "1", "stats": {}}', "[" * 100_000):
        bad.write_text(text)
        assert str(bad) in refused(streaming(store, "compare", str(bad), str(good)), "metrics-unreadable")
    for path in (pipe, store):
        refused(streaming(store, "compare", str(good), str(path)), "metrics-unreadable")
    bad.write_text(json.dumps({"format": 2, "stats": {}}))
    refused(streaming(store, "compare", str(good), str(bad)), "metrics-format")
    assert streaming(store, "compare", str(good)).returncode == 2
