"""Show what is on, and why anything is off.

Also the versions, the store, the database, and the download handler of each URL scheme.
No database is opened.

Examples:
  scrapy streaming status
  scrapy streaming -s FILES_STORE=downloads status --json
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scrapy_streaming import __version__, schemes
from scrapy_streaming.cli.output import ExitCode, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.redaction import escaped, without_credentials
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.locations import check_files


def show_status(invocation: Invocation) -> int:
    """Print the status.

    Raises ``StoreError`` if a link, a pipe or the like stands where a file of the store should be.
    """
    settings = invocation.settings
    status, handlers = _status(invocation), _handlers(invocation)
    if invocation.as_json:
        write_json({**status, "Handlers": handlers})
    else:
        for name, value in status.items():
            write(f"{name}: {escaped(value)}")
        for scheme, handler in handlers.items():
            write(f"Handler of {scheme}: {escaped(_handler_text(handler))}")
    if not settings.why_no_ledger:
        check_files(settings)
    return ExitCode.FINE


def _status(invocation: Invocation) -> dict[str, str]:
    settings = invocation.settings
    flags = {
        "Streaming": None,
        "Idempotency": settings.why_no_ledger,
        "Schema": settings.why_no_database,
        "Resume": _why_off("RESUME", settings.resume_enabled),
        "Bodies to disk": _why_off("IO", settings.io_enabled),
        "Publishing by content": _why_off("FINALIZATION", settings.finalization_enabled),
    }
    whole = settings.why_off
    return {
        **{name: f"disabled ({whole or off})" if whole or off else "enabled" for name, off in flags.items()},
        "Add-on": "in ADDONS" if _in_addons(invocation.project) else "not in ADDONS",
        "Store": str(settings.store or "none"),
        "Parts and ledger": str(settings.directory or "none"),
        "Database": _database(settings),
        "Link mode": settings.link_mode,
        "Fsync": "on" if settings.fsync else "off",
        "Versions": _versions(),
    }


def _why_off(what: str, on: bool) -> str | None:
    return None if on else f"STREAMING_{what}_ENABLED is off"


def _database(settings: StreamingSettings) -> str:
    if settings.why_no_ledger:
        return f"not opened ({settings.why_no_ledger})"
    directory = settings.directory
    url = settings.database_url or (directory and f"sqlite:///{directory / 'ledger.sqlite3'}")
    return without_credentials(str(url or "none"))


def _versions() -> str:
    found = [f"scrapy-streaming {__version__}"]
    for name in ("Scrapy", "Twisted", "SQLAlchemy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _handlers(invocation: Invocation) -> dict[str, dict[str, Any]]:
    """Return the download handler of each scheme, whether it streams, and if not why, or what to do."""
    settings = invocation.settings
    off = settings.why_off or _why_off("IO", settings.io_enabled)
    project = _with_addons(invocation.project)
    found = {}
    for scheme in project.getwithbase("DOWNLOAD_HANDLERS"):
        handler = schemes.handler_of(project, scheme)
        if handler is not None:
            found[scheme] = {"handler": handler.name, "streams": not (off or handler.remedy)}
            if off or handler.remedy:
                found[scheme]["why"] = off or f"to stream, {handler.remedy}"
    return found


def _with_addons(settings: Any) -> Any:
    """Return the settings as a crawl's add-ons change them; nothing is started."""
    from scrapy import Spider
    from scrapy.crawler import Crawler

    crawler = Crawler(Spider, settings)
    crawler.addons.load_settings(crawler.settings)
    return crawler.settings


def _handler_text(found: dict[str, Any]) -> str:
    return f"{found['handler']}, " + ("streams" if found["streams"] else f"buffers ({found['why']})")


def _in_addons(settings: Any) -> bool:
    from scrapy.utils.misc import load_object

    classes = (load_object(path) for path in settings.getdict("ADDONS"))
    return any(cls.__module__ == "scrapy_streaming.addon" for cls in classes)


VERB = Verb(show_status, needs_ledger=False)
