"""The table of invariants and faults with the tests that check them, made of the marks of the tests.

``python tests/support/rows.py`` writes ``docs/invariants.md``; a test holds the page against it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "invariants.md"

INVARIANTS = {
    "I1": "There is one row for each job key.",
    "I2": "A job's fence only grows, in the order of its claims; one claim at a time is the current one.",
    "I3": "Nothing changes under a fence or a claim that is not the current one.",
    "I4": "There is at most one completion for each generation of a job.",
    "I5": "A job that is done has a blob: recorded, there, of that size, and its bytes hash to its name.",
    "I6": "A completion that was acknowledged survives a crash.",
    "I7": "No job is stranded: a live worker is granted each one within lease, poll and back-off.",
    "I8": "Only the result of an effect that succeeded is replayed.",
    "I9": "A replayed result is equal to the byte.",
    "I10": "A part's bytes hash to what its sidecar says; two representations are never spliced.",
    "I11": "A worker that lost its lease cannot alter bytes that the new owner will publish.",
    "I12": "Memory and disk stay within bounds, whatever the server does.",
    "I13": "A job that kills its workers is claimed a bounded number of times.",
    "I14": "Clocks that jump or disagree cost duplicate work only.",
    "I15": "Collecting garbage removes no blob that is referred to and no part of a live claim.",
    "I16": "A ledger older or newer than the store leads to work done again, never to a wrong answer.",
    "I17": "No partial file has a final name.",
    "I18": "A claim of a key with another request is an error.",
    "I19": "A job that has ended changes only on request: refresh, or requeue.",
    "I20": "Workers that start at once migrate once; a newer schema is refused; nothing is dropped.",
}
FAULTS = {
    "F1": "kill -9 in the middle of a crawl",
    "F2": "kill -9 and stops past the lease, at random, among many workers",
    "F4": "connections reset at random bytes",
    "F5": "truncated bodies",
    "F6": "a byte a second; no byte after the head",
    "F7": "the representation changes in the middle",
    "F8": "a full disk",
    "F9": "an I/O error at fsync",
    "F10": "writes that fall short",
    "F11": "the database locked, down, or lost during a COMMIT",
    "F12": "the database restored from an older copy while workers run",
    "F13": "the ledger deleted, overwritten, truncated, damaged in a page, its log deleted",
    "F14": "the same URLs in many processes at once",
    "F15": "a worker that resumes after its lease was taken over",
    "F16": "clocks skewed, jumping, running backwards",
    "F17": "a part with flipped, missing or additional bytes",
    "F18": "a blob with flipped bytes",
    "F19": "paths that lead out of the store",
    "F20": "bodies that decode to far more bytes than were received",
    "F22": "validators with line breaks, NUL, or too long",
    "F24": "links and pipes planted in the store",
    "F25": "a job that kills its worker",
    "F26": "collecting garbage beside publishing",
    "F27": "many processes at the first start and at an upgrade, and kills in it",
}

HEAD = """\
# What is proved, and by which tests

Each row is a promise that must hold or a fault that must be survived, with the tests that check it.
The page is made of the marks of the tests: `python tests/support/rows.py` writes it.
"""


def proofs() -> dict[str, list[str]]:
    """Return the ids of the tests by the rows that they are marked with."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, rows in _marked(ast.parse(path.read_text())):
            for row in rows:
                found[row].append(f"{path.relative_to(ROOT / 'tests')}::{name}")
    return dict(found)


def _marked(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    names = {ast.unparse(node.targets[0]): node.value for node in assigned}
    everywhere = _rows(names["pytestmark"], names) if "pytestmark" in names else []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node.name, everywhere + [row for mark in node.decorator_list for row in _rows(mark, names)]


def _rows(node: ast.expr, names: dict[str, ast.expr]) -> list[str]:
    """Return the rows named in any ``proves(…)`` inside an expression; *names* are the module's own."""
    found: list[str] = []
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.proves"):
            for argument in call.args:
                if isinstance(argument, ast.Starred):
                    found += ast.literal_eval(names[ast.unparse(argument.value)])
                else:
                    found.append(str(ast.literal_eval(argument)))
    return found


def page() -> str:
    """Return the page."""
    found = proofs()
    unknown = sorted(set(found) - set(INVARIANTS) - set(FAULTS))
    if unknown:
        msg = f"tests are marked with rows that have no words here: {', '.join(unknown)}"
        raise ValueError(msg)
    lines = [HEAD]
    for title, rows in (("Invariants", INVARIANTS), ("Faults", FAULTS)):
        lines += [f"## {title}\n", "| row | what holds | tests |", "|---|---|---|"]
        for row, words in rows.items():
            tests = "<br>".join(f"`{test}`" for test in dict.fromkeys(found.get(row, ())))
            if tests:
                lines.append(f"| [{row}]{{#{row.lower()}}} | {words} | {tests} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
