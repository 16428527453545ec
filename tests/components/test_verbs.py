"""How verbs are found and declared: one module each, its help without importing it, its row on the page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import environment, scrapy

from scrapy_streaming.cli import registry

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
LIST_WITHOUT_IMPORTS = """
import sys
from scrapy_streaming.cli import registry
print({name: registry.summary(name) for name in registry.names()})
heavy = ("sqlalchemy", "scrapy_streaming.storage", "scrapy_streaming.cli.verbs.")
sys.exit(any(module.startswith(heavy) for module in sys.modules))
"""


def options_of(name: str) -> list[str]:
    return [word for each in registry.load(name).options for word in each.names if word.startswith("-")]


def help_of(name: str) -> str:
    return registry.parser_of(name, registry.load(name), description=registry.help_text(name)).format_help()


def test_the_command_lists_each_verb_with_the_first_line_of_its_module(tmp_path: Path) -> None:
    done = scrapy("streaming", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Inspect and maintain the download store" in done.stdout
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    for name in registry.names():
        assert [name, registry.summary(name)] in lines
        assert re.fullmatch(r"[A-Z].*[^.]", registry.summary(name))


def test_listing_the_verbs_imports_none_of_them() -> None:
    """Also where Python keeps no docstrings."""
    command = [sys.executable, "-OO", "-c", LIST_WITHOUT_IMPORTS]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Check the ledger" in done.stdout


def test_a_verb_that_runs_imports_no_other(tmp_path: Path) -> None:
    code = (
        "import sys; from scrapy_streaming.cli import registry as r; r.load('ls'); print(list(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"cli\.verbs\.(\w+)", done.stdout) == ["ls"]


def test_help_after_a_verb_is_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = scrapy("streaming", "gc", "--help", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == help_of("gc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", registry.names())
def test_help_of_a_verb_has_its_options_and_an_example_that_is_understood(name: str) -> None:
    printed = help_of(name)
    assert registry.summary(name) in printed
    for option in (*options_of(name), "--json"):
        assert f"\n  {option}" in printed
    examples = re.findall(rf"^  scrapy streaming (?:-s \S+ )?{name}\b ?(.*)$", printed, re.MULTILINE)
    assert examples
    for example in examples:
        words = [word for word in re.split(r" [|>] ", example)[0].split() if word != "--json"]
        registry.parsed(name, registry.load(name), words)


HELLO = '''"""Greet the store.

Examples:
  scrapy streaming hello --loud
"""

from scrapy_streaming.cli.output import ExitCode, write
from scrapy_streaming.cli.registry import Invocation, Verb, flag


def hello(invocation: Invocation) -> int:
    write("HELLO" if invocation.options.loud else "hello")
    return ExitCode.UNFINISHED


VERB = Verb(hello, (flag("--loud", "in capitals"),), needs_ledger=False)
'''
WITH_HELLO = """
import sys
from scrapy_streaming.cli import verbs
verbs.__path__.append(sys.argv.pop(1))
from support.command import main
main()
"""


def test_a_module_is_all_that_a_verb_needs(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(HELLO)
    done = {
        words: subprocess.run(
            [sys.executable, "-c", WITH_HELLO, str(tmp_path), "streaming", *words.split()],
            env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
        )
        for words in ("hello --loud", "--help", "hello --quiet")
    }  # fmt: skip
    assert (done["hello --loud"].returncode, done["hello --loud"].stdout) == (3, "HELLO\n")
    assert re.search(r"^  hello +Greet the store$", done["--help"].stdout, re.MULTILINE)
    assert done["hello --quiet"].returncode == 2
    assert "--quiet" in done["hello --quiet"].stderr


def test_the_page_of_commands_has_each_verb_with_its_options() -> None:
    rows = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(), re.MULTILINE)
    documented = {row.split()[0]: row for row in rows}
    assert sorted(documented) == registry.names()
    for name, row in documented.items():
        assert sorted(re.findall(r"--[a-z-]+", row)) == sorted({*options_of(name)}), name
