"""The ledger's tables, and the numbered steps that bring a database to them.

Only what both SQLite and PostgreSQL understand lives here. Migrations go forward only and
nothing is ever dropped (I20).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    insert,
    inspect,
    select,
    text,
    update,
)

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import JobState

SCHEMA_VERSION: Final = 1

metadata = MetaData()

# SQLite counts rows only in a column declared INTEGER
_RowId = BigInteger().with_variant(Integer(), "sqlite")
_STATES: Final = ", ".join(f"'{state.value}'" for state in JobState)
_TERMINAL: Final = ", ".join(f"'{state.value}'" for state in JobState if state.terminal)

meta = Table(
    "ss_meta",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    Column("ledger_id", String(32), nullable=False),
    Column("store_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="ss_meta_one_row"),
)

blob = Table(
    "ss_blob",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("stored_at", Double, nullable=False),
    Column("verified_at", Double),
    CheckConstraint("digest LIKE 'sha256:%' AND length(digest) = 71", name="ss_blob_digest"),
    CheckConstraint("size >= 0", name="ss_blob_size"),
    CheckConstraint("state IN ('present', 'deleting', 'quarantined', 'missing')", name="ss_blob_state"),
)

job = Table(
    "ss_job",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("job_key", Text, nullable=False, unique=True),
    Column("request_hash", Text, nullable=False),
    Column("work_id", Text, nullable=False),
    Column("artifact_id", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("url_key", String(64), nullable=False),
    Column("state", Text, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("claim_id", String(32)),
    Column("worker_id", Text),
    Column("lease_until", Double),
    Column("attempts", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("kept", BigInteger, nullable=False),  # bytes of its part when last claimed
    Column("not_before", Double),
    # a back-off binds the run that set it; one that the server asked for binds everybody
    Column("not_before_by", Text),
    Column("not_before_server", Boolean, nullable=False, server_default=false()),
    # deferred: `complete` asks the guard first and records the blob after it
    Column("digest", ForeignKey(blob.c.digest, deferrable=True, initially="DEFERRED")),
    Column("size", BigInteger),
    Column("error_code", Text),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    CheckConstraint(f"state IN ({_STATES})", name="ss_job_state"),
    CheckConstraint("(state = 'leased') = (claim_id IS NOT NULL)", name="ss_job_leased_claim"),
    CheckConstraint("(state = 'leased') = (lease_until IS NOT NULL)", name="ss_job_leased_until"),
    CheckConstraint("(state = 'done') = (digest IS NOT NULL)", name="ss_job_done_digest"),
    CheckConstraint("(digest IS NULL) = (size IS NULL)", name="ss_job_digest_size"),
    CheckConstraint(f"(state IN ({_TERMINAL})) = (finished_at IS NOT NULL)", name="ss_job_terminal_finished"),
    CheckConstraint("generation >= 1 AND fence >= 1 AND attempts >= 0", name="ss_job_counters"),
)

# never on lease_until: each heartbeat would rewrite the index
_LEASED = text("state = 'leased'")
_READY = text("state = 'ready'")
Index("ss_job_leased", job.c.worker_id, sqlite_where=_LEASED, postgresql_where=_LEASED)
Index("ss_job_ready", job.c.id, sqlite_where=_READY, postgresql_where=_READY)

representation = Table(
    "ss_representation",
    metadata,
    Column("url_key", String(64), primary_key=True),
    Column("final_url", Text, nullable=False),
    Column("digest", ForeignKey(blob.c.digest), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("etag", Text),
    Column("last_modified", Text),
    Column("date", Text),
    Column("media_type", Text),
    Column("vary", Text, nullable=False),
    Column("selecting", Text, nullable=False),
    Column("fetched_at", Double, nullable=False),
)

completion = Table(
    "ss_completion",
    metadata,
    Column("completion_id", String(32), primary_key=True),
    Column("job_id", ForeignKey(job.c.id), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("claim_id", String(32), nullable=False),
    Column("worker_id", Text, nullable=False),
    Column("digest", ForeignKey(blob.c.digest), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("resumed_from", BigInteger, nullable=False),
    Column("completed_at", Double, nullable=False),
    Column("delivered_at", Double),
    UniqueConstraint("job_id", "generation", name="ss_completion_once"),
)


def _create(connection: Connection) -> None:
    """1: the tables of the first release."""
    metadata.create_all(connection)


#: ``MIGRATIONS[n]`` leads from version *n* to version *n* + 1.
MIGRATIONS: Final[tuple[Callable[[Connection], None], ...]] = (_create,)


def migrate(connection: Connection, *, store_id: str) -> None:
    """Bring the database to ``SCHEMA_VERSION``, once, whoever else tries at the same time.

    The caller holds the one write transaction (SQLite: ``BEGIN IMMEDIATE``). Raises
    ``LedgerError``: ``ledger-newer`` for a schema of a later release, ``ledger-foreign`` for the
    ledger of another store, ``ledger-corrupt`` if the version row is gone.
    """
    found = _found_version(connection, store_id)
    for step in MIGRATIONS[found:]:
        step(connection)
    if found == 0:
        row = {"id": 1, "ledger_id": secrets.token_hex(16), "store_id": store_id, "epoch": 1}
        connection.execute(insert(meta).values(schema_version=SCHEMA_VERSION, **row))
    elif found < SCHEMA_VERSION:
        connection.execute(update(meta).values(schema_version=SCHEMA_VERSION))


def _found_version(connection: Connection, store_id: str) -> int:
    """Return the schema version of the database, 0 for none; raise as ``migrate`` does."""
    if not inspect(connection).has_table(meta.name):
        return 0
    row = connection.execute(select(meta.c.schema_version, meta.c.store_id)).one_or_none()
    if row is None:
        msg = "the ledger lost its version row; move it away and run `scrapy streaming rebuild`"
        raise LedgerError(msg, reason="ledger-corrupt")
    version, owner = int(row.schema_version), str(row.store_id)
    if version > SCHEMA_VERSION:
        msg = (
            f"the ledger has schema {version}, this release knows up to {SCHEMA_VERSION}; "
            "upgrade scrapy-streaming, or use another ledger"
        )
        raise LedgerError(msg, reason="ledger-newer")
    if owner != store_id:
        msg = (
            f"the ledger belongs to store {owner}, not to {store_id}; put back this store's own "
            "ledger, or move the file away and run `scrapy streaming rebuild`"
        )
        raise LedgerError(msg, reason="ledger-foreign")
    return version
