"""Show all that is recorded of a job or a blob.

A job is found by its URL, or by its key or digest, of which the first six hex digits
are enough. Exit code 1 if nothing is found.

Examples:
  scrapy streaming show https://example.org/a.pdf
  scrapy streaming show f8946140d22c
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, Final

from w3lib.url import canonicalize_url

from scrapy_streaming.cli.output import ExitCode, cell_text, warn, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, WrongCall, option
from scrapy_streaming.protocol.digests import Digest
from scrapy_streaming.redaction import clean, url_without_userinfo
from scrapy_streaming.storage.blobs import blob_key
from scrapy_streaming.storage.ledger import JobView, Queries
from scrapy_streaming.storage.ledger.records import BlobRow
from scrapy_streaming.storage.store import view_of
from scrapy_streaming.storage.view import StoreView

_HEX: Final = re.compile(r"(sha256:)?([0-9a-f]{6,64})", re.ASCII | re.IGNORECASE)


def show(invocation: Invocation) -> int:
    """Print the jobs and blobs that are found; 1 if there are none."""
    what = invocation.options.what
    with view_of(invocation.settings) as store:
        jobs, blobs = _found(store.ledger, what)
        document = {
            "jobs": [_job_document(store.ledger, job) for job in jobs],
            "blobs": [_blob_document(store, row) for row in blobs],
        }
    if invocation.as_json:
        write_json(document)
    else:
        _write_nested(document["jobs"], "job")
        _write_nested(document["blobs"], "blob")
    if not jobs and not blobs:
        warn(clean(f"show: nothing is recorded of {what} (not-found)"))
        return ExitCode.WRONG
    return ExitCode.FINE


def _found(ledger: Queries, what: str) -> tuple[list[JobView], list[BlobRow]]:
    match = _HEX.fullmatch(what)
    if match is not None:
        prefix = match[2].lower()
        return ledger.find(prefix=prefix).result(), ledger.blobs_like(prefix).result()
    url = url_without_userinfo(what)
    try:
        canonical = canonicalize_url(url)
    except ValueError as error:
        msg = f"{url} is no URL: {error}"
        raise WrongCall(msg) from error
    return ledger.find(url=canonical).result() or ledger.find(url=url).result(), []


def _job_document(ledger: Queries, job: JobView) -> dict[str, Any]:
    return dataclasses.asdict(job) | dataclasses.asdict(ledger.details(job.id).result())


def _blob_document(store: StoreView, row: BlobRow) -> dict[str, Any]:
    digest = Digest.parse(row.digest)
    jobs = store.ledger.find(prefix=digest.hex).result()
    return dataclasses.asdict(row) | {
        "path": blob_key(digest),
        "file": "there" if store.blobs.has(digest, row.size) else "not there, or not of that size",
        "jobs": [job.key for job in jobs],
        "represents": store.ledger.urls_of(row.digest).result(),
    }


def _write_nested(documents: Iterable[dict[str, Any]], kind: str) -> None:
    """Print each document: its values, then its lists, one entry a row."""
    for document in documents:
        write_row(kind, document.get("key") or document["digest"])
        for name, value in document.items():
            if not isinstance(value, list | tuple):
                write_row(f"  {name}", value)
        for name, values in document.items():
            if isinstance(values, list | tuple):
                for value in values:
                    pairs = value.items() if isinstance(value, dict) else ()
                    write_row(f"  {name}", *([f"{k}={cell_text(v)}" for k, v in pairs] or [value]))


VERB = Verb(show, (option("what", metavar="URL|KEY|DIGEST", help="what to find"),))
