"""Jobs, effects and the ledger, for code without a crawl.

What may live here: functions that callers use. They import the ledger when they are called: without
SQLAlchemy they return ``None``.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from scrapy_streaming.exceptions import SettingError
from scrapy_streaming.integration.switches import is_off, settings, why_no_idempotency, why_no_schema
from scrapy_streaming.integration.values import FinalizedArtifact
from scrapy_streaming.protocol.jobs import (
    Completion,
    Done,
    Lease,
    StoredRepresentation,
    operation_key,
    request_hash,
)
from scrapy_streaming.protocol.jobs import (
    job_key as _job_key,
)
from scrapy_streaming.protocol.reasons import Proof
from scrapy_streaming.protocol.validators import Validators
from scrapy_streaming.redaction import url_without_userinfo
from scrapy_streaming.storage.job_request import JobRequest

if TYPE_CHECKING:
    from scrapy_streaming.integration.database import StreamingDatabase
    from scrapy_streaming.storage.ledger import Ledger

#: Keys that are remembered with their arguments, so that the ledger can record the job's URL.
REMEMBERED: Final = 10_000

_made: Final[OrderedDict[str, tuple[str, str, str]]] = OrderedDict()
_lock: Final = threading.Lock()


def generate_job_key(work_id: str, artifact_id: str, canonical_url: str) -> str:
    """Return the idempotency key of a job: 64 hex digits; equal arguments are one job.

    Raises ``TypeError`` if an argument is not ``str``.
    """
    key = _job_key(work_id, artifact_id, canonical_url)
    with _lock:
        _made[key] = work_id, artifact_id, canonical_url
        if len(_made) > REMEMBERED:
            _made.popitem(last=False)
    return key


def generate_operation_key(kind: str, job_id: str, **context: Any) -> str:
    """Return the idempotency key of one effect of a job: 64 hex digits.

    *context* distinguishes it from other effects of its kind; its values are JSON values. Raises
    ``TypeError`` for other values, and for the names ``v``, ``kind`` and ``job_id``.
    """
    return operation_key(kind, job_id, **context)


def _checked_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    msg = f"{name} must be str, got {type(value).__name__}"
    raise TypeError(msg)


def _checked_key(name: str, value: Any) -> str:
    text = _checked_text(name, value)
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        makes = name.replace("op_", "operation_")
        msg = f"{name} must be 64 hex digits, as generate_{makes}() returns, got {text!r}"
        raise TypeError(msg)
    return text


def _database_url(url: Any) -> str:
    if url is not None:
        return _checked_text("url", url)
    found = settings()
    if found.database_url is not None:
        return found.database_url
    if found.directory is not None:
        return f"sqlite:///{found.directory / 'ledger.sqlite3'}"
    msg = (
        "no database is named: pass url, or set SCRAPY_STREAMING_DATABASE_URL to sqlite:///PATH or "
        "postgresql+psycopg://HOST/DATABASE, or SCRAPY_STREAMING_DIR to the folder of a store's ledger"
    )
    raise SettingError(msg)


@contextmanager
def get_streaming_database(url: str | None = None) -> Iterator[StreamingDatabase | None]:
    """Give the ledger; ``None`` if ``STREAMING_SCHEMA_ENABLED`` is off or SQLAlchemy is not installed.

    *url* as ``STREAMING_DATABASE_URL``, which is the default; missing tables are made. At the end of the
    block jobs that were claimed and not completed are released. Raises ``TypeError``, ``SettingError``
    if no database is named, ``LedgerError``, ``StoreError``.
    """
    if url is not None:
        _checked_text("url", url)
    if is_off(why_no_schema()):
        yield None
        return
    from scrapy_streaming.integration.database import StreamingDatabase

    with StreamingDatabase.of(_database_url(url), settings()) as database:
        yield database


def _checked_database(db: Any) -> StreamingDatabase:
    from scrapy_streaming.integration.database import StreamingDatabase

    if isinstance(db, StreamingDatabase):
        return db
    msg = f"db must be what get_streaming_database() gives, got {type(db).__name__}"
    raise TypeError(msg)


def acquire_or_reuse_job(
    db: StreamingDatabase | None, job_key: str, worker_id: str
) -> Lease | Completion | None:
    """Return a lease on the job, which is made if there is none, or its completion.

    ``None`` if *db* is ``None``, or ``STREAMING_IDEMPOTENCY_ENABLED`` is off. *worker_id* must differ from
    those of all running workers: a worker that restarts under its id gets the jobs that it held at once. The
    lease is renewed until *db* is closed. If another worker holds the job, wait for it
    (``STREAMING_HELD=skip``: ``JobUnavailable``, ``held``). The arguments of ``generate_job_key`` are
    recorded with the job if this process made the key. Raises ``TypeError``, ``JobUnavailable`` (``held``,
    ``waiting``, ``dead``), ``KeyConflict``, ``LedgerError``.
    """
    key, worker = _checked_key("job_key", job_key), _checked_text("worker_id", worker_id)
    if db is None or is_off(why_no_idempotency()):
        return None
    ledger, claims = _checked_database(db).for_worker(worker)
    request = _request_of(ledger, key)
    claim = claims.claim(lambda: ledger.claim(key, request))
    return claim.completion if isinstance(claim, Done) else claim.lease


def _request_of(ledger: Ledger, key: str) -> JobRequest:
    """Return the request of a job: as recorded, else by its key's arguments, else by its key alone."""
    found = ledger.job(key).result()
    if found is not None:
        hashed = request_hash("GET", found.url)
        return JobRequest(found.work_id, found.artifact_id, found.url, hashed)
    with _lock:
        made = _made.get(key)
    if made is None or url_without_userinfo(made[2]) != made[2]:  # credentials are stored nowhere (E7)
        return JobRequest.by_key(key)
    return JobRequest(*made, request_hash("GET", made[2]))


def complete_job(
    db: StreamingDatabase | None, lease: Any, artifact: Any, *, url: str = ""
) -> Completion | None:
    """Record that a job is done and its file published; return the completion.

    ``None`` if *db*, *lease* or *artifact* is ``None``. *url* is the URL after redirects. Raises
    ``TypeError``, ``LeaseLost`` (nothing was recorded), ``LedgerError``.
    """
    if db is None or lease is None or artifact is None:
        return None
    if not isinstance(lease, Lease):
        msg = f"lease must be a Lease of acquire_or_reuse_job(), got {type(lease).__name__}"
        raise TypeError(msg)
    if not isinstance(artifact, FinalizedArtifact):
        msg = f"artifact must be a FinalizedArtifact, got {type(artifact).__name__}"
        raise TypeError(msg)
    known = StoredRepresentation(artifact.digest, artifact.size, Validators(), url, proof=Proof.LENGTH)
    return _checked_database(db).complete(lease, known).result()


def run_effect(
    db: StreamingDatabase | None,
    op_key: str,
    fn: Any,
    *,
    lease: Any = None,
    recover: Any = None,
    kind: str = "effect",
) -> Any:
    """Run *fn* and return its result, or return that of an earlier run: at most one result is recorded.

    ``None``, without running *fn*, if *db* is ``None`` or ``STREAMING_IDEMPOTENCY_ENABLED`` is off. The
    result is a JSON value of at most 16 KiB, and is replayed equal to the byte. If the process died
    before the result was recorded, the effect runs again, unless *recover* returns its result (``None``:
    it did not happen). *lease* is that of the job to which the effect belongs; without it the key itself
    is claimed, and the call waits for another process that runs the same effect. Raises what *fn* raises
    (recorded, never replayed), ``TypeError``, ``ResultTooLarge``, ``LeaseLost``, ``JobUnavailable``,
    ``LedgerError``.
    """
    key, named = _checked_key("op_key", op_key), _checked_text("kind", kind)
    for name, value in (("fn", fn), ("recover", recover)):
        if not callable(value) and not (name == "recover" and value is None):
            msg = f"{name} must be callable without arguments, got {type(value).__name__}"
            raise TypeError(msg)
    if lease is not None and not isinstance(lease, Lease):
        msg = f"lease must be a Lease of acquire_or_reuse_job(), got {type(lease).__name__}"
        raise TypeError(msg)
    if db is None or is_off(why_no_idempotency()):
        return None
    effect = _Effect(_checked_database(db), key, named, fn, recover)
    return json.loads(effect.run(lease) if lease is not None else effect.run_alone())


class _Effect:
    """One effect, with its results as JSON."""

    def __init__(
        self,
        db: StreamingDatabase,
        key: str,
        kind: str,
        fn: Callable[[], Any],
        recover: Callable[[], Any] | None,
    ) -> None:
        self._db = db
        self._key = key
        self._kind = kind
        self._fn = fn
        self._recover = recover

    def run(self, lease: Lease) -> str:
        from scrapy_streaming.storage.ledger import run_effect as run

        recover = None if self._recover is None else self._recovered
        return run(self._db, lease, self._key, lambda: _as_json(self._fn()), kind=self._kind, recover=recover)

    def _recovered(self) -> str | None:
        found = None if self._recover is None else self._recover()
        return None if found is None else _as_json(found)

    def run_alone(self) -> str:
        """Run it under a claim on its own key; it uses up no attempts if it kills its worker."""
        request = JobRequest.by_key(self._key)
        claims = self._db.own_claims()
        granted = claims.claim(lambda: self._db.claim(self._key, request, work_started=False))
        assert not isinstance(granted, Done)  # the key of an effect is never completed
        try:
            return self.run(granted.lease)
        finally:
            claims.end(granted.lease)
            self._db.release(granted.lease).result()


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        msg = f"fn must return a JSON value: {error}"
        raise TypeError(msg) from error


def check_database_health(url: str | None = None) -> dict[str, Any] | None:
    """Return the health of the database; ``None`` if it is switched off, or SQLAlchemy is not installed.

    ``status``: ``healthy``, ``degraded`` (it works, but needs attention) or ``unhealthy``;
    ``schema_version`` (``None`` if it cannot be read), ``tables`` (rows of each), ``errors`` (messages).
    Makes nothing, and raises nothing for what is wrong with the database. Raises ``TypeError``, and
    ``SettingError`` if no database is named.
    """
    if url is not None:
        _checked_text("url", url)
    if is_off(why_no_schema()):
        return None
    from scrapy_streaming.integration.database import health_of

    return health_of(_database_url(url), settings())
