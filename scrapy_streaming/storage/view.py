"""A store opened read-only: nothing is created or changed, so read permission is enough.

What may live here: what commands that only read use of a store. ``store.view_of`` makes one.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.storage.blobs import BlobStore

if TYPE_CHECKING:
    from scrapy_streaming.storage.ledger import ReadOnlyLedger


class StoreView:
    """The blobs and the ledger of one store, as a context manager. Entering raises as ``ReadOnlyLedger``."""

    def __init__(self, blobs: BlobStore, ledger: ReadOnlyLedger, *, unrecorded: bool) -> None:
        """Take both over; *unrecorded*: a crawl without the ledger stored blobs that it does not have."""
        self.blobs = blobs
        self.ledger = ledger
        self._unrecorded = unrecorded
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:  # closes the blobs if the ledger cannot be opened
            opening.callback(self.blobs.close)
            opening.enter_context(self.ledger)
            self._opened = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def refuse_unknown(self) -> None:
        """Raise ``LedgerError`` if there may be blobs that the ledger does not have.

        ``ledger-behind`` after a crawl without the ledger, ``ledger-put-back`` as ``Queries.refuse_older``.
        """
        if self._unrecorded:
            raise ledger_behind()
        self.ledger.refuse_older().result()


def ledger_behind() -> LedgerError:
    """Return the error for a store in which a crawl ran without the ledger (``ledger-behind``)."""
    msg = "the store may hold blobs that its ledger does not know: a crawl ran without the ledger"
    return LedgerError(msg, reason="ledger-behind")
