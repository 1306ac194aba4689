"""Renames and new directories count as done unheard only by evidence of an attempt that had begun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pdm.workqueue.wire.agent_events import AgentEvent, BegunEvent, CancelledEvent, DoneEvent, StartedEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, MkdirRequest, PathItem, RenameItem, RenameRequest
from tests.helpers.driver import HelperProcess
from tests.protocols.places import judged
from tests.protocols.stands import LIMITS, STANDS, Ground, Stand
from tests.support.variants import usual

pytestmark = pytest.mark.timeout(180)


# The relay and the tools do it by the same code; GRIDFTP has connections of its own.
@pytest.fixture(scope="module", params=usual(STANDS, ["file", "https", "gridftp"]))
def stand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with STANDS[request.param](request, tmp_path_factory.mktemp(request.param)) as made:
        yield made


@pytest.fixture(scope="module")
def helper(stand: Stand) -> Iterator[HelperProcess]:
    with stand.helper() as running:
        yield running


def renamed(helper: HelperProcess, stand: Stand, source: Any, destination: Any, found: Any) -> AgentEvent:
    item = RenameItem(1, stand.url(source), stand.url(destination), found=found)
    return helper.run(RenameRequest(helper.new_id(), [item], "always", LIMITS))[-1]


def made(helper: HelperProcess, stand: Stand, path: Any, found: Any) -> AgentEvent:
    item = PathItem(1, stand.url(path), directory=True, found=found)
    return helper.run(MkdirRequest(helper.new_id(), [item], False, LIMITS))[-1]


def test_only_evidence_makes_an_unheard_rename_done(stand: Stand, helper: HelperProcess) -> None:
    ground = Ground(stand, "rename")
    old, new, others = ground.here, ground.new, stand.put(ground.directory / "others", b"somebody else's")
    # Never begun: an existing file belongs to another client, whatever the result of the attempt before.
    assert judged(stand.protocol, renamed(helper, stand, ground.absent, others, None)) == "source NOT_FOUND"
    number = helper.new_id() + 1
    assert isinstance(renamed(helper, stand, old, new, None), DoneEvent)
    found = helper.begun[number, 1]
    assert found["source"][:2] == ["file", 7] and found["destination"] is None
    # Done, but not reported: the second attempt recognises this file.
    assert isinstance(renamed(helper, stand, old, new, found), DoneEvent)
    assert judged(stand.protocol, renamed(helper, stand, old, others, found)) == "source NOT_FOUND"
    # Begun and not done, and the source taken away: what was there before is not it, however alike.
    helper.lets_go = False
    other = stand.put(ground.directory / "other")
    item = RenameItem(1, stand.url(other), stand.url(new))
    request = RenameRequest(helper.new_id(), [item], "always", LIMITS)
    helper.send(request)
    while not isinstance(begun := helper.event(), BegunEvent):
        pass
    helper.send(CancelRequest(request.id))
    assert isinstance(helper.rest(request.id)[-1], CancelledEvent)
    helper.lets_go = True
    before: Any = begun.found
    found = {**before, "source": ["file", 7, before["destination"][2] - 60]}
    other.unlink()
    assert judged(stand.protocol, renamed(helper, stand, other, new, found)) == "source NOT_FOUND"


def test_only_evidence_makes_an_unheard_directory_done(stand: Stand, helper: HelperProcess) -> None:
    ground = Ground(stand, "mkdir")
    assert judged(stand.protocol, made(helper, stand, ground.directory, None)) == "destination EXISTS"
    number = helper.new_id() + 1
    assert isinstance(made(helper, stand, ground.directory / "made", None), DoneEvent)
    found = helper.begun[number, 1]
    assert isinstance(made(helper, stand, ground.directory / "made", found), DoneEvent)
    assert judged(stand.protocol, made(helper, stand, ground.here, found)) == "destination EXISTS"


def test_nothing_is_done_before_the_service_has_kept_what_was_found(stand: Stand) -> None:
    ground = Ground(stand, "waits")
    with stand.helper() as helper:
        helper.lets_go = False
        item = RenameItem(1, stand.url(ground.here), stand.url(ground.new))
        request = RenameRequest(helper.new_id(), [item], "never", LIMITS)
        helper.send(request)
        assert isinstance(helper.event(), StartedEvent)
        assert isinstance(helper.event(), BegunEvent)
        assert ground.here.exists() and not ground.new.exists()
        helper.send(CancelRequest(request.id, [1]))
        assert isinstance(helper.rest(request.id)[-1], CancelledEvent)
        assert ground.here.exists() and not ground.new.exists()
