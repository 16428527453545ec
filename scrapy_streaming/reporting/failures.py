"""Failed files, grouped by reason: as a text names them, and as JSON.

What may live here: grouping. What a reason means is in ``explanations``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from scrapy_streaming.explanations import explain

if TYPE_CHECKING:
    from scrapy_streaming.storage.ledger import FailedJob

#: Hosts that the text of a group names.
HOSTS: Final = 3


@dataclass(slots=True)
class FailureGroup:
    """The files that failed for one reason; ``example`` is the URL of one."""

    reason: str
    example: str
    states: Counter[str] = field(default_factory=Counter)
    hosts: Counter[str] = field(default_factory=Counter)

    @property
    def files(self) -> int:
        """The number of files."""
        return self.states.total()

    def named_hosts(self) -> str:
        """Return the hosts with most failures, and the number of others."""
        if len(self.hosts) == 1:
            return next(iter(self.hosts))
        named = ", ".join(f"{host} ({number})" for host, number in self.hosts.most_common(HOSTS))
        more = len(self.hosts) - HOSTS
        return f"{named}, {more} more" if more > 0 else named


def grouped(failed: Iterable[FailedJob]) -> list[FailureGroup]:
    """Return the failures by reason, the most frequent first."""
    groups: dict[str, FailureGroup] = {}
    for job in failed:
        group = groups.setdefault(job.reason, FailureGroup(job.reason, job.url))
        group.states[job.state.value] += 1
        group.hosts[_host(job.url)] += 1
    return sorted(groups.values(), key=lambda group: (-group.files, group.reason))


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "-"
    except ValueError:
        return "-"


def document_of(groups: Iterable[FailureGroup]) -> dict[str, Any]:
    """Return the groups as JSON has them, each with its reason's meaning and remedy."""
    entries = [
        {
            "reason": group.reason,
            "files": group.files,
            "states": dict(group.states),
            "hosts": dict(group.hosts.most_common()),
            "example": group.example,
            **asdict(explain(group.reason)),
        }
        for group in groups
    ]
    return {"files": sum(entry["files"] for entry in entries), "failures": entries}
