"""Maintenance of a store, also while crawls run: policy only.

What may live here: decisions about what is removed, what is damaged and what is recorded. Parts and blobs
find, move and remove the bytes. ``collecting`` removes what nothing refers to (``gc``), ``inspection``
compares the ledger with the store (``verify``, ``rebuild``, ``health``), ``arriving`` adopts files of other
programs (``adopt``), ``carrying`` imports completions of other ledgers (``import``), ``leaving`` gives each
name bytes of its own (``detach``). ``common`` has what these share. Only files with a name that this package
gives are removed.
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
