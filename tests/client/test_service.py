"""The client against the real service: real TLS, real database, real log files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_twisted
from msgspec import UNSET
from twisted.internet import reactor
from twisted.logger import LogEvent

from pdm.workqueue.client.errors import (
    DelegationNeededError,
    InvalidRequestError,
    JobFailedError,
    NotFoundError,
    OutputNotReadyError,
    ServerFaultError,
    UnknownSiteError,
)
from pdm.workqueue.client.settings import ClientSettings
from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ListedEntry
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.wire.responses import JobView
from pdm.workqueue.WorkqueueClient import WorkqueueClient
from tests.http.service import Service, certificates, service

__all__ = ["certificates", "service"]

ensure = pytest_twisted.ensureDeferred
ClientOf = Callable[[str], WorkqueueClient]


@pytest.fixture
def as_user(service: Service, tmp_path: Path) -> Iterator[ClientOf]:
    """Makes clients of the real service for users; they are closed when the test ends."""
    made: list[WorkqueueClient] = []

    def make(user: str) -> WorkqueueClient:
        credential = service.certificates.of(user)
        credential.write_bundle(tmp_path / f"{user}.pem")
        settings = ClientSettings(
            f"https://localhost:{service.port}", tmp_path / f"{user}.pem", None, service.directory / "trust"
        )
        made.append(WorkqueueClient.from_settings(reactor, settings))
        return made[-1]

    yield make
    for client in made:
        pytest_twisted.blockon(client.close())


@ensure
async def test_each_type_of_job_is_submitted_as_asked(as_user: ClientOf) -> None:
    client = as_user("submitter")
    listed = await client.list(1, "a b%", depth=2, protocol="dummy", priority=0, max_tries=3, label="mine")
    copied = await client.copy(1, "x", 2, "y/", overwrite="different", verify="size", protocol="FILE")
    removed = await client.remove(1, "x", recursive=False, protocol="FILE")
    renamed = await client.rename(1, "x", "y", overwrite="always", protocol="FILE")
    made = await client.mkdir(1, "x", parents=True, protocol="FILE")
    given = await client.submit(
        "copy", {"src_siteid": 1, "src_filepath": "a", "dst_siteid": 2, "dst_filepath": "b"}, protocol="2"
    )

    assert [job.type for job in (listed, copied, removed, renamed, made, given)] == [
        *("LIST", "COPY", "REMOVE", "RENAME", "MKDIR", "COPY")
    ]
    assert (listed.priority, listed.max_tries, listed.label, listed.protocol) == (0, 3, "mine", "DUMMY")
    assert (listed.src_filepath, listed.dst_siteid, listed.extra_opts) == ("a b%", UNSET, {"depth": 2})
    assert (copied.dst_siteid, copied.dst_filepath) == (2, "y/")
    assert copied.extra_opts == {"overwrite": "different", "verify": "size"}
    assert removed.extra_opts == {"recursive": False}
    assert (renamed.dst_siteid, renamed.extra_opts) == (1, {"overwrite": "always"})
    assert made.extra_opts == {"parents": True}
    assert given.protocol == "DUMMY"
    assert all(job.status == "SUBMITTED" for job in (listed, copied, removed, renamed, made, given))
    assert [job.id for job in await client.jobs()] == [
        job.id for job in (listed, copied, removed, renamed, made, given)
    ]


@ensure
async def test_the_same_key_makes_one_job(as_user: ClientOf) -> None:
    client = as_user("twice")
    first = await client.list(1, "a", protocol="DUMMY", idempotency_key="one")
    second = await client.list(1, "a", protocol="DUMMY", idempotency_key="one")
    assert first.id == second.id
    assert len(await client.jobs()) == 1


@ensure
async def test_jobs_are_found_by_filters(as_user: ClientOf) -> None:
    client = as_user("seeker")
    before = datetime.now(UTC) - timedelta(minutes=1)
    jobs = [await client.list(1 + i % 2, f"p{i}", protocol="DUMMY", label="a&b=" if i < 2 else "c") for i in range(4)]
    assert [job.id for job in await client.jobs(label="a&b=")] == [jobs[0].id, jobs[1].id]
    assert [job.id for job in await client.jobs(site="SOUTH")] == [jobs[1].id, jobs[3].id]
    assert [job.id for job in await client.jobs(limit=1, after=jobs[1].id)] == [jobs[2].id]
    assert len(await client.jobs(since=before, status=JobStatus.SUBMITTED, type=JobType.LIST)) == 4
    assert await client.jobs(status="DONE") == ()
    assert [job.id async for job in client.iterate_jobs(after=jobs[0].id)] == [job.id for job in jobs[1:]]
    with pytest.raises(InvalidRequestError) as caught:
        await client.jobs(status="sleeping")
    assert caught.value.pointer == "?status"


@ensure
async def test_waiting_sees_the_job_through_to_its_end(as_user: ClientOf, service: Service) -> None:
    client = as_user("waiter")
    job = await client.list(1, "/top", protocol="DUMMY")
    seen: list[str] = []
    waiting = client.wait(job.id, timeout=20, on_progress=lambda job: seen.append(job.status))
    (token,) = await service.claim(job.id)
    while "RUNNING" not in seen:
        await client.pause(0.02)
    await service.list_with(
        token, [ListedEntry("", "directory"), ListedEntry("x\ny", "file", 5, 0o640, 7), ListedEntry("sub", "directory")]
    )
    await service.settle(token, log="it was listed")
    ended: JobView = await waiting
    assert (ended.status, ended.num_done, ended.num_elements) == ("DONE", 1, 1)
    assert seen[-1] == "DONE"
    assert (await client.status(job.id)).status == "DONE"
    assert (await client.element_status(job.id, 0)).attempts == 1

    element = await client.element(job.id, 0)
    assert element.listing == [{"/top": ["x\ny", "sub"], "/top/sub": []}]
    assert element.entries is not UNSET
    first = element.entries["/top"][0]
    assert (first.name, first.size, first.mode, first.mtime) == ("x\ny", 5, 0o640, 7)
    (output,) = await client.output(job.id)
    assert "it was listed" in (output.log or "")
    assert await client.element_output(job.id, 0, 1) == await client.element_output(job.id, 0, -1)


@ensure
async def test_a_running_job_has_progress_and_a_log(as_user: ClientOf, service: Service) -> None:
    client = as_user("watcher")
    job = await client.mkdir(1, "/there", protocol="DUMMY")
    assert job.progress is not UNSET
    assert (job.progress.bytes_moving, job.progress.elapsed) == (0, None)
    with pytest.raises(OutputNotReadyError):
        await client.live_output(job.id, 0)
    (token,) = await service.claim(job.id)
    seen = await client.job(job.id)
    assert seen.progress is not UNSET
    assert (seen.progress.files_done, seen.progress.files_total, seen.progress.eta) == (0, 1, None)
    assert (await client.status(job.id)).progress is not UNSET

    ref = LogRef(job.log_uid, 0, token.attempt)
    service.logs.open(ref, "begun")
    first = await client.live_output(job.id, 0)
    assert (first.status, first.attempt, first.end) == ("RUNNING", 1, False)
    assert "begun" in (first.log or "")
    assert isinstance(first.offset, int)
    service.logs.write(ref, "more")
    second = await client.live_output(job.id, 0, 1, first.offset)
    assert (second.log or "").endswith("Z more\n")
    await service.logs.close(ref, "over")
    await service.settle(token, log=None)
    assert isinstance(second.offset, int)
    last = await client.live_output(job.id, 0, -1, second.offset)
    assert (last.status, last.end) == ("DONE", True)
    assert (last.log or "").endswith("Z over\n")


@ensure
async def test_what_failed_says_why_and_can_be_tried_again(as_user: ClientOf, service: Service) -> None:
    client = as_user("retrier")
    job = await client.mkdir(1, "/there", protocol="DUMMY")
    (token,) = await service.claim(job.id)
    await service.settle(
        token, JobStatus.FAILED, AttemptFailure(FailureScope.SOURCE, FailureCode.EXISTS, "File exists"), log="why"
    )
    assert (await client.wait(job.id)).status == "FAILED"
    (element,) = await client.elements(job.id, status="FAILED")
    assert element.failure is not None
    assert (element.failure.code, element.failure.scope, element.failure.message) == ("EXISTS", "source", "File exists")
    again = await client.retry(job.id)
    assert again.retried == 1
    assert again.status in ("SUBMITTED", "RUNNING")
    cancelled = await client.cancel(job.id)
    assert cancelled.status == "CANCELLED"
    assert (await client.cancel(job.id)).status == "CANCELLED"


@ensure
async def test_elements_are_read_page_by_page(
    as_user: ClientOf, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdm.workqueue.WorkqueueClient._PAGE_SIZE", 3)
    client = as_user("reader")
    job_id = await service.copied("reader", *(f"f{i}" for i in range(7)))
    assert [element.id async for element in client.iterate_elements(job_id)] == list(range(8))
    assert [element.id async for element in client.iterate_elements(job_id, type="COPY", after=2)] == [3, 4, 5, 6, 7]


@ensure
async def test_a_proxy_is_delegated(as_user: ClientOf) -> None:
    client = as_user("delegator")
    assert await client.delegation() is None
    with pytest.raises(DelegationNeededError):
        await client.list(1, "a")
    before = datetime.now(UTC)
    given = await client.delegate(timedelta(hours=6))
    assert timedelta(hours=6, minutes=-6) < given.termination_time - before < timedelta(hours=6, minutes=1)
    assert await client.delegation() == given
    me = await client.whoami()
    assert (me.role, me.credential_valid_until) == ("user", given.termination_time)
    assert (await client.list(1, "a")).protocol == "GRIDFTP"
    await client.undelegate()
    assert await client.delegation() is None


@ensure
async def test_sites(as_user: ClientOf) -> None:
    north = (await as_user("visitor").sites())[0]
    assert (north.id, north.name, north.default_folder) == (1, "NORTH", "/store/user")
    assert north.protocols == ["GRIDFTP", "DUMMY", "FILE"]


@ensure
async def test_sites_are_named_and_the_protocol_is_chosen(as_user: ClientOf) -> None:
    client = as_user("namer")
    await client.delegate()
    names = {site.id: site.name for site in await client.sites()}
    job = await client.copy(names[1], "x", names[2], "y")
    assert (job.src_siteid, job.dst_siteid, job.protocol) == (1, 2, "GRIDFTP")
    assert (await client.copy(names[1], "x", 2, "y", protocol="dummy", overwrite="always")).protocol == "DUMMY"
    assert (await client.site(names[1])).id == 1
    with pytest.raises(UnknownSiteError, match=r"no site NORT\. Did you mean NORTH\?"):
        await client.list("NORT", "/")
    with pytest.raises(TypeError, match="overwrit"):
        await client.copy(1, "x", 2, "y", overwrit="always")  # type: ignore[call-arg]


async def first_job(client: WorkqueueClient) -> int:
    """The number of the user's first job, once it is registered."""
    while not (jobs := await client.jobs()):
        pass
    return jobs[0].id


@ensure
async def test_a_listing_in_one_call(as_user: ClientOf, service: Service) -> None:
    client = as_user("lister")
    answer = client.ls(1, "a", protocol="dummy")
    job_id = await first_job(client)
    (token,) = await service.claim(job_id)
    await service.list_with(token, [ListedEntry("", "directory"), ListedEntry("x", "file", 7)])
    await service.settle(token)
    (entry,) = await answer
    assert repr(entry) == "<EntryView 'x' file 7 bytes>"


@ensure
async def test_a_failed_job_that_was_waited_for_is_an_error(as_user: ClientOf, service: Service) -> None:
    client = as_user("checker")
    answer = client.mkdir(1, "/there", protocol="DUMMY", wait=True)
    job_id = await first_job(client)
    (token,) = await service.claim(job_id)
    await service.settle(token, JobStatus.FAILED, AttemptFailure(FailureScope.SOURCE, FailureCode.EXISTS, "it is"))
    with pytest.raises(JobFailedError, match=r"failed: /there: EXISTS \(source\): it is") as caught:
        await answer
    assert (caught.value.code, caught.value.job.id) == ("EXISTS", job_id)
    assert caught.value.hint in str(caught.value)
    assert repr(caught.value.job) == f"<JobView {job_id} FAILED: MKDIR 1:/there, 0/1 elements, 1 failed, 0 skipped>"
    other = await client.mkdir(1, "/a", protocol="DUMMY")
    await client.cancel(other.id)
    with pytest.raises(JobFailedError, match="was cancelled"):
        await client.wait(other.id, check=True)
    assert (await client.wait(other.id)).status == "CANCELLED"


@ensure
async def test_what_is_not_there_or_not_ours(as_user: ClientOf, service: Service) -> None:
    job = await as_user("owner").list(1, "a", protocol="DUMMY")
    stranger = as_user("stranger")
    for asked in (stranger.job, stranger.status, stranger.elements, stranger.output, stranger.cancel, stranger.retry):
        with pytest.raises(NotFoundError, match=f"no job {job.id}"):
            await asked(job.id)
    with pytest.raises(NotFoundError):
        await as_user("owner").element(job.id, 99)
    with pytest.raises(OutputNotReadyError):
        await as_user("owner").element_output(job.id, 0)


@ensure
async def test_what_is_wrong_with_a_request_is_named(as_user: ClientOf) -> None:
    client = as_user("careless")
    with pytest.raises(InvalidRequestError) as caught:
        await client.copy(1, "a\0b", 2, "b", protocol="DUMMY")
    assert caught.value.pointer == "$.src_filepath"
    assert caught.value.request_id
    with pytest.raises(InvalidRequestError) as caught:
        await client.list(1, "a", protocol="DUMMY", options={"dpeth": 1})
    assert "depth" in str(caught.value)


@ensure
async def test_a_lost_log_is_a_fault_with_a_number(
    as_user: ClientOf, service: Service, lost_errors: list[LogEvent]
) -> None:
    client = as_user("loser")
    job = await client.mkdir(1, "/there", protocol="DUMMY")
    (token,) = await service.claim(job.id)
    await service.settle(token, log=None)
    with pytest.raises(ServerFaultError) as caught:
        await client.element_output(job.id, 0)
    assert "to an operator" in str(caught.value)
    assert [event.get("word") for event in lost_errors] == ["log-missing"]
    lost_errors.clear()
