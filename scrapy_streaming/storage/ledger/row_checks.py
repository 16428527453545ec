"""Check every row of a ledger: do its values fit its columns, and can this package read them.

What may live here: the rules, which are pure (``faults``), and ``unsound``, which applies them to every row
of every table and changes nothing. A damaged row is reported with its job, so that people know what is
affected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Double,
    Integer,
    LargeBinary,
    Table,
    literal_column,
    select,
)
from sqlalchemy.exc import DBAPIError

from scrapy_streaming.exceptions import LedgerError
from scrapy_streaming.protocol.fields import EntityTag
from scrapy_streaming.protocol.jobs import JobState, OperationState, job_key
from scrapy_streaming.protocol.reasons import Proof
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.ledger.columns import DigestText, Hex
from scrapy_streaming.storage.ledger.database import Database, read
from scrapy_streaming.storage.ledger.schema import (
    blob,
    completion,
    event,
    job,
    metadata,
    operation,
    representation,
)

#: Damaged rows that are reported one by one, at most; the others are counted.
NAMED: Final = 10
#: Rows that are fetched at once.
AT_ONCE: Final = 1000

Row = Mapping[str, Any]

_LENGTHS: Final = {"claim_id": 16}
_BYTES_OF_A_HASH: Final = 32
_JOB_STATES: Final = frozenset(state.value for state in JobState)


# -- values and columns ---------------------------------------------------------------------


def faults(table: Table, row: Row) -> list[str]:
    """Return what is wrong with a row of the driver's, in words; nothing for a sound one."""
    found = [f"{column.name} {wrong}" for column in table.c if (wrong := _misfit(column, row[column.name]))]
    return found or [wrong for rule in _RULES.get(table.name, ()) if (wrong := rule(row))]


def _misfit(column: Column[Any], value: Any) -> str:
    """Return why *value* does not fit a column, ``""`` if it does."""
    if value is None:
        return "" if column.nullable else "is missing"
    kind = column.type
    if isinstance(kind, Hex | DigestText):
        wanted = _LENGTHS.get(column.name, _BYTES_OF_A_HASH)
        right = isinstance(value, bytes) and len(value) == wanted
        return "" if right else f"is not {wanted} bytes"
    if isinstance(kind, LargeBinary):
        return "" if isinstance(value, bytes) else "is not bytes"
    if isinstance(kind, Boolean):
        return "" if value in (0, 1) else "is neither true nor false"
    if isinstance(kind, Double):
        return "" if isinstance(value, float | int) and math.isfinite(value) else "is no time"
    if isinstance(kind, Integer):
        return "" if isinstance(value, int) else "is no whole number"
    return _unreadable(value)


def _unreadable(value: Any) -> str:
    """Return why a text cannot be read, ``""`` if it can; bytes that are not UTF-8 are lone surrogates."""
    if not isinstance(value, str):
        return "is no text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


# -- what the package reads from a row ------------------------------------------------------


def _one_of(name: str, allowed: frozenset[str]) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None or row[name] in allowed else f"{name} is {row[name]!r}"


def _own_key(row: Row) -> str:
    """Return whether a job's key is not the hash of the three texts in its row, in words."""
    texts = row["work_id"], row["artifact_id"], row["url"]
    if any("\ufffd" in text for text in texts):  # stored for NUL, which the key was made with
        return ""
    if texts == ("", row["job_key"].hex(), ""):  # a key without texts (``JobRequest.by_key``)
        return ""
    return "" if job_key(*texts) == row["job_key"].hex() else "its key is not that of its URL"


def _entity_tag(row: Row) -> str:
    tag = row["etag"]
    return "" if tag is None or EntityTag.parse(tag) is not None else f"etag is {tag!r}"


def _field_names(row: Row) -> str:
    try:
        names = json.loads(row["vary"])
    except ValueError:
        names = None
    fits = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return "" if fits else f"vary is {row['vary']!r}"


def _document(row: Row) -> str:
    try:
        json.loads(row["result"] or "null")
    except ValueError:
        return "result is no JSON"
    return ""


def _not_negative(*names: str) -> Callable[[Row], str]:
    return lambda row: next((f"{name} is {row[name]}" for name in names if (row[name] or 0) < 0), "")


_RULES: Final[Mapping[str, tuple[Callable[[Row], str], ...]]] = {
    job.name: (
        _one_of("state", _JOB_STATES),
        _one_of("taken_from", _JOB_STATES),
        _not_negative("generation", "fence", "attempts", "size"),
        _own_key,
    ),
    blob.name: (
        _one_of("state", frozenset(state.value for state in BlobState)),
        _not_negative("size"),
    ),
    representation.name: (
        _one_of("proof", frozenset({"", *(proof.value for proof in Proof)})),
        _not_negative("size"),
        _entity_tag,
        _field_names,
    ),
    completion.name: (_not_negative("generation", "fence", "size", "resumed_from"),),
    operation.name: (
        _one_of("state", frozenset(state.value for state in OperationState)),
        _document,
    ),
    event.name: (_one_of("from_state", _JOB_STATES), _one_of("to_state", _JOB_STATES)),
}


# -- all rows -------------------------------------------------------------------------------


def unsound(database: Database) -> list[str]:
    """Return what is damaged in the database's files and in its rows, in words. Blocks.

    Reads on its own connection, so that no writer waits. Raises ``LedgerError`` if the database cannot be
    read at all.
    """
    found: list[str] = []

    def read_all(connection: Connection) -> int:
        found[:] = [f"{line} (ledger-corrupt)" for line in database.check(connection)]
        damaged = _damaged(connection)
        found.extend(islice(damaged, NAMED))
        return sum(1 for _ in damaged)

    try:
        with database.reader() as reader:
            more = read(reader, read_all)
    except (DBAPIError, database.dialect.loaded_dbapi.Error, UnicodeDecodeError) as error:
        known = database.translate(error)
        if not isinstance(known, LedgerError) or known.reason != "ledger-corrupt":
            raise known from error
        return found or [f"{known.args[0]} (ledger-corrupt)"]
    return found + ([f"and {more} more rows (ledger-row)"] if more else [])


def _damaged(connection: Connection) -> Iterator[str]:
    """Yield a line for each damaged row."""
    for table in metadata.sorted_tables:
        names = [column.name for column in table.c]
        plain: Any = select(*(literal_column(name) for name in names)).select_from(table)
        rows = connection.execution_options(yield_per=AT_ONCE).execute(plain)
        for raw in rows:
            row = {name: _plain(value) for name, value in zip(names, raw, strict=True)}
            if wrong := faults(table, row):
                yield f"{table.name}: {', '.join(wrong)}: {_owner(connection, table, row)} (ledger-row)"


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def _owner(connection: Connection, table: Table, row: Row) -> str:
    """Return the job of a row in words: its key, and its URL if that can be read."""
    if table is job:
        return _named(row["job_key"], row["url"])
    by = next((name for name in ("job_id", "url_key", "digest") if name in row), None)
    if by is None:
        return f"row {row.get('id')!r}"
    column: Any = literal_column("id" if by == "job_id" else by)
    wanted: Any = select(literal_column("job_key"), literal_column("url")).select_from(job)
    found = connection.execute(wanted.where(column == row[by]).limit(1)).one_or_none()
    return f"row {_shown(row[by])}" if found is None else _named(_plain(found[0]), found[1])


def _named(key: Any, url: Any) -> str:
    return f"job {_shown(key)}" + (f" ({url})" if not _unreadable(url) else " (its URL cannot be read)")


def _shown(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
