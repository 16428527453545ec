"""The tables of pages that are made of declarations: settings, statistics, reasons and proofs.

``python tests/support/tables.py`` writes them into the pages, each between ``<!-- table NAME -->`` and
``<!-- end -->``; a test holds the pages against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.settings import SETTINGS, Setting
from scrapy_streaming.statistics import PREFIX, STATISTICS, Statistic

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "settings.md", DOCS / "statistics.md")

_TABLE = re.compile(r"<!-- table (.*?) -->\n.*?<!-- end -->", re.DOTALL)


def _rows(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rest))


def _setting(name: str, setting: Setting) -> tuple[str, ...]:
    default = f'"{setting.default}"' if isinstance(setting.default, str) else repr(setting.default)
    allowed = setting.kind.allowed.partition(" (")[0].replace("[", "\\[")
    return f"`{name}`", f"`{default}`", allowed, setting.help


def settings_of(group: str) -> str:
    """Return the table of one group of settings; raise ``LookupError`` for a group that has none."""
    rows = [_setting(name, each) for name, each in SETTINGS.items() if each.group == group]
    if not rows:
        raise LookupError(group)
    return _rows(("setting", "default", "allowed", "meaning"), *rows)


def _statistic(each: Statistic) -> tuple[str, ...]:
    missing = "" if each.always or each.group else "; missing when it is 0"
    return f"`{PREFIX}{each.name}`", each.unit, each.help + missing


def statistics() -> str:
    """Return the table of statistics."""
    return _rows(("statistic", "unit", "what it counts"), *map(_statistic, STATISTICS.values()))


def summary() -> str:
    """Return the names that ``metrics.json`` has under ``streaming``."""
    names = ", ".join(f"`{name}`" for name, each in STATISTICS.items() if each.summary)
    return f"- `streaming`: {names}\n"


def reasons() -> str:
    """Return the table of reasons."""
    rows = ((f"`{reason}`", reason.rows, reason.says) for reason in Reason)
    return _rows(("reason", "rows", "what it says"), *rows)


def proofs() -> str:
    """Return the table of proofs."""
    return _rows(("proof", "what it says"), *((str(proof), proof.says) for proof in Proof))


TABLES: dict[str, Callable[[], str]] = {
    "of statistics": statistics,
    "of the summary": summary,
    "of reasons": reasons,
    "of proofs": proofs,
}


def _table(match: re.Match[str]) -> str:
    name = match[1]
    table = TABLES[name]() if name in TABLES else settings_of(name.removeprefix("of settings: "))
    return f"<!-- table {name} -->\n{table}<!-- end -->"


def names(page: Path) -> list[str]:
    """Return the names of the tables that a page has a place for."""
    return _TABLE.findall(page.read_text())


def filled(page: Path) -> str:
    """Return the text of a page with its tables made anew."""
    return _TABLE.sub(_table, page.read_text())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page))
