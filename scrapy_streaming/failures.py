"""A file that failed: its reason, its one line in the log, its entry in the item (C18).

What may live here: what users learn of a failure. The pipeline gives the job back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from itemadapter import ItemAdapter, is_item
from scrapy import Request, Spider
from scrapy.exceptions import IgnoreRequest, StopDownload
from scrapy.http.request import NO_CALLBACK
from scrapy.utils.python import global_object_name
from scrapy.utils.request import referer_str

from scrapy_streaming.context import Tries, context_of
from scrapy_streaming.exceptions import LedgerError, StreamingError
from scrapy_streaming.explanations import explain
from scrapy_streaming.redaction import clean_record, without_credentials
from scrapy_streaming.runtime.shutdown import CrawlStopping

if TYPE_CHECKING:
    from scrapy.pipelines.media import FileException
else:
    try:  # where it is since Scrapy 2.17
        from scrapy.pipelines.media import FileException
    except ImportError:
        from scrapy.pipelines.files import FileException

__all__ = [
    "FailedFile",
    "FailuresField",
    "FileException",
    "FileRefused",
    "failed_file",
    "is_foreseen",
    "is_stop",
    "log_failed",
    "mark",
    "mark_raised",
    "marked",
    "not_of_a_file",
    "not_said_before",
    "reason_of",
    "stopped",
]

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: The words for errors of Scrapy, Twisted and the system, by the names of their classes: which module
#: has them differs between releases of Scrapy.
_WORDS: Final[Mapping[str, str]] = {
    "CannotResolveHostError": "cannot-resolve",
    "DNSLookupError": "cannot-resolve",
    "gaierror": "cannot-resolve",
    "DownloadConnectionRefusedError": "connection-refused",
    "ConnectionRefusedError": "connection-refused",
    "DownloadTimeoutError": "timed-out",
    "TimeoutError": "timed-out",
    "TunnelError": "tunnel-failed",
    "DownloadFailedError": "connection-failed",
    "ConnectError": "connection-failed",
    "ConnectionLost": "connection-failed",
    "ConnectionDone": "connection-failed",
    "ConnectionError": "connection-failed",
    "ResponseNeverReceived": "connection-failed",
    "SSLError": "connection-failed",
    "ResponseDataLossError": "incomplete",
    "ResponseFailed": "incomplete",
    "DownloadCancelledError": "too-large",
    "StopDownload": "incomplete-download-stopped",
    "UnsupportedURLSchemeError": "unsupported-scheme",
    "NotSupported": "unsupported-scheme",
    "FileException": "refused-by-hook",
    "IgnoreRequest": "filtered",
}
#: Errors that refuse a file on purpose, whenever they come.
_REFUSALS: Final = (FileException, IgnoreRequest, StopDownload)
_MARK: Final = "_scrapy_streaming_failed"


class FileRefused(FileException):
    """A file that is not stored; ``reason`` is the stable word, ``permanent`` whether to ask again.

    The reason is the message up to its first colon. ``retry_after`` is when the server wants to be
    asked again, in seconds.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(without_credentials(message))
        self.reason = message.partition(":")[0]
        self.permanent = permanent
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class FailedFile:
    """What is known of a file that was not stored.

    ``status`` is that of the last answer (``None``: none came), ``attempts`` the requests that were
    sent for it in this crawl, ``kept`` the bytes that its part holds. ``logged``: the log has its line.
    """

    url: str
    reason: str
    status: int | None
    attempts: int
    kept: int
    logged: bool = True

    def entry(self) -> dict[str, Any]:
        """Return what an item's field of failures holds of it."""
        names = ("url", "reason", "status", "attempts", "kept")
        return {name: getattr(self, name) for name in names}


def reason_of(error: BaseException, tries: Tries | None = None) -> str:
    """Return the stable word for an error; the name of its class for an unexpected one.

    Once an answer came (*tries*), an error of Scrapy's or the system's is a hook's mistake.
    """
    if isinstance(error, StreamingError):
        return error.reason
    reason = getattr(error, "reason", None)
    if isinstance(error, FileException) and isinstance(reason, str) and reason:
        return reason
    if isinstance(error, _REFUSALS) or tries is None or tries.status is None:
        words = (_WORDS.get(kind.__name__) for kind in type(error).__mro__)
        return next((word for word in words if word is not None), type(error).__name__)
    return type(error).__name__


def is_foreseen(error: BaseException, tries: Tries) -> bool:
    """Whether an error is a file's own failure: its line needs no traceback.

    Of the operating system's errors those of the network are, and those of a download handler, which
    come before any answer.
    """
    if isinstance(error, StreamingError | FileException):
        return True
    if isinstance(error, OSError) and tries.sent and tries.status is None:
        return True
    return reason_of(error, tries) != type(error).__name__


def failed_file(request: Request, error: BaseException, tries: Tries, *, keeps: bool) -> FailedFile:
    """Return what is known of a failure; *keeps*: an error of this kind leaves a whole part where it is."""
    kept = tries.kept if keeps or not tries.whole else 0
    return FailedFile(request.url, reason_of(error, tries), tries.status, tries.sent, kept)


def log_failed(
    request: Request, error: BaseException, failed: FailedFile, tries: Tries, spider: Spider | None
) -> None:
    """Log in one line why a file failed and what happens next; an unexpected error with its traceback."""
    extra = {"spider": spider}
    if isinstance(error, IgnoreRequest):
        text = "File (%s): Not downloading file from %s: %s"
        logger.debug(text, failed.reason, request, error, extra=extra)
        return
    why = explain(failed.reason)
    cause = _detail(error, failed) or why.meaning
    kept = f"{failed.kept} bytes are kept; " if failed.kept else ""
    values: tuple[object, ...]
    if failed.attempts:
        text = "File (%s): Error downloading file from %s referred in <%s>: %s; %s%s"
        values = (failed.reason, request, referer_str(request), cause, kept, why.remedy)
    else:
        text = "File (%s): no request is sent: %s: %s; %s%s"
        values = (failed.reason, cause, request, kept, why.remedy)
    if is_foreseen(error, tries):
        logger.warning(text, *values, extra=extra)
    else:
        logger.error(text, *values, extra=extra, exc_info=error)


def _detail(error: BaseException, failed: FailedFile) -> str:
    """Return the text of an error without its reason, in one line; ``""`` if it has no other."""
    text = error.args[0] if isinstance(error, LedgerError) else str(error)
    text = " ".join(str(text).split()).removesuffix(".")
    for known in (f"{failed.reason}:", f"{failed.url.partition('#')[0]}:", f"({failed.reason})"):
        text = text.removeprefix(known).removesuffix(known).strip()
    return "" if text == failed.reason else text


def stopped(request: Request) -> FileRefused:
    """Log that a file is left to the next crawl; return the error that the item's result holds."""
    logger.info("File (%s): left to the next crawl: %s", CrawlStopping.reason, request)
    return FileRefused(CrawlStopping.reason)


def is_stop(error: object) -> bool:
    """Whether a file failed because the user stopped the crawl."""
    return isinstance(error, FileRefused) and error.reason == CrawlStopping.reason


# -- beside the failure's own error ---------------------------------------------------------


def mark(error: BaseException, failed: FailedFile) -> None:
    """Note in an error which failure it stands for: Scrapy hands on the error alone."""
    setattr(error, _MARK, failed)


def marked(error: BaseException | None) -> FailedFile | None:
    """Return the failure that an error stands for, ``None`` if none was noted."""
    failed: FailedFile | None = getattr(error, _MARK, None)
    return failed


def mark_raised(raised: BaseException, error: BaseException, failed: FailedFile) -> None:
    """Note the failure in what the hook ``media_failed`` raised for *error*.

    Any other error than the failure's own or a refusal is a mistake in the hook: Scrapy logs it.
    """
    own = raised is error or isinstance(raised, FileException)
    mark(raised, failed if own else replace(failed, logged=False))


def not_said_before(record: logging.LogRecord) -> bool:
    """Whether to log the line of Scrapy's pipeline for a failed file: not if it has its own line."""
    error = getattr(record.msg, "value", None)
    failed = marked(error)
    stop = isinstance(error, FileException) and reason_of(error) == CrawlStopping.reason
    return not (stop or (failed is not None and failed.logged))


def not_of_a_file(record: logging.LogRecord) -> bool:
    """Whether to log that Scrapy gave up retrying: a failed file has its own line."""
    request = record.args.get("request") if isinstance(record.args, Mapping) else None
    if not isinstance(request, Request) or context_of(request) is None:
        return True
    return record.levelno < logging.INFO or request.callback is not NO_CALLBACK


class FailuresField:
    """Lists an item's failed files in the field that ``STREAMING_FAILURES_FIELD`` names."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._logged = False

    def fill(self, item: Any, results: Iterable[tuple[bool, Any]]) -> None:
        """Set the field of an item that asked for files; log once that items have no such field."""
        if self._name is None or not results or not is_item(item):
            return
        errors = [result.value for ok, result in results if not ok]
        try:
            ItemAdapter(item)[self._name] = [_entry(error) for error in errors]
        except (KeyError, AttributeError):  # not among its fields; frozen
            if not self._logged:
                self._logged = True
                logger.warning(
                    "items of %s have no field %s (STREAMING_FAILURES_FIELD) that can be set: "
                    "their failed files are not listed, the log has them",
                    global_object_name(type(item)),
                    self._name,
                )


def _entry(error: BaseException) -> dict[str, Any]:
    failed = marked(error) or FailedFile("", reason_of(error), None, 0, 0)
    return failed.entry()
