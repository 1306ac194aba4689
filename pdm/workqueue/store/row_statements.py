"""Statements about lists of rows, without SQLAlchemy's cost for each row.

For a row of an ``executemany`` SQLAlchemy spends more time (a dict, a function for each value) than SQLite needs to
write it. Here the rows are part of the statement, as ``VALUES`` of a common table expression. SQLite then evaluates
constants, and the lists of names in CHECK constraints, once for all rows instead of once for each execution.

PostgreSQL gets an array for each column: one statement for any number of rows, whose few parameters the driver need not
find in a long text. An INSERT is planned once. Statements that join the rows with a table are planned at each execution
for the number of rows: the plan for any number of them assumes ten, and compares each row with each row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

import sqlalchemy as sa
from attrs import define, field
from sqlalchemy.orm import Session

from pdm.workqueue.store.engines import PLANNED_EACH_TIME

#: Rows of one execution on SQLite. A list is split into pieces of this size and of smaller powers of two: few different
#: statements, which the driver keeps prepared.
_MOST_ROWS = 64
#: Rows of one execution on PostgreSQL, in arrays.
_MOST_IN_ARRAYS = 1000

_Processors = Sequence[Callable[[Any], Any] | None]


@define
class _Form:
    """A statement for one dialect: how values are converted, and the text by number of rows.

    Attributes:
        arrays: text with an array for each column instead of rows; empty on SQLite, which has no arrays.
        options: of each execution.
    """

    of_row: _Processors
    of_shared: _Processors
    of_result: _Processors
    arrays: str = ""
    options: Mapping[str, Any] = field(factory=dict)
    texts: dict[int, str] = field(factory=dict)


@define(eq=False)
class RowStatement:
    """A statement about many rows.

    Args:
        text: with ``VALUES {rows}`` for the rows, before any ``?``, which stands for a shared value.
        row: columns that have the types of the values of a row.
        shared: the same of the values that all rows share, in the order of their ``?``.
        result: the same of what it returns; empty if it returns nothing.
    """

    text: str
    row: Sequence[sa.Column[Any]]
    shared: Sequence[sa.Column[Any]] = ()
    result: Sequence[sa.Column[Any]] = ()
    _forms: dict[str, _Form] = field(factory=dict, init=False)

    def execute(self, session: Session, rows: Iterable[Sequence[Any]], *shared: Any) -> list[tuple[Any, ...]]:
        """Execute it for all rows, in as many pieces as necessary; returns its results in any order."""
        # Not by the session: that would look up its engine for each statement.
        connection = session.connection()
        form = self._form(connection.dialect)
        found: list[Sequence[Any]] = []
        for done in self._pieces(connection, form, rows, shared):
            if self.result:
                found += done.all()
        return _converted(found, form.of_result)

    def matched(self, session: Session, rows: Iterable[Sequence[Any]], *shared: Any) -> int:
        """Execute it for all rows; returns how many rows of the table it has matched. SQLite's driver does not know."""
        connection = session.connection()
        return sum(done.rowcount for done in self._pieces(connection, self._form(connection.dialect), rows, shared))

    def _pieces(
        self, connection: sa.Connection, form: _Form, rows: Iterable[Sequence[Any]], shared: Sequence[Any]
    ) -> Iterator[sa.CursorResult[Any]]:
        values = _converted(rows, form.of_row)
        common = tuple(chain.from_iterable(_converted([shared], form.of_shared)))
        first, size = 0, _MOST_IN_ARRAYS if form.arrays else _MOST_ROWS
        while first < len(values):
            if form.arrays:
                text = form.arrays
                flat = (*map(_array, zip(*values[first : first + size], strict=True)), *common)
            else:
                while first + size > len(values):
                    size //= 2
                text = form.texts.get(size) or self._text(form, size)
                flat = (*chain.from_iterable(values[first : first + size]), *common)
            yield connection.exec_driver_sql(text, flat, execution_options=form.options)
            first += size

    def _form(self, dialect: sa.Dialect) -> _Form:
        form = self._forms.get(dialect.name)
        if form is None:
            arrays = self._with_arrays(dialect) if dialect.name == "postgresql" else ""
            joins = arrays and "INSERT INTO" not in arrays
            form = self._forms[dialect.name] = _Form(
                [column.type.dialect_impl(dialect).bind_processor(dialect) for column in self.row],
                [column.type.dialect_impl(dialect).bind_processor(dialect) for column in self.shared],
                [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in self.result],
                arrays,
                {PLANNED_EACH_TIME: True} if joins else {},
            )
        return form

    def _with_arrays(self, dialect: sa.Dialect) -> str:
        types = ", ".join(f"CAST(%s AS {_array_type(column, dialect)})" for column in self.row)
        # Types only.
        arrays = f"SELECT * FROM unnest({types})"  # noqa: S608
        text = self.text.replace("%", "%%").replace("VALUES {rows}", arrays)
        return text.replace("?", "%s")

    def _text(self, form: _Form, size: int) -> str:
        row = f"({', '.join('?' * len(self.row))})"
        form.texts[size] = text = self.text.format(rows=", ".join([row] * size))
        return text


def _array_type(column: sa.Column[Any], dialect: sa.Dialect) -> str:
    impl = column.type.dialect_impl(dialect)
    # A cast to a type with a length would cut longer texts without an error.
    is_text = isinstance(impl, sa.String) or isinstance(getattr(impl, "impl", None), sa.String)
    return "TEXT[]" if is_text else f"{column.type.compile(dialect)}[]"


def _array(values: Iterable[Any]) -> str:
    """An array as PostgreSQL reads it."""
    return f"{{{','.join(map(_array_element, values))}}}"


def _array_element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return f'"{value.isoformat()}"' if isinstance(value, datetime) else str(value)


def _converted(rows: Iterable[Sequence[Any]], processors: _Processors) -> list[tuple[Any, ...]]:
    """Rows with their values converted, column by column."""
    columns = zip(*rows, strict=True)
    return list(
        zip(
            *(
                values if process is None else map(process, values)
                for values, process in zip(columns, processors, strict=False)
            ),
            strict=True,
        )
    )
