"""A ledger with damaged bits: refused with the remedy or worked with, never wedged, never wrong (F13).

What is damaged here passes ``PRAGMA quick_check``, or is met only when a crawl is on its way.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.command import environment, run_here, streaming
from support.crawl import Crawl, assert_sound, assert_stored, blobs, run_crawl
from support.origin import Origin
from support.stores import Source, complete, fetch, key_of, open_store, publish, sha, state, url_of

from scrapy_streaming.exceptions import LedgerError, StreamingError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Dead, Done, Granted, Held
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import JobRequest
from scrapy_streaming.storage.ledger.row_checks import faults
from scrapy_streaming.storage.ledger.schema import metadata
from scrapy_streaming.storage.store import Storage

COPIES = {"STREAMING_LINK_MODE": "copy", "RETRY_ENABLED": False}
DAY = 86400.0
REMEDY = "scrapy streaming rebuild"
#: Seconds within which anything here ends; what takes longer hangs.
LIMIT = 40.0


def ledger_of(store: Path) -> Path:
    return store / ".streaming" / "ledger.sqlite3"


@contextmanager
def unchecked(store: Path) -> Iterator[sqlite3.Connection]:
    """Give the ledger to one who writes past its rules, as a disk does."""
    with closing(sqlite3.connect(ledger_of(store), isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        yield connection


#: What a flipped bit does to the rows of one job, as SQL; ``?`` is the job's id.
ROWS: dict[str, str] = {
    "url": "UPDATE ss_job SET url = CAST(x'68747470fa2f2f' AS TEXT) WHERE id = ?",
    "work": "UPDATE ss_job SET work_id = 'fhles' WHERE id = ?",
    "hash": "UPDATE ss_job SET request_hash = zeroblob(32) WHERE id = ?",
    "digest": "UPDATE ss_completion SET digest = zeroblob(32) WHERE job_id = ?",
    "size": "UPDATE ss_completion SET size = size + 64 WHERE job_id = ?",
    "blob": "UPDATE ss_blob SET size = size + 1 WHERE digest = (SELECT digest FROM ss_job WHERE id = ?)",
    "generation": "UPDATE ss_job SET generation = 3 WHERE id = ?",
    "vary": (
        "UPDATE ss_representation SET vary = '[;' WHERE url_key = (SELECT url_key FROM ss_job WHERE id = ?)"
    ),
}


def said(crawl: Crawl, word: str) -> list[str]:
    return [line for line in crawl.log.splitlines() if word in line and " DEBUG: " not in line]


@pytest.mark.proves("F13", "I16")
def test_damaged_rows_are_named_skipped_and_rebuilt(origin: Origin, store: Path) -> None:
    """Each row is another's damage; the crawl goes on with all others."""
    bodies = {name: name.encode() * 1000 for name in (*ROWS, "sound", "new")}
    urls = {name: origin.put(f"/{name}", body) for name, body in bodies.items()}
    old = [url for name, url in urls.items() if name != "new"]
    run_crawl(old, store, settings=COPIES)
    with unchecked(store) as connection:
        rows = dict(connection.execute("SELECT url, hex(job_key) FROM ss_job").fetchall())
        keys = {name: rows[url].lower() for name, url in urls.items() if url in rows}
        for name, statement in ROWS.items():
            connection.execute(statement, connection.execute(
                "SELECT id FROM ss_job WHERE job_key = ?", (bytes.fromhex(keys[name]),)
            ).fetchone())  # fmt: skip
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]

    crawl = run_crawl(list(urls.values()), store, settings=COPIES, timeout=LIMIT)
    for name in ("sound", "new"):
        assert_stored(store, crawl.files[urls[name]], bodies[name])
    assert set(crawl.files) == {urls[name] for name in ("sound", "new")}
    for name in ROWS:
        [line] = said(crawl, f"<GET {urls[name]}>")
        assert "File (ledger-row)" in line
        assert keys[name] in line
        assert REMEDY in line
    assert crawl.stat("streaming/failed/ledger-row") == len(ROWS)
    assert "Traceback" not in crawl.log

    health = streaming(store, "health")
    assert health.returncode == 1, health.stdout
    for name in ("url", "work", "digest", "vary"):
        assert keys[name] in health.stdout, name
    assert urls["vary"] in health.stdout
    done = streaming(store, "rebuild")
    assert done.returncode == 0, done.stderr
    assert "made a new ledger" in done.stdout
    [aside] = [
        path for path in ledger_of(store).parent.glob("*.damaged-*") if path.name[-4:] not in ("-wal", "-shm")
    ]
    assert str(aside) in done.stdout
    assert streaming(store, "health").returncode == 0
    origin.requests.clear()
    again = run_crawl(list(urls.values()), store, settings=COPIES, timeout=LIMIT)
    for name, url in urls.items():
        assert_stored(store, again.files[url], bodies[name])
    assert origin.requests == []


def _overwrite(store: Path, table: str) -> None:
    """Damage a page of a ledger that is too large to be checked whenever it is opened."""
    with unchecked(store) as connection:
        connection.execute("CREATE TABLE filler(x)")
        connection.execute("INSERT INTO filler VALUES (zeroblob(?))", (33 << 20,))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        [page] = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
    with ledger_of(store).open("r+b") as stream:
        stream.seek((page - 1) * 4096)
        stream.write(b"\xff\xff")


@pytest.mark.proves("F13")
@pytest.mark.parametrize(("spider", "table"), [("from-start", "ss_job"), ("files", "ss_completion")])
def test_a_ledger_found_damaged_in_use_stops_the_crawl_in_one_line(
    origin: Origin, store: Path, spider: str, table: str
) -> None:
    urls = [origin.put(f"/{number}", b"%d" % number * 1000) for number in range(6)]
    run_crawl(urls[:3], store, settings=COPIES)
    _overwrite(store, table)
    crawl = run_crawl(urls, store, settings=COPIES, spider=spider, timeout=LIMIT)
    [line] = said(crawl, REMEDY)
    assert "CRITICAL: the crawl stops, its ledger cannot be used any more" in line
    assert "Traceback" not in crawl.log
    assert_sound(store, [b"%d" % number * 1000 for number in range(6)])
    assert "made a new ledger" in streaming(store, "rebuild").stdout


# -- any bit (S6) ----------------------------------------------------------------------------

BODIES = {number: b"%d" % number * 3000 for number in range(8)}
#: Of the flips of the short form, the first five hit names and texts that once ended in no remedy.
SEEDS = (1009, 1037, 1071, 1082, 1100, *range(5))

#: A crawl that is killed: half of what it did is in the file, half in the log; two jobs are leased.
KILLED = """
import os, sqlite3, sys
from pathlib import Path
from support.stores import claim, fetch, open_store
from test_damaged_ledger import BODIES, ledger_of
root = Path(sys.argv[1])
store = open_store(root)
for number, data in BODIES.items():
    if number == 4:
        other = sqlite3.connect(ledger_of(root))
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    if number < 6:
        fetch(store, number, data)
    else:
        claim(store, number)
os._exit(0)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a killed crawl left behind."""
    root = tmp_path_factory.mktemp("killed") / "store"
    variables = environment()
    variables["PYTHONPATH"] = f"{Path(__file__).parent}:{variables['PYTHONPATH']}"
    subprocess.run([sys.executable, "-c", KILLED, str(root)], env=variables, check=True, timeout=60)
    assert Path(f"{ledger_of(root)}-wal").stat().st_size > 4096
    return root


@dataclass
class Flip:
    """One bit of the ledger or of its log, where bytes are in use; ``cold``: the machine was off since."""

    file: Path
    at: int
    bit: int
    cold: bool

    @classmethod
    def draw(cls, store: Path, rng: random.Random) -> Flip:
        ledger = ledger_of(store)
        log = Path(f"{ledger}-wal")
        file = rng.choice([ledger, log] if log.exists() else [ledger])
        used = [at for at, byte in enumerate(file.read_bytes()) if byte]
        return cls(file, rng.choice(used), 1 << rng.randrange(8), rng.random() < 0.5)

    def apply(self) -> None:
        data = bytearray(self.file.read_bytes())
        data[self.at] ^= self.bit
        self.file.write_bytes(data)
        if self.cold:
            Path(f"{ledger_of(self.file.parents[1])}-shm").unlink(missing_ok=True)


def check_refusal(error: StreamingError) -> str:
    """A refusal says what to do."""
    assert isinstance(error, LedgerError), repr(error)
    assert error.reason in (
        "ledger-row",
        "ledger-corrupt",
        "ledger-foreign",
        "ledger-missing",
        "ledger-newer",
    )
    assert REMEDY in str(error), str(error)
    return error.reason


def drain(root: Path) -> dict[str, int]:
    """Do what a crawl does for each job; return how often each answer came."""
    answers: dict[str, int] = {}
    try:
        store = open_store(root)
    except StreamingError as error:
        return {check_refusal(error): 1}
    with closing(store):
        for number in BODIES:
            answer = _do(store, number)
            answers[answer] = answers.get(answer, 0) + 1
    return answers


def _do(store: Storage, number: int) -> str:
    data, request = BODIES[number], JobRequest("work", "", url_of(number), sha(b"GET"))
    try:
        answer = store.ledger.claim(key_of(number), request).result(LIMIT)
        if isinstance(answer, Granted):
            publish(store, data)
            complete(store, answer.lease, number, data)
    except StreamingError as error:
        return check_refusal(error)
    match answer:
        case Done(completion):
            known = completion.known
            assert (known.digest, known.size) == (f"sha256:{sha(data)}", len(data))
        case Held(until=until):
            assert until < time.time() + 2 * DAY, "nobody would ever take it over"
        case Dead(error=error):
            assert error
    return type(answer).__name__


def rebuild_is_sound(root: Path) -> None:
    settings = StreamingSettings.load(Source(FILES_STORE=str(root), STREAMING_FSYNC=False), {})
    assert run_here("rebuild", settings) == 0
    with closing(open_store(root)) as store:
        assert store.ledger.check() == []
        assert store.ledger.invariant_violations().result() == []
        for found in store.blobs.blobs():
            assert state(store, found.digest) == "present"
            assert store.blobs.verify(found.digest)


def flipped(killed: Path, root: Path, seed: int, work: Callable[[Path], object]) -> None:
    rng = random.Random(seed)
    if root.exists():
        shutil.rmtree(root)
    shutil.copytree(killed, root)
    flip = Flip.draw(root, rng)
    flip.apply()
    try:
        print(flip.file.name, flip.at, flip.bit, flip.cold, work(root))
        rebuild_is_sound(root)
        drained = drain(root)
        assert set(drained) <= {"Granted", "Done"}, drained
        assert set(blobs(root)) == {sha(data) for data in BODIES.values()}
    except BaseException as error:
        error.add_note(f"seed {seed}: {flip}")
        raise


@pytest.mark.proves("F13")
def test_a_flipped_bit_is_refused_or_harmless(killed: Path, store: Path) -> None:
    for seed in SEEDS:
        flipped(killed, store, seed, drain)


@pytest.mark.soak
@pytest.mark.proves("F13")
@pytest.mark.parametrize("seed", range(1000, 1180))
def test_180_flipped_bits_are_refused_or_harmless(killed: Path, store: Path, seed: int) -> None:
    flipped(killed, store, seed, drain)


@pytest.mark.soak
@pytest.mark.proves("F13")
@pytest.mark.parametrize("seed", range(2000, 2020))
def test_crawls_over_20_flipped_bits_end(origin: Origin, store: Path, seed: int) -> None:
    """A refusal names the remedy; what is stored is the origin's; a rebuilt store transfers nothing."""
    bodies = [b"%d" % number * 3000 for number in range(8)]
    urls = [origin.put(f"/{number}", body) for number, body in enumerate(bodies)]
    settings = COPIES | {"CONCURRENT_REQUESTS": 2, "DOWNLOAD_DELAY": 0.02, "STREAMING_LEASE_SECONDS": 5}
    run_crawl(urls, store, settings=settings, kill_when=lambda: len(blobs(store)) >= 5, check=False)
    flip = Flip.draw(store, random.Random(seed))
    flip.apply()
    print(flip)
    crawl = run_crawl(urls, store, settings=settings, timeout=LIMIT, check=False)
    whole = set(crawl.files) == set(urls) and crawl.code == 0
    assert whole or REMEDY in crawl.log, crawl.log[-3000:]
    assert_sound(store, bodies)
    done = streaming(store, "rebuild")
    assert done.returncode == 0, done.stderr
    named = [path for path in (store / "full").rglob("*") if path.is_file() and path.name[0] != "."]
    assert streaming(store, "health").returncode == 0
    origin.requests.clear()
    again = run_crawl(urls, store, settings=settings, timeout=LIMIT)
    for url, body in zip(urls, bodies, strict=True):
        assert_stored(store, again.files[url], body)
    paths = {asked.path for asked in origin.requests}
    assert len(paths) <= len(urls) - len(named), said(crawl, REMEDY)


# -- the rules of a row ----------------------------------------------------------------------


def row_of(name: str, **values: Any) -> dict[str, Any]:
    return {column.name: None for column in metadata.tables[name].c} | values


JOB = {
    "id": 1,
    "job_key": bytes.fromhex(key_of(1)),
    "request_hash": bytes(32),
    "work_id": "work",
    "artifact_id": "",
    "url": url_of(1),
    "url_key": bytes(32),
    "state": "ready",
    "generation": 1,
    "fence": 1,
    "attempts": 0,
    "max_attempts": 5,
    "kept": 0,
    "begun": 1,
    "not_before_server": 0,
    "created_at": 1.5,
    "updated_at": 2,
}


@pytest.mark.parametrize(
    ("column", "value", "wrong"),
    [
        ("url", None, ["url is missing"]),
        ("url", b"http", ["url is no text"]),
        ("url", "http\udcfa", ["url is not UTF-8"]),
        ("url", url_of(2), ["its key is not that of its URL"]),
        ("work_id", "w\ufffd", []),
        ("job_key", bytes(31), ["job_key is not 32 bytes"]),
        ("claim_id", bytes(32), ["claim_id is not 16 bytes"]),
        ("request_hash", "text", ["request_hash is not 32 bytes"]),
        ("begun", 2, ["begun is neither true nor false"]),
        ("fence", "1", ["fence is no whole number"]),
        ("fence", -1, ["fence is -1"]),
        ("created_at", float("inf"), ["created_at is no time"]),
        ("state", "reaey", ["state is 'reaey'"]),
        ("taken_from", "gone", ["taken_from is 'gone'"]),
        ("size", 5, []),
    ],
)
def test_what_a_jobs_row_may_hold(column: str, value: object, wrong: list[str]) -> None:
    table = metadata.tables["ss_job"]
    assert faults(table, row_of("ss_job", **JOB)) == []
    assert faults(table, row_of("ss_job", **JOB | {column: value})) == wrong


@pytest.mark.parametrize(
    ("column", "value", "wrong"),
    [
        ("etag", '"a"', []),
        ("etag", "a", ["etag is 'a'"]),
        ("vary", '["accept"]', []),
        ("vary", "[1]", ["vary is '[1]'"]),
        ("vary", "[;", ["vary is '[;'"]),
        ("proof", "sure", ["proof is 'sure'"]),
        ("size", -1, ["size is -1"]),
    ],
)
def test_what_a_representations_row_may_hold(column: str, value: object, wrong: list[str]) -> None:
    sound = {
        "url_key": bytes(32), "digest": bytes(32), "size": 1, "vary": "[]", "selecting": "",
        "fetched_at": 1.0, "proof": "strong",
    }  # fmt: skip
    row = row_of("ss_representation", **sound | {column: value})
    assert faults(metadata.tables["ss_representation"], row) == wrong


def test_a_digest_that_is_no_bytes_is_not_read() -> None:
    """An integer in its place would be taken for so many zeros."""
    from sqlalchemy.dialects import sqlite

    from scrapy_streaming.storage.ledger.schema import DigestText, Hex

    for kind in (Hex(), DigestText()):
        with pytest.raises(ValueError, match="int in the place of bytes"):
            kind.process_result_value(1 << 60, sqlite.dialect())
    assert DigestText().process_result_value(bytes(32), sqlite.dialect()) == str(Digest("0" * 64))


@pytest.mark.proves("F13")
def test_damaged_rows_in_a_server_are_named_and_left(store: Path, postgres_url: str) -> None:
    """Nothing is moved aside there: an empty database is asked for."""
    with closing(open_store(store, postgres_url)) as opened:
        fetch(opened, 1, BODIES[1])
    address = postgres_url.replace("+psycopg", "")
    with closing(psycopg.connect(address, autocommit=True)) as connection:
        connection.execute("UPDATE ss_job SET url = 'http://example.org/other'")
    health = streaming(store, "health", url=postgres_url)
    assert (health.returncode, key_of(1) in health.stdout) == (1, True), health.stdout
    refused = streaming(store, "rebuild", url=postgres_url)
    assert refused.returncode == 1
    assert "name an empty database in STREAMING_DATABASE_URL" in refused.stderr
