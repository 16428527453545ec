"""The ledger's tables, and the numbered migrations to them.

What may live here: tables and migrations that both SQLite and PostgreSQL understand. Keys and digests are
stored as bytes, not as hexadecimal text, and tables with a key of their own have no row number, which
halves the size on disk (``benchmarks``, ledger). Migrations only go forward, and drop no data (I20).
"""

from __future__ import annotations

import hashlib
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
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    false,
    insert,
    inspect,
    make_url,
    select,
    table,
    text,
    true,
    update,
)
from sqlalchemy.schema import CreateColumn, CreateIndex, CreateTable

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.jobs import JobState, OperationState
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.failpoints import failpoint
from scrapy_streaming.storage.ledger.columns import DigestText, Hex, PathText, Words

SCHEMA_VERSION: Final = 4

metadata = MetaData()

# SQLite counts rows only in a column declared INTEGER
_RowId = BigInteger().with_variant(Integer(), "sqlite")
_STATES: Final = ", ".join(f"'{state.value}'" for state in JobState)
_TERMINAL: Final = ", ".join(f"'{state.value}'" for state in JobState if state.terminal)
_BLOB_STATES: Final = ", ".join(f"'{state.value}'" for state in BlobState)
_OPERATION_STATES: Final = ", ".join(f"'{state.value}'" for state in OperationState)

meta = Table(
    "ss_meta",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("schema_version", Integer, nullable=False),
    Column("ledger_id", Text, nullable=False),
    Column("store_id", Text, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    # when this ledger was found to be an older copy: what was done before is requested again
    Column("put_back_at", Double),
    # whether the store may have blobs that such a copy does not have
    Column("unread", Boolean, nullable=False, server_default=false()),
    CheckConstraint("id = 1", name="ss_meta_one_row"),
)

# all workers so far, for people; the id is a hash of the name, so that a restored ledger cannot reuse it
worker = Table(
    "ss_worker",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    sqlite_with_rowid=False,
)

blob = Table(
    "ss_blob",
    metadata,
    Column("digest", DigestText, primary_key=True),
    Column("size", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("stored_at", Double, nullable=False),  # of one being deleted: when that began
    Column("verified_at", Double),
    Column("found_at", Double),  # when a file was found that no completion names
    Column("stamp", LargeBinary),  # inode and times of its file when its bytes were last known to be right
    CheckConstraint("length(digest) = 32", name="ss_blob_digest"),
    CheckConstraint("size >= 0", name="ss_blob_size"),
    CheckConstraint(f"state IN ({_BLOB_STATES})", name="ss_blob_state"),
    sqlite_with_rowid=False,
)

job = Table(
    "ss_job",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("job_key", Hex, nullable=False),
    Column("request_hash", Hex, nullable=False),
    Column("work_id", Words, nullable=False),
    Column("artifact_id", Words, nullable=False),
    Column("url", Words, nullable=False),
    Column("url_key", Hex, nullable=False),
    Column("state", Text, nullable=False),
    Column("taken_from", Text),  # the state in which the current or last claim found it
    Column("generation", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("claim_id", Hex),
    Column("worker", BigInteger),  # no foreign key: correctness never depends on this table
    Column("lease_until", Double),
    Column("attempts", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("kept", BigInteger, nullable=False),  # bytes of its part when last claimed
    Column("begun", Boolean, nullable=False, server_default=true()),  # whether its claim began the work
    Column("not_before", Double),
    # a back-off binds the run that set it; one that the server set binds every run
    Column("not_before_by", BigInteger),
    Column("not_before_server", Boolean, nullable=False, server_default=false()),
    Column("digest", DigestText, ForeignKey(blob.c.digest)),
    Column("size", BigInteger),
    Column("error_code", Text),
    Column("error", Words),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("finished_at", Double),
    # ``job_request.Repeat``; NULL: claimed by an older release, or not by a pipeline
    Column("plain", Boolean),
    Column("asked_url", Words),  # NULL: as ``url``
    Column("asked_name", PathText),  # NULL: depends on the response; "": as FilesPipeline derives it
    UniqueConstraint("job_key", name="ss_job_once"),
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
Index("ss_job_by_worker", job.c.worker, sqlite_where=_LEASED, postgresql_where=_LEASED)
Index("ss_job_waiting", job.c.id, sqlite_where=_READY, postgresql_where=_READY)
#: Jobs with an artifact id; most ledgers have few, or none.
ARTIFACTS: Final = text("ss_job.artifact_id <> ''")
_ARTIFACTS = text("artifact_id <> ''")
Index("ss_job_artifacts", job.c.id, sqlite_where=_ARTIFACTS, postgresql_where=_ARTIFACTS)

operation = Table(
    "ss_operation",
    metadata,
    Column("op_key", Hex, primary_key=True),
    Column("job_id", ForeignKey(job.c.id)),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("result", Text),
    Column("error", Words),
    Column("updated_at", Double, nullable=False),
    CheckConstraint(f"state IN ({_OPERATION_STATES})", name="ss_operation_state"),
    CheckConstraint("(state = 'ok') = (result IS NOT NULL)", name="ss_operation_result"),
    sqlite_with_rowid=False,
)

# wide rows with random keys: a row number and a narrow index make inserts cheaper
representation = Table(
    "ss_representation",
    metadata,
    Column("url_key", Hex, primary_key=True),
    Column("final_url", Words),  # NULL: the URL that was asked for
    Column("digest", DigestText, ForeignKey(blob.c.digest), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("etag", Words),
    Column("last_modified", Words),
    Column("date", Words),
    Column("media_type", Words),
    Column("vary", Text, nullable=False),
    Column("selecting", Words, nullable=False),
    Column("fetched_at", Double, nullable=False),
    Column("proof", Text, nullable=False, server_default=""),  # why the bytes are taken to be right
)

# That the blob is published and has this name. The completion's id is its claim's: a claim completes once.
completion = Table(
    "ss_completion",
    metadata,
    Column("job_id", ForeignKey(job.c.id), primary_key=True),
    Column("generation", BigInteger, primary_key=True),
    Column("fence", BigInteger, nullable=False),
    Column("claim_id", Hex, nullable=False),
    Column("worker", BigInteger, nullable=False),
    Column("digest", DigestText, ForeignKey(blob.c.digest), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("resumed_from", BigInteger, nullable=False),
    Column("path", PathText),  # the name, below the store's root
    Column("completed_at", Double, nullable=False),
    Column("delivered_at", Double),
    Column("stamp", LargeBinary),  # inode and times of the name's own file
    Column("by_response", Boolean, nullable=False, server_default=false()),  # the name depends on the answer
    sqlite_with_rowid=False,
)

# append-only; no foreign key, so that it can be trimmed and copied by itself
event = Table(
    "ss_event",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("job_id", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("claim_id", Hex),
    Column("worker", BigInteger, nullable=False),
    Column("from_state", Text),
    Column("to_state", Text, nullable=False),
    Column("at", Double, nullable=False),
)


# -- migrations -----------------------------------------------------------------------------


def _compact(connection: Connection) -> None:
    """1 → 2: keys as bytes; tables of workers, operations and events.

    The tables of version 1 stay as ``ss_v1_…``; nothing reads them any more.
    """
    old = {name: f"ss_v1_{name}" for name in ("job", "blob", "representation", "completion")}
    for name in ("ss_job_leased", "ss_job_ready"):
        connection.exec_driver_sql(f"DROP INDEX {name}")
    for name, renamed in old.items():
        connection.exec_driver_sql(f"ALTER TABLE ss_{name} RENAME TO {renamed}")
        failpoint("migration")
    metadata.create_all(connection, [each for each in metadata.sorted_tables if each is not meta])
    _copy_v1(connection, old["blob"], blob, {})
    _copy_v1(connection, old["representation"], representation, {})
    workers = {"worker": "worker_id"}
    _copy_v1(connection, old["job"], job, workers | {"not_before_by": "not_before_by"})
    _copy_v1(connection, old["completion"], completion, workers)
    known = connection.exec_driver_sql(
        "SELECT worker_id, min(updated_at) FROM ss_v1_job WHERE worker_id IS NOT NULL GROUP BY worker_id"
    )
    names = [{"id": worker_number(name), "name": name, "started_at": seen} for name, seen in known]
    if names:
        connection.execute(insert(worker), names)


def _copy_v1(connection: Connection, source: str, target: Table, workers: dict[str, str]) -> None:
    """Copy the rows of a table of version 1; *workers* names columns that held a worker's name."""
    rows = connection.execute(select(text("*")).select_from(table(source))).mappings()
    for some in rows.partitions(1000):
        values = []
        for row in some:
            value = {
                column.name: row.get(column.name)
                for column in target.c
                if column.name in row or column.server_default is None
            }
            for column, was in workers.items():
                value[column] = None if row[was] is None else worker_number(row[was])
            values.append(value)
        connection.execute(insert(target), values)


def _add_columns(connection: Connection) -> None:
    """Add the columns and indexes that later versions have.

    2 → 3: what is noted of files and names, of proofs, and of a ledger that was put back.
    3 → 4: what a later crawl needs to finish an unfinished job.
    """
    for table_ in metadata.sorted_tables:
        there = {column["name"] for column in inspect(connection).get_columns(table_.name)}
        for column in table_.c:
            if column.name not in there:
                new = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table_.name} ADD COLUMN {new}")
                failpoint("migration")
        indexed = {index["name"] for index in inspect(connection).get_indexes(table_.name)}
        for index in sorted(table_.indexes, key=lambda each: str(each.name)):
            if index.name not in indexed:
                connection.execute(CreateIndex(index))
                failpoint("migration")


#: ``MIGRATIONS[n]`` leads from version *n* to version *n* + 1; version 0 is an empty database.
MIGRATIONS: Final[dict[int, Callable[[Connection], None]]] = {1: _compact, 2: _add_columns, 3: _add_columns}


def worker_number(name: str) -> int:
    """Return the number of a worker: 63 bits of its name's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def migrate(connection: Connection, *, store_id: str, ledger_id: str | None, create: bool) -> str:
    """Create the tables, or migrate them to ``SCHEMA_VERSION``; return the ledger's id.

    The caller excludes other processes (SQLite: ``BEGIN IMMEDIATE``; PostgreSQL: an advisory lock).
    *ledger_id* is that of the ledger which the store had.
    Raises ``LedgerError``: ``ledger-newer`` for a schema of a later release, ``ledger-foreign``
    for the ledger of another store, ``ledger-corrupt`` if the version row or a table is gone,
    ``ledger-missing`` if there is none and the store had one, or none may be made.
    """
    found, owner, there = _found(connection)
    if found == 0:
        if ledger_id is not None or not create:
            msg = "there is no ledger, and the store had one" if ledger_id else "there is no ledger yet"
            raise LedgerError(msg, reason="ledger-missing")
        metadata.create_all(connection)
        failpoint("schema-made")
        there = secrets.token_hex(16)
        row = {"id": 1, "ledger_id": there, "store_id": store_id, "epoch": 1}
        connection.execute(insert(meta).values(schema_version=SCHEMA_VERSION, **row))
        return there
    if found > SCHEMA_VERSION:
        msg = f"the ledger has schema {found}, this release knows up to {SCHEMA_VERSION}"
        raise LedgerError(msg, reason="ledger-newer")
    if owner != store_id:
        msg = f"the ledger belongs to store {owner}, not to {store_id}"
        raise LedgerError(msg, reason="ledger-foreign")
    if ledger_id not in (None, there):
        msg = f"this is ledger {there}, the store has ledger {ledger_id}"
        raise LedgerError(msg, reason="ledger-foreign")
    for version in range(found, SCHEMA_VERSION):
        MIGRATIONS[version](connection)
    if found < SCHEMA_VERSION:
        connection.execute(update(meta).values(schema_version=SCHEMA_VERSION))
    _check_tables(connection)
    return there


def _check_tables(connection: Connection) -> None:
    """Raise ``LedgerError`` (``ledger-corrupt``) if a table lacks a column or refers to an unknown table."""
    seen = inspect(connection)
    for table_ in metadata.sorted_tables:
        there = (
            {column["name"] for column in seen.get_columns(table_.name)}
            if seen.has_table(table_.name)
            else set()
        )
        if lacking := {column.name for column in table_.c} - there:
            msg = f"the ledger's table {table_.name} lacks {', '.join(sorted(lacking))}"
            raise LedgerError(msg, reason="ledger-corrupt")
        if strange := {key["referred_table"] for key in seen.get_foreign_keys(table_.name)} - {
            *metadata.tables
        }:
            msg = f"the ledger's table {table_.name} refers to unknown tables: {', '.join(sorted(strange))}"
            raise LedgerError(msg, reason="ledger-corrupt")


def _found(connection: Connection) -> tuple[int, str, str]:
    """Return the database's schema version (0 for none), its store's and its own id."""
    if not inspect(connection).has_table(meta.name):
        return 0, "", ""
    row = connection.execute(select(meta.c.schema_version, meta.c.store_id, meta.c.ledger_id)).one_or_none()
    if row is None:
        msg = "the ledger's version row is missing"
        raise LedgerError(msg, reason="ledger-corrupt")
    version = row.schema_version
    # the first schema alone had no table of workers: a migration must not begin on the tables of another
    if version < 1 or (version == 1) == inspect(connection).has_table(worker.name):
        msg = f"the ledger has schema {version} by its version row, but the tables of another one"
        raise LedgerError(msg, reason="ledger-corrupt")
    return version, row.store_id, row.ledger_id


def ddl(dialect: str) -> str:
    """Return the statements that make an empty ledger, for ``sqlite`` or ``postgresql``."""
    made = make_url(f"{dialect}://").get_dialect()()
    statements: list[str] = []
    for each in metadata.sorted_tables:
        statements.append(str(CreateTable(each).compile(dialect=made)).strip())
        indexes = sorted(each.indexes, key=lambda index: str(index.name))
        statements += [str(CreateIndex(index).compile(dialect=made)).strip() for index in indexes]
    return "".join(f"{statement};\n\n" for statement in statements)
