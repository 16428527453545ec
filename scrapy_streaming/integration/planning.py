"""The plan for a part, made before the fields of the request are known; and how long bytes are fresh.

What may live here: what ``deciding``, ``fetching`` and ``downloading`` plan by.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Final

from scrapy_streaming.protocol.jobs import StoredRepresentation, is_recent
from scrapy_streaming.protocol.parts import PartState
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Recovery
from scrapy_streaming.protocol.selecting import selecting_key
from scrapy_streaming.results import refresh_before
from scrapy_streaming.settings import StreamingSettings

#: Days for which a whole representation is fresh, as ``FILES_EXPIRES`` in Scrapy.
FRESH_DAYS: Final = 90


def plan_part(
    state: PartState,
    planned: PlannedRequest,
    known: StoredRepresentation | None = None,
    recovery: Recovery = Recovery.NONE,
    *,
    fresh: bool,
) -> Plan:
    """Return the plan for a part, as if the request selected the same representation.

    The response is judged with the fields that were really sent. A part whose end only the closed connection
    marked is probed (R33).
    """
    if state.end_unmarked and recovery is Recovery.NONE:
        recovery = Recovery.PROBE
    selecting = selecting_key((), {})
    vary = tuple(name for name in state.vary if name in ("*", "cookie"))
    plan = plan_request(
        replace(state, vary=vary, selecting=selecting_key(vary, {})),
        None if known is None else replace(known, vary=(), selecting=selecting),
        planned,
        recovery,
        fresh=fresh,
    )
    match plan:
        case Resume() | ConfirmWhole() | PublishPart():
            return replace(plan, part=state)
        case _:
            return plan


def oldest_fresh(settings: StreamingSettings) -> float | None:
    """Return the time after which fresh bytes were stored (R7); ``inf``, ``None`` as ``refresh_before``."""
    return refresh_before(settings.revalidate, FRESH_DAYS, time.time())


def is_fresh(settings: StreamingSettings, written_at: float) -> bool:
    """Whether bytes of that time may be used without a request (R7)."""
    return is_recent(written_at, oldest_fresh(settings), time.time())
