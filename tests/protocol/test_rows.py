"""Every row of the decision table that concerns this package has a test that names it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROWS = frozenset(
    f"R{number}"
    for number in (
        *range(2, 8),
        *range(10, 15),
        16,
        20,
        21,
        22,
        25,
        27,
        28,
        29,
        31,
        32,
        37,
        38,
        39,
        *range(41, 47),
        48,
        *range(50, 60),
        60,
        61,
        62,
        63,
        64,
        65,
        71,
        72,
        73,
    )
)
ALSO = frozenset(
    {"R15", "R17", "R18", "R23", "R24", "R26", "R33", "R34", "R35", "R36", "R40", "R41", "R47", "R49", "R75"}
)

_ID = re.compile(r"(R[1-9][0-9]?)-[a-z0-9]")
_FILES = sorted(f for f in Path(__file__).parent.glob("test_*.py") if f != Path(__file__))
_SKIPPING = {"skip", "skipif", "xfail"}


def _load(file: Path) -> ModuleType:
    """Import a test module under a name of its own, whatever pytest made of it."""
    spec = importlib.util.spec_from_file_location(f"_rows_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rows_of(test: object) -> set[str]:
    """Return the rows that the parameters of one test function name, skipped ones left out."""
    marks = getattr(test, "pytestmark", [])
    if any(mark.name in _SKIPPING for mark in marks):
        return set()
    return {
        match[1]
        for mark in marks
        if mark.name == "parametrize"
        for parameter in mark.args[1]
        if not any(m.name in _SKIPPING for m in getattr(parameter, "marks", ()))
        if (match := _ID.match(str(getattr(parameter, "id", None))))
    }


def _tested() -> set[str]:
    tests = (t for file in _FILES for name, t in vars(_load(file)).items() if name.startswith("test_"))
    return set().union(*(_rows_of(test) for test in tests))


def test_every_row_has_a_test():
    assert sorted((ROWS | ALSO) - _tested()) == []


def test_every_row_named_exists():
    assert _tested() <= {f"R{number}" for number in range(1, 79)}


def test_the_scan_sees_what_runs_and_nothing_else():
    left_out = pytest.param(1, id="R9-not", marks=pytest.mark.skip)

    @pytest.mark.parametrize("_", [pytest.param(1, id="R8-runs"), left_out, pytest.param(1, id="other"), 1])
    def runs(_): ...

    @pytest.mark.skip(reason="never collected: what the scan has to leave out")
    @pytest.mark.parametrize("_", [pytest.param(1, id="R1-skipped")])
    def skipped(_): ...

    assert (_rows_of(runs), _rows_of(skipped)) == ({"R8"}, set())
