"""Agents as real processes: started, lent, killed; their output may be anything."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentCommand, AgentProcess, AgentStartError, BatchListener
from pdm.workqueue.domain.limits import LimitKey, LimitKind, StreamLedger
from pdm.workqueue.telemetry.background import following
from pdm.workqueue.wire.agent_events import AgentEvent, FinishedEvent, StartedEvent
from pdm.workqueue.wire.agent_requests import RemoveRequest, TimeLimits, WorkRequest

READY = """
import os, sys, time
say = lambda line: os.write(3, line.encode() + b"\\n")
say('{"event": "ready", "tools": "none"}')
"""
ECHO = READY + 'for line in sys.stdin: say(\'{"event": "finished", "id": 1}\')\n'


class Unused(list[str]):
    """The credentials of which no agent is left."""


def command(script: str, **environment: str) -> AgentCommand:
    return AgentCommand("test", [sys.executable, "-c", script], {"PATH": os.defpath, **environment})


@pytest.fixture
def scripts() -> dict[str, str]:
    return {"echo": ECHO}


@pytest.fixture
def unused() -> Unused:
    return Unused()


@pytest.fixture
def pool(scripts: dict[str, str], unused: Unused) -> Iterator[AgentPool]:
    pool = AgentPool(
        spawner=reactor,
        timer=reactor,
        command_for=lambda kind: command(scripts[kind.helper]),
        most=2,
        idle_s=60,
        unused=unused.append,
        start_timeout_s=5,
    )
    pool.start()
    yield pool
    pytest_twisted.blockon(Deferred.fromCoroutine(pool.stop()))


def kind(helper: str = "echo", credential: str = "") -> AgentKind:
    return AgentKind(helper, credential, {})


LIMITS = TimeLimits()


def nothing(number: int) -> WorkRequest:
    return RemoveRequest(number, [], LIMITS)


async def next_event(agent: AgentProcess, request: WorkRequest) -> AgentEvent:
    answer: Deferred[Sequence[AgentEvent]] = Deferred()
    agent.submit(request, BatchListener(answer.callback, lambda sentence: None))
    (event,) = await answer
    agent.detach(request.id)
    return event


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest_twisted.ensureDeferred
async def test_an_agent_is_kept_for_the_next_of_its_kind(pool: AgentPool) -> None:
    agent = await pool.acquire(kind())
    assert await next_event(agent, nothing(1)) == FinishedEvent(1)
    pool.release(agent, kind())
    assert await pool.acquire(kind()) is agent


@pytest_twisted.ensureDeferred
async def test_another_credential_gets_another_agent(pool: AgentPool, unused: Unused) -> None:
    first = await pool.acquire(kind(credential="one"))
    pool.release(first, kind(credential="one"))
    second = await pool.acquire(kind(credential="two"))
    assert second is not first
    # Two may live: the idle one makes room for the third, and its credential is not needed any more.
    third = await pool.acquire(kind(credential="three"))
    assert not first.alive
    assert third.alive
    assert unused == ["one"]


@pytest_twisted.ensureDeferred
async def test_agents_of_a_credential_that_was_removed_end(pool: AgentPool, unused: Unused) -> None:
    gone, kept = kind(credential="gone"), kind(credential="kept")
    agent = await pool.acquire(gone)
    other = await pool.acquire(kept)
    pool.release(other, kept)
    pool.retire("gone")
    pool.retire("never seen")
    assert pool.works_with("gone") and agent.alive, "it may finish its work"
    pool.release(agent, gone)
    await following(agent.ended)
    assert (unused, pool.works_with("gone")) == (["gone"], False)
    pool.retire("kept")
    await following(other.ended)
    assert unused == ["gone", "kept"]


@pytest_twisted.ensureDeferred
async def test_agents_of_alternating_users_are_kept() -> None:
    pool = AgentPool(
        spawner=reactor,
        timer=reactor,
        command_for=lambda kind: command(ECHO),
        most=1,
        idle_s=60,
        unused=lambda name: None,
        spare=1,
    )
    agents: dict[str, AgentProcess] = {}
    for name in ("one", "two", "one", "two"):
        agent = await pool.acquire(kind(credential=name))
        assert agents.setdefault(name, agent) is agent
        waiting = Deferred.fromCoroutine(pool.acquire(kind(credential="three")))
        await deferLater(reactor, 0.02)
        # However many may live: one works.
        assert not waiting.called
        waiting.cancel()
        waiting.addErrback(lambda _: None)
        pool.release(agent, kind(credential=name))
    # The longest unused makes room.
    third = await pool.acquire(kind(credential="three"))
    assert third.alive
    assert [agents["one"].alive, agents["two"].alive] == [False, True]
    await pool.stop()


@pytest_twisted.ensureDeferred
async def test_when_all_are_lent_one_waits_for_the_next_that_comes_back(pool: AgentPool) -> None:
    agents = [await pool.acquire(kind()) for _ in range(2)]
    waiting = Deferred.fromCoroutine(pool.acquire(kind()))
    await deferLater(reactor, 0.05)
    assert not waiting.called
    pool.release(agents[0], kind())
    assert await waiting is agents[0]


class Watcher(BatchListener):
    """Records its events."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        super().__init__(self.heard.extend, self.heard.append, lambda: self.heard.append("turn"))


@pytest_twisted.ensureDeferred
async def test_an_agent_whose_work_is_nearly_done_gets_the_next(pool: AgentPool, scripts: dict[str, str]) -> None:
    scripts["two"] = (
        READY
        + "sys.stdin.readline()\nsys.stdin.readline()\n"
        + "\n".join(
            f'say(\'{{"event": "{event}", "id": {number}{more}}}\')'
            for number in (1, 2)
            for event, more in (("started", ', "key": 0'), ("finished", ""))
        )
        + "\ntime.sleep(60)\n"
    )
    agents = [await pool.acquire(kind("two")) for _ in range(2)]
    first, second = Watcher(), Watcher()
    agents[0].submit(nothing(1), first)
    waiting = Deferred.fromCoroutine(pool.acquire(kind("two")))
    alone = Deferred.fromCoroutine(pool.acquire(kind("two"), alone=True))
    assert not waiting.called
    first.nearly_done = True
    pool.wake_waiting()
    assert await waiting is agents[0]
    # It has two by now; a third has to wait, and what must not wait behind another waits for an agent of its own.
    third = Deferred.fromCoroutine(pool.acquire(kind("two")))
    agents[0].submit(nothing(2), second)
    assert (first.heard, second.heard) == (["turn"], [])
    while not first.heard[1:] or not second.heard:
        await deferLater(reactor, 0.01)
    while FinishedEvent(1) not in first.heard:
        await deferLater(reactor, 0.01)
    agents[0].detach(1)
    pool.release(agents[0], kind("two"))
    assert "turn" in second.heard
    assert not third.called and not alone.called
    pool.release(agents[1], kind("two"))
    assert await alone is agents[1]
    agents[0].kill("the test wants it")
    while not isinstance(second.heard[-1], str) or "the test wants it" not in second.heard[-1]:
        await deferLater(reactor, 0.01)
    assert first.heard == ["turn", StartedEvent(1, 0), FinishedEvent(1)]
    assert (await third).alive


@pytest_twisted.ensureDeferred
async def test_work_waits_behind_no_other_while_another_kind_waits_longer(pool: AgentPool) -> None:
    agents = [await pool.acquire(kind(credential="one")) for _ in range(2)]
    other = Deferred.fromCoroutine(pool.acquire(kind(credential="two")))
    listener = Watcher()
    agents[0].submit(nothing(7), listener)
    listener.nearly_done = True
    more = Deferred.fromCoroutine(pool.acquire(kind(credential="one")))
    pool.wake_waiting()
    assert not more.called
    agents[0].detach(7)
    pool.release(agents[0], kind(credential="one"))
    started = await other
    assert started not in agents
    pool.release(agents[1], kind(credential="one"))
    assert await more is agents[1]


@pytest_twisted.ensureDeferred
async def test_places_are_kept_for_batches_that_need_an_agent_alone() -> None:
    pool = AgentPool(
        spawner=reactor,
        timer=reactor,
        command_for=lambda kind: command(ECHO),
        most=2,
        idle_s=60,
        unused=lambda name: None,
        kept_free=1,
    )
    work = await pool.acquire(kind())
    more = Deferred.fromCoroutine(pool.acquire(kind()))
    listing = await pool.acquire(kind(), alone=True)
    assert not more.called
    pool.release(listing, kind())
    assert not more.called
    pool.release(work, kind())
    assert (await more).alive
    await pool.stop()


@pytest_twisted.ensureDeferred
async def test_a_killed_agent_makes_room_and_is_not_lent_again(pool: AgentPool) -> None:
    agents = [await pool.acquire(kind()) for _ in range(2)]
    ended: Deferred[str] = Deferred()

    def pass_on(sentence: str) -> str:
        ended.callback(sentence)
        return sentence

    agents[0].ended.addCallback(pass_on)
    began = time.monotonic()
    agents[0].kill("the test wants it")
    sentence = await ended
    assert "signal 9" in sentence and "the test wants it" in sentence
    assert time.monotonic() - began < 1
    pool.release(agents[0], kind())
    assert (await pool.acquire(kind())).alive


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit(7)", "exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import os, time; os.write(3, b'nonsense\\n'); time.sleep(60)", "a line that is no event"),
        ("import os, time; os.write(3, b'x' * 5_000_000); time.sleep(60)", "a line of more than"),
        ("import time; time.sleep(60)", "not ready within 0.3 s"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_an_agent_that_does_not_come_up_says_why(script: str, says: str) -> None:
    pool = AgentPool(
        spawner=reactor,
        timer=reactor,
        command_for=lambda kind: command(script),
        most=1,
        idle_s=60,
        unused=lambda credential: None,
        start_timeout_s=0.3 if "0.3" in says else 10,
    )
    for _ in range(2):  # the place of the first is free again
        with pytest.raises(AgentStartError, match=says):
            await pool.acquire(kind())


@pytest_twisted.ensureDeferred
async def test_garbage_in_the_middle_of_a_batch_ends_the_agent(pool: AgentPool, scripts: dict[str, str]) -> None:
    scripts["liar"] = READY + 'sys.stdin.readline(); os.write(3, b\'{"event": "done"}\\n\'); time.sleep(60)\n'
    agent = await pool.acquire(kind("liar"))
    agent.cancel(1)
    assert "no event" in await agent.ended


@pytest_twisted.ensureDeferred
async def test_an_idle_agent_that_does_not_end_makes_room_all_the_same(
    scripts: dict[str, str], unused: Unused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdm.workqueue.agents.pool._END_GRACE_S", 0.2)
    scripts["deaf"] = READY + "time.sleep(60)\n"
    pool = AgentPool(
        spawner=reactor,
        timer=reactor,
        command_for=lambda kind: command(scripts[kind.helper]),
        most=1,
        idle_s=60,
        unused=unused.append,
        start_timeout_s=5,
    )
    deaf = await pool.acquire(kind("deaf"))
    pool.release(deaf, kind("deaf"))
    assert (await pool.acquire(kind())).alive
    assert "it did not end when it had nothing more to do" in await following(deaf.ended)
    await pool.stop()


@pytest_twisted.ensureDeferred
async def test_what_an_agent_started_dies_with_it(pool: AgentPool, scripts: dict[str, str], tmp_path: Path) -> None:
    scripts["parent"] = (
        READY + "import subprocess\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        'say(\'{"event": "finished", "id": 1}\'); time.sleep(60)\n'
    )
    agent = await pool.acquire(kind("parent"))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        await deferLater(reactor, 0.01)
    child = int((tmp_path / "pid").read_text())
    assert is_alive(child)
    assert agent.pid is not None
    os.kill(agent.pid, 9)
    await agent.ended
    while is_alive(child):
        await deferLater(reactor, 0.01)


@pytest_twisted.ensureDeferred
async def test_nothing_of_the_environment_is_inherited(
    pool: AgentPool, scripts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PDM_SECRET", "hunter2")
    scripts["env"] = READY + f"open({str(tmp_path / 'env')!r}, 'w').write(repr(dict(os.environ)))\ntime.sleep(60)\n"
    await pool.acquire(kind("env"))
    while not (tmp_path / "env").exists() or not (tmp_path / "env").read_text():
        await deferLater(reactor, 0.01)
    assert "hunter2" not in (tmp_path / "env").read_text()


@pytest_twisted.ensureDeferred
async def test_a_paused_agent_blocks_instead_of_filling_memory(pool: AgentPool, scripts: dict[str, str]) -> None:
    scripts["flood"] = (
        READY + "sys.stdin.readline()\n"
        'for n in range(200_000): say(\'{"event": "log", "id": 1, "key": %d, "text": "x"}\' % n)\n'
        'say(\'{"event": "finished", "id": 1}\'); time.sleep(60)\n'
    )
    agent = await pool.acquire(kind("flood"))
    seen: list[Any] = []
    agent.submit(nothing(1), BatchListener(seen.extend, lambda sentence: None))
    while not seen:
        await deferLater(reactor, 0.01)
    agent.pause()
    await deferLater(reactor, 0.1)
    stopped_at = len(seen)
    await deferLater(reactor, 0.2)
    assert len(seen) == stopped_at < 200_000
    agent.resume()
    while not isinstance(seen[-1], FinishedEvent):
        await deferLater(reactor, 0.01)
    assert len(seen) == 200_001


@pytest_twisted.ensureDeferred
async def test_a_limit_keeps_agents_free_for_others(pool: AgentPool) -> None:
    ledger = StreamLedger(lambda key: 1, lambda key, count: None)
    one: LimitKey = (LimitKind.USER, 1)
    other: LimitKey = (LimitKind.USER, 2)
    first, second, third = ledger.slot([one]), ledger.slot([one]), ledger.slot([other])
    agent = await pool.acquire(kind(), slot=first)
    waits = Deferred.fromCoroutine(pool.acquire(kind(), slot=second))
    free = await pool.acquire(kind(), slot=third)
    assert free is not agent and not waits.called
    first.leave()
    pool.release(agent, kind())
    assert await waits is agent
    assert (ledger.running(one), ledger.running(other)) == (1, 1)


@pytest_twisted.ensureDeferred
async def test_a_following_batch_takes_over_the_stream(pool: AgentPool) -> None:
    ledger = StreamLedger(lambda key: 1, lambda key, count: None)
    one: LimitKey = (LimitKind.USER, 1)
    slots = [ledger.slot([one]) for _ in range(3)]
    agent = await pool.acquire(kind(), slot=slots[0])
    listener = BatchListener(lambda events: None, lambda sentence: None)
    agent.submit(nothing(1), listener)
    follower = Deferred.fromCoroutine(pool.acquire(kind(), slot=slots[1]))
    last = Deferred.fromCoroutine(pool.acquire(kind(), slot=slots[2]))
    assert not follower.called
    listener.nearly_done = True
    pool.wake_waiting()
    assert await follower is agent
    assert ledger.running(one) == 1 and not last.called
    slots[0].leave()
    agent.detach(1)
    pool.release(agent, kind())
    assert slots[1].has_stream and not last.called
    slots[1].leave()
    pool.release(agent, kind())
    assert await last is agent
