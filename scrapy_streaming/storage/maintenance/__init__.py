"""Maintenance: looking after a store that crawls leave behind, also while others run.

Above parts, blobs and ledger; nothing of a download comes here. ``common`` has what the others
share, ``collecting`` removes what nobody needs, ``inspection`` compares what is recorded with what is
there, ``arriving`` takes over what other programs stored, ``carrying`` brings in
what other ledgers know. Nothing is removed that is not of our own grammar.
"""

from __future__ import annotations

from scrapy_streaming.storage.maintenance.arriving import Adoption, adopt
from scrapy_streaming.storage.maintenance.carrying import Imported, Wanted, carry
from scrapy_streaming.storage.maintenance.collecting import (
    SETTLING,
    Collected,
    Reconciled,
    collect,
    reconcile,
)
from scrapy_streaming.storage.maintenance.common import MaintenanceRuns, Progress, Store
from scrapy_streaming.storage.maintenance.inspection import (
    Finding,
    Health,
    Rebuilt,
    Verified,
    health,
    move_aside,
    rebuild,
    verify,
)
from scrapy_streaming.storage.maintenance.leaving import Detached, detach

__all__ = [
    "SETTLING",
    "Adoption",
    "Collected",
    "Detached",
    "Finding",
    "Health",
    "Imported",
    "MaintenanceRuns",
    "Progress",
    "Rebuilt",
    "Reconciled",
    "Store",
    "Verified",
    "Wanted",
    "adopt",
    "carry",
    "collect",
    "detach",
    "health",
    "move_aside",
    "rebuild",
    "reconcile",
    "verify",
]
