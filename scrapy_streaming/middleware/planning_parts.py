"""The parts that a request can build on: found, verified, opened.

What may live here: which of a job's parts a request goes on with. It blocks, so it is called in a thread.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from scrapy_streaming.context import DownloadContext
from scrapy_streaming.exceptions import PartCorrupt
from scrapy_streaming.protocol.attempts import Attempt
from scrapy_streaming.protocol.planning import (
    ConfirmWhole,
    Plan,
    PlannedRequest,
    PublishPart,
    Resume,
    plan_request,
)
from scrapy_streaming.protocol.reasons import Recovery
from scrapy_streaming.redaction import clean_record
from scrapy_streaming.storage.complete_part import CompletePart
from scrapy_streaming.storage.part_writer import PartWriter
from scrapy_streaming.storage.parts import PartStore

logger = logging.getLogger(__name__)
logger.addFilter(clean_record)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan with what it builds on: an open, verified part, or a whole one.

    ``corrupt`` counts the parts that disagreed with their sidecars.
    """

    plan: Plan
    writer: PartWriter | None = None
    whole: CompletePart | None = None
    corrupt: int = 0

    @property
    def kept(self) -> int:
        """How many bytes of a part the plan builds on."""
        return self.plan.part.length if isinstance(self.plan, Resume | ConfirmWhole | PublishPart) else 0


def prepare(
    parts: PartStore, context: DownloadContext, attempt: Attempt, planned: PlannedRequest
) -> Prepared:
    """Return the plan for a request and the verified part it builds on.

    The longest part comes first; one that disagrees with its sidecar is removed (R3).
    """
    corrupt, recovery, stored = 0, attempt.recovery, context.stored
    for part in parts.find(context.key):
        if part.name.fence > context.lease.fence:
            continue
        if recovery is Recovery.PROBE and part.state.prefix_sha256 != attempt.unmarked:
            continue  # not the body whose end is in question
        fresh = context.may_publish(part.written_at, time.time())
        plan = plan_request(part.state, stored, planned, recovery, fresh=fresh)
        try:
            match plan:
                case PublishPart():
                    return Prepared(plan, whole=parts.complete_part(part), corrupt=corrupt)
                case Resume() | ConfirmWhole():
                    writer = parts.reopen(part, context.lease.fence)
                    return Prepared(plan, writer=writer, corrupt=corrupt)
                case _:
                    return Prepared(plan, corrupt=corrupt)
        except PartCorrupt as error:
            logger.warning("%s", error)
            parts.remove(part.name)
            corrupt += 1
    return Prepared(plan_request(None, stored, planned, recovery), corrupt=corrupt)
