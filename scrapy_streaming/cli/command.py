"""The Scrapy command ``streaming``: finds the verb, runs it, and turns errors into exit codes.

What may live here: what is the same for all verbs. Every ``scrapy`` call imports this module, so it imports
nothing heavy: a verb's module is imported when the verb runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import Any, ClassVar

from scrapy.commands import ScrapyCommand, ScrapyHelpFormatter
from scrapy.exceptions import UsageError

from scrapy_streaming.redaction import clean, write_lines

DESCRIPTION = "Inspect and maintain the download store"


class _HelpFormatter(ScrapyHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Scrapy's help, with the lines of the description as they are."""


class StreamingCommand(ScrapyCommand):
    """The command with its verbs."""

    requires_project = False
    requires_crawler_process = False
    default_settings: ClassVar[dict[str, Any]] = {"LOG_ENABLED": False}
    _parser: argparse.ArgumentParser

    def syntax(self) -> str:
        """Return the usage line."""
        return "[-s NAME=VALUE] VERB [options]"

    def short_desc(self) -> str:
        """Return the command's line in the list of Scrapy's commands."""
        return DESCRIPTION

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that all verbs share; help is printed when the verb is known."""
        super().add_options(parser)
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument(
            "-h", "--help", action="store_true", help="show the help of the command, or of VERB"
        )
        self._parser = parser

    def run(self, args: list[str], opts: argparse.Namespace) -> None:
        """Run a verb; set ``exitcode``."""
        from scrapy_streaming.cli import registry

        if opts.help and not args:
            self._print_help()
            return
        name = _verb_name(args)
        verb = registry.load(name)
        if opts.help:
            parser = registry.parser_of(name, verb, description=registry.help_text(name))
            write_lines(sys.stdout, parser.format_help().rstrip())
            return
        try:
            options = registry.parsed(name, verb, args[1:])
        except registry.WrongCall as error:
            msg = f"{clean(error)} (settings stand before the verb: -s NAME=VALUE)"
            raise UsageError(msg) from None
        assert self.settings is not None
        invocation = registry.Invocation(self.settings, _settings(self.settings), options, opts.json)
        if verb.needs_ledger and find_spec("sqlalchemy") is None:
            why = invocation.settings.why_no_ledger
            self.exitcode = 1
            write_lines(sys.stderr, f"{name}: no ledger is opened: {why} (ledger-off)")
            return
        self._run(name, verb, invocation)

    def _run(self, name: str, verb: Any, invocation: Any) -> None:
        from scrapy_streaming.cli import output, registry
        from scrapy_streaming.exceptions import StreamingError

        try:
            self.exitcode = verb.run(invocation)
            sys.stdout.flush()
        except registry.WrongCall as error:
            raise UsageError(clean(error)) from None
        except (StreamingError, OSError) as error:
            self.exitcode = output.ExitCode.WRONG
            if isinstance(error, BrokenPipeError):  # the reader closed its end, as `head` does
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return
            output.warn(f"{name}: {output.error_text(error)}")
        except KeyboardInterrupt:
            self.exitcode = output.ExitCode.INTERRUPTED
            output.warn(f"{name}: interrupted; what was done so far is kept")

    def _print_help(self) -> None:
        from scrapy_streaming.cli import registry

        names = registry.names()
        width = max(map(len, names))
        lines = [f"  {name:{width}}  {registry.summary(name)}" for name in names]
        self._parser.formatter_class = _HelpFormatter
        self._parser.description = "\n".join(
            [f"{DESCRIPTION}.", "", "Verbs:", *lines, "", "scrapy streaming VERB --help shows its options."]
        )
        self._parser.print_help()


def _verb_name(args: list[str]) -> str:
    from scrapy_streaming.cli import registry

    known = registry.names()
    if args and args[0] in known:
        return args[0]
    given = f"unknown verb {args[0]!r}, " if args else ""
    msg = f"{given}expected one of: {', '.join(known)}"
    raise UsageError(msg)


def _settings(settings: Any) -> Any:
    """Return this package's settings; raise ``UsageError`` for one that cannot be read."""
    from scrapy_streaming.exceptions import SettingError
    from scrapy_streaming.settings import StreamingSettings

    try:
        return StreamingSettings.load(settings, os.environ)
    except SettingError as error:
        raise UsageError(clean(error), print_help=False) from None
