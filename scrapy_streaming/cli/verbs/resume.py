"""Finish the downloads that no crawl will request again.

Prints a line for each job as it ends. Exit code 3 if some are left.

Examples:
  scrapy streaming resume
  scrapy streaming ls --state ready
"""

from __future__ import annotations

from typing import Any

from scrapy_streaming.cli.output import ExitCode, error_text, write_json_line, write_row
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.cli.resume_crawl import run_crawl
from scrapy_streaming.exceptions import StoreError
from scrapy_streaming.storage.ledger import JobView
from scrapy_streaming.storage.store import Storage, Use


def resume(invocation: Invocation) -> int:
    """Finish the jobs; 3 if some are left, 1 if the crawl could not start.

    Raises ``StoreError`` if there is no store.
    """
    settings = invocation.settings
    if not settings.enabled or settings.store is None:
        msg = "nothing to resume: STREAMING_ENABLED is off, or FILES_STORE names no local directory"
        raise StoreError(msg, reason="store-missing")
    Storage.open(settings, Use.MAINTAIN).close()  # refuses what cannot be resumed
    left = 0

    def report(job: JobView, result: Any) -> None:
        nonlocal left
        done = isinstance(result, dict)
        left += not done
        more = result if done else {"error": _text(result)}
        if invocation.as_json:
            write_json_line({"key": job.key, "url": job.url, "done": done, **more})
        else:
            write_row(job.key, "done" if done else "left", job.url, more.get("path") or more["error"])

    if not run_crawl(invocation.project, report):
        return ExitCode.WRONG
    return ExitCode.UNFINISHED if left else ExitCode.FINE


def _text(result: object) -> str:
    """Return an error's message, or a text, on one line."""
    while isinstance(result, BaseException) and not str(result) and result.__context__ is not None:
        result = result.__context__  # Scrapy's own error has no message
    if isinstance(result, BaseException):
        return error_text(result) or type(result).__name__
    return str(result)


VERB = Verb(resume)
