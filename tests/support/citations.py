"""What the source cites, rows (R12, I4, E7 …) and rules (ledger rule 9), and which anchors the pages have.

What may live here: reading sources and pages for citations and anchors; the tests compare them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "scrapy_streaming"
DOCS = ROOT / "docs"

#: Where a citation may be broken: a new line, and what begins a comment on it.
_BREAK = re.compile(r"\s*\n\s*(?:#:?)?\s*")
_ROWS = re.compile(r"\b([CEFIR])([0-9]{1,2})(?: to \1([0-9]{1,2}))?\b")
_RULES = re.compile(
    r"(?:\b(ledger|storage) )?\brules? ([0-9]+[a-z]?(?:(?:,| and| or| to)? [0-9]+[a-z]?)*)", re.IGNORECASE
)
_ANCHOR = re.compile(r"\[[^\]`]+\]\{#([a-z0-9-]+)\}")


def cited(text: str) -> Iterator[tuple[str, str]]:
    """Yield each citation in *text* as it stands there, and the anchor that it needs.

    The anchor of a rule that is of neither ledger nor storage is ``rule-…``, which no page has.
    """
    text = _BREAK.sub(" ", text)
    for letter, first, last in _ROWS.findall(text):
        for number in range(int(first), int(last or first) + 1):
            yield f"{letter}{number}", f"{letter.lower()}{number}"
    for whose, numbers in _RULES.findall(text):
        for number in re.findall(r"[0-9]+[a-z]?", numbers):
            words = f"{whose} rule {number}".strip()
            yield words, words.lower().replace(" ", "-")


def in_source(root: Path = SOURCE) -> dict[str, dict[str, str]]:
    """Return the anchors that the source needs, each with the files that cite it and how they do."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(root.rglob("*.py")):
        for words, anchor in cited(path.read_text()):
            found[anchor][str(path.relative_to(root))] = words
    return dict(found)


def anchors(pages: Iterable[Path] | None = None) -> Counter[str]:
    """Return how often the pages have each anchor."""
    pages = sorted(DOCS.rglob("*.md")) if pages is None else pages
    return Counter(anchor for page in pages for anchor in _ANCHOR.findall(page.read_text()))
