"""Authorities for single servers: those of the one vouch for no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.wire import agent_messages as wire
from tests.agents.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged

RELAY = ["-m", "pdm.workqueue.agents.helpers.relay"]


@pytest.mark.parametrize("protocol", ["https", "xroot"])
def test_each_server_is_vouched_for_by_its_own(
    protocol: str, storages: TestStorages, places: Places, tmp_path: Path
) -> None:
    """Also when another server of the same copy has the authority that has signed this one."""
    assert storages.credentials is not None
    for name in ("usual", "other"):
        Authority.create(f"/DC=org/DC={name}/CN={name} CA").write_trust(tmp_path / name)
    right, other = str(storages.credentials.trust), str(tmp_path / "other")
    urls = {site: "/".join(storages.url(protocol, site, tmp_path).split("/")[:3]) for site in "AB"}
    source = places.put(places.a / "file")

    def run(told: dict[str, str]) -> tuple[wire.Event, wire.Event, wire.Event]:
        changes = {"X509_CERT_DIR": str(tmp_path / "usual"), "PDM_TRUST": json.dumps(told)}
        with HelperProcess(RELAY, {**storages.environment(), **changes}) as helper:
            at_a, at_b = (helper.list(places.url(protocol, folder))[-1] for folder in (places.a, places.b))
            return at_a, at_b, helper.copy([places.item(protocol, source, places.b / "copy")])[1]

    at_a, at_b, copied = run({urls["A"]: right, urls["B"]: other})
    assert isinstance(at_a, wire.Done)
    assert judged(protocol, at_b) == "source CERTIFICATE"
    assert judged(protocol, copied) == "destination CERTIFICATE"
    assert list(places.b.iterdir()) == []
    # Of the second nothing is told, or two things under two names: only what is trusted everywhere counts, or nothing.
    for told in (
        {urls["A"]: right},
        {urls["A"]: right, urls["B"]: right, urls["B"].replace("localhost", "LOCALHOST"): other},
    ):
        assert judged(protocol, run(told)[1]) == "source CERTIFICATE"
    assert all(isinstance(event, wire.Done) for event in run(dict.fromkeys(urls.values(), right)))
