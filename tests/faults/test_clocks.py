"""Clocks that are wrong, or jump: duplicate work at most (F16, I14).

On SQLite each worker reads its own machine's clock, on PostgreSQL all read the server's; the clock handed to
``Ledger.open`` takes the place of either, so what is shown here is worse than what either can meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.ledger_checker import bound, claims, states
from support.worker import Plan
from support.workers import Workers

HOUR = 3600.0

#: (skew, jump, when) of each worker: seconds ahead, seconds more from so many seconds of its life on.
CLOCKS = {
    "five seconds apart": [(-5, 0, 0), (0, 0, 0), (5, 0, 0), (2, 0, 0)],
    "an hour apart": [(-HOUR, 0, 0), (0, 0, 0), (HOUR, 0, 0), (HOUR, 0, 0)],
    "all go back five seconds": [(0.001, -5, 2)] * 4,
    "all go back an hour": [(0.001, -HOUR, 2)] * 4,
    "all go ahead an hour": [(0.001, HOUR, 2)] * 4,
    "some go back, some ahead": [(0.001, -HOUR, 2), (0.001, HOUR, 3), (5, -10, 2), (-5, 10, 3)],
}

#: Those that have what the others have, too.
WIDEST = ("an hour apart", "all go back an hour", "some go back, some ahead")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path / 'ledger.sqlite3'}"


@pytest.fixture
def workers(url: str, tmp_path: Path) -> Iterator[Workers]:
    with Workers(Plan(url, str(tmp_path), keys=80, lease=3, work=0.3)) as made:
        yield made


def _run(workers: Workers, clocks: Sequence[tuple[float, float, float]], **plan: Any) -> None:
    for skew, jump, at in clocks:
        workers.start(skew=skew, jump=jump, jump_at=at, **plan)
    workers.wait()
    found = workers.violations()
    counts = claims(workers.plan.url)
    most, granted = max(counts.values()), sum(counts.values())
    print(f"{workers.figures()}; at most {most} claims of a key; {len(found)} violations ({bound(granted)})")
    assert found == []
    assert states(workers.plan.url) == {"done": workers.plan.keys}


@pytest.mark.parametrize(
    "clocks",
    [
        pytest.param(clocks, id=name, marks=() if name in WIDEST else pytest.mark.soak)
        for name, clocks in CLOCKS.items()
    ],
)
@pytest.mark.proves("F16", "I2", "I3", "I4", "I14")
@pytest.mark.long_on_postgres
def test_clocks_that_are_wrong_cost_duplicate_work_only(workers: Workers, clocks: list[Any]) -> None:
    _run(workers, clocks)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(5))
@pytest.mark.parametrize("clocks", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.proves("F16", "I2", "I3", "I4", "I14")
def test_clocks_that_are_wrong_for_long_cost_duplicate_work_only(
    url: str, tmp_path: Path, clocks: list[Any], turn: int
) -> None:
    with Workers(Plan(url, str(tmp_path), keys=400, lease=3, work=0.3)) as workers:
        _run(workers, [clock for clock in clocks for _ in range(2)])


@pytest.mark.proves("F16", "I7", "I14")
def test_a_dead_workers_lease_ends_though_the_clock_went_back(workers: Workers) -> None:
    """Its end is an hour ahead by the clock that now is; it is not waited for."""
    dead = workers.start(skew=HOUR, freeze_before=2)[0]
    workers.until(lambda: len(workers.lines("frozen")) == 1)
    dead.kill()
    _run(workers, [(0.001, 0, 0), (0.001, 0, 0)])


@pytest.mark.proves("F16", "I14")
@pytest.mark.long_on_postgres
def test_a_job_that_workers_with_other_clocks_take_from_each_other_is_not_dead(workers: Workers) -> None:
    """Not one of them went silent: with the attempts of the default, all is done."""
    _run(workers, CLOCKS["five seconds apart"], max_attempts=5, lease=60)
