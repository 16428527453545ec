"""The result of a file: when what is stored is the result already, and the entry made of a completion.

What may live here: rules that the item pipeline and ``integration.download`` share. All are pure, except
``adopt_fresh``, which blocks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from scrapy_streaming.exceptions import NotAdopted, WriteFailed
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.protocol.jobs import (
    Completion,
    Granted,
    NotedFile,
    RecordedName,
    StoredRepresentation,
    is_recent,
)
from scrapy_streaming.protocol.reasons import Reason
from scrapy_streaming.protocol.selecting import selects_again
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import clean_record

if TYPE_CHECKING:
    from scrapy_streaming.storage.blobs import Adopted, BlobStore
    from scrapy_streaming.storage.job_request import JobRequest

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

SECONDS_A_DAY: Final = 86400.0


def entry_of(
    completion: Completion, url: str, path: str, *, status: str, reason: Reason, resumed_from: int = 0
) -> dict[str, Any]:
    """Return the entry for ``item["files"]``: what ``FilesPipeline`` gives, and more.

    ``checksum`` is the SHA-256 in hexadecimal, ``digest`` the same as ``sha256:…``; ``size`` and
    ``resumed_from`` are bytes; ``reason`` is the word of the decision, ``proof`` the evidence that the bytes
    are right.
    """
    known = completion.known
    etag = known.validators.etag
    return {
        "url": url,
        "path": path,
        "checksum": known.digest.removeprefix("sha256:"),
        "status": status,
        "digest": known.digest,
        "size": known.size,
        "resumed_from": resumed_from,
        "reason": str(reason),
        "media_type": known.media_type,
        "etag": None if etag is None else str(etag),
        "last_modified": known.validators.last_modified,
        "proof": str(known.proof) or None,
        "completion_id": completion.completion_id,
    }


def refresh_before(revalidate: str, expires: float, now: float) -> float | None:
    """Return the time before which stored bytes are too old to be used unasked, in epoch seconds (R7).

    *revalidate* is ``STREAMING_REVALIDATE``, *expires* a number of days. ``inf`` if all bytes are too old,
    ``None`` if none are.
    """
    match revalidate:
        case "always":
            return math.inf
        case "never":
            return None
        case _:
            return now - expires * SECONDS_A_DAY


def is_unexpected(expected: Digest | None, known: StoredRepresentation | None) -> bool:
    """Whether the stored bytes are not those that the request expects, so that they cannot answer it (E9)."""
    return expected is not None and known is not None and known.digest != str(expected)


def answers(known: StoredRepresentation, expected: Digest | None, fields: Mapping[str, str] | None) -> bool:
    """Whether stored bytes answer a request without asking the server (E9, R40).

    *fields* are those of the request by lower-case name, ``None`` if they cannot be foreseen.
    """
    if is_unexpected(expected, known):
        return False
    if not set(known.vary) - {"accept-encoding"}:
        return True
    return fields is not None and selects_again(known, fields)


# -- files that another program stored (C6, C11, I16) ----------------------------------------


def may_adopt(granted: Granted, job: JobRequest, *, has_part: bool, refresh_before: float | None) -> bool:
    """Whether a file that stands under the job's name may be recorded as its result instead of fetched.

    Only for the first claim of a job that is its URL's alone: another job may have taken the name. Not if a
    part is left, whose sidecar holds what selected it (R40).
    """
    first = granted.known is None and granted.lease.generation == 1 and not job.artifact_id
    return first and not has_part and refresh_before != math.inf


def adopt_fresh(
    blobs: BlobStore, path: str, noted: NotedFile | None, refresh_before: float | None
) -> Adopted | None:
    """Make the file at *path* a blob if it was written recently enough (I14); ``None`` if it is not adopted.

    Blocks. Log the reason of a refusal at INFO.
    """
    written_at = blobs.written_at(path)
    if written_at is None or not is_recent(written_at, refresh_before, time.time()):
        return None
    try:
        return blobs.adopt(path, noted=noted)
    except (NotAdopted, WriteFailed) as refusal:
        logger.info("File (%s): not adopted, the server is asked: %s", refusal.reason, refusal.args[0])
        return None


def adopted_representation(found: Adopted, url: str) -> StoredRepresentation:
    """Return what the ledger records of an adopted file; *url* is the job's. It has no validators."""
    return StoredRepresentation(
        str(found.digest),
        found.size,
        Validators(),
        url,
        stamp=found.stamp,
        name=RecordedName(found.path, found.own_stamp),
        stored_at=found.stored_at,
    )
