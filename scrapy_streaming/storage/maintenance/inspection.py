"""Comparing the ledger with the store, and repairing either.

What may live here: what counts as damage, how it is repaired, and how a ledger is rebuilt.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scrapy_streaming.exceptions import LedgerError, NotAdopted, StoreError, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import JobState, RecordedName
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.blobs import FoundBlob, Hashed, Presence, Tampered
from scrapy_streaming.storage.filesystems import free_bytes
from scrapy_streaming.storage.maintenance.common import (
    Progress,
    ReadableStore,
    Store,
    alone,
    batches,
)

if TYPE_CHECKING:
    from scrapy_streaming.storage.ledger import BlobRow

#: Threads that hash at once.
THREADS: Final = min(4, os.cpu_count() or 1)
#: Free bytes below which a store is degraded.
LITTLE_SPACE: Final = 512 << 20

#: Kinds of findings that are damage: recorded bytes are missing or wrong.
DAMAGE: Final = frozenset(
    {"bad-bytes", "wrong-size", "wrong-record", "unreadable", "missing", Tampered.BAD_NAME.value}
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference. Kinds: those of ``DAMAGE``, and the harmless ``unrecorded`` and ``stale-record``.

    ``repaired`` is what was done, in words, empty if nothing was.
    """

    kind: str
    digest: str
    detail: str
    repaired: str = ""

    @property
    def damage(self) -> bool:
        """Whether recorded bytes are missing or wrong."""
        return self.kind in DAMAGE


@dataclass
class Verified:
    """What ``verify`` found: ``blobs`` and ``names`` with bytes of their own read, ``bytes`` of both.

    ``good`` is the number of blobs without a finding.
    """

    blobs: int = 0
    names: int = 0
    bytes: int = 0
    good: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def damaged(self) -> int:
        """How many findings are damage."""
        return sum(finding.damage for finding in self.findings)


@dataclass
class Rebuilt:
    """What ``rebuild`` did: ``blobs`` read, ``known`` before, ``adopted`` now; ``bad`` are other digests."""

    blobs: int = 0
    bytes: int = 0
    known: int = 0
    adopted: int = 0
    bad: list[str] = field(default_factory=list)


# -- hashing --------------------------------------------------------------------------------


def _hashed(
    store: Store,
    blobs: Iterable[FoundBlob],
    progress: Progress | None,
    stop: threading.Event,
    seen: tuple[int, int] = (0, 0),
) -> Iterator[list[Hashed]]:
    """Yield the hashes of *blobs* in batches until *stop* is set; several threads hash.

    *seen*: the files and bytes to add in *progress*.
    """
    count, size = seen
    with ThreadPoolExecutor(THREADS, "ss-hash") as pool, ExitStack() as undo:
        undo.callback(stop.set)  # when interrupted, the threads stop in the middle of a large blob
        for some in batches(blobs):
            read = [
                one for one in pool.map(lambda blob: store.blobs.hash(blob, stop), some) if one is not None
            ]
            yield read
            count, size = count + len(some), size + sum(blob.size for blob in some)
            if progress is not None:
                progress(count, size)
            if stop.is_set():
                return
        undo.pop_all()


# -- verify ---------------------------------------------------------------------------------


def verify(store: Store, *, repair: bool = False, progress: Progress | None = None) -> Verified:
    """Hash every blob, and every name that is a file of its own; return what disagrees with the ledger.

    The time of verification of good blobs is recorded. With *repair* a bad blob is moved to quarantine and
    fetched again when a job next asks for it; a missing one is made again from its name, or fetched again,
    too; blobs without a record are recorded; a name with other bytes is made again from its blob, and the
    other bytes are kept in quarantine.
    Raises ``MaintenanceRuns`` with *repair*, ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    result = Verified()
    if not repair:
        _verify(store, result, progress, repair=False)
        return result
    with alone(store):
        _verify(store, result, progress, repair=True)
    return result


def _verify(store: Store, result: Verified, progress: Progress | None, *, repair: bool) -> None:
    for read in _hashed(store, store.blobs.blobs(), progress, threading.Event()):
        rows = store.ledger.blobs_of({str(one.found.digest) for one in read}).result()
        good = []
        for one in read:
            result.blobs += 1
            result.bytes += one.found.size
            finding = _judge(one, rows.get(str(one.found.digest)))
            if finding is None:
                good.append(str(one.found.digest))
            else:
                result.findings.append(_repaired(store, finding, one) if repair else finding)
        result.good += len(good)
        store.ledger.mark_verified(good).result()
    missing = set(_without_file(store))
    under_name = _verify_names(store, result, progress, missing, repair=repair)
    result.findings += _missing(store, missing, under_name, repair=repair)


def _verify_names(
    store: Store, result: Verified, progress: Progress | None, missing: set[str], *, repair: bool
) -> dict[str, str]:
    """Read the names that are files of their own (R77), except those whose blob is damaged.

    Returns names, by digest, that have the bytes of *missing* blobs, as where publishing by content was
    switched off.
    """
    damaged = {finding.digest for finding in result.findings}
    under_name: dict[str, str] = {}
    for read in _hashed(
        store, _copies(store, damaged), progress, threading.Event(), (result.blobs, result.bytes)
    ):
        for one in read:
            result.names += 1
            result.bytes += one.found.size
            digest, path = str(one.found.digest), str(one.found.name)
            if digest in missing:
                if one.good:
                    under_name[digest] = path
                continue
            if one.good or _is_blob(store, one):
                continue
            what = one.why if one.hexadecimal is None else f"hashes to sha256:{one.hexadecimal}"
            done = _name_again(store, one.found, path) if repair else ""
            result.findings.append(Finding(Tampered.BAD_NAME, digest, f"{path} {what}", done))
    return under_name


def _copies(store: Store, damaged: set[str]) -> Iterator[FoundBlob]:
    after = 0
    while rows := store.ledger.names(after).result():
        after = rows[-1].job_id
        for row in rows:
            digest = Digest.parse(row.digest)
            if row.digest not in damaged and (found := store.blobs.copy_of(digest, row.path)) is not None:
                yield found


def _is_blob(store: Store, read: Hashed) -> bool:
    """Return whether a name has another blob's bytes: a crawl has just changed it, or two jobs share it."""
    return read.hexadecimal is not None and store.blobs.has(Digest(read.hexadecimal), read.found.size)


def _name_again(store: Store, found: FoundBlob, path: str) -> str:
    """Make a name again from its blob unless it changed since it was read; return what was done, in words."""
    now = store.blobs.copy_of(found.digest, path)
    if now is None or now.stamp != found.stamp:
        return ""
    named = store.blobs.name(found.digest, path, recorded=RecordedName(path))
    return "made again" if named.kept is None else f"made again, the other bytes are in {named.kept}"


def _judge(read: Hashed, row: BlobRow | None) -> Finding | None:
    """Return what is wrong with one blob's file and its record, ``None`` if nothing is."""
    digest, size = str(read.found.digest), read.found.size
    if read.hexadecimal is None:
        return Finding("unreadable", digest, read.why)
    if not read.good:
        if row is not None and row.size != size:
            return Finding("wrong-size", digest, f"{size} bytes, {row.size} are recorded")
        return Finding("bad-bytes", digest, f"hashes to sha256:{read.hexadecimal}")
    if row is None:
        return Finding("unrecorded", digest, f"{size} bytes, no record")
    if row.size != size:
        return Finding("wrong-record", digest, f"{size} bytes and sound, {row.size} are recorded")
    if row.state in (BlobState.MISSING, BlobState.QUARANTINED):
        return Finding("stale-record", digest, f"recorded as {row.state}, and sound")
    return None  # present, or about to be deleted by gc


def _repaired(store: Store, finding: Finding, read: Hashed) -> Finding:
    """Repair a finding if possible; return it with what was done."""
    ledger, digest = store.ledger, finding.digest
    done = ""
    if finding.kind in ("unrecorded", "stale-record"):
        if digest in ledger.adopt_blobs({digest: read.found.size}).result():
            done = "recorded as present"
    elif finding.kind in ("bad-bytes", "wrong-size"):
        # the record first, so that jobs fetch the bytes again from now on
        recorded = ledger.set_blob_state(
            digest, BlobState.QUARANTINED, [BlobState.PRESENT, BlobState.MISSING]
        ).result()
        if store.blobs.set_aside(read.found):
            done = "moved to quarantine"
        elif recorded and store.blobs.verify(read.found.digest):  # a crawl stored it anew meanwhile
            ledger.set_blob_state(digest, BlobState.PRESENT, [BlobState.QUARANTINED]).result()
            done = "replaced by good bytes meanwhile"
    return Finding(finding.kind, digest, finding.detail, done)


def _without_file(store: Store) -> Iterator[str]:
    """Yield the digests of blobs that are recorded as present and have no file."""
    after = None
    while rows := store.ledger.blob_rows(after).result():
        after = rows[-1].digest
        yield from (
            row.digest for row in rows if row.state == BlobState.PRESENT and _lack_of(store, row) is not None
        )


def _missing(store: Store, missing: set[str], under_name: dict[str, str], *, repair: bool) -> list[Finding]:
    """Return a finding for each of the blobs that still have no file.

    None for bytes that only names have, because publishing by content was switched off.
    """
    findings = []
    for some in batches(sorted(missing)):
        for row in store.ledger.blobs_of(frozenset(some)).result().values():
            if row.state != BlobState.PRESENT or (lack := _lack_of(store, row)) is None:
                continue
            name = under_name.get(row.digest)
            done = _found_again(store, row, name) if repair else ""
            if done is not None and (name is None or row.has_file):
                findings.append(Finding("missing", row.digest, lack, done))
    return findings


def _found_again(store: Store, row: BlobRow, name: str | None) -> str | None:
    """Make a blob again from a name with its bytes, or have it fetched; return what was done, in words.

    ``None`` if the blob is not missing.
    """
    if name is not None:
        if not store.blobs.keeps_blobs:
            return None
        with suppress(NotAdopted):  # changed meanwhile
            store.blobs.adopt(name, checksum=Digest.parse(row.digest).hex, alone=True)
            return f"made again from {name}"
    store.ledger.set_blob_state(row.digest, BlobState.MISSING, [BlobState.PRESENT]).result()
    if _lack_of(store, row) is None:  # stored again meanwhile
        store.ledger.set_blob_state(row.digest, BlobState.PRESENT, [BlobState.MISSING]).result()
        return None
    return "fetched again when next asked for"


def _lack_of(store: Store, row: BlobRow) -> str | None:
    """Return why a recorded blob is missing, in words; ``None`` if it exists."""
    match store.blobs.presence(Digest.parse(row.digest)):
        case Presence.BLOB:
            return None
        case Presence.NOTHING:
            return f"{row.size} bytes are recorded, there is no file"
        case Presence.OTHER:
            return f"{row.size} bytes are recorded, what is there is no plain file"


# -- rebuild --------------------------------------------------------------------------------


def rebuild(store: Store, *, progress: Progress | None = None) -> Rebuilt:
    """Record every blob whose bytes are right in the ledger; return what was done.

    A blob with bad bytes stays, and is reported. No job is created. Raises as ``verify`` with *repair*.
    """
    with alone(store):
        before = store.ledger.standing().result()
        result = _recorded(store, _hashed(store, store.blobs.blobs(), progress, threading.Event()))
        store.ledger.mark_read(before).result()
        return result


def read_unknown(store: Store, stop: threading.Event) -> Rebuilt | None:
    """Record the blobs that the ledger, an older copy, does not have; return what was done.

    ``None`` if nothing had to be read, or *stop* was set before the end: the next call continues. The caller
    excludes other maintenance. Raises ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    before = store.ledger.standing().result()
    if not before.unread or stop.is_set():
        return None
    result = _recorded(store, _hashed(store, _unknown(store), None, stop))
    if stop.is_set():
        return None
    store.ledger.mark_read(before).result()
    return result


def _unknown(store: Store) -> Iterator[FoundBlob]:
    """Yield the blobs that the ledger does not record as present with their size."""
    for some in batches(store.blobs.blobs()):
        rows = store.ledger.blobs_of({str(blob.digest) for blob in some}).result()
        for blob in some:
            row = rows.get(str(blob.digest))
            if row is None or (row.state, row.size) != (BlobState.PRESENT, blob.size):
                yield blob


def _recorded(store: Store, hashed: Iterable[list[Hashed]]) -> Rebuilt:
    """Record the blobs that were hashed and whose bytes are right; return what was done."""
    result = Rebuilt()
    for read in hashed:
        good = {str(one.found.digest): one.found.size for one in read if one.good}
        result.blobs += len(read)
        result.bytes += sum(one.found.size for one in read)
        result.bad += [str(one.found.digest) for one in read if not one.good]
        rows = store.ledger.blobs_of(good).result()
        known = {d for d, row in rows.items() if (row.state, row.size) == (BlobState.PRESENT, good[d])}
        adopted = store.ledger.adopt_blobs(good).result() if good else frozenset()
        result.known += len(known)
        result.adopted += len(adopted - known)
        result.bad += sorted(good.keys() - adopted)  # recorded with another size
    return result


def move_aside(path: Path) -> Path:
    """Rename a ledger's file and the logs beside it, which preserves them; return the new path."""
    moved = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    for number in itertools.count(1):
        if not os.path.lexists(moved):
            break
        moved = moved.with_name(f"{moved.name.partition('~')[0]}~{number}")
    for end in ("-wal", "-shm"):  # first: SQLite must not apply an old log to a new file
        with suppress(FileNotFoundError):
            os.rename(f"{path}{end}", f"{moved}{end}")
    os.rename(path, moved)
    return moved


# -- health ---------------------------------------------------------------------------------


@dataclass
class Health:
    """The health of a store: ``healthy``, ``degraded`` (with warnings) or ``unhealthy`` (with errors)."""

    schema_version: int | None = None
    tables: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``healthy``, ``degraded`` or ``unhealthy``."""
        return "unhealthy" if self.errors else "degraded" if self.warnings else "healthy"


def health(store: ReadableStore, *, patience: float = 5.0) -> Health:
    """Check ledger and disk; return what is wrong, without raising for it.

    A ledger that does not answer within *patience* seconds is an error.
    """
    result = Health()
    try:
        result.schema_version = store.ledger.schema_version().result(patience)
        _check_ledger(store, result)
    except TimeoutError:
        msg = f"the ledger did not answer within {patience:.0f} s; is a process stopped in the middle?"
        result.errors.append(f"{msg} (ledger-locked)")
    except (StoreError, LedgerError, WriteFailed) as error:
        result.errors.append(str(error))
    try:
        left = min((free_bytes(folder) for folder in store.blobs.folders), default=LITTLE_SPACE)
    except OSError as error:
        result.errors.append(f"the store cannot be read: {error.strerror}")
    else:
        if left < LITTLE_SPACE:
            result.warnings.append(f"little space: {left >> 20} MiB are free")
    return result


def _check_ledger(store: ReadableStore, result: Health) -> None:
    ledger = store.ledger
    unsound = ledger.check()
    if unsound:
        remedy = "stop the crawls and run `scrapy streaming rebuild`"
        result.errors += [f"the ledger is not sound: {line}; {remedy}" for line in unsound]
        with suppress(LedgerError):  # a damaged ledger may still answer this
            result.errors += ledger.invariant_violations().result()
        return
    result.tables = ledger.table_rows().result()
    counts = ledger.counts().result()
    result.jobs = {state.value: counts[state] for state in JobState}
    result.errors += ledger.invariant_violations().result()
    try:
        store.refuse_unknown()
    except LedgerError as error:
        if error.reason not in ("ledger-put-back", "ledger-behind"):
            raise
        result.warnings.append(str(error))
    degraded = ledger.degraded_counts().result()
    if dead := result.jobs.get("dead", 0):
        result.warnings.append(f"{dead} jobs are dead: `scrapy streaming requeue --failed` tries them again")
    for state in (BlobState.MISSING, BlobState.QUARANTINED):
        if degraded[state]:
            what = f"{degraded[state]} blobs in use are {state}"
            result.warnings.append(f"{what}: fetched again when next asked for")
    if degraded["left"]:
        result.warnings.append(f"{degraded['left']} jobs are leased to workers that ended")
