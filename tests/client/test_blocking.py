"""The client for programs without a reactor. Each test is a program of its own: a reactor runs once in a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from pdm.workqueue.blocking import BlockingWorkqueueClient
from pdm.workqueue.WorkqueueClient import WorkqueueClient
from tests.client.fault_server import FaultServer, answer
from tests.client.samples import job_view

JOB = msgspec.json.encode(job_view(status="DONE"))
BEGIN = "from pdm.workqueue.blocking import BlockingWorkqueueClient as Client\nclient = Client.from_environment()\n"


def environment(server: FaultServer, pki: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PDM_URL": server.url,
        "PDM_CERT": str(pki / "alice.crt"),
        "PDM_KEY": str(pki / "alice.key"),
        "PDM_CA": str(pki / "ca.crt"),
    }


def program(server: FaultServer, pki: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment(server, pki),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_it_has_each_method_of_the_client() -> None:
    own = {"from_settings", "from_environment"}
    methods = {name for name in vars(WorkqueueClient) if not name.startswith("_")} - own - {"pause"}
    assert methods <= set(vars(BlockingWorkqueueClient))
    for name in methods:
        assert getattr(BlockingWorkqueueClient, name).__doc__ == getattr(WorkqueueClient, name).__doc__


def test_values_come_back_and_the_program_ends(server: FaultServer, pki: Path) -> None:
    server.behaviours[:] = [answer("200 OK", JOB)]
    done = program(
        server,
        pki,
        BEGIN
        + "with client:\n"
        + "    job = client.copy(1, '/a', 2, '/b', label='x')\n"
        + "    seen = []\n"
        + "    print(client.wait(job.id, on_progress=seen.append).status, len(seen))\n"
        + "other = Client.from_environment()\n"
        + "print(other.job(7).id)\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "DONE 1\n7\n", "")


def test_lists_are_iterated_and_errors_raised_where_the_call_is(server: FaultServer, pki: Path) -> None:
    pages = [[job_view(id=i) for i in range(1, 501)], [job_view(id=501)]]
    server.behaviours[:] = [
        *(answer("200 OK", msgspec.json.encode(page)) for page in pages),
        answer("404 No", b'{"title": "no", "detail": "you have no job 9"}'),
    ]
    done = program(
        server,
        pki,
        BEGIN
        + "from pdm.workqueue.client.errors import NotFoundError\n"
        + "print([job.id for job in client.iterate_jobs()][-2:])\n"
        + "try:\n    client.job(9)\nexcept NotFoundError as error:\n    print(error)\n"
        + "try:\n    client.list(1, '/a', lable='x')\nexcept TypeError as error:\n    print(error)\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "[500, 501]",
        "you have no job 9",
        "unknown options of a submission: lable",
    ]


def test_a_reactor_that_runs_already_is_used(server: FaultServer, pki: Path) -> None:
    server.behaviours[:] = [answer("200 OK", JOB)]
    done = program(
        server,
        pki,
        "from twisted.internet import reactor, threads\n"
        "from pdm.workqueue.blocking import BlockingWorkqueueClient as Client\n"
        "def work():\n"
        "    with Client.from_environment() as client:\n"
        "        return client.job(7).id\n"
        "def inside():\n"
        "    try:\n"
        "        Client.from_environment().job(7)\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "    threads.deferToThread(work).addCallback(print).addBoth(lambda _: reactor.stop())\n"
        "reactor.callWhenRunning(inside)\n"
        "reactor.run()\n",
    )
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert "use WorkqueueClient there" in first
    assert second == "7"


def test_interrupting_ends_the_waiting(server: FaultServer, pki: Path) -> None:
    server.behaviours[:] = [server.silent]
    code = BEGIN + "try:\n    client.job(7)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    with subprocess.Popen(
        # A test run that a shell has put into the background passes on that SIGINT is ignored.
        ["env", "--default-signal=INT", sys.executable, "-c", code],
        env=environment(server, pki),
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        while not server.seen:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=20)
    assert (running.returncode, output) == (0, "interrupted\n")
