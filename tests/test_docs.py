"""The documentation agrees with the code: tables, snippets, names."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from support import citations, decisions, failure_words, rows, tables

import scrapy_streaming
from scrapy_streaming import integration
from scrapy_streaming.explanations import GROUPS, REASONS, UNKNOWN, explain
from scrapy_streaming.protocol.reasons import Proof, Reason
from scrapy_streaming.settings import SETTINGS
from scrapy_streaming.statistics import STATISTICS, full_name

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def snippets(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


def test_the_tables_of_settings_statistics_and_reasons_are_those_of_the_declarations():
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page), "run `python tests/support/tables.py`"
    settings, statistics = (tables.names(page) for page in tables.PAGES)
    assert set(settings) == {f"of settings: {setting.group}" for setting in SETTINGS.values()}
    assert statistics == list(tables.TABLES)
    cells = [each.help for each in (*SETTINGS.values(), *STATISTICS.values())]
    cells += [setting.kind.allowed for setting in SETTINGS.values()]
    cells += [each.says for each in (*Reason, *Proof)]
    assert [cell for cell in cells if not cell or "|" in cell or "\n" in cell] == []


def test_a_page_without_its_table_is_noticed(tmp_path):
    page = tmp_path / "settings.md"
    page.write_text("<!-- table of settings: Nothing -->\n<!-- end -->")
    with pytest.raises(LookupError):
        tables.filled(page)


def test_a_statistic_that_is_not_declared_cannot_be_counted():
    assert full_name("bytes_kept") == "streaming/bytes_kept"
    assert full_name(f"decision/{Reason.FETCHED}") == "streaming/decision/fetched"
    for name in ("bytes_kep", "decision", "decision/", "decision/<reason>", "fetched", ""):
        with pytest.raises(LookupError, match="is not declared"):
            full_name(name)


def test_every_invariant_names_its_tests():
    """S1: the page is what the tests' marks make it, and no row is without a test."""
    assert rows.PAGE.read_text() == rows.page(), "run `python tests/support/rows.py`"
    assert set(rows.INVARIANTS) <= set(rows.proofs())
    assert {"F2", "F11", "F12", "F13", "F14", "F15", "F16", "F25", "F26", "F27"} <= set(rows.proofs())


def test_the_page_of_decisions_is_that_of_the_code_and_the_tests() -> None:
    """A row without a test of its rule and a crawl that meets it is not on the page."""
    assert decisions.PAGE.read_text() == decisions.page(), "run `python tests/support/decisions.py`"
    rows = {row for part in decisions.WHEN.values() for row in part}
    units, crawls = decisions.unit_tests(), decisions.end_to_end()
    # no server's answer leads to these: the writer refuses a byte too many, the filesystem a link
    assert {row for row in rows if not crawls.get(row)} == {35, 68}
    # no rule of ours: the disk's, Scrapy's, the digest's or the user's
    assert {row for row in rows if not units.get(row)} <= {30, 78}


def test_what_the_source_cites_is_in_the_documentation() -> None:
    """A row or a rule in a comment has an anchor of its name; "rule 9" alone does not say whose."""
    needed, there = citations.in_source(), citations.anchors()
    assert {anchor: by for anchor, by in needed.items() if anchor not in there} == {}
    some = {"r33", "i5", "f24", "e7", "c4", "ledger-rule-1", "storage-rule-13c"}
    assert some <= set(needed)
    assert [anchor for anchor, times in there.items() if times > 1] == []


def test_citations_are_found_however_they_are_written() -> None:
    text = """Rows R4 to R6, and I9. (F24, E2; storage
    rules 6 and 7). # noqa: C901, E501
    #: what the ledger
    #: rule 13b says, rule 3; Storage rules 1, 2 or 5. RFC 9110, 206, 0xE5, XC4"""
    rows_and_rules = [words for words, _ in citations.cited(text)]
    assert rows_and_rules == [
        *("R4", "R5", "R6", "I9", "F24", "E2"),
        *("storage rule 6", "storage rule 7", "ledger rule 13b", "rule 3"),
        *("Storage rule 1", "Storage rule 2", "Storage rule 5"),
    ]


def test_the_page_of_failures_is_the_packages_own_table() -> None:
    """C18: each reason that the code can give a failure is explained once, and no other."""
    assert failure_words.PAGE.read_text() == failure_words.page(), (
        "run `python tests/support/failure_words.py`"
    )
    explained = {reason for reason in REASONS if not reason.startswith("bad-status-")}
    found = failure_words.in_code()
    assert found == explained
    assert {"digest-mismatch", "too-slow", "dead", "changed-206", "cannot-resolve"} <= found  # it finds some
    assert explain("bad-status-418") is REASONS["bad-status-4xx"]
    assert explain("bad-status-206") is REASONS["bad-status-other"]
    assert explain("KeyError") is UNKNOWN
    explanations = [reason for group in GROUPS.values() for reason in group]
    assert sorted(explanations) == sorted(REASONS), "none is explained twice"
    for why in [*REASONS.values(), UNKNOWN]:
        assert "|" not in why.meaning + why.remedy, "it would end a cell of the table"
        assert not why.remedy.endswith("."), "it stands in the middle of a line"


@pytest.mark.parametrize("code", snippets("python"))
def test_python_snippets_are_valid(code):
    """Those that stand alone are run; those from the middle of a spider must at least parse."""
    body = f"async def spider(response, title, href):\n{re.sub('^', '    ', code, flags=re.MULTILINE)}"
    if code.startswith(("yield", "{")):
        ast.parse(body)
        return
    namespace: dict[str, object] = {}
    exec(compile(code, "snippet", "exec"), namespace)
    if "class ByTitle" in code:
        path = namespace["ByTitle"].file_path(None, None, item={"title": "report"})
        assert path == "report.pdf"


def test_the_readme_shows_the_two_commands_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    assert "python -m pip install . && cd example_project && scrapy crawl documents" in readme
    assert "python -m pip install tox && tox run -e py" in readme


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_pages_name_are_there():
    """``scrapy_streaming/…`` and ``tests/…`` in backquotes: of the map for contributors above all."""
    named = [
        (page.name, path)
        for page in PAGES
        for path in re.findall(r"`((?:scrapy_streaming|tests|docs)/[\w./-]*)`", page.read_text())
    ]
    assert ("CONTRIBUTING.md", "scrapy_streaming/settings.py") in named
    assert [(page, path) for page, path in named if not (ROOT / path).exists()] == []


def test_the_house_names_every_package_and_no_other() -> None:
    table, _, _ = (ROOT / "docs/architecture.md").read_text().partition("## One download")
    named = re.findall(r"`([a-z_]+)/?`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
    package = Path(scrapy_streaming.__file__).parent
    modules = [path for path in package.iterdir() if path.name[0] != "_" and path.suffix in ("", ".py")]
    assert sorted(named) == sorted(path.stem for path in modules)


def test_all_that_may_be_imported_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    for name in scrapy_streaming.__all__:
        assert name == "__version__" or f"scrapy_streaming.{name}\n" in reference
    assert "automodule:: scrapy_streaming.integration\n   :members:" in reference  # all of its __all__
    # one without a docstring is left out of the page
    assert [name for name in integration.__all__ if not inspect.getdoc(getattr(integration, name))] == []
