"""Bring the ledger to this release's schema.

Any crawl does that too.

Examples:
  scrapy streaming migrate
  scrapy streaming migrate --sql
"""

from __future__ import annotations

from scrapy_streaming.cli.output import ExitCode, write, write_json
from scrapy_streaming.cli.registry import Invocation, Verb, flag
from scrapy_streaming.cli.stores import opened
from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage.ledger import SCHEMA_VERSION, ddl, schema_found
from scrapy_streaming.storage.locations import check_files, ledger_url


def migrate(invocation: Invocation) -> int:
    """Migrate the ledger, or print its tables with ``--sql``."""
    if invocation.options.sql:
        return _print_tables(invocation)
    settings = invocation.settings
    check_files(settings)
    before = _schema_before(settings)
    with opened(settings):
        pass
    if invocation.as_json:
        write_json({"from": before, "to": SCHEMA_VERSION})
    elif before == SCHEMA_VERSION:
        write(f"migrate: the ledger has schema {SCHEMA_VERSION}, nothing to do")
    else:
        write(f"migrate: the ledger went from schema {before} to {SCHEMA_VERSION}")
    return ExitCode.FINE


def _print_tables(invocation: Invocation) -> int:
    url = invocation.settings.database_url or ""
    dialect = "postgresql" if url.startswith("postgresql") else "sqlite"
    statements = ddl(dialect)
    if invocation.as_json:
        write_json({"dialect": dialect, "sql": statements})
    else:
        write(statements.strip())
    return ExitCode.FINE


def _schema_before(settings: StreamingSettings) -> int:
    """Return the schema's version; 0 if it cannot be read: opening the ledger says why."""
    directory = settings.directory
    if directory is None or not directory.is_dir():
        return 0
    try:
        return schema_found(ledger_url(settings, directory)) or 0
    except LedgerError:
        return 0


VERB = Verb(migrate, (flag("--sql", "print the tables as SQL, and open nothing"),))
