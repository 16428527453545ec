"""Compare two crawls by their metrics.json.

Prints each setting, version and statistic that differs, with the ratio of B to A.

Examples:
  scrapy streaming compare yesterday.json downloads/.streaming/metrics.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from scrapy_streaming.cli.output import ExitCode, write, write_json, write_table
from scrapy_streaming.cli.registry import Invocation, Verb, option
from scrapy_streaming.reporting.comparison import compare, load


def compare_crawls(invocation: Invocation) -> int:
    """Print what differs between two metrics files."""
    before, after = load(Path(invocation.options.before)), load(Path(invocation.options.after))
    changes = compare(before, after)
    if invocation.as_json:
        write_json({"changes": [asdict(change) for change in changes]})
    elif not changes:
        write("compare: nothing changed")
    else:
        rows = [(c.name, _shown(c.before), _shown(c.after), _ratio(c.ratio)) for c in changes]
        write_table(("changed", "A", "B", "B/A"), rows)
    return ExitCode.FINE


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


VERB = Verb(
    compare_crawls,
    (
        option("before", metavar="A", help="the metrics.json of the first crawl"),
        option("after", metavar="B", help="the metrics.json of the second crawl"),
    ),
    needs_ledger=False,
)
