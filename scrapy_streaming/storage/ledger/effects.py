"""Effects: changes outside of the ledger, each recorded at most once (ledger rules 11 and 12).

What may live here: the verbs for effects, and ``run_effect``, which uses them in order. An effect begins
under a claim, runs, and is recorded as ``ok`` with its result; only such a result is replayed. If one began
and no end is recorded (its worker died, or the connection broke), the caller finds out whether it happened
before it runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from scrapy_streaming.exceptions import ResultTooLarge
from scrapy_streaming.protocol.jobs import (
    EffectStart,
    Lease,
    OperationState,
    Recover,
    Replay,
    Run,
)
from scrapy_streaming.storage.ledger import statements as sql
from scrapy_streaming.storage.ledger.commands import Verbs, verb
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.recording import lease_lost
from scrapy_streaming.storage.ledger.records import safe_error

#: Bytes that the result of an effect may have, as UTF-8.
MAX_RESULT: Final = 16 << 10


class Effects(Verbs):
    """The verbs that ``run_effect`` uses; each returns a future, as those of ``Jobs``."""

    @verb
    def begin(self, session: Session, lease: Lease, op_key: str, kind: str) -> EffectStart:
        """Record that the effect *op_key* begins under a claim, unless its result is recorded.

        Returns ``Run``, ``Recover`` (it began before, and no end is recorded) or ``Replay``. The future may
        raise ``LeaseLost``.
        """
        run = self._context.statements
        if session.run(run.alive, **sql.held(lease)) is None:
            raise lease_lost(lease)
        row = session.run(run.operation, op=op_key)
        if row is not None and row.state == OperationState.OK:
            return Replay(row.result)
        attempt = 1 if row is None else row.attempt + 1
        session.run(
            run.put_operation,
            op_key=op_key,
            job_id=lease.job_id,
            kind=kind,
            state=OperationState.STARTED.value,
            fence=lease.fence,
            attempt=attempt,
            result=None,
            error=None,
        )
        if session.changed == 0:  # another job's claim has just ended it
            return Replay(session.run(run.operation, op=op_key).result)
        if row is not None and row.state == OperationState.STARTED:
            return Recover(attempt, row.fence)
        return Run(attempt)

    def succeed(self, lease: Lease, op_key: str, result: str) -> Future[None]:
        """Record the result of an effect that this claim began; the future may raise ``LeaseLost``.

        Raises ``ResultTooLarge`` beyond 16 KiB.
        """
        return self._end_effect(lease, op_key, checked_result(result))

    def give_up(self, lease: Lease, op_key: str, error: str) -> Future[None]:
        """Record that an effect failed, so that it may run again; the future may raise ``LeaseLost``."""
        return self._end_effect(lease, op_key, None, safe_error(error))

    @verb
    def _end_effect(
        self, session: Session, lease: Lease, op_key: str, result: str | None, error: str | None = None
    ) -> None:
        run = self._context.statements
        state = OperationState.FAILED if result is None else OperationState.OK
        if session.run(run.alive, **sql.held(lease)) is not None:
            session.run(
                run.end_operation,
                op=op_key,
                held_job=lease.job_id,
                held_fence=lease.fence,
                new_state=state.value,
                new_result=result,
                new_error=error,
            )
            if session.changed == 1:
                return
        # it may be recorded already, by a COMMIT whose answer did not arrive
        row = session.run(run.operation, op=op_key)
        wanted = (state, result, lease.job_id, lease.fence)
        if row is None or (row.state, row.result, row.job_id, row.fence) != wanted:
            raise lease_lost(lease)


def checked_result(result: str) -> str:
    """Return *result*; raise ``ResultTooLarge`` beyond ``MAX_RESULT``, ``ValueError`` for a NUL."""
    if "\0" in result:
        msg = "a result must not contain NUL: PostgreSQL cannot store it, and results are never changed"
        raise ValueError(msg)
    size = len(result.encode("utf-8"))
    if size > MAX_RESULT:
        msg = f"the result has {size} bytes, above {MAX_RESULT}; store it as a blob and record its digest"
        raise ResultTooLarge(msg)
    return result


def run_effect(
    ledger: Effects,
    lease: Lease,
    op_key: str,
    effect: Callable[[], str],
    *,
    kind: str = "effect",
    recover: Callable[[], str | None] | None = None,
) -> str:
    """Return the effect's result: recorded before, found by *recover*, or made now. Blocks.

    At most one result is ever recorded for *op_key*, and every later call returns it byte for byte (I8,
    I9). *recover* finds out whether an effect that began and has no recorded end happened, and returns its
    result or ``None``; without it the effect runs again, so it must then be one that may happen twice.
    Raises what *effect* raises (recorded as a failure, which is never replayed), ``LeaseLost``,
    ``ResultTooLarge``, and ``ValueError`` for a result with NUL.
    """
    start = ledger.begin(lease, op_key, kind).result()
    if isinstance(start, Replay):
        return start.result
    result = recover() if isinstance(start, Recover) and recover is not None else None
    if result is None:
        try:
            result = checked_result(effect())
        except Exception as error:
            ledger.give_up(lease, op_key, f"{type(error).__name__}: {error}").result()
            raise
    ledger.succeed(lease, op_key, result).result()
    return result
