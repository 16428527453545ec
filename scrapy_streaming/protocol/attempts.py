"""How one file is requested again and again: the value that each request passes to the next.

What may live here: ``Attempt`` and the rules of its succession. Each method returns the next value; acting
on it (closing a part, making a request) is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from scrapy_streaming.protocol.reasons import Recovery

#: Resumptions in a row that met another validator, after which the part is not offered any more (R62).
UNSTABLE_AFTER: Final = 3

#: Requests that are made once: a retry of one is an ordinary request.
_ONCE: Final = (Recovery.CONFIRM, Recovery.PROBE, Recovery.ORIGINAL)


@dataclass(frozen=True, slots=True)
class Attempt:
    """How the file is requested next, and what the answers so far have proved.

    ``restarts`` counts refused answers that another request followed. ``kept`` is the most bytes that a
    part has had since the last refusal. ``stuck`` counts requests in a row that added no byte (in a crawl
    RetryMiddleware counts them). ``changes`` counts resumptions in a row that met another
    representation (R62). ``unmarked`` is the SHA-256 (hex) of an earlier body whose end nothing marked
    (R33). ``odd_pieces`` counts pieces that did not match their own Content-Digest (R64). ``reclaims``
    counts claims after a lost lease.
    """

    recovery: Recovery = Recovery.NONE
    restarts: int = 0
    kept: int = 0
    changes: int = 0
    unmarked: str | None = None
    odd_pieces: int = 0
    reclaims: int = 0
    stuck: int = 0

    def after_refusal(self, recovery: Recovery) -> Attempt:
        """Return the attempt that follows a refused answer.

        After ``ORIGINAL`` it is an ordinary one: only the URL is another. Raises ``ValueError`` for
        ``FAIL``, which no request follows.
        """
        if recovery is Recovery.FAIL:
            msg = "no request follows a refusal that says `fail`"
            raise ValueError(msg)
        following = Recovery.NONE if recovery is Recovery.ORIGINAL else recovery
        return replace(self, recovery=following, restarts=self.restarts + 1, kept=0)

    def unstable(self) -> Attempt:
        """Return the attempt to plan with: a plain GET if resuming keeps meeting other bytes (R62)."""
        if self.recovery is Recovery.NONE and self.changes >= UNSTABLE_AFTER:
            return replace(self, recovery=Recovery.SINGLE_SHOT)
        return self

    def planned(self, kept: int) -> Attempt:
        """Return the attempt once its request is planned, with *kept* bytes of a part before it.

        A confirmation and a probe are requested once: a retry is an ordinary request.
        """
        recovery = Recovery.NONE if self.recovery in _ONCE else self.recovery
        return replace(self, recovery=recovery, kept=max(self.kept, kept))

    def ordinary(self) -> Attempt:
        """Return the attempt with an ordinary request next.

        After an error to a request without Range as well (R55), and after a failure without a recovery.
        """
        return replace(self, recovery=Recovery.NONE)

    def made_progress(self, kept: int) -> Attempt:
        """Return the attempt after a body that broke off with *kept* bytes, more than before."""
        return replace(self, recovery=Recovery.NONE, kept=kept, stuck=0)

    def made_none(self) -> Attempt:
        """Return the attempt after a request that added no byte: an ordinary one, once more."""
        return replace(self, recovery=Recovery.NONE, stuck=self.stuck + 1)

    def met_another(self) -> Attempt:
        """Return the attempt after a resumption that met another representation (R62)."""
        return replace(self, changes=self.changes + 1)

    def end_marked(self) -> Attempt:
        """Return the attempt after an answer that says where its body ends (R33)."""
        return replace(self, unmarked=None)

    def unmarked_body(self, sha256: str) -> Attempt:
        """Return the attempt after a body whose end nothing marked; *sha256* in hex (R33)."""
        return replace(self, unmarked=sha256)

    def odd_piece(self) -> Attempt:
        """Return the attempt after the first piece that did not match its Content-Digest (R64)."""
        return replace(self, recovery=Recovery.NONE, odd_pieces=1)

    def claimed_again(self) -> Attempt:
        """Return the attempt under a new lease, after the old one was lost."""
        return replace(self, recovery=Recovery.NONE, reclaims=self.reclaims + 1)

    def rejected(self) -> Attempt:
        """Return the attempt after a middleware refused a whole file: it is fetched anew."""
        return replace(self, recovery=Recovery.REFETCH)
