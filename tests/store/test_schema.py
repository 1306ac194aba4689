"""Migrations: they make what the models say, and refuse what they do not know."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateTable

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.subjects import normal_subject
from pdm.workqueue.store import credentials, held_elements
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.engines import create_sqlite_file, make_engines
from pdm.workqueue.store.errors import DatabaseUrlError, ForeignSchemaError, SchemaTooNewError
from pdm.workqueue.store.schema_revisions import config, migrate
from pdm.workqueue.WorkqueueDB import Base
from tests.store.stores import EXPIRED, Store, done, ended

_AT = {"now": "2026-03-02 11:04:05"}


@pytest.fixture
def connection(empty_url: str) -> sa.Connection:  # type: ignore[misc]
    engines = make_engines(empty_url, 4)
    create_sqlite_file(engines.writer)
    with engines.writer.begin() as connection:
        yield connection
    engines.dispose()


def test_an_empty_database_becomes_what_the_models_say(connection: sa.Connection) -> None:
    migrate(connection)
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_are_those_of_the_models(empty_url: str) -> None:
    """What alembic does not compare: the text of constraints and of the conditions of indexes."""
    engines = make_engines(empty_url, 1)
    create_sqlite_file(engines.writer)
    with engines.writer.begin() as connection:
        migrate(connection)
        migrated = described(connection)
        with connection.begin_nested():
            Base.metadata.drop_all(connection)
            Base.metadata.create_all(connection)
        assert described(connection) == migrated
    engines.dispose()


def described(connection: sa.Connection) -> set[tuple[str, str]]:
    """Name and text of all checks and indexes."""
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
            " UNION SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name <> 'alembic_version'"
        )
        return {
            (name, "".join(sorted(text.replace("\n", "").replace("\t", "").replace(" ", "")))) for name, text in rows
        }
    rows = connection.exec_driver_sql(
        "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        " UNION SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'c'"
    )
    return {(name, text) for name, text in rows}


def test_a_migrated_database_is_left_alone(connection: sa.Connection) -> None:
    migrate(connection)
    migrate(connection)
    assert connection.execute(sa.text("SELECT count(*) FROM alembic_version")).scalar() == 1


def test_a_migration_has_the_name_of_its_file_and_the_newest_sorts_last() -> None:
    scripts = list(ScriptDirectory.from_config(config()).walk_revisions())
    names = [script.revision for script in scripts]
    assert names == [Path(script.path).stem for script in scripts]
    assert names == sorted(names, reverse=True)


def test_a_start_that_migrates_nothing_does_not_import_alembic(tmp_path: Path) -> None:
    start = (
        "import sys; from pdm.workqueue.store.engines import make_engines;"
        "from pdm.workqueue.store.schema_revisions import migrate;"
        f"e = make_engines('sqlite:///{tmp_path}/db', 1); c = e.writer.begin(); migrate(c.__enter__());"
        "c.__exit__(None, None, None); e.dispose(); sys.exit('alembic' in sys.modules)"
    )
    first, second = (subprocess.run([sys.executable, "-c", start], check=False).returncode for _ in range(2))
    assert (first, second) == (1, 0)


def test_a_schema_of_the_future_is_refused(connection: sa.Connection) -> None:
    migrate(connection)
    connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaTooNewError, match="schema 9999, which this version does not know: install"):
        migrate(connection)


def test_tables_of_another_origin_are_not_touched(connection: sa.Connection) -> None:
    connection.execute(sa.text("CREATE TABLE jobs (id INTEGER)"))
    with pytest.raises(ForeignSchemaError, match=r"\(jobs\): point \[database\] url at an empty database"):
        migrate(connection)
    assert sa.inspect(connection).get_table_names() == ["jobs"]


def test_daemons_that_start_together_migrate_once(empty_url: str) -> None:
    engines = make_engines(empty_url, 4)
    create_sqlite_file(engines.writer)
    faults: list[Exception] = []

    def start() -> None:
        try:
            own = make_engines(empty_url, 1)
            with own.writer.begin() as connection:
                migrate(connection)
            own.dispose()
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engines.dispose()
    assert faults == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "not a database URL"),
        ("mysql://h/d", "mysql is not supported: use sqlite or postgresql"),
        ("sqlite://", "SQLite needs a file"),
        ("sqlite:///:memory:", "SQLite needs a file"),
    ],
)
def test_urls_that_cannot_work_are_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(DatabaseUrlError, match=words):
        make_engines(url, 4)


def test_postgresql_needs_no_driver_in_its_url() -> None:
    assert make_engines("postgresql://u:p@h/d", 4).writer.url.drivername == "postgresql+psycopg"


def test_sizes_have_64_bits_on_postgresql() -> None:
    from sqlalchemy.dialects import postgresql

    text = str(CreateTable(Base.metadata.tables["job_elements"]).compile(dialect=postgresql.dialect()))
    assert "size BIGINT NOT NULL" in text
    assert "transferred BIGINT" in text


def test_credentials_of_the_first_schema_are_kept(connection: sa.Connection) -> None:
    command.upgrade(config(connection), "0001")
    connection.execute(
        sa.text("INSERT INTO users (id, subject, role, registered_at) VALUES (3, '/CN=a', 'user', :now)"), _AT
    )
    connection.execute(
        sa.text(
            "INSERT INTO credentials (id, user_id, kind, subject, valid_until, stored_at, secret)"
            " VALUES (8, 3, 'proxy', '/CN=a', :now, :now, :secret)"
        ),
        {**_AT, "secret": b"\0sealed"},
    )
    migrate(connection)
    with Session(bind=connection) as session:
        found = credentials.find(session, 3, CredentialKind.PROXY)
        assert found is not None
        assert (found.id, found.site_id, found.secret, dict(found.details)) == (8, 0, b"\0sealed", {})
        new = EncryptedCredential(CredentialKind.TOKEN, "a token", None, b"sealed", 5)
        assert credentials.put(session, 3, new, found.stored_at).id == 9
        assert credentials.put(session, 3, new, found.stored_at).id == 9


def test_subjects_of_users_get_their_new_form(connection: sa.Connection) -> None:
    """A slash in a value was marked always, and now only where it could be taken for the beginning of a part."""
    command.upgrade(config(connection), "0003_sites")
    before = [r"/CN=host\/a.b", r"/CN=alice\/CN=admin", r"/CN=a\\\/b\\", "/CN=plain/O=x", r"/CN=a\/b\/1.2=c\\/O=d\\"]
    after = ["/CN=host/a.b", r"/CN=alice\/CN=admin", r"/CN=a\\/b\\", "/CN=plain/O=x", r"/CN=a/b\/1.2=c\\/O=d\\"]
    for number, subject in enumerate(before, 1):
        connection.execute(
            sa.text("INSERT INTO users (id, subject, role, registered_at) VALUES (:id, :subject, 'user', :now)"),
            {**_AT, "id": number, "subject": subject},
        )
    migrate(connection)
    found = connection.execute(sa.text("SELECT subject, authority FROM users ORDER BY id")).all()
    assert found == [(subject, None) for subject in after]
    assert [normal_subject(subject) for subject in after] == after


def _back_to_the_first_schema(connection: sa.Connection) -> None:
    """Keep the queue, where the first schema can: its statements are not those of the current code."""
    tables = [Base.metadata.tables[name] for name in ("users", "workers", "jobs", "job_elements", "attempts")]
    rows = {table.name: connection.execute(sa.select(table)).mappings().all() for table in tables}
    Base.metadata.drop_all(connection)
    connection.execute(sa.text("DROP TABLE alembic_version"))
    command.upgrade(config(connection), "0001")
    for table in tables:
        names = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
        for row in rows[table.name]:
            connection.execute(sa.insert(table), {name: value for name, value in row.items() if name in names})


def test_work_of_the_first_schema_continues(empty_url: str) -> None:
    """A daemon of the last version was killed at work; the new one migrates its database and carries on."""
    engines = make_engines(empty_url, 2)
    create_sqlite_file(engines.writer)
    with engines.writer.begin() as connection:
        migrate(connection)
    store = Store(engines.writer)
    user = store.user()
    store.worker("old")
    large = store.copy_job(user, [10] * 5, worker="old")
    others = {type_: store.submit(user, type_) for type_ in (JobType.LIST, JobType.MKDIR, JobType.REMOVE)}
    running = store.claim("old", batches=2, batch_elements=2)
    numbers = [large.id, *(job.id for job in others.values())]
    before = {number: store.job(number) for number in numbers}
    with engines.writer.begin() as connection:
        _back_to_the_first_schema(connection)
        migrate(connection)
    assert {number: store.job(number) for number in numbers} == before
    assert store.register("old").back == sum(len(batch.elements) for batch in running)
    held = store.claim("old", batches=1, batch_elements=2)
    store.settle(ended(JobStatus.HELD, *held, failure=EXPIRED, counts=False), "old")
    assert store.run(held_elements.resume_held, user, store.now).count == len(held[0].elements)
    while batches := store.claim("old", batches=20):
        store.settle(done(*batches), "old")
    assert {store.job(number).status for number in numbers} == {JobStatus.DONE}
    assert all(store.job(number).counters == store.recount(number) for number in numbers)
    engines.dispose()
