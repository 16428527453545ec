"""Which download handler serves a URL scheme, and whether its bodies can be streamed.

What may live here: reading of settings, and which schemes were found to be buffered. No handler is made; a
class that cannot be loaded is left to Scrapy, which reports it.
"""

from __future__ import annotations

import logging
from typing import Any, Final, NamedTuple

from scrapy.settings import BaseSettings
from scrapy.utils.misc import load_object
from scrapy.utils.python import global_object_name

from scrapy_streaming.redaction import clean_record

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)

#: The handler that streams bodies, around another one.
OURS: Final = "scrapy_streaming.handlers.StreamingDownloadHandler"
#: The handlers that a user named for the schemes that the streaming handler wraps.
FALLBACK: Final = "STREAMING_FALLBACK_DOWNLOAD_HANDLERS"
#: The schemes of HTTP.
SCHEMES: Final = ("http", "https")
#: What to do where the names are missing that ``handlers.twisted_tap`` relies on.
UNKNOWN_NAMES: Final = "use releases of Scrapy and Twisted that this one was tested with"

_HTTP11: Final = "scrapy.core.downloader.handlers.http11.HTTP11DownloadHandler"
_WITH_REACTOR: Final = "set TWISTED_REACTOR_ENABLED=True, for Scrapy's HTTP11DownloadHandler"
_WITH_STREAMING: Final = 'set DOWNLOAD_HANDLERS["{scheme}"] = "' + OURS + '"'
_WITH_HTTP11: Final = (
    'leave "{scheme}" out of DOWNLOAD_HANDLERS, or name HTTP11DownloadHandler or a subclass of it there'
)
_BY_HTTP: Final = "serve them by http or https"


class SchemeHandler(NamedTuple):
    """The handler of a scheme; ``remedy`` is what to do to have bodies streamed, ``""`` if they are."""

    scheme: str
    name: str
    remedy: str

    def buffers(self) -> str:
        """Return the log line for bodies that are buffered: by which handler, and the remedy."""
        return (
            f"falling back to buffered bodies for {self.scheme}: {self.name} gives whole bodies only, "
            "kept in memory and not resumed in the middle; "
            f"to stream them, {self.remedy}; to accept it, set STREAMING_IO_ENABLED=False"
        )


class BufferingSchemes(set[str]):
    """The schemes whose bodies Scrapy buffers; without *warns* the user has asked for that."""

    def __init__(self, *, warns: bool) -> None:
        super().__init__()
        self._warns = warns

    def note(self, handler: SchemeHandler) -> None:
        """Add the scheme of *handler*; log it once, unless the user has asked for buffering.

        A file of another scheme than HTTP's is buffered by Scrapy alone, too: that is no warning.
        """
        if handler.scheme in self or not self._warns or handler.scheme == "data":
            return
        self.add(handler.scheme)
        logger.log(logging.WARNING if handler.scheme in SCHEMES else logging.INFO, "%s", handler.buffers())


def can_wrap(path: Any) -> bool:
    """Whether *path* names a handler that bodies can be streamed from."""
    return _is_a(path, _HTTP11)


def is_streaming(path: Any) -> bool:
    """Whether *path* names the streaming handler, or a subclass of it."""
    return _is_a(path, OURS)


def has_reactor(settings: BaseSettings) -> bool:
    """Whether the crawl has a Twisted reactor, which streaming needs."""
    return settings.getbool("TWISTED_REACTOR_ENABLED", True)


def wrapped(settings: BaseSettings, scheme: str) -> Any:
    """Return the handler that is wrapped: the user's, else Scrapy's as it is by now; ``None`` for none."""
    return settings.getdict(FALLBACK).get(scheme) or settings["DOWNLOAD_HANDLERS_BASE"].get(scheme)


def handler_of(settings: BaseSettings, scheme: str) -> SchemeHandler | None:
    """Return what serves *scheme*, ``None`` if nothing does."""
    path = settings.getwithbase("DOWNLOAD_HANDLERS").get(scheme)
    streams = path is not None and is_streaming(path)
    inner = wrapped(settings, scheme) if streams else path
    if inner is None:
        return None
    if scheme not in SCHEMES:
        remedy = _BY_HTTP
    elif not has_reactor(settings):
        remedy = _WITH_REACTOR
    elif not can_wrap(inner):
        remedy = _WITH_HTTP11
    else:
        remedy = "" if streams else _WITH_STREAMING
    name = inner if isinstance(inner, str) else global_object_name(inner)
    return SchemeHandler(scheme, name, remedy.format(scheme=scheme))


def _is_a(path: Any, base: str) -> bool:
    loaded = _loaded(path)
    return isinstance(loaded, type) and issubclass(loaded, load_object(base))


def _loaded(path: Any) -> Any:
    try:
        return load_object(path)
    except Exception:  # noqa: BLE001 - a user's module may raise anything; Scrapy loads it again and reports it
        return None
