"""Which functions are on, by the environment alone; and how often callers fell back to their own code.

What may live here: the settings for code without a crawl, and what depends on nothing but them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.settings import StreamingSettings

logger = logging.getLogger("scrapy_streaming.integration")
logger.addFilter(clean_record)

T = TypeVar("T")

_fallbacks: Final[Counter[str]] = Counter()
_lock: Final = threading.Lock()


class _NoProject:
    """The settings of a Scrapy project that has none: only the environment counts."""

    def get(self, _name: str, default: Any = None) -> Any:
        return default

    def getpriority(self, _name: str) -> int | None:
        return None

    def __iter__(self) -> Any:
        return iter(())


def settings(store: Path | None = None) -> StreamingSettings:
    """Return the settings of the environment, for the store in the directory *store*.

    Raises ``SettingError`` for a ``SCRAPY_STREAMING_…`` that cannot be read.
    """
    found = StreamingSettings.load(_NoProject(), os.environ)
    if store is None:
        return found
    has_database = found.schema_enabled and installed("sqlalchemy")
    return replace(found, store=store.absolute(), schema_enabled=has_database)


def installed(module: str) -> bool:
    """Whether *module* can be imported; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def why_no_streaming(*parts: str) -> str | None:
    """Return why one of *parts* (``resume``, ``io``, ``finalization``) is off; ``None`` if all are on."""
    found = settings()
    if not found.enabled:
        return "STREAMING_ENABLED is off"
    off = [part for part in parts if not getattr(found, f"{part}_enabled")]
    return f"STREAMING_{off[0].upper()}_ENABLED is off" if off else None


def why_no_schema() -> str | None:
    """Return why no database is opened; ``None`` if one is."""
    found = settings()
    if not found.enabled:
        return "STREAMING_ENABLED is off"
    if not found.schema_enabled:
        return "STREAMING_SCHEMA_ENABLED is off"
    return None if installed("sqlalchemy") else "SQLAlchemy is not installed"


def why_no_idempotency() -> str | None:
    """Return why no job, lease or effect is recorded; ``None`` if they are."""
    if (why := why_no_schema()) is not None:
        return why
    return None if settings().idempotency_enabled else "STREAMING_IDEMPOTENCY_ENABLED is off"


def streaming_enabled() -> bool:
    """Whether ``STREAMING_ENABLED`` is on."""
    return settings().enabled


def schema_enabled() -> bool:
    """Whether a database may be opened: the flags are on, and SQLAlchemy is installed."""
    return why_no_schema() is None


def idempotency_enabled() -> bool:
    """Whether jobs, leases and effects are recorded; never without the database."""
    return why_no_idempotency() is None


def use_streaming_for_resume() -> bool:
    """Whether ``try_streaming_resume_decision`` decides anything (``STREAMING_RESUME_ENABLED``)."""
    return why_no_streaming("resume") is None


def use_streaming_for_io() -> bool:
    """Whether ``try_streaming_io`` writes anything (``STREAMING_IO_ENABLED``)."""
    return why_no_streaming("io") is None


def use_streaming_for_finalization() -> bool:
    """Whether ``try_streaming_finalization`` publishes anything (``STREAMING_FINALIZATION_ENABLED``)."""
    return why_no_streaming("finalization") is None


def integration_status() -> dict[str, bool]:
    """Return what is on: ``streaming``, ``idempotency``, ``schema``."""
    return {
        "streaming": streaming_enabled(),
        "idempotency": idempotency_enabled(),
        "schema": schema_enabled(),
    }


def log_integration_status() -> str:
    """Log what is on in one line, as a crawl does at its start; return the line."""
    status = " ".join(f"{name}={on}" for name, on in integration_status().items())
    logger.info("Streaming architecture integrations: %s", status)
    return f"Streaming architecture integrations: {status}"


def fallback_counts() -> dict[str, int]:
    """Return how often calls with ``fallback=True`` fell back in this process, by reason."""
    with _lock:
        return dict(_fallbacks)


def or_fall_back(fallback: bool, call: Callable[[], T]) -> T | None:
    """Return the result of *call*; with *fallback* log and count a named error, and return ``None``."""
    try:
        return call()
    except StreamingError as error:
        if not fallback:
            raise
        with _lock:
            _fallbacks[error.reason] += 1
        logger.warning("falling back: %s: %s", error.reason, error)
        return None


def is_off(why: str | None) -> bool:
    """Whether a function is off; log *why* at DEBUG."""
    if why is not None:
        logger.debug("nothing is done: %s", why)
    return why is not None
