"""The page "What happens when…": the decision table with its reasons and tests, made of both.

``python tests/support/decisions.py`` writes ``docs/decisions.md``; a test holds the page against it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from scrapy_streaming.protocol.reasons import Reason

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "decisions.md"
END_TO_END = (
    "faults/test_rows_end_to_end.py",
    "faults/test_never_confirmed.py",
    "faults/test_broken_bodies.py",
    "faults/test_redirects.py",
    "faults/test_full_disk.py",
    "faults/test_tampered_store.py",
    "components/test_first_and_second_crawl.py",
    "components/test_hooks_beside_stock.py",
    "components/test_other_peoples_code.py",
    "adapter/test_download.py",
)
#: Beside ``protocol/``: tests of what is no rule of it.
UNITS = ("storage/test_blobs.py", "storage/test_parts.py", "components/test_response.py", "test_space.py")

WHEN = {
    "Before a request": {
        2: ("a part's file is longer than what was made durable", "cut to that, then resumed"),
        3: ("a part is shorter, or its bytes do not hash to what its sidecar says", "thrown away"),
        4: ("a part's sidecar cannot be read, or it is of another URL or variant", "from the first byte"),
        5: (
            "a part has a weak tag",
            "resumed by `If-Unmodified-Since` if it has a strong date too, else from the first byte",
        ),
        6: (
            "a part has no validator",
            "from the first byte, unless `STREAMING_UNVALIDATED_RESUME` allows more and a digest is expected",
        ),
        7: (
            "a part is whole and was not published",
            "published with no request while fresh, or if its digest is known; else revalidated",
        ),
        26: ("a part has no bytes", "asked plainly: no range from the first byte is asked for"),
        71: ("the server supports no ranges (`Accept-Ranges: none`)", "from the first byte"),
        72: ("a part's date is too young to be strong, or has no `Date` beside it", "from the first byte"),
        78: ("a request has an `Accept-Encoding` of its own", "kept where nothing is resumed or revalidated"),
        73: ("a request is no plain GET, or has other credentials", "no part is shared"),
    },
    "A 206": {
        10: ("the rest, with the part's strong tag and length", "joined"),
        11: ("the rest without a tag", "joined if length and date, or a digest, are the same"),
        12: (
            "the rest of a part that has a strong date only",
            "joined if date and length are the same, and there is no tag",
        ),
        13: (
            "a piece with another tag, date or digest: `If-Range` was ignored",
            "part dropped, asked plainly",
        ),
        14: ("a piece whose tag is weak now", "asked plainly"),
        15: ("a piece that begins at another offset", "asked plainly"),
        16: ("the whole, as one piece", "treated as a 200"),
        17: ("less than the rest", "joined, and the remainder asked for"),
        18: ("a piece that does not say how long the whole is", "joined if that is known from before"),
        19: (
            "the rest of a part without a validator, and its end once more",
            "joined if that end and the length are the same; the expected digest decides",
        ),
        20: ("another complete length", "part dropped, asked plainly"),
        21: ("no `Content-Range`, an invalid one, or two", "asked plainly"),
        22: ("several ranges in one body", "asked plainly"),
        24: ("another content coding than the part's", "asked plainly"),
        25: ("a piece that was not asked for", "refused"),
        74: ("a body that is not what its `Content-Range` says", "all of it dropped, asked plainly"),
    },
    "A 200": {
        23: (
            "a `Content-Range`",
            "ignored, unless the body is that piece: joined if all is proven, else asked plainly",
        ),
        27: ("the whole body", "stored"),
        28: ("another tag", "stored from the first byte"),
        29: ("the same tag: the range was ignored", "stored from the first byte"),
        30: ("a page that is not the file", "refused by the expected digest; the part stays"),
        31: ("fewer bytes than were announced", "the part stays, and is resumed"),
        32: ("chunks with or without the last one", "whole, or resumed"),
        33: (
            "an end that only the closed connection marks",
            "asked whether there is more; without ranges stored as unproven once the same came twice",
        ),
        34: (
            "a coding that was not asked for",
            "decoded when published, unless the file is meant to be in it",
        ),
        36: ("no bytes", "a blob of no bytes"),
        37: ("no length, for the same representation", "compared with the length from before"),
        38: ("two lengths, or one that is no number", "refused"),
        39: ("two tags, or an invalid one", "no validator"),
        40: ("`Vary: *`", "never resumed"),
        41: ("a 203: a proxy changed the bytes", "stored without the origin's validators"),
        42: ("another 2xx", "no file"),
        75: (
            "a change less than two seconds before",
            "stored without the validators that the next change may leave as they are",
        ),
    },
    "304, 412, 416": {
        43: ("304 to the stored file", "kept, validators updated"),
        44: ("304, and the blob is gone", "asked plainly, past every cache"),
        45: (
            "304 with another strong tag, or the stored tag and another date",
            "asked plainly, past every cache",
        ),
        46: ("304 to a request without a condition", "asked plainly, past every cache, once"),
        47: ("304 to a weak tag", "kept; `STREAMING_WEAK_VALIDATORS=refetch`: such files are asked plainly"),
        48: ("200, and the same bytes", "the existing blob is used"),
        49: ("304 to a part that may be whole", "published"),
        50: ("416 with the part's length", "asked conditionally whether the part is whole"),
        51: ("416 with a smaller length", "part dropped, asked plainly"),
        52: ("416 with a greater length", "asked plainly"),
        53: ("416 without a length", "asked plainly"),
        54: ("the body of a 416", "never written"),
        56: ("412", "part dropped, asked plainly"),
    },
    "Errors and redirects": {
        55: ("an error that a range may be the cause of", "asked once without; what comes is not resumed"),
        57: ("401 or 403 from a redirect's target, when retried", "the first URL is asked again"),
        58: ("404, 410", "no file; the part stays"),
        59: ("408, 425, 429, 5xx", "Scrapy's retries; the part stays"),
        60: ("a redirect", "each hop is planned anew; validators are the last URL's"),
        61: ("a connection lost in the middle", "resumed; an attempt that brought bytes does not count"),
        62: ("three resumptions in a row that met another representation", "not resumed any more"),
    },
    "Digests": {
        63: (
            "bytes other than expected or promised",
            "quarantined; fetched again if they came in pieces",
        ),
        64: ("a piece that its own digest does not match", "that piece is dropped and asked for again"),
        65: ("a digest by another algorithm than SHA-256", "not compared"),
    },
    "On this machine": {
        9: (
            "the rest of the body does not fit on the disk beside the reserve",
            "the part is kept, and the file waits for space, `STREAMING_PATIENCE` seconds at most",
        ),
        35: ("more bytes than were declared", "refused before they are written"),
        66: (
            "the blob exists already",
            "used if its bytes are right; else it is moved to quarantine and replaced",
        ),
        68: ("a part cannot be linked to its blob", "copied beside it, made durable, moved into place"),
        76: ("a middleware or a hook made another response", "stored as such, without validators"),
        77: (
            "a stored file was touched after its bytes were known to be right",
            "read before it is reported, named or kept after a 304; wrong bytes are moved to quarantine",
        ),
    },
}

HEAD = """\
# What happens when…

What a server may answer and what follows. Each row has its reasons in [statistics and logs](statistics.md),
the tests of its rule, and the crawls and downloads that meet it and must end with the server's bytes.
*Plainly* means a GET without Range and conditions.
The page is made of the code and the tests: `python tests/support/decisions.py` writes it.
"""

_ROW = re.compile(r"R(\d+)(?: to R(\d+))?")


def rows_in(text: str) -> Iterator[int]:
    """Yield the numbers of the rows that *text* names, ranges in full."""
    for first, last in _ROW.findall(text):
        yield from range(int(first), int(last or first) + 1)


def words() -> dict[int, list[str]]:
    """Return the reason words by row."""
    found: dict[int, list[str]] = defaultdict(list)
    for reason in Reason:
        for row in rows_in(reason.rows):
            found[row].append(str(reason))
    return found


def _tests(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def _named_in_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the rows that a file's docstring and those of its tests name, each with whose it is."""
    for row in rows_in(ast.get_docstring(ast.parse(path.read_text())) or ""):
        yield row, path.name
    for test in _tests(path):
        for row in rows_in(ast.get_docstring(test) or ""):
            yield row, f"{path.name}::{test.name}"


def unit_tests() -> dict[int, list[str]]:
    """Return the tests of the rules by row: from the ids of their parameters, and their names."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests" / "protocol").glob("test_*.py")):
        for test in _tests(path):
            marks = (text for mark in test.decorator_list for text in _ids(mark))
            named = [f"R{number}" for number in re.findall(r"^test_r(\d+)_", test.name)]
            for row in {row for text in [*marks, *named] for row in rows_in(text)}:
                found[row].append(f"{path.name}::{test.name}")
    for name in UNITS:
        for row, test_name in _named_in_docstrings(ROOT / "tests" / name):
            found[row].append(test_name)
    return found


def _ids(mark: ast.expr) -> Iterator[str]:
    for node in ast.walk(mark):
        if isinstance(node, ast.keyword) and node.arg == "id":
            text = ast.unparse(node.value).strip("f'\"")
            yield from re.findall(r"^R\d+", text)


def end_to_end() -> dict[int, list[str]]:
    """Return the crawls that meet each row: those of the table of rows, and tests that name it."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in END_TO_END:
        path = ROOT / "tests" / name
        for row in _table(ast.parse(path.read_text())):
            for number in rows_in(row):
                found[number].append(f"{path.name}[{row}]")
        for number, test in _named_in_docstrings(path):
            found[number].append(test)
    return found


def _table(tree: ast.Module) -> Iterator[str]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    for call in calls:
        if ast.unparse(call.func) in ("Row", "refused") and isinstance(call.args[0], ast.Constant):
            yield str(call.args[0].value)


def _cell(texts: Iterable[str]) -> str:
    return "<br>".join(f"`{text}`" for text in dict.fromkeys(texts))


def page() -> str:
    """Return the page."""
    reasons, units, crawls = words(), unit_tests(), end_to_end()
    lines = [HEAD]
    for title, rows in WHEN.items():
        lines += [
            f"## {title}\n",
            "| row | when | then | words | rules | crawls |",
            "|---|---|---|---|---|---|",
        ]
        for row, (when, then) in rows.items():
            cells = (_cell(found.get(row, ())) for found in (reasons, units, crawls))
            lines.append(f"| [R{row}]{{#r{row}}} | {when} | {then} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
