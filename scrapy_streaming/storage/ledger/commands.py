"""What the classes of verbs share: how a verb becomes a command, and what commands work with.

A verb is written once, as the command that runs inside a transaction; ``verb`` makes the method of it
that callers use. No verb itself lives here.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import wraps
from itertools import chain
from typing import Concatenate, ParamSpec, TypeVar

from scrapy_streaming.protocol.jobs import JobState, Lease
from scrapy_streaming.storage.ledger.prepared import Command, Session
from scrapy_streaming.storage.ledger.statements import Statements, WorkerIdentity

T = TypeVar("T")
P = ParamSpec("P")
V = TypeVar("V", bound="Verbs")


@dataclass(frozen=True, slots=True)
class LedgerContext:
    """What verbs that write work with: the worker, its compiled statements, whether events are kept."""

    worker: WorkerIdentity
    statements: Statements
    events: bool

    def record(self, session: Session, lease: Lease, origin: str | None, to: JobState, at: float) -> None:
        """Append to the history of a job what its claim did to it."""
        if self.events:
            session.run(
                self.statements.put_event,
                job_id=lease.job_id,
                fence=lease.fence,
                claim_id=lease.claim_id,
                worker=self.worker.number,
                from_state=origin,
                to_state=to.value,
                at=at,
            )


class Verbs:
    """A base of classes whose methods are verbs."""

    #: The epoch that the store has seen: a ledger below it is an older copy.
    epoch: int
    #: Only where the ledger is open to write.
    _context: LedgerContext

    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Return the future answer of *command*; *key* and *urgent* as in ``Writer.submit``."""
        raise NotImplementedError


def verb(body: Callable[Concatenate[V, Session, P], T]) -> Callable[Concatenate[V, P], Future[T]]:
    """Return the method that submits *body* as a command and returns its future answer.

    The caller passes all arguments of *body* but the session. A ``Lease`` among them names the job that
    the command writes about.
    """

    @wraps(body)
    def submit(self: V, /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        given = chain(args, kwargs.values())
        key = next((value.job_key for value in given if isinstance(value, Lease)), "")
        return self.submit(lambda session: body(self, session, *args, **kwargs), key)

    return submit
