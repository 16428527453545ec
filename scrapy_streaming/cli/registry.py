"""What a verb of ``scrapy streaming`` declares, and how verbs are found.

What may live here: the classes of a declaration, and reading them. Adding a verb means adding a module to
``verbs``: no list names it. Only the verb that runs is imported; the help lines of all others are read from
their source.
"""

from __future__ import annotations

import argparse
import ast
import pkgutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from scrapy.settings import Settings

    from scrapy_streaming.settings import StreamingSettings


#: The package of the verbs.
VERBS: Final = "scrapy_streaming.cli.verbs"


class WrongCall(Exception):
    """The options do not say what to do."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a verb is run with.

    ``project`` are Scrapy's settings, ``settings`` those of this package, ``options`` the verb's own, as its
    declaration names them. ``as_json``: one JSON document is printed, or one a line.
    """

    project: Settings
    settings: StreamingSettings
    options: Namespace
    as_json: bool = False

    @property
    def result_field(self) -> str:
        """The item field in which the project's crawls store the results of files."""
        return self.project.get("FILES_RESULT_FIELD") or "files"


@dataclass(frozen=True, slots=True)
class Option:
    """One option or positional argument, as ``ArgumentParser.add_argument`` takes it."""

    names: tuple[str, ...]
    terms: Mapping[str, Any]


def option(*names: str, **terms: Any) -> Option:
    """Return an option; arguments as those of ``ArgumentParser.add_argument``."""
    return Option(names, terms)


def flag(name: str, what: str) -> Option:
    """Return an option that is on or off; *what* is its line in the help."""
    return option(name, action="store_true", help=what)


@dataclass(frozen=True, slots=True)
class Verb:
    """The declaration of a verb.

    ``run`` prints what it does and returns the exit code. ``needs_ledger``: without SQLAlchemy the verb is
    refused before it runs.
    """

    run: Callable[[Invocation], int]
    options: tuple[Option, ...] = ()
    needs_ledger: bool = True


def names() -> list[str]:
    """Return the names of all verbs, sorted; none is imported."""
    return sorted(_modules())


def load(name: str) -> Verb:
    """Return the declaration of a verb that ``names`` has."""
    declared: Verb = import_module(_module_name(name)).VERB
    return declared


def summary(name: str) -> str:
    """Return a verb's line in the list of verbs; it is not imported."""
    return help_text(name).partition("\n")[0].removesuffix(".")


def help_text(name: str) -> str:
    """Return the docstring of a verb's module, read from its source: ``python -OO`` keeps none in memory."""
    spec = find_spec(_module_name(name))
    assert spec is not None
    assert spec.loader is not None
    source = spec.loader.get_source(spec.name)  # type: ignore[attr-defined] # of every loader of source files
    return ast.get_docstring(ast.parse(source or "")) or ""


def _module_name(name: str) -> str:
    return f"{VERBS}.{_modules()[name]}"


def _modules() -> dict[str, str]:
    """Return the module of each verb by the verb's name."""
    found = pkgutil.iter_modules(import_module(VERBS).__path__)
    return {module.name.removesuffix("_"): module.name for module in found}


class _Parser(argparse.ArgumentParser):
    """A parser that raises instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise ``WrongCall``."""
        raise WrongCall(message)


def parser_of(name: str, verb: Verb, *, description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a verb's arguments; it raises ``WrongCall`` for what it does not understand."""
    parser = _Parser(
        prog=f"scrapy streaming [-s NAME=VALUE] {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    for each in verb.options:
        parser.add_argument(*each.names, **each.terms)
    return parser


def parsed(name: str, verb: Verb, arguments: list[str]) -> Namespace:
    """Return the options of a verb; raise ``WrongCall`` for arguments that it does not understand."""
    parser = parser_of(name, verb)
    found, left = parser.parse_known_intermixed_args(arguments)
    if left:
        parser.error(f"not understood: {' '.join(left)}")
    return found
