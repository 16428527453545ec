"""``download``: one file from a URL to a store, without a crawler; the entry of ``item["files"]``."""

from __future__ import annotations

import gzip
import http.client
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_kit import BODY, CLIENTS, KIB, Cutter, client_of, ranges, sha
from scrapy import Request
from scrapy.pipelines.files import FilesPipeline
from scrapy.utils.test import get_crawler
from support.origin import Answer, Origin, cut, honest, partial
from support.servers import WebServer
from support.stores import open_store

import scrapy_streaming
from scrapy_streaming import integration
from scrapy_streaming.exceptions import (
    AddressRefused,
    AnswerRefused,
    BodyIncomplete,
    IntegrityError,
    JobUnavailable,
    RequestFailed,
    StoreError,
    StreamingError,
    WriteFailed,
)
from scrapy_streaming.integration import downloading, planning
from scrapy_streaming.protocol.jobs import Granted, job_key, request_hash
from scrapy_streaming.storage.job_request import JobRequest

ROOT = Path(scrapy_streaming.__file__).parents[1]
AT = 128 * KIB + 77  # no whole number of pieces
KEYS = {
    "url", "path", "checksum", "status", "digest", "size", "resumed_from", "reason", "media_type", "etag",
    "last_modified", "proof", "completion_id",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.01)


@pytest.fixture(params=["ledger", "no-ledger"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether jobs are recorded."""
    if request.param == "no-ledger":
        monkeypatch.setenv("SCRAPY_STREAMING_IDEMPOTENCY_ENABLED", "0")
    return request.param == "ledger"


def get(url: str, store: Path, library: str = "urllib", **how: Any) -> dict[str, Any]:
    entry = integration.download(url, store=store, client=client_of(library), **how)
    assert entry is not None
    return entry


def parts(store: Path) -> list[str]:
    return sorted(path.name for path in (store / ".streaming" / "parts").iterdir())


@pytest.mark.parametrize("library", CLIENTS)
def test_a_file_is_stored_as_a_crawl_stores_it(
    origin: Origin, store: Path, library: str, recorded: bool
) -> None:
    url = origin.put("/docs/a.pdf", BODY, media_type="application/pdf")
    seen: list[tuple[int, int | None]] = []
    entry = get(url, store, library, progress_callback=lambda *said: seen.append(said))
    assert set(entry) == KEYS
    assert entry["path"] == FilesPipeline(str(store), crawler=get_crawler()).file_path(Request(url))
    assert (store / entry["path"]).read_bytes() == BODY
    assert entry["digest"] == f"sha256:{entry['checksum']}" == f"sha256:{sha(BODY)}"
    assert (entry["status"], entry["reason"], entry["proof"]) == ("downloaded", "fetched", "length")
    assert (entry["url"], entry["size"], entry["resumed_from"]) == (url, len(BODY), 0)
    assert entry["media_type"] == "application/pdf"
    assert seen[-1] == (len(BODY), len(BODY))
    assert parts(store) == []


@pytest.mark.parametrize("library", CLIENTS)
@pytest.mark.parametrize("end", ["reset", "close"])
def test_a_broken_transfer_is_resumed(origin: Origin, store: Path, library: str, end: str) -> None:
    url = origin.put("/a", BODY, cut(AT, end), cut(AT, end))
    entry = get(url, store, library)
    assert (store / entry["path"]).read_bytes() == BODY
    assert (entry["resumed_from"], entry["reason"], entry["proof"]) == (2 * AT, "resumed", "strong")
    assert ranges(origin) == ["", f"bytes={AT}-", f"bytes={2 * AT}-"]


def test_the_second_call_asks_nothing_while_the_file_is_fresh(
    origin: Origin, store: Path, recorded: bool
) -> None:
    url = origin.put("/a.bin", BODY)
    first, second = get(url, store), get(url, store)
    assert (second["status"], second["digest"], second["path"]) == (
        "uptodate",
        first["digest"],
        first["path"],
    )
    assert second["reason"] == ("stored" if recorded else "adopted")
    assert len(origin.requests) == 1


@pytest.mark.parametrize("library", CLIENTS)
def test_an_expired_file_is_asked_for_conditionally(
    origin: Origin, store: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = origin.put("/a.bin", BODY)
    first = get(url, store, library)
    monkeypatch.setenv("SCRAPY_STREAMING_REVALIDATE", "always")
    again = get(url, store, library)
    assert (again["status"], again["reason"]) == ("uptodate", "not-modified")
    assert origin.requests[-1].fields["if-none-match"] == first["etag"]
    other = BODY[::-1]
    origin.put("/a.bin", other)
    changed = get(url, store, library)
    assert (changed["status"], changed["reason"], changed["path"]) == ("downloaded", "changed", first["path"])
    assert (store / first["path"]).read_bytes() == other


def test_a_file_of_years_ago_is_expired(origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = origin.put("/a.bin", BODY)
    get(url, store)
    monkeypatch.setattr(planning, "FRESH_DAYS", -1)
    assert get(url, store)["reason"] == "not-modified"
    monkeypatch.setenv("SCRAPY_STREAMING_REVALIDATE", "never")
    assert get(url, store)["reason"] == "stored"


def test_bytes_that_were_damaged_are_fetched_again(origin: Origin, store: Path) -> None:
    """R44, R77."""
    url = origin.put("/a.bin", BODY)
    entry = get(url, store)
    blob = store / "blobs" / "sha256" / sha(BODY)[:2] / sha(BODY)
    blob.chmod(0o644)
    blob.write_bytes(BODY[::-1])
    again = get(url, store)
    assert again["status"] == "downloaded"
    assert blob.read_bytes() == BODY
    assert (store / entry["path"]).read_bytes() == BODY


def test_a_name_of_ones_own(origin: Origin, store: Path) -> None:
    entry = get(origin.put("/a", BODY), store, name="reports/2024.pdf")
    assert entry["path"] == "reports/2024.pdf"
    assert (store / "reports" / "2024.pdf").read_bytes() == BODY
    with pytest.raises(StoreError):
        get(origin.put("/b", BODY), store, name="../out.pdf")


def test_an_expected_digest_decides(origin: Origin, store: Path, recorded: bool) -> None:
    url = origin.put("/a", BODY)
    with pytest.raises(IntegrityError):
        get(url, store, expected=sha(b"other"))
    assert not (store / "full").exists()
    assert get(f"{url}#sha256={sha(BODY)}", store, expected=sha(BODY))["proof"] == "digest"
    with pytest.raises(TypeError, match="expected"):
        get(f"{url}#sha256={sha(BODY)}", store, expected=sha(b"other"))


def test_pieces_of_two_files_are_fetched_again_once(origin: Origin, store: Path) -> None:
    """R63, R70: the tag stayed, the bytes did not; the digest tells."""
    url = origin.put("/a", BODY[::-1], cut(AT), etag='"same"')
    origin.put("/a", BODY, etag='"same"')
    entry = get(url, store, expected=sha(BODY))
    assert (store / entry["path"]).read_bytes() == BODY


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(404, {}), "bad-status-404"),
        (Answer(403, {}), "bad-status-403"),
        (Answer(503, {"Retry-After": "3600"}), "bad-status-503"),
        (Answer(204, {}), "bad-status-204"),
    ],
    ids=lambda value: str(getattr(value, "status", "")),
)
def test_no_file_is_said_at_once(origin: Origin, store: Path, answer: Answer, reason: str) -> None:
    url = origin.put("/a", BODY, default=lambda a, r: answer)
    with pytest.raises(AnswerRefused) as refused:
        get(url, store)
    assert refused.value.reason == reason
    assert len(origin.requests) == 1
    opened = open_store(store)
    try:
        [job] = opened.ledger.jobs().result()
    finally:
        opened.close()
    assert job.error_code == reason
    assert str(job.state) == ("failed" if answer.status in (403, 404) else "ready")


def test_a_back_off_that_the_server_asked_for_binds_the_next(origin: Origin, store: Path) -> None:
    url = origin.put("/a", BODY, default=lambda a, r: Answer(503, {"Retry-After": "3600"}))
    with pytest.raises(AnswerRefused):
        get(url, store)
    with pytest.raises(JobUnavailable) as refused:
        get(url, store)
    assert refused.value.reason == "waiting"
    assert len(origin.requests) == 1


@pytest.mark.parametrize("library", CLIENTS)
def test_a_server_that_is_busy_is_asked_again(origin: Origin, store: Path, library: str) -> None:
    """R59."""
    busy = Answer(503, {"Retry-After": "0"})
    url = origin.put("/a", BODY, Answer(raw=lambda: [b""], end="reset"), busy, cut(0))
    assert get(url, store, library)["digest"] == f"sha256:{sha(BODY)}"


@pytest.mark.parametrize("library", CLIENTS)
def test_trying_again_has_an_end(
    origin: Origin, store: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_MAX_ATTEMPTS", "3")
    url = origin.put("/a", BODY, default=cut(0))
    with pytest.raises(BodyIncomplete):
        get(url, store, library)
    assert len(origin.requests) == 3
    url = origin.put("/b", BODY, default=lambda a, r: Answer(raw=lambda: [b""], end="reset"))
    with pytest.raises(RequestFailed):
        get(url, store, library)
    with pytest.raises(RequestFailed):
        get("http://127.0.0.1:1/", store, library)


def test_a_file_that_never_comes_whole_and_cannot_be_resumed_ends(
    origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each body begins at the first byte: only one that is longer than all before it is progress."""
    monkeypatch.setenv("SCRAPY_STREAMING_MAX_ATTEMPTS", "3")
    no_validator = {"etag": "", "last_modified": ""}
    url = origin.put("/a", BODY, cut(AT), *[cut(2 * AT), cut(AT)] * 5, **no_validator)
    with pytest.raises(BodyIncomplete):
        get(url, store)
    assert ranges(origin) == [""] * 5


#: Answers that are not joined, and what the next request is: the file comes whole in the end.
REFUSED = {
    "changed-206": (lambda a, r: partial(r, AT, fields=r.fields() | span(AT) | {"ETag": '"x"'}), ""),
    "bad-content-range": (lambda a, r: Answer(206, r.fields(), BODY[AT:]), ""),
    "shrunk": (lambda a, r: Answer(416, {"Content-Range": "bytes */10"}), ""),
    "bare-416": (lambda a, r: Answer(416, {}), ""),
    "range-error": (lambda a, r: Answer(500, {}), ""),
    "precondition": (lambda a, r: Answer(412, {}), ""),
    "unasked-304": (lambda a, r: Answer(304, r.fields()), ""),
    "contradicted": (lambda a, r: partial(r, AT, chunked=True, body=BODY[AT:] + b"more"), ""),
    "slice-digest": (
        lambda a, r: partial(
            r, AT, fields=r.fields() | span(AT) | {"Content-Digest": f"sha-256=:{'A' * 43}=:"}
        ),
        f"bytes={AT}-",
    ),
}


def span(first: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {first}-{len(BODY) - 1}/{len(BODY)}"}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_answer_is_followed_by_another_request(origin: Origin, store: Path, case: str) -> None:
    answer, following = REFUSED[case]
    url = origin.put("/a", BODY, cut(AT), answer)
    entry = get(url, store, "httpx")
    assert (store / entry["path"]).read_bytes() == BODY
    assert ranges(origin) == ["", f"bytes={AT}-", following]


def test_a_part_of_another_file_is_not_offered_again(origin: Origin, store: Path) -> None:
    """The plain request broke off, too, and left less than the part that was thrown away."""
    changed = REFUSED["changed-206"][0]
    url = origin.put("/a", BODY, cut(AT), changed, cut(AT // 2))
    entry = get(url, store)
    assert (store / entry["path"]).read_bytes() == BODY
    assert ranges(origin) == ["", f"bytes={AT}-", "", f"bytes={AT // 2}-"]


def test_refused_answers_have_an_end(origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_RESTARTS", "2")
    url = origin.put("/a", BODY, default=lambda a, r: Answer(304, {}))
    with pytest.raises(AnswerRefused) as refused:
        get(url, store)
    assert refused.value.reason == "unasked-304"
    assert len(origin.requests) <= 3


@pytest.mark.parametrize("library", CLIENTS)
def test_an_end_that_nothing_marks_is_probed(origin: Origin, store: Path, library: str) -> None:
    """R33."""
    url = origin.put("/a", BODY, default=lambda a, r: Answer(200, {}, BODY, length=None, end="close"))
    entry = get(url, store, library)
    assert (entry["proof"], entry["size"]) == ("unproven", len(BODY))
    assert ranges(origin) == ["", f"bytes={len(BODY)}-"]


def test_a_digest_lets_a_part_without_a_validator_go_on(
    origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R6, R19."""
    monkeypatch.setenv("SCRAPY_STREAMING_UNVALIDATED_RESUME", "verify")
    url = origin.put("/a", BODY, cut(AT), etag="", last_modified="")
    entry = get(url, store, expected=sha(BODY))
    assert (entry["resumed_from"], entry["reason"], entry["proof"]) == (AT, "resumed-unvalidated", "digest")
    assert ranges(origin) == ["", f"bytes={AT - 64 * KIB}-"]
    other = BODY[::-1]
    url = origin.put("/b", other, cut(AT), etag="", last_modified="")
    origin.put("/b", BODY, etag="", last_modified="")
    assert get(url, store, expected=sha(BODY))["reason"] == "fetched"


def test_a_weak_tag_confirms_nothing_if_so_set(
    origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R47."""
    monkeypatch.setenv("SCRAPY_STREAMING_REVALIDATE", "always")
    url = origin.put("/a", BODY, etag='W/"x"')
    get(url, store)
    assert get(url, store)["reason"] == "not-modified"
    monkeypatch.setenv("SCRAPY_STREAMING_WEAK_VALIDATORS", "refetch")
    assert get(url, store)["status"] == "downloaded"


def test_a_full_disk_keeps_the_part(origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R9."""
    monkeypatch.setenv("SCRAPY_STREAMING_MIN_FREE_BYTES", str(1 << 60))
    with pytest.raises(WriteFailed) as full:
        get(origin.put("/a", BODY), store)
    assert full.value.reason == "no-space"


def test_a_coding_that_nobody_asked_for_is_taken_off(origin: Origin, store: Path) -> None:
    """R34."""
    coded = gzip.compress(BODY)
    fields = {"Content-Encoding": "gzip", "ETag": '"v1"'}
    url = origin.put("/a.bin", BODY, default=lambda a, r: Answer(200, fields, coded))
    for library in CLIENTS:
        entry = get(url, store / library, library)
        assert (store / library / entry["path"]).read_bytes() == BODY
        assert (entry["size"], entry["etag"]) == (len(BODY), None)


@pytest.mark.parametrize("library", CLIENTS)
def test_a_redirect_is_followed_and_the_part_behind_it_resumed(
    origin: Origin, store: Path, library: str
) -> None:
    target = origin.put("/target", BODY, cut(AT))
    url = origin.put("/a", b"", default=lambda a, r: Answer(302, {"Location": target}))
    entry = get(url, store, library)
    assert (store / entry["path"]).read_bytes() == BODY
    assert (entry["url"], entry["resumed_from"]) == (url, AT)
    os.environ["SCRAPY_STREAMING_REVALIDATE"] = "always"
    try:
        assert get(url, store, library)["reason"] == "not-modified"
    finally:
        del os.environ["SCRAPY_STREAMING_REVALIDATE"]


@pytest.mark.parametrize("library", CLIENTS)
def test_a_password_in_the_url_is_sent_and_not_handed_on(origin: Origin, store: Path, library: str) -> None:
    """E7: nor is it stored."""
    other = Origin()
    try:
        target = other.put("/target", BODY)
        url = origin.put("/a", b"", default=lambda a, r: Answer(302, {"Location": target}))
        get(url.replace("http://", "http://user:p%40ss@"), store, library)
        assert origin.requests[0].fields["authorization"] == "Basic dXNlcjpwQHNz"
        assert "authorization" not in other.requests[0].fields
    finally:
        other.close()
    ledger = (store / ".streaming" / "ledger.sqlite3").read_bytes()
    assert b"p%40ss" not in ledger
    assert b"p@ss" not in ledger


def test_a_redirect_to_a_file_of_this_machine_leads_nowhere(origin: Origin, store: Path) -> None:
    url = origin.put("/a", b"", default=lambda a, r: Answer(302, {"Location": "file:///etc/passwd"}))
    with pytest.raises(StreamingError):
        get(url, store, "urllib")
    assert not (store / "full").exists()


@pytest.mark.parametrize("library", CLIENTS)
def test_only_public_addresses_if_so_set(
    origin: Origin, store: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_ALLOW_PRIVATE_ADDRESSES", "0")
    with pytest.raises(AddressRefused, match=r"127\.0\.0\.1"):
        get(origin.put("/a", BODY), store, library)


def test_two_at_once_fetch_it_once(origin: Origin, store: Path) -> None:
    url = origin.put("/a", BODY, lambda a, r: honest(a, r, pace=0.1, piece=64 * KIB))
    with ThreadPoolExecutor(3) as pool:
        entries = list(pool.map(lambda _: get(url, store), range(3)))
    assert sorted(entry["status"] for entry in entries) == ["downloaded", "uptodate", "uptodate"]
    assert len(origin.requests) == 1


def test_another_workers_job_is_waited_for(
    origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = origin.put("/a", BODY)
    opened = open_store(store)
    try:
        job = JobRequest("", "", url, request_hash("GET", url))
        granted = opened.ledger.claim(job_key("", "", url), job).result()
        assert isinstance(granted, Granted)
        monkeypatch.setenv("SCRAPY_STREAMING_HELD", "skip")
        with pytest.raises(JobUnavailable) as refused:
            get(url, store)
        assert refused.value.reason == "held"
        monkeypatch.setenv("SCRAPY_STREAMING_HELD", "wait")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(get, url, store)
            time.sleep(0.3)
            assert not waiting.done()
            opened.ledger.release(granted.lease).result()
            assert waiting.result(30)["status"] == "downloaded"
    finally:
        opened.close()


def test_a_lease_is_renewed_while_it_streams(
    origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body takes longer than the lease, and another worker waits for it."""
    monkeypatch.setenv("SCRAPY_STREAMING_LEASE_SECONDS", "1")
    url = origin.put("/a", BODY, lambda a, r: honest(a, r, pace=0.35, piece=64 * KIB))
    with ThreadPoolExecutor(2) as pool:
        entries = list(pool.map(lambda _: get(url, store), range(2)))
    assert sorted(entry["status"] for entry in entries) == ["downloaded", "uptodate"]
    assert len(origin.requests) == 1


def test_a_lost_lease_writes_nothing_more(origin: Origin, store: Path) -> None:
    """Another worker took the job over and stored it: its result is ours."""
    url = origin.put("/a", BODY)

    def taken_over(had: int, _total: int | None) -> None:
        if had < len(BODY):
            return
        opened = open_store(store)
        try:
            [job] = opened.ledger.jobs().result()
            opened.ledger.end_worker_leases(job.worker_id).result()
        finally:
            opened.close()
        others.append(get(url, store))

    others: list[dict[str, Any]] = []
    entry = get(url, store, progress_callback=taken_over)
    assert others[0]["status"] == "downloaded"
    assert (entry["status"], entry["completion_id"]) == ("uptodate", others[0]["completion_id"])


def test_ctrl_c_keeps_the_part_and_frees_the_job(origin: Origin, store: Path, recorded: bool) -> None:
    url = origin.put("/a", BODY)

    def stop(had: int, _total: int | None) -> None:
        if had >= AT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(url, store, progress_callback=stop)
    entry = get(url, store)
    assert entry["resumed_from"] >= AT
    assert (store / entry["path"]).read_bytes() == BODY


def test_a_crawl_and_a_script_share_a_store(origin: Origin, store: Path) -> None:
    """What a script stored is a crawl's result, under the same work id."""
    url = origin.put("/a.bin", BODY)
    entry = get(url, store)
    opened = open_store(store)
    try:
        job = JobRequest("", "", url, request_hash("GET", url))
        done = opened.ledger.claim(job_key("", "", url), job).result()
        assert done.completion.completion_id == entry["completion_id"]
        assert done.completion.path == entry["path"]
        assert opened.ledger.invariant_violations().result() == []
    finally:
        opened.close()


def test_each_part_may_be_switched_off(origin: Origin, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRAPY_STREAMING_RESUME_ENABLED", "0")
    url = origin.put("/a.bin", BODY, cut(AT))
    assert get(url, store)["resumed_from"] == 0
    assert ranges(origin) == ["", ""]
    monkeypatch.setenv("SCRAPY_STREAMING_FINALIZATION_ENABLED", "0")
    url = origin.put("/b.bin", BODY)
    entry = get(url, store / "plain")
    assert (store / "plain" / entry["path"]).read_bytes() == BODY
    assert not (store / "plain" / "blobs").exists()


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"url": 3}, "url"),
        ({"url": "ftp://example.org/a"}, "url"),
        ({"url": "/etc/passwd"}, "url"),
        ({"url": "http://[x"}, "url"),
        ({"store": None}, "store"),
        ({"client": object()}, "client"),
        ({"client": http.client}, "client"),
        ({"expected": 1}, "expected"),
        ({"name": 1}, "name"),
        ({"progress_callback": 1}, "progress_callback"),
    ],
)
def test_a_wrong_argument_is_named(store: Path, how: dict[str, Any], named: str) -> None:
    given = {"url": "http://127.0.0.1:1/", "store": store} | how
    with pytest.raises(TypeError, match=named):
        integration.download(given.pop("url"), **given)
    assert not store.exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.pdf", "https://example.org/a.tar.gz", "https://example.org/x?f=a.pdf",
        "https://example.org/x?f=a.pdf/b", "https://example.org/%C3%A9.txt", "https://example.org/",
        "https://example.org/a.PDF", "https://example.org/a.unknown", "https://example.org/a.pdf#sha256=00",
    ],
)  # fmt: skip
def test_the_name_is_that_of_files_pipeline(url: str, tmp_path: Path) -> None:
    pipeline = FilesPipeline(str(tmp_path), crawler=get_crawler())
    if "urlparse" not in inspect.getsource(FilesPipeline.file_path) and set(url) & set("?#"):
        pytest.skip("older releases of Scrapy look at the whole URL")
    assert downloading.default_path(url) == pipeline.file_path(Request(url))


# -- killed ----------------------------------------------------------------------------------

MIB = 1 << 20
SIZE = 16 * MIB
CHECKPOINT = 2 * MIB
BATCH = 256 * KIB

SCRIPT = """
import json, sys
from scrapy_streaming.integration import download
url, store, library = sys.argv[1:]
if library == "httpx":
    import httpx
    client = httpx.Client()
elif library == "requests":
    import requests
    client = requests.Session()
else:
    client = None
def progress(had, total):
    print(had, flush=True)
print(json.dumps(download(url, store=store, client=client, progress_callback=progress)))
"""


def cut_killed_and_finished(web: WebServer, store: Path, library: str) -> dict[str, Any]:
    """Cut a download off, kill it when it has gone on, let the next finish; return where each began."""
    body = os.urandom(SIZE)
    name = f"{library}.bin"
    web.put(name, body)
    cutter = Cutter(web.port, SIZE // 4)
    url = web.url(name, "/slow").replace(str(web.port), str(cutter.port))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "SCRAPY_STREAMING_CHECKPOINT_BYTES": str(CHECKPOINT),
    }
    command = [sys.executable, "-c", SCRIPT, url, str(store), library]
    had = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:  # to the end: what it had when it died
            had.append(int(line))
            if had[-1] >= SIZE // 2 + CHECKPOINT * 3 // 4:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    entry = get(url, store, library)
    cutter.close()
    assert (store / entry["path"]).read_bytes() == body
    assert entry["digest"] == f"sha256:{sha(body)}"
    assert parts(store) == []
    served = [line for line in web.served() if line.path == f"/slow/{name}"]
    assert [line.status for line in served] == [200, 206, 206]
    begun = [int(line.range.removeprefix("bytes=").removesuffix("-")) for line in served[1:]]
    at_cut = max(each for each in had if each <= SIZE // 4)
    assert entry["resumed_from"] == begun[1]
    return {
        "had": [at_cut, had[-1]], "asked from": begun,
        "fetched again": [at_cut - begun[0], had[-1] - begun[1]],
    }  # fmt: skip


@pytest.mark.parametrize(
    "library",
    ["urllib", *(pytest.param(each, marks=pytest.mark.soak) for each in ("httpx", "requests"))],
)
def test_a_killed_download_goes_on_where_it_was(web: WebServer, store: Path, library: str) -> None:
    """S3: nginx, cut and kill -9 in the middle; fetched again is a checkpoint and a batch, at most."""
    found = cut_killed_and_finished(web, store, library)
    print("S3 download", library, found)
    assert all(start > 0 for start in found["asked from"])
    assert all(-BATCH <= again <= CHECKPOINT + BATCH for again in found["fetched again"])


def test_threads_share_no_state(origin: Origin, store: Path) -> None:
    urls = [origin.put(f"/{number}.bin", BODY[number:]) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        entries = list(pool.map(lambda url: get(url, store), urls))
    assert [entry["digest"] for entry in entries] == [f"sha256:{sha(BODY[number:])}" for number in range(8)]
    for thread in threading.enumerate():
        if thread.name == "ss-heartbeat":
            thread.join(30)
            assert not thread.is_alive()
