"""Maintenance of a store, also while crawls run: policy only.

What may live here: decisions about what may go, what disagrees and what is recorded. How bytes are found,
moved and removed is up to parts and blobs. ``collecting`` removes what nothing needs, ``inspection``
compares the ledger with the store, ``arriving`` adopts what other programs stored, ``carrying`` imports
completions of other ledgers, ``leaving`` gives each name bytes of its own. ``common`` has what these
share. Only names that this package gives to its files are removed.
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
