"""The page "My file failed", made of the package's own table of reasons; and the reasons in the code.

``python tests/support/failure_words.py`` writes ``docs/failures.md``; a test holds the page against it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scrapy_streaming.context import DOUBTFUL
from scrapy_streaming.explanations import GROUPS, UNKNOWN
from scrapy_streaming.protocol.reasons import REFUSALS, Reason

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "failures.md"
PACKAGE = ROOT / "scrapy_streaming"

HEAD = """\
# My file failed

Each file that is not stored has one line in the log, at `WARNING`, with the reason, the URL and what to do:

> File (bad-status-404): Error downloading file from <GET https://example.org/a.pdf> referred in <None>: the
> server has no such file; correct the URL where it came from

The same word is in the statistic's name (`streaming/failed/bad-status-404`), in the ledger, from which
[`scrapy streaming failures`](commands.md) prints it, and, with
[`STREAMING_FAILURES_FIELD`](settings.md#failed-files), in the item. Scrapy's own lines about such a file
(`Gave up retrying`, tracebacks) are not logged.

The next crawl that has the file's URL requests a failed file again, and resumes from the bytes that are
kept. Only a file that is `dead` is not requested: `scrapy streaming requeue` makes its job ready again.

This page is generated: `python tests/support/failure_words.py` writes it.
"""

TAIL = f"""\
## Any other word

`KeyError` and the like: {UNKNOWN.meaning}. At `ERROR`, and {UNKNOWN.remedy}.
"""


def page() -> str:
    """Return the page."""
    lines = [HEAD]
    for title, group in GROUPS.items():
        lines += [f"## {title}\n", "| reason | what it means | what to do |", "|---|---|---|"]
        lines += [f"| `{reason}` | {why.meaning} | {why.remedy} |" for reason, why in group.items()]
        lines.append("")
    return "\n".join([*lines, TAIL])


# -- the reasons in the code ---------------------------------------------------------------

#: Where reasons are those of verbs on files of their own: no file of a crawl fails for them.
NO_FILES = ("cli", "reporting", "reasons.py", "explanations.py")
_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)+|[a-z]+")


def in_code() -> set[str]:
    """Return every reason that the code gives a failure, as far as it is spelled out there."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in NO_FILES:
            tree = ast.parse(path.read_text())
            found |= {word for node in ast.walk(tree) for word in _words(node, path.name)}
    found |= {str(reason) for reason in REFUSALS}
    found |= {f"incomplete-{flag.replace('_', '-')}" for flag in DOUBTFUL}
    return {word for word in found if _WORD.fullmatch(word)}


def _words(node: ast.AST, file: str) -> Iterator[str]:
    match node:
        case ast.Call(func=function, args=args):
            yield from _in_call(ast.unparse(function).rpartition(".")[2], args)
        case ast.ClassDef():  # an error's own reason
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "reason":
                    yield from _texts(line.value)
        case ast.keyword(arg="reason", value=value):
            yield from _texts(value)
        case ast.Assign(targets=[ast.Name(id="reason")], value=value) if file == "pipeline.py":
            yield from () if "Reason." in ast.unparse(value) else _texts(value)
        case ast.AnnAssign(target=ast.Name(id="_WORDS"), value=ast.Dict(values=values)):
            yield from (word for value in values for word in _texts(value))
        case ast.Dict(keys=keys, values=values):
            codes = dict(zip(map(ast.unparse, filter(None, keys)), values, strict=False))
            yield from _texts(codes["'error_code'"]) if "'error_code'" in codes else ()


def _in_call(name: str, args: list[ast.expr]) -> Iterator[str]:
    match name:
        case "FileRefused":
            yield from _texts(args[0])
        case "Refuse" | "_follow":
            yield from (word for each in args for word in _members(each))


def _texts(node: ast.expr) -> Iterator[str]:
    """Yield the reasons in an expression: a text up to its first colon, or a member of ``Reason``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.partition(":")[0]
    elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
        yield str(node.values[0].value).partition(":")[0]
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body), *_texts(node.orelse))
    else:
        yield from _members(node)


def _members(node: ast.expr) -> Iterator[str]:
    for name in re.findall(r"\bReason\.([A-Z0-9_]+)", ast.unparse(node)):
        yield str(Reason[name])


if __name__ == "__main__":
    PAGE.write_text(page())
