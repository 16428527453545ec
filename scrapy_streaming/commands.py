"""``scrapy streaming …``: what is on, and how it stands.

Imported by every ``scrapy`` call, so nothing heavy is imported before a verb runs: ``console`` has
what the verbs do, ``looking`` those that change nothing. Exit codes: 0 fine, 1 something is wrong or
refused, 2 a wrong call, 3 something is left (``check``, ``resume``), 4 jobs failed (``check``), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, ClassVar, NoReturn

from scrapy.commands import ScrapyCommand
from scrapy.exceptions import UsageError

from scrapy_streaming.redaction import clean, escaped, without_credentials, write_lines

STATES = ("ready", "leased", "done", "failed", "dead")


class StreamingCommand(ScrapyCommand):
    """The command with its verbs."""

    requires_project = False
    requires_crawler_process = False
    default_settings: ClassVar[dict[str, Any]] = {"LOG_ENABLED": False}

    def syntax(self) -> str:
        """Return how it is called."""
        return "[-s NAME=VALUE] VERB [options]"

    def short_desc(self) -> str:
        """Return what it is for."""
        return "Look at and after what scrapy-streaming stores"

    def long_desc(self) -> str:
        """Return the verbs, each with what it does."""
        return "Verbs: " + "; ".join(f"{name}: {what}" for name, (what, _) in _VERBS.items())

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the option that all verbs have."""
        super().add_options(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: list[str], opts: argparse.Namespace) -> None:
        """Run a verb; set ``exitcode``."""
        given = _parsed(args)
        given.json = opts.json
        loaded = _load(self.settings)
        given.result_field = _result_field(self.settings)
        if given.verb == "status":
            _status(self.settings, loaded, opts.json)
            if loaded.why_no_ledger:
                return
        if find_spec("sqlalchemy") is None:
            self.exitcode = 1
            write_lines(sys.stderr, f"{given.verb}: no ledger is opened: {loaded.why_no_ledger} (ledger-off)")
            return
        from scrapy_streaming import console, looking, moving
        from scrapy_streaming.exceptions import StreamingError

        try:
            if given.verb == "resume":
                from scrapy_streaming import resuming

                settings: Any = self.settings
                self.exitcode = resuming.resume(settings, loaded, as_json=given.json)
            else:
                verbs = {**console.VERBS, **looking.VERBS, **moving.VERBS}
                self.exitcode = verbs[given.verb](loaded, given)
            sys.stdout.flush()
        except console.WrongCall as error:
            raise UsageError(clean(error)) from None
        except (StreamingError, OSError) as error:
            self.exitcode = 1
            if isinstance(error, BrokenPipeError):  # whoever read has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return
            write_lines(sys.stderr, f"{given.verb}: {console.said(error)}")
        except KeyboardInterrupt:
            self.exitcode = 130
            sys.stderr.write(f"{given.verb}: interrupted; what was done so far is kept\n")


# -- the call -------------------------------------------------------------------------------


def _days(text: str) -> float:
    days = float(text)
    if not math.isfinite(days) or days < 0:
        msg = f"not a number of days, 0 or more: {text}"
        raise argparse.ArgumentTypeError(msg)
    return days


#: Each verb: what it does, and its options as ``add_argument`` takes them.
_VERBS: dict[str, tuple[str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "status": ("what is on, and why anything is off", []),
    "health": ("whether every row of the ledger, jobs and disk are well", []),
    "ls": ("the jobs, one a line", [(("--state",), {"choices": STATES})]),
    "show": ("all about a job or a blob", [(("what",), {"metavar": "URL|KEY|DIGEST"})]),
    "check": (
        "whether all is done: exit code 0, 3 if something may still come, 4 if jobs failed or are dead",
        [(("--work-id",), {"metavar": "W"})],
    ),
    "failures": (
        "why files failed, and what to do",
        [(("--urls",), {"action": "store_true"}), (("--reason",), {"metavar": "WORD"})],
    ),
    "compare": (
        "what changed between two crawls, by their metrics.json",
        [(("before",), {"metavar": "A"}), (("after",), {"metavar": "B"})],
    ),
    "verify": ("read every blob and every copy", [(("--repair",), {"action": "store_true"})]),
    "gc": (
        "remove what nobody needs",
        [
            (("--dry-run",), {"action": "store_true"}),
            (("--superseded",), {"action": "store_true"}),
            (("--grace",), {"type": _days, "default": 1.0, "metavar": "DAYS"}),
        ],
    ),
    "requeue": (
        "make failed and dead jobs ready",
        [(("keys",), {"nargs": "*", "metavar": "KEY"}), (("--failed",), {"action": "store_true"})],
    ),
    "resume": ("finish the downloads that nobody will ask for again", []),
    "migrate": ("bring the ledger to this release's tables", [(("--sql",), {"action": "store_true"})]),
    "rebuild": ("make a ledger from the files in the store", []),
    "adopt": ("take over the files that FilesPipeline stored", []),
    "detach": ("give every name bytes of its own, so that blobs and .streaming can be deleted", []),
    "export": (
        "write what the ledger knows, one line a completion",
        [(("file",), {"metavar": "FILE.jsonl"})],
    ),
    "import": (
        "record what an export, or a feed of FilesPipeline, says of files that are here",
        [
            (("file",), {"metavar": "FILE.jsonl|FEED"}),
            (("--work-id",), {"metavar": "SPIDER"}),
            (("--field",), {"metavar": "NAME"}),
        ],
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose refusal is Scrapy's."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError``."""
        msg = f"{clean(message)} (settings stand before the verb: -s NAME=VALUE)"
        raise UsageError(msg)


def _parsed(args: list[str]) -> argparse.Namespace:
    """Return the verb and its options; raise ``UsageError`` for what is not understood."""
    if not args or args[0] not in _VERBS:
        given = f"unknown verb {args[0]!r}, " if args else ""
        msg = f"{given}expected one of: {', '.join(_VERBS)}"
        raise UsageError(msg)
    parser = _Parser(prog=f"scrapy streaming {args[0]}", add_help=False, allow_abbrev=False)
    for names, how in _VERBS[args[0]][1]:
        parser.add_argument(*names, **how)
    parsed, left = parser.parse_known_intermixed_args(args[1:])
    if left:
        parser.error(f"not understood: {' '.join(left)}")
    parsed.verb = args[0]
    return parsed


def _result_field(settings: Any) -> str:
    """Return the item field in which the project's crawls leave what became of files."""
    return settings.get("FILES_RESULT_FIELD") or "files"


# -- status ---------------------------------------------------------------------------------


def _load(settings: Any) -> Any:
    """Return the settings; raise ``UsageError`` for one that cannot be read."""
    from scrapy_streaming.exceptions import SettingError
    from scrapy_streaming.settings import StreamingSettings

    try:
        return StreamingSettings.load(settings, os.environ)
    except SettingError as error:
        raise UsageError(clean(error), print_help=False) from None


def _status(settings: Any, loaded: Any, as_json: bool) -> None:
    status, handlers = _collect(settings, loaded), _handlers(settings, loaded)
    if as_json:
        lines = [json.dumps({**status, "Handlers": handlers}, indent=2)]
    else:
        lines = [f"{name}: {escaped(value)}" for name, value in status.items()]
        lines += [
            f"Handler of {scheme}: {escaped(_shown_handler(found))}" for scheme, found in handlers.items()
        ]
    write_lines(sys.stdout, "\n".join(lines))


def _collect(settings: Any, loaded: Any) -> dict[str, str]:
    """Return what ``status`` says, line by line; nothing is opened or made."""
    from scrapy_streaming import __version__

    why, unrecorded = loaded.why_off, loaded.why_no_ledger
    directory = loaded.directory
    database = loaded.database_url or (directory and f"sqlite:///{directory / 'ledger.sqlite3'}")
    ledger_file = f"not opened ({unrecorded})" if unrecorded else without_credentials(str(database or "none"))
    flags = {
        "Streaming": None,
        "Idempotency": unrecorded,
        "Schema": loaded.why_no_database,
        "Resume": _switched_off("RESUME", loaded.resume_enabled),
        "Bodies to disk": _switched_off("IO", loaded.io_enabled),
        "Publishing by content": _switched_off("FINALIZATION", loaded.finalization_enabled),
    }
    return {
        **{name: f"disabled ({why or off})" if why or off else "enabled" for name, off in flags.items()},
        "Add-on": "in ADDONS" if _in_addons(settings) else "not in ADDONS",
        "Store": str(loaded.store or "none"),
        "Parts and ledger": str(directory or "none"),
        "Database": ledger_file,
        "Link mode": loaded.link_mode,
        "Fsync": "on" if loaded.fsync else "off",
        "Versions": ", ".join(
            [f"scrapy-streaming {__version__}"]
            + [f"{name} {_version(name)}" for name in ("Scrapy", "Twisted", "SQLAlchemy")]
            + [f"Python {platform.python_version()}"]
        ),
    }


def _switched_off(what: str, on: bool) -> str | None:
    return None if on else f"STREAMING_{what}_ENABLED is off"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _handlers(settings: Any, loaded: Any) -> dict[str, dict[str, Any]]:
    """Return the handler of each scheme in a crawl, whether it streams, and if not why, or what to do."""
    from scrapy_streaming import schemes

    off = loaded.why_off or (None if loaded.io_enabled else "STREAMING_IO_ENABLED is off")
    wired = _wired(settings)
    found = {}
    for scheme in wired.getwithbase("DOWNLOAD_HANDLERS"):
        handler = schemes.handler_of(wired, scheme)
        if handler is not None:
            found[scheme] = {"handler": handler.name, "streams": not (off or handler.remedy)}
            if off or handler.remedy:
                found[scheme]["why"] = off or f"to stream, {handler.remedy}"
    return found


def _wired(settings: Any) -> Any:
    """Return the settings as the add-ons of a crawl would leave them; nothing is started."""
    from scrapy import Spider
    from scrapy.crawler import Crawler

    crawler = Crawler(Spider, settings)
    crawler.addons.load_settings(crawler.settings)
    return crawler.settings


def _shown_handler(found: dict[str, Any]) -> str:
    return f"{found['handler']}, " + ("streams" if found["streams"] else f"buffers ({found['why']})")


def _in_addons(settings: Any) -> bool:
    from scrapy.utils.misc import load_object

    classes = (load_object(path) for path in settings.getdict("ADDONS"))
    return any(cls.__module__ == "scrapy_streaming.addon" for cls in classes)
