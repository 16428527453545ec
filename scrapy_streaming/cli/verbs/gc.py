"""Remove parts and blobs that nothing refers to.

Removes only what is older than the grace time. Crawls may run meanwhile: then nothing
younger than an hour is removed.

Examples:
  scrapy streaming gc --dry-run
  scrapy streaming gc --superseded --grace 7
"""

from __future__ import annotations

import argparse
import math
from typing import Any, Final

from scrapy_streaming.cli.output import ExitCode, progress_of, write, write_json, write_row
from scrapy_streaming.cli.registry import Invocation, Verb, flag, option
from scrapy_streaming.cli.stores import opened
from scrapy_streaming.storage import maintenance

DAY: Final = 86400.0


def collect(invocation: Invocation) -> int:
    """Remove garbage, or list it with ``--dry-run``."""
    options = invocation.options
    items: list[dict[str, Any]] = []

    def list_item(kind: str, path: str, size: int) -> None:
        if options.dry_run and invocation.as_json:
            items.append({"kind": kind, "bytes": size, "path": path})
        elif options.dry_run:
            write_row(kind, size, path)

    with opened(invocation.settings) as store, progress_of("gc") as progress:
        result = maintenance.collect(
            store,
            grace=options.grace * DAY,
            superseded=options.superseded,
            dry_run=options.dry_run,
            removed=list_item,
            progress=progress,
        )
    if invocation.as_json:
        write_json(_document(result) | ({"items": items} if options.dry_run else {}))
    else:
        would = "would free" if result.dry_run else "freed"
        kinds = ", ".join(f"{number} {kind}" for kind, number in result.counts.items()) or "nothing to remove"
        rest = f"grace {result.grace:g} s, {result.restored} put back"
        write(f"gc: {would} {result.bytes} bytes: {kinds}; {rest}")
    return ExitCode.FINE


def _document(result: maintenance.Collected) -> dict[str, Any]:
    return {
        "dry_run": result.dry_run,
        "grace_seconds": result.grace,
        "freed_bytes": result.bytes,
        "restored": result.restored,
        "removed": {kind: {"count": n, "bytes": result.sizes[kind]} for kind, n in result.counts.items()},
    }


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not math.isfinite(days) or days < 0:
        msg = f"not a number of days, 0 or more: {text}"
        raise argparse.ArgumentTypeError(msg)
    return days


VERB = Verb(
    collect,
    (
        flag("--dry-run", "list what would be removed, and remove nothing"),
        flag("--superseded", "also blobs of representations that newer ones replaced"),
        option("--grace", type=_days, default=1.0, metavar="DAYS", help="keep what is younger (default: 1)"),
    ),
)
