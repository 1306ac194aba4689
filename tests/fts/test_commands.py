"""Each command of CERN's client with each of its options, once: what the door takes, and what it refuses by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.fts.conftest import FtsClients

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
#: Nothing answers there.
SOURCE, DESTINATION = "gsiftp://192.0.2.1/x", "gsiftp://192.0.2.2/y"
TAKEN = "Job successfully submitted"
#: Options of transfer-submit → what it prints.
SUBMISSIONS = {
    "": TAKEN,
    "-o": TAKEN,
    "--overwrite-on-retry": TAKEN,
    "-r": TAKEN,
    '--job-metadata {"a":1}': TAKEN,
    '--file-metadata {"a":1}': TAKEN,
    '--staging-metadata {"a":1}': TAKEN,
    '--archive-metadata {"a":1}': TAKEN,
    "--file-size 5": TAKEN,
    "-g nostreams:3": TAKEN,
    "-K": TAKEN,
    "-C target": TAKEN,
    "--copy-pin-lifetime 600": TAKEN,
    "--dst-file-report": TAKEN,
    "--timeout 60": TAKEN,
    "--retry 2": TAKEN,
    "-p 5": TAKEN,
    "-e 2": TAKEN,
    "--delegate-when-lifetime-lt 5": TAKEN,
    "--nostreams 4": TAKEN,
    "--ipv4": TAKEN,
    "--ipv6": TAKEN,
    "--s3alternate": TAKEN,
    "--buffer-size 1024": TAKEN,
    "--strict-copy": TAKEN,
    "--disable-cleanup": TAKEN,
    "--activity express": TAKEN,
    "--scitag 70": TAKEN,
    "--overwrite-hop": "overwrite_hop: this service copies without hops",
    "--overwrite-when-only-on-disk --archive-timeout 60": "overwrite_when_only_on_disk: this service",
    "-t TOKEN": "destination_spacetoken: space tokens belong to SRM",
    "-S TOKEN": "source_spacetoken: space tokens belong to SRM",
    "--fail-nearline": "fail_nearline: this service",
    "-m": "multihop: this service copies without hops",
    "--cloud-credentials dropbox": "credential: this service has no credentials",
}


def test_each_option_of_a_submission(clients: FtsClients, tmp_path: Path) -> None:
    found = {}
    for number, options in enumerate(SUBMISSIONS):
        _, output = clients.attempt("alice", "transfer-submit", *options.split(), SOURCE, f"{DESTINATION}{number}")
        if (job := re.search(r"Job id: (\S+)", output)) is not None:
            clients.attempt("alice", "transfer-cancel", job[1])
        found[options] = SUBMISSIONS[options] if SUBMISSIONS[options] in output else output
    assert found == SUBMISSIONS
    jobs = len(json.loads(clients.command("alice", "transfer-list", "-j")))
    assert '"sources"' in clients.command("alice", "transfer-submit", "--dry-run", SOURCE, DESTINATION)
    assert len(json.loads(clients.command("alice", "transfer-list", "-j"))) == jobs


def test_the_other_commands_with_their_options(clients: FtsClients) -> None:
    names = {user: clients.grid.description()["users"][user]["dn"] for user in ("alice", "bob")}
    output = clients.command("alice", "transfer-submit", SOURCE, f"{DESTINATION}z")
    job = output.split("Job id: ")[1].split()[0]

    def said(user: str, *command: str) -> str:
        return clients.attempt(user, *command)[1]

    assert json.loads(said("alice", "whoami", "-j"))["user_dn"] == names["alice"]
    for options in ((), ("-f", "-H", "3"), ("--legacy-mode",)):
        assert "Delegation id: " in said("alice", "delegate", *options)
    filters = (
        ("-u", names["alice"]),
        ("-o", json.loads(said("alice", "whoami", "-j"))["vos"][0]),
        ("--source", "gsiftp://192.0.2.1"),
        ("--destination", "gsiftp://192.0.2.2"),
    )
    for option, value in filters:
        assert job in said("alice", "transfer-list", option, value), option
    assert job not in said("alice", "transfer-list", "--source", "gsiftp://192.0.2.9")
    # A list of another user's jobs is refused, as by FTS3.
    assert "do not correspond" in said("alice", "transfer-list", "-u", names["bob"])
    deletion = said("alice", "delete-submit", SOURCE)
    assert "405" in deletion or "Method" in deletion
    assert "Forbidden" in said("alice", "server-status") or "operator" in said("alice", "server-status")
    assert re.search(r"active: \d+\s+staging: 0", said("admin", "server-status"))
    assert clients.attempt("admin", "server-status", "--is-active")[0] in (0, 1)

    storage = ("--storage", "gsiftp://192.0.2.1")
    refused = said("admin", "ban", *storage, "--status", "wait", "--timeout", "60")
    assert "timeout: jobs that wait for a banned storage" in refused
    assert "operator" in said("alice", "ban", *storage) or "Forbidden" in said("alice", "ban", *storage)
    assert job in said("admin", "ban", *storage, "--status", "wait", "--allow-submit")
    assert TAKEN in said("alice", "transfer-submit", SOURCE, f"{DESTINATION}w")
    assert job in said("admin", "ban", *storage)
    assert TAKEN not in said("alice", "transfer-submit", SOURCE, f"{DESTINATION}v")
    assert clients.attempt("admin", "ban", *storage, "--unban")[0] == 0
    assert TAKEN in said("alice", "transfer-submit", SOURCE, f"{DESTINATION}v")
    assert "CANCELED" in said("alice", "transfer-status", job)
    said("admin", "ban", "--user", names["alice"])
    assert TAKEN not in said("alice", "transfer-submit", SOURCE, f"{DESTINATION}u")
    assert clients.attempt("admin", "ban", "--user", names["alice"], "--unban")[0] == 0
    assert TAKEN in said("alice", "transfer-submit", SOURCE, f"{DESTINATION}u")
