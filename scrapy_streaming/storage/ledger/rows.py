"""Conversion of the ledger's rows to the values of ``protocol.jobs``; a damaged row raises.

What may live here: pure functions of rows. No database is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import Completion, RecordedName, StoredRepresentation
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.storage.job_request import JobRequest
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.records import damaged_row


@contextmanager
def reading_job(key: str) -> Iterator[None]:
    """Turn an error in reading a job's rows into ``LedgerError`` (``ledger-row``)."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise damaged_row(key, error) from error


def check_row(row: Any, key: str, request: JobRequest) -> None:
    """Raise ``LedgerError`` (``ledger-row``) unless the row of a job has the key and texts of *request*.

    The key is made from the texts, so a sound row that is found by its key has the same ones.
    """
    texts = (request.work_id, request.artifact_id, request.url)
    asked = (key, *(text.replace("\0", "\ufffd") for text in texts))
    for name, wanted in zip(sql.ASKED_FOR, asked, strict=True):
        if getattr(row, name) != wanted:
            raise damaged_row(key, f"its {name} does not match the request")


def as_representation(row: Any, final_url: str, fetched_at: float) -> StoredRepresentation:
    """Return the stored representation in *row*; raise ``ValueError`` if it cannot be read."""
    _check_size(row)
    return StoredRepresentation(
        digest=row.digest,
        size=row.size,
        validators=Validators(
            EntityTag.parse(row.etag) if row.etag is not None else None, row.last_modified, row.date
        ),
        final_url=final_url,
        media_type=row.media_type,
        vary=tuple(json.loads(row.vary)),
        selecting=row.selecting,
        fetched_at=fetched_at,
        proof=row.proof,
        stamp=row.stamp,
        name=_name(row),
    )


def as_completion(row: Any) -> Completion:
    """Return a completion: digest and size are its own, the rest is the URL's representation's.

    If the representation has other bytes by now, the result has no validators, and of the selecting fields
    only their names: their values are no longer known (R40). Raises ``ValueError`` if a row cannot be read.
    """
    _check_size(row)
    if row.represents != row.digest:
        known = StoredRepresentation(
            row.digest,
            row.size,
            Validators(),
            row.url,
            vary=tuple(json.loads(row.vary or "[]")),
            fetched_at=row.completed_at,
            stamp=row.stamp,
            name=_name(row),
        )
    else:
        known = as_representation(row, row.final_url or row.url, row.completed_at)
    return Completion(
        row.claim_id, known, row.completed_at, row.job_id, row.generation, row.path, row.by_response
    )


def _check_size(row: Any) -> None:
    """Raise ``ValueError`` if a record of bytes and that of their blob disagree about their number."""
    if row.size != row.blob_size:
        msg = f"it has {row.size} bytes, its blob {row.digest} has {row.blob_size}"
        raise ValueError(msg)


def _name(row: Any) -> RecordedName | None:
    return None if row.path is None else RecordedName(row.path, row.name_stamp)
