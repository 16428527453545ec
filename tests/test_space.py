"""Room on the disk, as values (R9)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from scrapy_streaming.runtime.space import LONGEST_PAUSE, UNKNOWN_NEED, Space, pause

DISKS = {Path("/a"): 1000, Path("/b"): 700}


@dataclass
class Body:
    left: int | None


@pytest.mark.parametrize(
    ("reserve", "need", "coming", "fits"),
    [
        pytest.param(0, 700, [], True, id="all-of-the-smaller-disk"),
        pytest.param(0, 701, [], False, id="more-than-it"),
        pytest.param(100, 600, [], True, id="beside-the-reserve"),
        pytest.param(100, 601, [], False, id="into-the-reserve"),
        pytest.param(100, 400, [100, 100], True, id="beside-what-is-coming"),
        pytest.param(100, 401, [100, 100], False, id="in-its-place"),
        pytest.param(100, 600, [None], True, id="what-nobody-knows-is-not-counted"),
        pytest.param(700, None, [], True, id="unknown-length-above-the-reserve"),
        pytest.param(701, None, [], False, id="unknown-length-below-it"),
        pytest.param(0, None, [701], False, id="unknown-length-and-all-is-promised"),
        pytest.param(900, 0, [], False, id="nothing-fits-below-the-reserve"),
    ],
)
def test_what_fits(reserve: int, need: int | None, coming: list[int | None], fits: bool) -> None:
    space = Space(DISKS, reserve, DISKS.__getitem__)
    refusal = space.refusal("http://h/f", need, [Body(left) for left in coming])
    assert (refusal is None) == fits
    if refusal is not None:
        assert refusal.reason == "no-space"
        assert refusal.need == (need or UNKNOWN_NEED)
        assert "STREAMING_MIN_FREE_BYTES" in str(refusal)


def test_pauses_grow_up_to_a_bound() -> None:
    pauses = [pause(tried) for tried in range(2000)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, LONGEST_PAUSE)
