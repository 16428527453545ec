"""The statistics: every name that is counted, declared once.

What may live here: declarations. The page of statistics, the names in ``metrics.json`` and the check of
what is counted are made of them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

#: What every name begins with in Scrapy's statistics.
PREFIX: Final = "streaming/"


class StatisticKind(enum.StrEnum):
    """How the value of a statistic comes about."""

    COUNTER = "counter"  # it only grows
    AVERAGE = "average"  # of what was measured so far


@dataclass(frozen=True, slots=True)
class Statistic:
    """One statistic, or the group of those whose name ends in ``/<word>``.

    ``always``: every crawl has it, be it 0. ``summary``: ``metrics.json`` repeats it under ``streaming``.
    """

    name: str
    help: str
    unit: str = ""
    kind: StatisticKind = StatisticKind.COUNTER
    always: bool = False
    summary: bool = False

    @property
    def group(self) -> str | None:
        """What the names of a group begin with, up to the slash; ``None`` for a single name."""
        start, slash, word = self.name.rpartition("/")
        return start + slash if word.startswith("<") else None


_DECLARED: Final = (
    Statistic("resume_decisions_made", "plans made and answers judged", always=True, summary=True),
    Statistic("decision/<reason>", "each of them, by its [reason](#decisions)"),
    Statistic(
        "bytes_received",
        "bytes of file bodies that came over the wire, with those of refused answers and of requests that "
        "broke off",
        "bytes",
        always=True,
    ),
    Statistic("bytes_kept", "bytes not fetched again because a part was resumed", "bytes", always=True),
    Statistic(
        "bytes_saved",
        "bytes not fetched because the file was stored and unchanged, and bytes not stored again because "
        "their content was stored already",
        "bytes",
        always=True,
    ),
    Statistic(
        "files_hashed",
        "stored files that were read because something had touched them since their bytes were last known "
        "to be right",
        "files",
    ),
    Statistic(
        "tampered/<what>",
        "stored files that were changed from outside: `bad-blob` (fetched again), `blob-missing` (made "
        "again from its name, else fetched again), `bad-name` (the server is asked, then made again from "
        "the blob), `name-missing` (made again from the blob); each has its warning",
        "files",
    ),
    Statistic("blobs_published", "new blobs", "blobs", always=True),
    Statistic("deduplicated", "files whose content was stored already", "files", always=True),
    Statistic(
        "waits_for_space",
        "files that the disk had no room for and that waited for it (`STREAMING_PATIENCE`)",
        "files",
    ),
    Statistic(
        "io_operations",
        "pieces of file work given to a thread: writes, hashes, publications, names, removals",
        always=True,
        summary=True,
    ),
    Statistic(
        "fallbacks_to_existing",
        "requests for files whose bodies Scrapy buffers, because [the scheme's download handler]"
        "(handlers.md) cannot be streamed from; and a spider's own requests that were not streamed because "
        "their job was not granted",
        "requests",
        always=True,
        summary=True,
    ),
    Statistic(
        "average_latency_ms",
        "average time to publish",
        "milliseconds",
        StatisticKind.AVERAGE,
        always=True,
        summary=True,
    ),
    Statistic(
        "failed/<reason>",
        "files that were not stored, by [reason](failures.md); `crawl-stopping` are those that "
        "[Ctrl-C](stopping.md) broke off",
        "files",
    ),
    Statistic(
        "leases_lost",
        "leases that another worker took over, or that were ended from outside, before the job was done; "
        "a lease that is only renewed late is not lost",
        "leases",
        always=True,
    ),
    Statistic(
        "recovered",
        "jobs taken over from a worker that stopped renewing its leases, and jobs claimed again after "
        "their lease was lost",
        "jobs",
        always=True,
    ),
)

#: Every statistic by its name without ``PREFIX``.
STATISTICS: Final[Mapping[str, Statistic]] = MappingProxyType({each.name: each for each in _DECLARED})
_GROUPS: Final = tuple(each.group for each in _DECLARED if each.group is not None)


def is_declared(name: str) -> bool:
    """Whether *name*, without ``PREFIX``, is declared by itself or as one of a group."""
    if name in STATISTICS:
        return "<" not in name
    return any(name.startswith(group) and len(name) > len(group) for group in _GROUPS)


@lru_cache(maxsize=1024)
def full_name(name: str) -> str:
    """Return the name under which Scrapy's statistics have *name*.

    Raises ``LookupError`` for a name that is not declared: a mistake in the code that counts it.
    """
    if not is_declared(name):
        msg = f"the statistic {name!r} is not declared in scrapy_streaming/statistics.py"
        raise LookupError(msg)
    return PREFIX + name
