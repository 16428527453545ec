"""What the ledger records of a blob, as values; its table has these words."""

from __future__ import annotations

import enum


class BlobState(enum.StrEnum):
    """The state of a blob in the ledger.

    Only a ``PRESENT`` blob may be named by a completion. ``DELETING``: ``gc`` is removing it.
    ``MISSING`` and ``QUARANTINED``: its bytes are gone, or were wrong; they are fetched again when a
    job asks for them.
    """

    PRESENT = "present"
    DELETING = "deleting"
    MISSING = "missing"
    QUARANTINED = "quarantined"
