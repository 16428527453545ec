"""What the verbs of ``scrapy streaming`` do, and what they print; ``commands`` has the call.

Each verb takes the settings and its options, prints, and returns the exit code. Lists are
separated by tabs; with ``--json`` one document is printed, for ``ls`` one a line. Raises what
the store and the ledger raise.
"""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Final

from w3lib.url import canonicalize_url

from scrapy_streaming.exceptions import LedgerError, StoreError, StreamingError
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import JobState
from scrapy_streaming.redaction import clean, escaped, url_without_userinfo, write_lines
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.ledger import SCHEMA_VERSION, JobView, Ledger, Queries, ddl, schema_found
from scrapy_streaming.storage.ledger.records import BlobRow
from scrapy_streaming.storage.locations import check_files, ledger_file, ledger_url
from scrapy_streaming.storage.store import Storage, Use, view_of
from scrapy_streaming.storage.view import StoreView
from scrapy_streaming.storage.workers import running_workers

DAY: Final = 86400.0
#: Seconds that ``health`` waits for a database that somebody keeps locked.
PATIENCE: Final = 5.0
#: Why a ledger's file cannot be opened, where ``rebuild`` makes another and keeps it aside.
UNUSABLE: Final = frozenset({"ledger-corrupt", "ledger-foreign", "ledger-row", "ledger-unusable"})
#: Jobs that ``ls`` asks for at once.
PAGE: Final = 1000
#: Hex digits of a key or a digest that must be given at least.
PREFIX: Final = 6

_HEX = re.compile(r"(sha256:)?([0-9a-f]{6,64})", re.ASCII | re.IGNORECASE)


class WrongCall(Exception):
    """The options say nothing that can be done."""


# -- printing -------------------------------------------------------------------------------


def out(text: str) -> None:
    """Print a text."""
    write_lines(sys.stdout, text)


def _json(document: Any) -> None:
    out(json.dumps(document, indent=2))


def line(*values: object) -> None:
    """Print one line of a list; no value may break it."""
    out("\t".join(escaped(_shown(value)) for value in values))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
    return "-" if value is None else str(value)


def said_of(result: object) -> str:
    """Return what an error, or a text, says, in one line."""
    while isinstance(result, BaseException) and not str(result) and result.__context__ is not None:
        result = result.__context__  # Scrapy's own error says nothing of why a file failed
    return said(result) or type(result).__name__ if isinstance(result, BaseException) else str(result)


def said(error: BaseException) -> str:
    """Return what an error says, in one line, without credentials."""
    return clean(" ".join(str(error).split()))


@contextmanager
def progress_of(what: str, things: str = "blobs") -> Iterator[maintenance.Progress | None]:
    """Give what shows on a terminal how far the verb *what* is, by number of *things* and their bytes."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(number: int, size: int) -> None:
        sys.stderr.write(f"\r{what}: {number} {things}, {size >> 20} MiB ")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _opened(settings: StreamingSettings) -> closing[Storage]:
    return closing(Storage.open(settings, Use.MAINTAIN))


# -- health ---------------------------------------------------------------------------------


def health(settings: StreamingSettings, given: Namespace) -> int:
    """Say whether all is well; 1 unless it is."""
    found = _health(settings)
    if given.json:
        _json({"status": found.status, **dataclasses.asdict(found)})
    else:
        line("status", found.status)
        line("schema_version", found.schema_version)
        for what in ("jobs", "tables"):
            for name, number in getattr(found, what).items():
                line(what, name, number)
        for what in ("errors", "warnings"):
            for text in getattr(found, what):
                line(what, text)
    return int(found.status != "healthy")


def _health(settings: StreamingSettings) -> maintenance.Health:
    """Look in a thread of its own: it is not waited for when the database is locked."""
    opened, looked, found = threading.Event(), threading.Event(), maintenance.Health()

    def look() -> None:
        nonlocal found
        try:
            with view_of(settings) as store:
                store.ledger.wait_unlocked(PATIENCE)
                opened.set()
                found = maintenance.health(store, patience=PATIENCE)
                looked.set()
        except (StreamingError, OSError) as error:
            if not looked.is_set():
                found = maintenance.Health(errors=[said(error)])
        finally:
            opened.set()
            looked.set()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    if not opened.wait(PATIENCE):
        msg = f"the ledger did not answer within {PATIENCE:.0f} s; is a process stopped in the middle?"
        return maintenance.Health(errors=[f"{msg} (ledger-locked)"])
    looked.wait()
    thread.join(PATIENCE)
    return found


# -- ls and show ----------------------------------------------------------------------------


def ls(settings: StreamingSettings, given: Namespace) -> int:
    """Print a line for each job; those that a worker left which is gone are ready, too."""
    state = None if given.state is None else JobState(given.state)
    with view_of(settings) as store:
        found: Iterable[JobView] = _jobs(store.ledger, state)
        if state is JobState.READY:
            alive = _may_be_alive(settings)
            left = (job for job in _jobs(store.ledger, JobState.LEASED) if not alive(job))
            found = chain(found, left)
        for job in found:
            if given.json:
                out(json.dumps(dataclasses.asdict(job)))
            else:
                line(job.key, job.state, job.attempts, job.size, job.url)
    return 0


def _jobs(ledger: Queries, state: JobState | None) -> Iterator[JobView]:
    after = 0
    while page := ledger.jobs(state, after=after, limit=PAGE).result():
        after = page[-1].id
        yield from page


def _may_be_alive(settings: StreamingSettings) -> Callable[[JobView], bool]:
    """Return what tells whether a leased job's worker may be at it: of this machine's by its lock."""
    running: set[str] = set()
    if settings.directory is not None:
        running.update(running_workers(settings.directory / "workers"))
    host, now = socket.gethostname(), time.time()

    def alive(job: JobView) -> bool:
        worker = job.worker_id or ""
        gone = worker.rsplit("-", 2)[0] == host and worker not in running
        return not gone and (job.lease_until or 0) > now

    return alive


def show(settings: StreamingSettings, given: Namespace) -> int:
    """Print all about the jobs and blobs that are meant; 1 if there are none."""
    with view_of(settings) as store:
        jobs, blobs = _found(store.ledger, given.what)
        document = {
            "jobs": [_job_document(store.ledger, job) for job in jobs],
            "blobs": [_blob_document(store, row) for row in blobs],
        }
    if given.json:
        _json(document)
    else:
        _print_nested(document["jobs"], "job")
        _print_nested(document["blobs"], "blob")
    if not jobs and not blobs:
        write_lines(sys.stderr, clean(f"show: nothing is known of {given.what} (not-found)"))
        return 1
    return 0


def _found(ledger: Queries, what: str) -> tuple[list[JobView], list[BlobRow]]:
    match = _HEX.fullmatch(what)
    if match is not None:
        prefix = match[2].lower()
        return ledger.find(prefix=prefix).result(), ledger.blobs_like(prefix).result()
    url = url_without_userinfo(what)
    return ledger.find(url=canonicalize_url(url)).result() or ledger.find(url=url).result(), []


def _job_document(ledger: Queries, job: JobView) -> dict[str, Any]:
    return dataclasses.asdict(job) | dataclasses.asdict(ledger.details(job.id).result())


def _blob_document(store: StoreView, row: BlobRow) -> dict[str, Any]:
    digest = Digest.parse(row.digest)
    there = store.blobs.has(digest, row.size)
    jobs = store.ledger.find(prefix=digest.hex).result()
    return dataclasses.asdict(row) | {
        "path": blob_key(digest),
        "file": "there" if there else "not there, or not of that size",
        "jobs": [job.key for job in jobs],
        "represents": store.ledger.urls_of(row.digest).result(),
    }


def _print_nested(documents: Iterable[dict[str, Any]], kind: str) -> None:
    for document in documents:
        line(kind, document.get("key") or document["digest"])
        for name, value in document.items():
            if not isinstance(value, list | tuple):
                line(f"  {name}", value)
        for name, values in document.items():
            if isinstance(values, list | tuple):
                for value in values:
                    pairs = value.items() if isinstance(value, dict) else ()
                    line(f"  {name}", *([f"{k}={_shown(v)}" for k, v in pairs] or [value]))


# -- verify and gc --------------------------------------------------------------------------


def verify(settings: StreamingSettings, given: Namespace) -> int:
    """Read every blob and every copy; 1 if one is damaged or missing, repaired or not."""
    with _opened(settings) as store, progress_of("verify") as progress:
        result = maintenance.verify(store, repair=given.repair, progress=progress)
    if given.json:
        _json(dataclasses.asdict(result) | {"damaged": result.damaged})
    else:
        for finding in result.findings:
            line(finding.kind, finding.digest, finding.detail, finding.repaired or None)
        out(
            f"verify: {result.blobs} blobs and {result.names} copies read ({result.bytes} bytes), "
            f"{result.good} blobs good, {result.damaged} files damaged or missing"
        )
    return int(result.damaged > 0)


def gc(settings: StreamingSettings, given: Namespace) -> int:
    """Remove what nobody needs and is older than the grace time."""
    items: list[dict[str, Any]] = []

    def tell(kind: str, path: str, size: int) -> None:
        if given.dry_run and given.json:
            items.append({"kind": kind, "bytes": size, "path": path})
        elif given.dry_run:
            line(kind, size, path)

    with _opened(settings) as store, progress_of("gc") as progress:
        result = maintenance.collect(
            store,
            grace=given.grace * DAY,
            superseded=given.superseded,
            dry_run=given.dry_run,
            tell=tell,
            progress=progress,
        )
    if given.json:
        removed = {kind: {"count": n, "bytes": result.sizes[kind]} for kind, n in result.counts.items()}
        document = {
            "dry_run": result.dry_run,
            "grace_seconds": result.grace,
            "freed_bytes": result.bytes,
            "restored": result.restored,
            "removed": removed,
        }
        _json(document | ({"items": items} if given.dry_run else {}))
        return 0
    would = "would free" if result.dry_run else "freed"
    kinds = ", ".join(f"{number} {kind}" for kind, number in result.counts.items()) or "nothing to remove"
    out(f"gc: {would} {result.bytes} bytes: {kinds}; grace {result.grace:g} s, {result.restored} put back")
    return 0


# -- requeue --------------------------------------------------------------------------------


def requeue(settings: StreamingSettings, given: Namespace) -> int:
    """Make failed and dead jobs ready; 1 if one that is named is not there or is neither."""
    if bool(given.keys) == given.failed:
        msg = "requeue wants the KEYs of jobs, or --failed for all that failed or are dead"
        raise WrongCall(msg)
    for key in given.keys:
        if re.fullmatch(f"[0-9a-fA-F]{{{PREFIX},64}}", key) is None:
            msg = f"{key!r} is no key: {PREFIX} to 64 hex digits (scrapy streaming ls shows them)"
            raise WrongCall(msg)
    refused: list[str] = []
    with _opened(settings) as store:
        if given.failed:
            number = store.ledger.requeue_all().result()
        else:
            found = [_requeueable(store.ledger, key.lower(), refused) for key in given.keys]
            keys = [key for key in found if key is not None]
            number = store.ledger.requeue(*keys).result() if keys else 0
    if given.json:
        _json({"requeued": number, "refused": refused})
    else:
        out(f"requeue: {number} jobs are ready again")
    for line in refused:
        write_lines(sys.stderr, f"requeue: {line}")
    return int(bool(refused))


def _requeueable(ledger: Ledger, prefix: str, refused: list[str]) -> str | None:
    """Return the key that is meant, or say in *refused* why there is none."""
    keys = ledger.keys(prefix).result()
    if len(keys) != 1:
        why = "begins more than one key (ambiguous)" if keys else "is no job's key (not-found)"
        refused.append(f"{prefix} {why}")
        return None
    state = ledger.states_of(keys).result()[keys[0]]
    if state not in (JobState.FAILED, JobState.DEAD):
        refused.append(f"{prefix} is {state}, neither failed nor dead (not-ended)")
        return None
    return keys[0]


# -- migrate and rebuild --------------------------------------------------------------------


def migrate(settings: StreamingSettings, given: Namespace) -> int:
    """Bring the ledger to this release's tables, or print them."""
    if given.sql:
        dialect = "postgresql" if (settings.database_url or "").startswith("postgresql") else "sqlite"
        statements = ddl(dialect)
        _json({"dialect": dialect, "sql": statements}) if given.json else out(statements.strip())
        return 0
    check_files(settings)
    directory = settings.directory
    url = None if directory is None or not directory.is_dir() else ledger_url(settings, directory)
    try:
        before = 0 if url is None else schema_found(url)
    except LedgerError:
        before = 0  # why, is said with the remedy when it is opened
    with _opened(settings):
        pass
    if given.json:
        _json({"from": before, "to": SCHEMA_VERSION})
    elif before == SCHEMA_VERSION:
        out(f"migrate: the ledger has schema {SCHEMA_VERSION}, nothing is to be done")
    else:
        out(f"migrate: the ledger went from schema {before} to {SCHEMA_VERSION}")
    return 0


def rebuild(settings: StreamingSettings, given: Namespace) -> int:
    """Make a ledger from the blobs, or complete the one there is; 1 if a blob's bytes are bad."""
    refuse_beside_others(settings)
    store, moved = _open_to_rebuild(settings)
    with closing(store), progress_of("rebuild") as progress:
        rows = store.ledger.table_rows().result()
        kept = bool(rows["ss_job"] or rows["ss_blob"])
        result = maintenance.rebuild(store, progress=progress)
    if given.json:
        extra = {"ledger": "completed" if kept else "new", "damaged_ledger": moved and str(moved)}
        _json(dataclasses.asdict(result) | extra)
    else:
        for digest in result.bad:
            line("bad-bytes", digest)
        aside = f"; the old ledger is kept as {moved}" if moved else ""
        out(
            f"rebuild: {'completed the ledger' if kept else 'made a new ledger'}, {result.adopted} blobs "
            f"recorded, {result.known} were known, {len(result.bad)} bad{aside}"
        )
    return int(bool(result.bad))


def refuse_beside_others(settings: StreamingSettings) -> None:
    """Raise ``StoreError`` (``store-busy``) while a crawl, or another verb, uses the store."""
    if settings.directory is None:
        return  # refused when it is opened
    workers = settings.directory / "workers"
    running = running_workers(workers)
    if running:
        msg = (
            f"worker {running[0]} uses this store: end it first; if it is gone, remove {workers / running[0]}"
        )
        raise StoreError(msg, reason="store-busy")


def _open_to_rebuild(settings: StreamingSettings) -> tuple[Storage, Path | None]:
    """Return the store with a sound ledger, and where one that was not is kept."""
    try:
        store = Storage.open(settings, Use.REBUILD)
    except LedgerError as error:
        path = _ledger_file(settings)
        if error.reason not in UNUSABLE or path is None:
            _say_way_out(error)
            raise
    else:
        if _sound(store.ledger):
            return store, None
        store.close()
        path = _ledger_file(settings)
        if path is None:
            msg = "the ledger in the server is not sound; name an empty database in STREAMING_DATABASE_URL"
            raise LedgerError(msg, reason="ledger-corrupt")
    moved = maintenance.move_aside(path)
    return Storage.open(settings, Use.REBUILD), moved


def _sound(ledger: Ledger) -> bool:
    """Whether a ledger can be read through, and says nothing that cannot be."""
    try:
        return not ledger.check() and not ledger.invariant_violations().result()
    except LedgerError as error:
        if error.reason != "ledger-corrupt":
            raise
        return False


def _ledger_file(settings: StreamingSettings) -> Path | None:
    """Return the ledger's file, ``None`` if it is in a server."""
    return None if settings.directory is None else ledger_file(settings, settings.directory)


def _say_way_out(error: LedgerError) -> None:
    """Raise the error of another store's ledger in a server with what can be done: nothing there is moved."""
    if error.reason == "ledger-foreign":
        why = error.__cause__ or error
        msg = f"{why.args[0]}; name this store's own database, or an empty one, in STREAMING_DATABASE_URL"
        raise LedgerError(msg, reason=error.reason) from error


def status(settings: StreamingSettings, _given: Namespace) -> int:
    """Refuse what stands in the place of a file of ours; ``commands`` has printed the rest."""
    check_files(settings)
    return 0


VERBS: Final[dict[str, Callable[[StreamingSettings, Namespace], int]]] = {
    "status": status,
    "health": health,
    "ls": ls,
    "show": show,
    "verify": verify,
    "gc": gc,
    "requeue": requeue,
    "migrate": migrate,
    "rebuild": rebuild,
}
