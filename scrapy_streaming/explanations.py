"""What each reason means, and its remedy: the words of ``reasons`` and those of refused answers.

What may live here: the one table of all reasons, and reading it. A refused answer is explained where its
reason is declared, in ``protocol.reasons``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from scrapy_streaming import reasons
from scrapy_streaming.protocol.reasons import REFUSALS, Reason
from scrapy_streaming.reasons import Why

_REFUSED: Final = {
    str(reason): Why(reason.says.removeprefix("refused: "), reasons.SERVER)
    for reason in REFUSALS
    if reason.says.startswith("refused: ") and reason is not Reason.CODING_UNSUPPORTED
}
#: Every reason by what it is about; ``bad-status-4xx`` stands for the statuses that are not named.
GROUPS: Final[Mapping[str, Mapping[str, Why]]] = MappingProxyType(
    {
        group: _REFUSED | dict(words) if group == reasons.UNUSABLE_ANSWERS else words
        for group, words in reasons.GROUPS.items()
    }
)
REASONS: Final[Mapping[str, Why]] = MappingProxyType(
    {reason: why for group in GROUPS.values() for reason, why in group.items()}
)
#: The explanation of a reason that is the name of a Python error.
UNKNOWN: Final = Why(
    "an unexpected error, by the name of its Python class",
    "the crawl's log has its traceback: correct the hook, the middleware or the handler that it names",
)

_STATUS = re.compile(r"bad-status-(\d)\d\d", re.ASCII)


def explain(reason: str) -> Why:
    """Return what *reason* means and its remedy; ``UNKNOWN`` for the name of an error."""
    if reason in REASONS:
        return REASONS[reason]
    status = _STATUS.fullmatch(reason)
    if status is None:
        return UNKNOWN
    return REASONS.get(f"bad-status-{status[1]}xx", REASONS["bad-status-other"])
