"""Events: noted while a transaction changes jobs, written at its end, and read in the order of the transactions."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam
from sqlalchemy.orm import Session

from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, hint_for
from pdm.workqueue.domain.holds import HOLD_CODE, HoldBy, JobHold
from pdm.workqueue.domain.jobs import JobRecord
from pdm.workqueue.domain.node_reports import SignalKind
from pdm.workqueue.domain.notifications import Event, EventKind, is_milestone
from pdm.workqueue.store import signals
from pdm.workqueue.store.records import columns_of, elements, events, failure_counts
from pdm.workqueue.store.row_statements import RowStatement

_KEY = "noted events"
#: Longer texts are cut, in characters; a path has at most 4,096 bytes on most systems.
_LONGEST_TEXT, _LONGEST_PATH = 500, 4096

#: What `write_noted` inserts: time, kind, job, owner, data.
_NotedEvent = tuple[datetime, str, int | None, int | None, str]


def note_submitted(session: Session, job: JobRecord) -> None:
    """Note that this transaction has registered a job."""
    _note(session, job.timestamp, EventKind.JOB, job, _status_data(None, job))


def note_changes(
    session: Session,
    before: JobRecord,
    after: JobRecord,
    hold: AttemptFailure | None,
    at: datetime,
    resumed: tuple[HoldBy, str] | None = None,
) -> None:
    """Note that this transaction changes the status of a job, or that it or elements of it are HELD or resumed.

    ``hold``: why an element is HELD, if this transaction has set one aside. ``resumed``: who ends the hold of a person,
    and a sentence about it.
    """
    if after.hold is not None and after.hold is not before.hold:
        _note_hold(session, after, after.hold, at)
    if after.status is not before.status:
        _note(session, at, EventKind.JOB, after, _status_data(before, after))
    held_before, held = before.counters.held, after.counters.held
    if held and not held_before and hold is not None:
        hint = hint_for(hold.code, after.type)
        data = {"code": hold.code.value, "reason": _cut(hold.message), "hint": hint, "by": "service", "count": held}
        _note(session, at, EventKind.HELD, after, _json(data))
    elif held_before and not held and not after.cancel_requested:
        data = {"reason": "what was missing is available again", "by": "service", "count": held_before}
        _note(session, at, EventKind.RESUMED, after, _json(data))
    if resumed is not None and after.hold is None:
        data = {"reason": resumed[1], "by": resumed[0].value, "count": after.counters.submitted}
        _note(session, at, EventKind.RESUMED, after, _json(data))


def _note_hold(session: Session, job: JobRecord, hold: JobHold, at: datetime) -> None:
    until = None if hold.until is None else hold.until.isoformat(timespec="seconds").replace("+00:00", "Z")
    data = {
        "code": HOLD_CODE,
        "reason": _cut(hold.sentence),
        "hint": hold.hint,
        "by": hold.by.value,
        "who": hold.subject,
        "message": _cut(hold.message),
        "until": until,
        "count": job.counters.submitted,
    }
    _note(session, at, EventKind.HELD, job, _json(data))


_COUNT_FAILURES = RowStatement(
    """
    INSERT INTO failure_counts (job_id, code, count) VALUES {rows}
    ON CONFLICT (job_id, code) DO UPDATE SET count = failure_counts.count + excluded.count
    RETURNING job_id, code, count
    """,
    columns_of(failure_counts, "job_id", "code", "count"),
    result=columns_of(failure_counts, "job_id", "code", "count"),
)
_PATH = sa.select(elements.c.src_filepath).where(
    elements.c.job_id == bindparam("of_job"), elements.c.id == bindparam("number")
)


def note_failures(
    session: Session,
    failed: Mapping[tuple[int, FailureCode], Sequence[tuple[int, AttemptFailure]]],
    jobs: Mapping[int, JobRecord],
    at: datetime,
) -> None:
    """Count failed attempts by job and code, and note the first of a code, the 10th, the 100th ...

    ``failed``: job and code → numbers of elements, and failures of their attempts. ``jobs``: by number; this
    transaction has locked them.
    """
    rows = sorted((job_id, code.value, len(attempts)) for (job_id, code), attempts in failed.items())
    for job_id, code, count in _COUNT_FAILURES.execute(session, rows):
        attempts = failed[job_id, FailureCode(code)]
        if is_milestone(count - len(attempts), count):
            _note_failure(session, jobs[job_id], *attempts[0], count, at)


def _note_failure(
    session: Session, job: JobRecord, element: int, failure: AttemptFailure, count: int, at: datetime
) -> None:
    path: str = session.scalar(_PATH, {"of_job": job.id, "number": element}) or ""
    data = {
        "code": failure.code.value,
        "scope": failure.scope.value,
        "count": count,
        "element": element,
        "path": path[:_LONGEST_PATH],
        "message": _cut(failure.message),
        "hint": hint_for(failure.code, job.type),
    }
    _note(session, at, EventKind.FAILURE, job, _json(data))


def note_site(session: Session, at: datetime, data: Mapping[str, Any]) -> None:
    """Note that an endpoint of a site does not work, or works again."""
    _note(session, at, EventKind.SITE, None, _json(data))


def _status_data(before: JobRecord | None, after: JobRecord) -> str:
    counters = after.counters
    # Formatted, not encoded: numbers and words, thrice for each job.
    was = "null" if before is None else f'"{before.status.name}"'
    text = (
        f'{{"status":"{after.status.name}","before":{was},"num_elements":{counters.elements}'
        f',"num_done":{counters.done},"num_failed":{counters.failed},"num_cancelled":{counters.cancelled}'
        f',"held":{counters.held},"bytes_done":{after.bytes_done},"bytes_total":{after.bytes_total}'
    )
    reason = after.cancel_reason
    if reason is not None and after.status is JobStatus.CANCELLED:
        return f'{text},"reason":{_json({"code": reason.code.value, "message": _cut(reason.message)})}}}'
    return text + "}"


def _json(data: Mapping[str, Any]) -> str:
    # ASCII: names may have characters that no UTF-8 text contains.
    return json.dumps(data, separators=(",", ":"))


def _cut(text: str) -> str:
    return " ".join(text[: 2 * _LONGEST_TEXT].split())[:_LONGEST_TEXT]


def _note(session: Session, at: datetime, kind: EventKind, job: JobRecord | None, data: str) -> None:
    row = (at, kind.value, None, None, data) if job is None else (at, kind.value, job.id, job.user_id, data)
    noted: list[_NotedEvent] = session.info.setdefault(_KEY, [])
    noted.append(row)


_INSERT_TEXT = """
    WITH noted (at, kind, job_id, owner_id, data) AS (VALUES {{rows}})
    INSERT INTO events (at, kind, job_id, owner_id, data, xact)
    SELECT at, kind, CAST(job_id AS BIGINT), CAST(owner_id AS BIGINT), data, {xact} FROM noted
    """
_INSERT = {
    dialect: RowStatement(
        _INSERT_TEXT.format(xact=xact), columns_of(events, "at", "kind", "job_id", "owner_id", "data")
    )
    for dialect, xact in {
        "sqlite": "0",
        # A transaction may have taken its number before the one after which it changes the job.
        "postgresql": """
            greatest(
                CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT),
                (SELECT max(xact) FROM events AS earlier WHERE earlier.job_id = CAST(noted.job_id AS BIGINT))
            )""",
    }.items()
}


def write_noted(session: Session) -> bool:
    """Write the events that this transaction has noted, as its last statement; returns whether there are any."""
    noted: list[_NotedEvent] = session.info.pop(_KEY, [])
    if noted:
        _INSERT[session.connection().dialect.name].execute(session, noted)
        signals.note(session, SignalKind.EVENTS)
    return bool(noted)


# -- maintenance

#: PostgreSQL: no transaction with such a number has begun.
_FUTURE = sa.cast(sa.cast(sa.func.pg_snapshot_xmax(sa.func.pg_current_snapshot()), sa.Text), sa.BigInteger)


def repair_order(session: Session) -> bool:
    """Order events by their ids if they come from another PostgreSQL cluster; returns whether they do.

    A database that is restored from a dump begins with small transaction numbers again, and readers would not get its
    events until those have grown. All of its events precede those that are written from now on.
    """
    if session.connection().dialect.name != "postgresql":
        return False
    if not session.scalar(sa.select(sa.exists().where(events.c.xact >= _FUTURE))):
        return False
    session.execute(sa.update(events).values(xact=0))
    return True


# -- reading

_COLUMNS = columns_of(events, "id", "at", "kind", "job_id", "owner_id", "data", "xact")
_XACT = sa.select(events.c.xact).where(events.c.id == bindparam("after"))
_ORDER = sa.select(events.c.id, events.c.xact).where(events.c.id == bindparam("after"))
#: PostgreSQL: transactions below this have ended; any that begins or still runs writes events above.
_RUNNING = sa.cast(sa.cast(sa.func.pg_snapshot_xmin(sa.func.pg_current_snapshot()), sa.Text), sa.BigInteger)


def events_after(
    session: Session,
    after: int,
    limit: int,
    *,
    owner: int | None = None,
    job: int | None = None,
    kinds: Collection[EventKind] | None = None,
    newest_first: bool = False,
) -> list[Event]:
    """The next events, in the order in which all readers see them; or the latest, in reverse.

    On PostgreSQL ids of transactions that ran at the same time may not ascend: continue after the *last* event, not
    after the highest id. Events that a transaction which still runs may yet precede are held back, so that a reader
    never skips one.

    ``after``: id of the last event that was read; 0 for the oldest that is stored. ``owner``: only of jobs of this
    user. ``kinds``: only these.
    """
    xact: int | None = session.scalar(_XACT, {"after": after})
    is_shared = session.connection().dialect.name == "postgresql"
    statement = after_statement(after, xact, limit, is_shared=is_shared)
    if owner is not None:
        statement = statement.where(events.c.owner_id == owner)
    if job is not None:
        statement = statement.where(events.c.job_id == job)
    if kinds is not None:
        statement = statement.where(events.c.kind.in_([kind.value for kind in kinds]))
    if newest_first:
        order = (events.c.xact.desc(), events.c.id.desc()) if is_shared else (events.c.id.desc(),)
        statement = statement.order_by(None).order_by(*order)
    return [_event(row) for row in session.execute(statement)]


def after_statement(after: int, xact: int | None, limit: int, *, is_shared: bool) -> sa.Select[Any]:
    """The query of `events_after`; ``xact`` is that of the event ``after``, None if that is not stored any more."""
    statement = sa.select(*_COLUMNS).limit(limit)
    if not is_shared:
        # The constant lets SQLite use the indexes of jobs and owners for the order, too.
        return statement.where(events.c.xact == 0, events.c.id > after).order_by(events.c.id)
    statement = statement.where(events.c.xact < _RUNNING).order_by(events.c.xact, events.c.id)
    if xact is None:
        return statement.where(events.c.id > after)
    return statement.where(sa.tuple_(events.c.xact, events.c.id) > sa.tuple_(xact, after))


_LATEST = sa.select(events.c.id, events.c.xact).limit(1)
_LATEST_OF = {
    "sqlite": _LATEST.order_by(events.c.id.desc()),
    "postgresql": _LATEST.where(events.c.xact < _RUNNING).order_by(events.c.xact.desc(), events.c.id.desc()),
}


def position(session: Session, after: int | None) -> tuple[int, tuple[int, int]]:
    """Where a reader begins: id and order of the event after which it reads, zeros for the begin.

    ``after``: id of an event; None for the latest, which also stands for an id that was never given out, as those that
    a restored backup does not have.
    """
    row = None if after is None else session.execute(_ORDER, {"after": after}).one_or_none()
    if row is None:
        row = session.execute(_LATEST_OF[session.connection().dialect.name]).one_or_none()
        if after is not None and row is not None and after < row.id:
            return after, (0, 0)
    return (0, (0, 0)) if row is None else (row.id, (row.xact, row.id))


def _event(row: Iterable[Any]) -> Event:
    number, at, kind, job_id, owner_id, data, xact = row
    return Event(
        id=number,
        at=at,
        kind=EventKind(kind),
        job=job_id,
        owner=owner_id,
        data=json.loads(data),
        order=(xact, number),
    )
