"""The base of the classes of verbs, and the decorator that turns a command into a verb.

What may live here: what all verbs share, and no verb. A verb is written once, as the command that runs inside
a transaction; ``verb`` makes the method that callers use.
"""

from __future__ import annotations

import abc
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
    """What verbs that write use: the worker, its compiled statements, whether to record events."""

    worker: WorkerIdentity
    statements: Statements
    events: bool

    def record(self, session: Session, lease: Lease, origin: str | None, to: JobState, at: float) -> None:
        """Append the change of a job's state by its claim to the history."""
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


class Verbs(abc.ABC):
    """A base of classes whose methods are verbs."""

    #: The store's epoch: a ledger whose own is below it is an older copy.
    epoch: int
    #: Only where the ledger is open to write.
    _context: LedgerContext

    @abc.abstractmethod
    def submit(self, command: Command[T], key: str = "", *, urgent: bool = False) -> Future[T]:
        """Return the future answer of *command*; *key* and *urgent* as in ``Writer.submit``."""


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
