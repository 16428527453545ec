"""Importing completions into a store that has their bytes: from an export, or a feed of ``FilesPipeline``.

What may live here: the treatment of one line of an import.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from scrapy_streaming.exceptions import NotAdopted, UnusableId
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import Completion, RecordedName, StoredRepresentation
from scrapy_streaming.protocol.portable import Entered, FeedFile, Record, Unreadable
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.maintenance.common import Progress, Store, alone, batches
from scrapy_streaming.storage.maintenance.inspection import THREADS

#: A file of a feed with the work id of its job.
OfFeed: TypeAlias = tuple[FeedFile, str]
#: The content of a line of an import; ``Unreadable`` if it cannot be read.
Wanted: TypeAlias = Record | OfFeed | Unreadable

#: Called with each line that is not imported: its number, its URL, and the reason.
Refused = Callable[[int, str, str], object]


@dataclass
class Imported:
    """What an import did: ``files`` lines examined, with ``bytes``; files ``imported`` and ``refused``.

    ``known``: the ledger has this completion, or a newer one. ``reasons`` counts the refused by reason.
    """

    files: int = 0
    bytes: int = 0
    imported: int = 0
    known: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


class _NotImported(Exception):
    """A line that is not imported; its text is the reason."""


def carry(
    store: Store, lines: Iterable[tuple[int, Wanted]], *, refused: Refused, progress: Progress | None = None
) -> Imported:
    """Record the completions of *lines* (number, content) whose bytes are in the store.

    The file at the path of a line is hashed and becomes a blob, as by ``adopt``. Nothing is fetched, and
    nothing newer in the ledger is changed. *refused* is called with each line that is not imported.
    Crawls may run. Raises ``MaintenanceRuns``, ``LedgerError``, ``WriteFailed``, ``OSError``.
    """
    result, stop = Imported(), threading.Event()
    with alone(store), ThreadPoolExecutor(THREADS, "ss-import") as pool, ExitStack() as undo:
        undo.callback(stop.set)
        for some in batches(lines):
            found = list(pool.map(lambda line: _found(store, line[1], stop), some))
            # in order: of two lines for one job, the second is compared with the first
            entered = [store.ledger.enter(one) if isinstance(one, Record) else one for one in found]
            for (number, wanted), one, answer in zip(some, found, entered, strict=True):
                reason = answer if isinstance(answer, str) else answer.result()
                result.files += 1
                if isinstance(one, Record):
                    result.bytes += one.completion.known.size
                if reason in (Entered.IMPORTED, Entered.KNOWN):
                    result.imported += reason == Entered.IMPORTED
                    result.known += reason == Entered.KNOWN
                    continue
                result.refused += 1
                result.reasons[str(reason)] = result.reasons.get(str(reason), 0) + 1
                refused(number, _about(wanted), str(reason))
            if progress is not None:
                progress(result.files, result.bytes)
    return result


def _about(wanted: Wanted) -> str:
    match wanted:
        case Record(url=url):
            return url
        case Unreadable():
            return str(wanted)
        case (file, _):
            return f"{file.url} {file.path}"


def _found(store: Store, wanted: Wanted, stop: threading.Event) -> Record | str:
    """Store the bytes of a line; return its record for the ledger, or the reason why there is none."""
    if isinstance(wanted, Unreadable):
        return wanted.reason
    try:
        if isinstance(wanted, Record):
            return _stored(store, wanted, stop)
        file, work_id = wanted
        return _of_feed(store, file, JobRequest.plain(work_id, file.url), stop)
    except (NotAdopted, UnusableId) as refusal:
        return refusal.reason
    except PermissionError:
        return "unreadable"
    except _NotImported as refusal:
        return str(refusal)


def _of_feed(store: Store, file: FeedFile, request: JobRequest, stop: threading.Event) -> Record:
    """Return the record of a file that ``FilesPipeline`` stored, completed when that was."""
    found = store.blobs.adopt(file.path, checksum=file.checksum, stop=stop, alone=True)
    known = StoredRepresentation(
        str(found.digest),
        found.size,
        Validators(),
        request.url,
        stamp=found.stamp,
        name=RecordedName(found.path, found.own_stamp),
    )
    done = Completion(secrets.token_hex(16), known, found.stored_at, generation=1, path=found.path)
    return Record(request.work_id, "", request.url, request.request_hash, done, fetched_at=found.stored_at)


def _stored(store: Store, record: Record, stop: threading.Event) -> Record:
    """Return the record with the stamps of its files.

    Raises ``_NotImported`` if the bytes are missing, or its name has other bytes, which may be newer.
    """
    JobRequest(record.work_id, record.artifact_id, record.url, record.request_hash)
    known, path = record.completion.known, record.completion.path
    found, sha256 = None, known.digest.removeprefix("sha256:")
    if path is not None and store.blobs.makes_names:
        try:
            found = store.blobs.adopt(path, checksum=sha256, stop=stop, alone=True)
        except NotAdopted as refusal:
            if refusal.reason == "checksum-mismatch":
                raise _NotImported("name-changed") from refusal
            if refusal.reason != "not-found":
                raise
    if found is None:
        found_blob = store.blobs.inspect_blob(Digest.parse(known.digest), known.size, None)
        if found_blob.tampered is not None:
            raise _NotImported(str(found_blob.tampered))
        known = replace(known, stamp=found_blob.stamp)
    elif found.size != known.size:
        raise _NotImported(str(Entered.BLOB_SIZE))
    else:
        known = replace(known, stamp=found.stamp, name=RecordedName(found.path, found.own_stamp))
    return replace(record, completion=replace(record.completion, known=known))
