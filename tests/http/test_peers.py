"""Two services with one database: each shows what the other one runs, and says where a part is if it is away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from pdm.testgrid.ports import reserve_port
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.jobs import ClaimToken, NewElement
from pdm.workqueue.domain.limits import Route
from pdm.workqueue.execution.progress_board import ReportedProgress
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.endpoint import Allow
from pdm.workqueue.http.endpoints import ENDPOINTS
from pdm.workqueue.logstore.attempt_log import LogRef
from tests.http.service import Certificates, Service, certificates, service
from tests.http.test_surface import path_of
from tests.store.clusters import cluster, programs

__all__ = ["certificates", "service"]

reactor: Any = _reactor
FOR_NODES = [endpoint for endpoint in ENDPOINTS if endpoint.allow is Allow.NODES]
#: For an answer of a node that is there.
_PATIENT_S = 60.0
_AWAY = "on node south, which does not answer"


@pytest_twisted.ensureDeferred
async def test_only_nodes_may_ask_what_nodes_ask(service: Service) -> None:
    """Each route of the table, by all kinds of certificates; of one daemon alone not even its own is a node's."""
    assert len(FOR_NODES) == 5
    authority = service.certificates.authority
    other = authority.host(["other.example.org"])
    callers: list[Any] = [
        *("alice", "operator"),
        authority.user("a user").proxy(),
        other,
        other.proxy(),
        service.certificates.host,
    ]
    for endpoint in FOR_NODES:
        for caller in callers:
            answer = await service.call(caller, "GET", path_of(endpoint))
            assert (answer.status, answer.problem) == (403, "forbidden"), (endpoint.name, caller)


class Pair:
    """Two nodes; `north` is asked for what `south` runs.

    Attributes:
        answering: whether `south` listens.
    """

    def __init__(self, directory: Path, certificates: Certificates, database: str) -> None:
        ports = [reserve_port() for _ in range(2)]
        self.north, self.south = (
            Service(
                _made(directory / name),
                certificates,
                # On a busy machine, too, no lease ends here before the tests do.
                configuration=f"[node]\nname = {name}\naddress = https://localhost:{port}\n[queue]\nlease = 1h\n",
                database_url=database,
                port_wanted=port,
            )
            for name, port in zip(("north", "south"), ports, strict=True)
        )

    async def start(self) -> None:
        await self.north.start()
        key = Path("state/credentials.key")
        (self.south.directory / "state").mkdir(mode=0o700)
        shutil.copy(self.north.directory / key, self.south.directory / key)
        await self.south.start()
        for each in (self.north, self.south):
            each.assembly.nodes.peers.timeout_s = _PATIENT_S

    async def stop(self) -> None:
        for each in (self.south, self.north):
            await each.stop()

    async def copied(self, user: str, *, ended: bool = False) -> tuple[int, ClaimToken, LogRef]:
        """A copy whose listing has ended, and whose only file south runs, or has copied."""
        job = await self.north.submit(user, "/copy")
        (listing,) = await self.south.claim(job["id"])
        await self.south.extend(listing, NewElement(JobType.COPY, "data/a", "copy/a", size=1000))
        await self.south.settle(listing, log="the listing")
        (token,) = await self.south.claim(job["id"])
        record = await self.south.job(job["id"])
        if ended:
            await self.south.settle(token, log="moved in the south", transferred=1000)
        return job["id"], token, LogRef(record.log_uid, token.element_id, token.attempt)

    async def part(self) -> None:
        """Let south not listen any more, and north keep nothing of it."""
        await self.south.assembly.server.api_port.stop()
        peers = self.north.assembly.nodes.peers
        await peers.stop()
        peers._answers.clear()


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    found = programs()
    if found is None:
        pytest.skip("THE TESTS ON POSTGRESQL CANNOT RUN: no server programs (Debian: apt-get install postgresql)")
    with cluster(found) as url:
        yield url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def pair(certificates: Certificates, database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), certificates, database)
    pytest_twisted.blockon(Deferred.fromCoroutine(pair.start()))
    yield pair
    pytest_twisted.blockon(Deferred.fromCoroutine(pair.stop()))


pytestmark = pytest.mark.postgresql


@pytest_twisted.ensureDeferred
async def test_progress_and_rates_of_what_another_node_moves(pair: Pair) -> None:
    job_id, token, _ = await pair.copied("progressing")
    board = pair.south.board
    board.begin(job_id, token.element_id)
    board.update(job_id, token.element_id, ReportedProgress(400, 20.0, 10.0, 4.0))
    await deferLater(reactor, 0.6)
    board.update(job_id, token.element_id, ReportedProgress(500, 20.0, 10.0, 5.0))
    for seen in (
        (await pair.north.call("progressing", "GET", f"/jobs/{job_id}")).json["progress"],
        (await pair.north.call("progressing", "GET", f"/jobs/{job_id}/status")).json["progress"],
    ):
        assert (seen["bytes_done"], seen["bytes_moving"], seen["bytes_total"]) == (0, 500, 1000)
        assert seen["instant"] > 0
        assert seen["eta"] > 0
        assert "silent" not in seen
    path = f"/jobs/{job_id}/elements/{token.element_id}/status"
    element = (await pair.north.call("progressing", "GET", path)).json
    assert [element[name] for name in ("transferred", "instant", "average", "elapsed")] == [500, 20.0, 10.0, 5.0]
    page = await pair.north.browse("progressing", f"/web/jobs/{job_id}")
    assert b"now</span>" in page.body
    assert b"Rate of job" in page.body or b"rate" in page.body
    assert job_id in await pair.north.assembly.nodes.progress.running()
    # The events of a job have the progress, too.
    event = await pair.north.assembly.feed.progress_of(job_id)  # type: ignore[misc]
    assert event is not None
    assert event.data["bytes_moving"] == 500


@pytest_twisted.ensureDeferred
async def test_the_log_of_an_attempt_is_followed_on_another_node(pair: Pair) -> None:
    job_id, token, ref = await pair.copied("following")
    place = f"/jobs/{job_id}/elements/{token.element_id}"
    pair.south.logs.open(ref, "begun in the south")
    await pair.south.logs.flush()
    first = (await pair.north.call("following", "GET", f"{place}/output?live=1")).json
    assert first["log"].endswith(" begun in the south\n")
    assert first["end"] is False
    pair.south.logs.write(ref, "a second line")
    await pair.south.logs.flush()
    second = (await pair.north.call("following", "GET", f"{place}/output?live=1&offset={first['offset']}")).json
    assert second["log"].endswith(" a second line\n")
    page = await pair.north.browse("following", f"/web{place}/log")
    assert b"a second line" in page.body
    await pair.south.logs.close(ref, "the last line")
    await pair.south.settle(token, log=None, transferred=1000)
    third = (await pair.north.call("following", "GET", f"{place}/output?live=1&offset={second['offset']}")).json
    assert third["log"].endswith(" the last line\n")
    assert third["end"] is True
    whole = (await pair.north.call("following", "GET", f"{place}/output")).json
    assert [line.split(" ", 1)[1] for line in whole["log"].splitlines()] == [
        "begun in the south", "a second line", "the last line",
    ]  # fmt: skip
    (listing, copy) = (await pair.north.call("following", "GET", f"/jobs/{job_id}/output")).json
    assert copy["log"] == whole["log"]
    assert "the listing" in listing["log"]
    download = await pair.north.browse("following", f"/web{place}/log/download")
    assert download.body.decode() == whole["log"]


@pytest_twisted.ensureDeferred
async def test_a_shared_directory_is_read_without_a_question(pair: Pair, tmp_path: Path) -> None:
    job_id, token, _ = await pair.copied("sharing", ended=True)
    (pair.north.directory / "logs").rename(pair.north.directory / "logs-of-north")
    (pair.north.directory / "logs").symlink_to(pair.south.directory / "logs")
    pair.north.assembly.nodes.peers._answers.clear()
    try:
        answer = await pair.north.call("sharing", "GET", f"/jobs/{job_id}/elements/{token.element_id}/output")
        assert "moved in the south" in answer.json["log"]
        assert not [path for _, path in pair.north.assembly.nodes.peers._answers if "/logs/" in path]
    finally:
        (pair.north.directory / "logs").unlink()
        (pair.north.directory / "logs-of-north").rename(pair.north.directory / "logs")


@pytest_twisted.ensureDeferred
async def test_nodes_are_listed_and_recognised(pair: Pair) -> None:
    nodes = (await pair.north.call("operator", "GET", "/nodes")).json
    assert [(node["name"], node["alive"]) for node in nodes] == [("north", True), ("south", True)]
    assert nodes[1]["address"] == f"https://localhost:{pair.south.port}"
    for endpoint in FOR_NODES:
        path = path_of(endpoint)
        assert (await pair.north.call(pair.north.certificates.host, "GET", path)).status == 200, endpoint.name
        assert (await pair.north.call("operator", "GET", path)).status == 403
        assert (await pair.north.call(pair.north.certificates.host.proxy(), "GET", path)).status == 403
    for query in ("?part=other", "?part=piece&most=0", "?begin=1", "?offset=-1", "?part=tail&most=99999999999"):
        path = "/peers/logs/0123456789abcdef/1/1" + query
        answer = await pair.north.call(pair.north.certificates.host, "GET", path)
        assert (answer.status, answer.problem.split()[0]) == (400, "invalid-input"), answer.body
    for path in ("/peers/logs/..%2F..%2Fetc/1/1", "/peers/logs/a.b.c.d/1/1", "/peers/logs/0123456789abcdef/1/0"):
        answer = await pair.north.call(pair.north.certificates.host, "GET", path)
        assert answer.status in (400, 404), path


@pytest_twisted.ensureDeferred
async def test_routes_of_all_nodes_are_shown(pair: Pair) -> None:
    now = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for node, running in ((pair.north, 2), (pair.south, 3)):
        state = RouteState(
            route=Route(1, 2),
            running=running,
            limit=4,
            least=1,
            most=4,
            throughput=None,
            unit=None,
            reason="as many as",
            decided_at=now,
            changed_at=now,
        )
        node.routes[:] = [state]
    try:
        for asked, names in ((pair.north, ["north", "south"]), (pair.south, ["south", "north"])):
            routes = (await asked.call("operator", "GET", "/routes")).json
            assert [route["node"] for route in routes] == names
            assert {route["node"]: route["running"] for route in routes} == {"north": 2, "south": 3}
    finally:
        for node in (pair.north, pair.south):
            node.routes.clear()
            node.assembly.nodes.peers._answers.clear()


@pytest_twisted.ensureDeferred
async def test_a_node_is_drained_and_resumed_from_another_one(pair: Pair) -> None:
    north, south = pair.north, pair.south
    for body in ({}, {"message": ""}, {"message": "a\nb"}, {"message": "x", "deadline": "soon"}):
        assert (await north.call("operator", "POST", "/nodes/south/drain", body)).status == 400
    assert (await north.call("operator", "POST", "/nodes/west/drain", {"message": "x"})).status == 404
    drained = (await north.call("operator", "POST", "/nodes/south/drain", {"message": "new disk"})).json
    assert (drained["name"], drained["drain"], drained["drain_until"]) == ("south", "new disk", None)
    while not south.assembly.nodes.drain.is_ordered:
        await deferLater(reactor, 0.02)
    assert not north.assembly.nodes.drain.is_ordered
    page = await north.browse("operator", "/web/operators")
    assert b"new disk" in page.body
    assert b">drained<" in page.body.replace(b" ", b"").replace(b"</span>drained", b">drained")
    await north.act("operator", f"/web/operators/nodes/{drained['worker']}/resume")
    while south.assembly.nodes.drain.is_ordered:
        await deferLater(reactor, 0.02)
    audit = (await north.call("operator", "GET", "/audit")).json
    target = f"node south ({drained['worker']})"
    assert [(line["action"], line["target"], line["details"]) for line in audit if "node" in line["action"]] == [
        ("node.drain", target, "new disk"),
        ("node.resume", target, ""),
    ]


@pytest_twisted.ensureDeferred
async def test_where_a_node_is_away_all_else_is_there(pair: Pair) -> None:
    """The last test: south stops to listen, with its lease."""
    running, token, ref = await pair.copied("left alone")
    pair.south.board.begin(running, token.element_id)
    pair.south.logs.open(ref, "begun in the south")
    ended, copied, _ = await pair.copied("left alone", ended=True)
    await pair.part()
    north, user = pair.north, "left alone"
    progress = (await north.call(user, "GET", f"/jobs/{running}")).json["progress"]
    assert progress["silent"] == [_AWAY]
    assert (progress["bytes_total"], progress["files_done"], progress["eta"]) == (1000, 0, None)
    place = f"/jobs/{running}/elements/{token.element_id}"
    status = (await north.call(user, "GET", f"{place}/status")).json
    assert (status["status"], status["transferred"], status["silent"]) == ("RUNNING", None, _AWAY)
    live = (await north.call(user, "GET", f"{place}/output?live=1&offset=7")).json
    assert (live["log"], live["offset"], live["end"], live["silent"]) == ("", 7, False, _AWAY)
    outputs = (await north.call(user, "GET", f"/jobs/{ended}/output")).json
    assert [output["log"] for output in outputs] == [f"the log is {_AWAY}\n"] * 2
    assert {output["silent"] for output in outputs} == {_AWAY}
    assert {output["status"] for output in outputs} == {JobStatus.DONE.name}
    live = (await north.call(user, "GET", f"/jobs/{ended}/elements/{copied.element_id}/output?live=1")).json
    assert (live["log"], live["end"], live["silent"]) == (f"the log is {_AWAY}\n", True, _AWAY)
    assert running in await north.assembly.nodes.progress.running()
    for path in (f"/web/jobs/{running}", f"/web{place}/log", f"/web/jobs/{running}/elements"):
        page = await north.browse(user, path)
        assert page.status == 200
        assert _AWAY.encode() in page.body or path.endswith("elements")
    assert (await north.call("operator", "GET", "/nodes")).status == 200
