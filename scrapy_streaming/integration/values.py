"""The results of the three steps.

What may live here: values that callers get.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scrapy_streaming.protocol.planning import Plan


@dataclass(frozen=True, slots=True)
class ResumeDecision:
    """What to request.

    ``mode``: ``fresh`` (the whole file), ``resume`` (the bytes from ``resume_byte_offset`` on) or ``cached``
    (the bytes are here: a request with ``headers`` has them confirmed by a 304; without headers no request is
    needed). Send ``headers`` unchanged. ``reason`` is the stable word of the decision table, ``outcome`` the
    plan as a value.
    """

    mode: Literal["fresh", "resume", "cached"]
    resume_byte_offset: int
    headers: dict[str, str]
    reason: str
    outcome: Plan


@dataclass(frozen=True, slots=True)
class StreamMetrics:
    """What was written: bytes, milliseconds, and MiB a second excluding the time of syncs.

    ``sha256_hex`` is of the whole part; ``resumed_from_bytes`` of its bytes were there before.
    """

    bytes_written: int
    sha256_hex: str
    elapsed_ms: float
    fsync_ms: float
    avg_write_mibps: float
    resumed_from_bytes: int


@dataclass(frozen=True, slots=True)
class FinalizedArtifact:
    """A published file: ``path`` (absolute; the blob's if no name was given), ``digest`` (``sha256:…``).

    ``size`` in bytes; ``deduplicated``: the store had these bytes already.
    """

    path: Path
    digest: str
    size: int
    deduplicated: bool
