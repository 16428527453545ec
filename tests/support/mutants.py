"""What the tests must notice: one safeguard taken out each (S9)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

Put = Callable[[object, str, Any], None]


def apply(name: str, put: Put = setattr) -> None:
    """Take the safeguard *name* out of this process; by monkeypatch's *put* it comes back."""
    (DOWNLOADS | LEDGER)[name](put)


# -- downloads --------------------------------------------------------------------------------


def _if_range(put: Put) -> None:
    from scrapy_streaming.protocol.planning import Resume

    put(Resume, "fields", lambda self: {"Range": f"bytes={self.part.length}-"})


def _content_range(put: Put) -> None:
    """Neither where a piece begins nor whether its body keeps to that is looked at."""
    from scrapy_streaming.protocol import judging
    from scrapy_streaming.runtime import body_writer

    check = judging._why_not_combine

    def lax(*args):
        refusal = check(*args)
        return None if refusal is judging.Reason.RANGE_START else refusal

    put(judging, "_why_not_combine", lax)
    put(body_writer.Task, "ranged", False)


def _re_hash(put: Put) -> None:
    from scrapy_streaming.storage import parts

    def trusting(fd, stored):
        return hashlib.sha256(os.pread(fd, stored.state.length, 0))

    put(parts, "hash_prefix", trusting)


DOWNLOADS: dict[str, Callable[[Put], None]] = {
    "if-range": _if_range,
    "content-range": _content_range,
    "re-hash": _re_hash,
}


# -- the ledger: its statements are compiled when it is opened, so before that ------------------


def _guard_without(*names: str) -> Callable[[Put], None]:
    """Take comparisons out of the guard; their values are still bound, and mean nothing.

    That of the state alone is not missed: a job that is not leased has no claim.
    """

    def mutant(put: Put) -> None:
        from sqlalchemy import and_, bindparam, or_

        from scrapy_streaming.protocol.jobs import JobState
        from scrapy_streaming.storage.ledger import schema, statements

        def lax():
            compared = {"id": "held_job", "fence": "held_fence", "claim_id": "held_claim"}
            conditions = [] if "state" in names else [statements.in_state(JobState.LEASED)]
            for column, bound in compared.items():
                value = bindparam(bound)
                same = schema.job.c[column] == value
                conditions.append(or_(same, schema.job.c[column] != value) if column in names else same)
            return and_(*conditions)

        put(statements, "guard", lax)

    return mutant


def _claimable_too(condition: Callable[[Any, Any], Any]) -> Callable[[Put], None]:
    """Let a claim take jobs that it must not."""

    def mutant(put: Put) -> None:
        from sqlalchemy import or_

        from scrapy_streaming.storage.ledger import statements

        real = statements._claimable
        put(
            statements,
            "_claimable",
            lambda identity, progress: or_(real(identity, progress), condition(statements, identity)),
        )

    return mutant


def _leased(statements: Any, _identity: Any) -> Any:
    from scrapy_streaming.protocol.jobs import JobState

    return statements.in_state(JobState.LEASED)


def _leased_and_expired(statements: Any, identity: Any) -> Any:
    return _leased(statements, identity) & statements.expired(identity)


def _dead(statements: Any, _identity: Any) -> Any:
    from scrapy_streaming.protocol.jobs import JobState

    return statements.in_state(JobState.DEAD)


def _never_expired(put: Put) -> None:
    from sqlalchemy import false

    from scrapy_streaming.storage.ledger import statements

    put(statements, "expired", lambda identity: false())


def _clock_set_back(put: Put) -> None:
    from scrapy_streaming.storage.ledger import schema, statements

    put(statements, "expired", lambda identity: schema.job.c.lease_until <= identity.now)


def _fence_stays(put: Put) -> None:
    from scrapy_streaming.storage.ledger import transitions

    real = transitions.transition
    put(transitions, "transition", lambda state, event: replace(real(state, event), fence=0))


def _other_request(put: Put) -> None:
    from scrapy_streaming.storage.ledger import Jobs

    real = Jobs._claimed

    def lax(self, session, key, request, claim_id, terms):
        row = session.run(self._context.statements.job, job_key=key)
        same = request if row is None else replace(request, request_hash=row.request_hash)
        return real(self, session, key, same, claim_id, terms)

    put(Jobs, "_claimed", lax)


def _own_claim_not_known(put: Put) -> None:
    from scrapy_streaming.storage.ledger import Jobs

    real = Jobs._refused
    put(Jobs, "_refused", lambda self, session, key, request, claim_id: real(self, session, key, request, ""))


def _completed_twice(put: Put) -> None:
    """The guard looks at the job alone, and the table takes a second completion in the first one's place."""
    from scrapy_streaming.storage.ledger import statements

    real = statements.Statements.__init__

    def lax(self, identity, dialect):
        from sqlalchemy import text

        from scrapy_streaming.storage.ledger.prepared import Prepared

        real(self, identity, dialect)
        fresh = statements.named_insert(statements.completion, delivered_at=None)
        newer = {column.name: column for column in fresh.excluded}
        keys = ["job_id", "generation"]
        self.put_completion = Prepared(
            fresh.on_conflict_do_update(index_elements=keys, set_=newer, where=text("true")), dialect
        )

    put(statements.Statements, "__init__", lax)
    _guard_without("state", "claim_id", "fence")(put)


def _replayed(state: str) -> Callable[[Put], None]:
    """Replay what is no result: a failure, or an effect that is under way."""

    def mutant(put: Put) -> None:
        from scrapy_streaming.protocol.jobs import Replay
        from scrapy_streaming.storage.ledger import Effects
        from scrapy_streaming.storage.ledger.commands import verb

        real = Effects.begin.__wrapped__

        def lax(self, session, lease, op_key, kind):
            row = session.run(self._context.statements.operation, op=op_key)
            if row is not None and row.state == state:
                return Replay(row.error or "")
            return real(self, session, lease, op_key, kind)

        put(Effects, "begin", verb(lax))

    return mutant


def _not_recovered(put: Put) -> None:
    from scrapy_streaming.protocol.jobs import Recover, Run
    from scrapy_streaming.storage.ledger import Effects
    from scrapy_streaming.storage.ledger.commands import verb

    real = Effects.begin.__wrapped__

    def lax(*args, **how):
        start = real(*args, **how)
        return Run(start.attempt) if isinstance(start, Recover) else start

    put(Effects, "begin", verb(lax))


def _result_trimmed(put: Put) -> None:
    from scrapy_streaming.storage.ledger import effects

    put(effects, "checked_result", lambda result: result[:1000])


def _no_history_of_takeovers(put: Put) -> None:
    from scrapy_streaming.storage.ledger.commands import LedgerContext

    real = LedgerContext.record

    def lax(self, session, lease, origin, to, at):
        if origin != to:
            real(self, session, lease, origin, to, at)

    put(LedgerContext, "record", lax)


LEDGER: dict[str, Callable[[Put], None]] = {
    "guard-without-fence": _guard_without("fence"),
    "guard-without-claim-id": _guard_without("claim_id"),
    "lease-not-looked-at": _claimable_too(_leased),
    "attempts-without-end": _claimable_too(_leased_and_expired),
    "dead-claimable": _claimable_too(_dead),
    "lease-never-over": _never_expired,
    "clock-set-back": _clock_set_back,
    "fence-stays": _fence_stays,
    "other-request": _other_request,
    "own-claim-not-known": _own_claim_not_known,
    "completed-twice": _completed_twice,
    "failure-replayed": _replayed("failed"),
    "started-replayed": _replayed("started"),
    "not-recovered": _not_recovered,
    "result-trimmed": _result_trimmed,
    "no-history-of-takeovers": _no_history_of_takeovers,
}
