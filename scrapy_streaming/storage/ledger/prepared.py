"""Statements of SQLAlchemy Core that are compiled once and run by the driver, and the session for them.

What may live here: how a statement is bound and run. Every download uses these statements, because
SQLAlchemy's own execution costs more than the statement (``benchmarks``, ledger: claim and complete take
less than half the time without it). Types, names and the dialect's SQL are still SQLAlchemy's.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import Select

from scrapy_streaming.storage.ledger.columns import DigestText, Hex, PathText

T = TypeVar("T")
_Processor = Callable[[Any], Any]


class Session:
    """The connection of a command, which runs statements by the driver or by SQLAlchemy.

    *again*: the command ran before, in a transaction that may or may not have been committed.
    """

    def __init__(self, connection: Connection, *, again: bool = False) -> None:
        self.connection = connection
        self.again = again
        self.cursor: Any = connection.connection.cursor()

    def close(self) -> None:
        """Close the cursor."""
        self.cursor.close()

    def run(self, prepared: Prepared, **values: Any) -> Any:
        """Return the first row of *prepared*, ``None`` without one; raise the driver's errors."""
        row = self.all(prepared, values)
        return row[0] if row else None

    def all(self, prepared: Prepared, values: Mapping[str, Any]) -> list[Any]:
        """Return all rows of *prepared*, each a named tuple."""
        self.cursor.execute(prepared.sql, prepared.bind(values))
        return prepared.rows(self.cursor.fetchall()) if prepared.returns else []

    def plain(self, statement: str) -> None:
        """Run a statement without values that returns no rows."""
        self.cursor.execute(statement)

    def undo(self) -> None:
        """Roll back what this command has written."""
        self.plain("ROLLBACK TO SAVEPOINT command")

    @property
    def changed(self) -> int:
        """How many rows the last statement changed."""
        return int(self.cursor.rowcount)


#: What runs in one transaction, alone or with others.
Command = Callable[[Session], T]


class Prepared:
    """A compiled statement with named values; its constants are bound already."""

    def __init__(self, statement: Select[Any] | UpdateBase, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.sql: Final = str(compiled)
        fixed = compiled.params
        bound: dict[str, tuple[str, _Processor | None, Any]] = {}
        for bind, name in compiled.bind_names.items():
            processor = bind.type.dialect_impl(dialect).bind_processor(dialect)
            if bind.required:
                bound[name] = (name, processor, None)
            else:
                value = fixed[name] if processor is None else processor(fixed[name])
                bound[name] = ("", None, value)
        #: for each value: the name under which it is given and its processor, or "" and the constant
        self._values = bound
        self._positions = None if compiled.positiontup is None else [bound[n] for n in compiled.positiontup]
        columns = list(statement.exported_columns)
        self.returns: Final = bool(columns)
        #: a class for the rows of this statement, whose fields are its columns
        self._row: Callable[..., Any] = _row_of([str(column.key) for column in columns])
        # the drivers return values of all other types as they should be
        self._readers = [
            _reader(column.type, dialect) if isinstance(column.type, Hex | DigestText | PathText) else None
            for column in columns
        ]
        self._plain = not any(self._readers)

    def bind(self, given: Mapping[str, Any]) -> Any:
        """Return *given* in the form of the driver; raise ``KeyError`` for a missing value."""
        if self._positions is None:
            return {name: _bound(how, given) for name, how in self._values.items()}
        return [_bound(how, given) for how in self._positions]

    def rows(self, raw: list[Any]) -> list[Any]:
        """Return the driver's rows as named tuples."""
        if self._plain:
            return [self._row(*row) for row in raw]
        return [
            self._row(*(v if read is None else read(v) for v, read in zip(row, self._readers, strict=True)))
            for row in raw
        ]


def _bound(how: tuple[str, _Processor | None, Any], given: Mapping[str, Any]) -> Any:
    """Return one value as the driver takes it: a constant of the statement, or one of *given*."""
    name, processor, constant = how
    if not name:
        return constant
    return given[name] if processor is None else processor(given[name])


def _reader(kind: Hex | DigestText | PathText, dialect: Dialect) -> _Processor:
    return lambda value: kind.process_result_value(value, dialect)


def _row_of(names: list[str]) -> Callable[..., Any]:
    return namedtuple("_Row", names)  # noqa: PYI024 - its fields are a statement's columns, known only once it is compiled
