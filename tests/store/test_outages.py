"""A database server that dies: what transactions say of it."""

from __future__ import annotations

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent

from pdm.workqueue.store import users
from pdm.workqueue.store.database import Database
from pdm.workqueue.store.errors import DatabaseUnavailableError
from tests.store.clusters import cluster, programs
from tests.store.stores import START


@pytest.mark.postgresql
@pytest_twisted.ensureDeferred
async def test_a_server_that_is_gone_is_told_once_and_without_the_statement(lost_errors: list[LogEvent]) -> None:
    found = programs()
    assert found is not None
    with cluster(found) as url:
        database = Database.open(url.render_as_string(hide_password=False), _reactor)  # type: ignore[arg-type]
        await database.start()
        await database.run("register", users.register, "/CN=alice", "user", START)

    calls = [
        Deferred.fromCoroutine(database.run("register", users.register, f"/CN=secret {n}", "user", START))
        for n in range(20)
    ]
    for call in calls:
        with pytest.raises(DatabaseUnavailableError) as raised:
            await call
        assert "secret" not in str(raised.value)
        assert "INSERT" not in str(raised.value)
        assert "\n" not in str(raised.value)
    assert database.unavailable is not None
    assert len(lost_errors) == 1
    lost_errors.clear()
    await database.stop()
