"""The states of a blob in the ledger.

What may live here: values only. The layers beside the ledger use them too, and must not load SQLAlchemy.
"""

from __future__ import annotations

import enum


class BlobState(enum.StrEnum):
    """The state of a blob in the ledger; the column holds these words.

    Only a ``PRESENT`` blob may be named by a completion. ``DELETING``: ``gc`` is removing it.
    ``QUARANTINED``: its bytes were wrong. ``MISSING``: there are none. The bytes of the last two are
    fetched again when a job asks for them.
    """

    PRESENT = "present"
    DELETING = "deleting"
    QUARANTINED = "quarantined"
    MISSING = "missing"
