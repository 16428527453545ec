"""``scrapy streaming …``: what is on, and how it stands.

Imported by every ``scrapy`` call, so nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from typing import Any, ClassVar

from scrapy.commands import ScrapyCommand
from scrapy.exceptions import UsageError


class StreamingCommand(ScrapyCommand):
    """The command with its verbs; exit code 2 for a wrong call."""

    requires_project = False
    requires_crawler_process = False
    default_settings: ClassVar[dict[str, Any]] = {"LOG_ENABLED": False}

    def syntax(self) -> str:
        """Return how it is called."""
        return "[-s NAME=VALUE] status [--json]"

    def short_desc(self) -> str:
        """Return what it is for."""
        return "Show what scrapy-streaming does here"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the verbs."""
        super().add_options(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, args: list[str], opts: argparse.Namespace) -> None:
        """Run a verb."""
        verbs = {"status": self._status}
        if not args or args[0] not in verbs:
            given = f"unknown verb {args[0]!r}, " if args else ""
            msg = f"{given}expected one of: {', '.join(verbs)}"
            raise UsageError(msg)
        if len(args) > 1:
            msg = f"not understood: {' '.join(args[1:])} (settings stand before the verb: -s NAME=VALUE)"
            raise UsageError(msg)
        verbs[args[0]](opts)

    def _status(self, opts: argparse.Namespace) -> None:
        status = _collect(self.settings)
        if opts.json:
            print(json.dumps(status, indent=2))  # noqa: T201 - this is what the command is for
            return
        for name, value in status.items():
            print(f"{name}: {value}")  # noqa: T201 - as above


def _collect(settings: Any) -> dict[str, str]:
    """Return what ``status`` says, line by line; nothing is opened or made."""
    from scrapy_streaming import __version__
    from scrapy_streaming.exceptions import SettingError
    from scrapy_streaming.settings import StreamingSettings

    try:
        loaded = StreamingSettings.load(settings, os.environ)
    except SettingError as error:
        raise UsageError(str(error), print_help=False) from None
    why = _why_off(loaded)
    on = f"disabled ({why})" if why else "enabled"
    directory = loaded.directory
    database = loaded.database_url or (directory and f"sqlite:///{directory / 'ledger.sqlite3'}")
    return {
        "Streaming": on,
        "Idempotency": on,
        "Schema": on,
        "Resume": on if why or loaded.resume_enabled else "disabled (STREAMING_RESUME_ENABLED is off)",
        "Bodies to disk": on if why or loaded.io_enabled else "disabled (STREAMING_IO_ENABLED is off)",
        "Add-on": "in ADDONS" if _in_addons(settings) else "not in ADDONS",
        "Store": str(loaded.store or "none"),
        "Parts and ledger": str(directory or "none"),
        "Database": str(database or "none"),
        "Link mode": loaded.link_mode,
        "Fsync": "on" if loaded.fsync else "off",
        "Versions": ", ".join(
            [f"scrapy-streaming {__version__}"]
            + [f"{name} {version(name)}" for name in ("Scrapy", "Twisted", "SQLAlchemy")]
            + [f"Python {platform.python_version()}"]
        ),
    }


def _why_off(loaded: Any) -> str | None:
    if not loaded.enabled:
        return "STREAMING_ENABLED is off"
    if loaded.store is None:
        return "FILES_STORE names no local directory"
    return None


def _in_addons(settings: Any) -> bool:
    from scrapy.utils.misc import load_object

    classes = (load_object(path) for path in settings.getdict("ADDONS"))
    return any(cls.__module__ == "scrapy_streaming.addon" for cls in classes)
