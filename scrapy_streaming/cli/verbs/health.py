"""Check the ledger, the jobs and the disk.

Reads every row of the ledger. Exit code 1 unless the status is healthy.

Examples:
  scrapy streaming health
  scrapy streaming health --json
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Final

from scrapy_streaming.cli.output import ExitCode, error_text, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb
from scrapy_streaming.exceptions import StreamingError
from scrapy_streaming.settings import StreamingSettings
from scrapy_streaming.storage import maintenance
from scrapy_streaming.storage.store import view_of

#: Seconds to wait for a database that another process keeps locked.
PATIENCE: Final = 5.0


def check_health(invocation: Invocation) -> int:
    """Print the health of the store; 1 unless it is healthy."""
    found = _health(invocation.settings)
    if invocation.as_json:
        write_json({"status": found.status, **dataclasses.asdict(found)})
    else:
        write_row("status", found.status)
        write_row("schema_version", found.schema_version)
        for what in ("jobs", "tables"):
            for name, number in getattr(found, what).items():
                write_row(what, name, number)
        for what in ("errors", "warnings"):
            for text in getattr(found, what):
                write_row(what, text)
    return ExitCode.FINE if found.status == "healthy" else ExitCode.WRONG


def _health(settings: StreamingSettings) -> maintenance.Health:
    """Return the health, read in a thread of its own: a locked database must not block the verb."""
    is_open, is_read, found = threading.Event(), threading.Event(), maintenance.Health()

    def read() -> None:
        nonlocal found
        try:
            with view_of(settings) as store:
                store.ledger.wait_unlocked(PATIENCE)
                is_open.set()
                found = maintenance.health(store, patience=PATIENCE)
                is_read.set()
        except (StreamingError, OSError) as error:
            if not is_read.is_set():
                found = maintenance.Health(errors=[error_text(error)])
        finally:
            is_open.set()
            is_read.set()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    if not is_open.wait(PATIENCE):
        msg = f"the ledger did not answer within {PATIENCE:.0f} s; is a process stopped in the middle?"
        return maintenance.Health(errors=[f"{msg} (ledger-locked)"])
    is_read.wait()
    thread.join(PATIENCE)
    return found


VERB = Verb(check_health)
