"""Authorities for single servers: those of the one vouch for no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent
from tests.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]


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

    def run(told: dict[str, str]) -> tuple[AgentEvent, AgentEvent, AgentEvent]:
        changes = {"X509_CERT_DIR": str(tmp_path / "usual"), "PDM_TRUST": json.dumps(told)}
        with HelperProcess(RELAY, {**storages.environment(), **changes}) as helper:
            at_a, at_b = (helper.list(places.url(protocol, directory))[-1] for directory in (places.a, places.b))
            return at_a, at_b, helper.copy([places.item(protocol, source, places.b / "copy")])[1]

    at_a, at_b, copied = run({urls["A"]: right, urls["B"]: other})
    assert isinstance(at_a, DoneEvent)
    assert judged(protocol, at_b) == "source CERTIFICATE"
    assert judged(protocol, copied) == "destination CERTIFICATE"
    assert list(places.b.iterdir()) == []
    # Authorities for the second name are missing or differ: only those trusted for all servers count, or none.
    for told in (
        {urls["A"]: right},
        {urls["A"]: right, urls["B"]: right, urls["B"].replace("localhost", "LOCALHOST"): other},
    ):
        assert judged(protocol, run(told)[1]) == "source CERTIFICATE"
    assert all(isinstance(event, DoneEvent) for event in run(dict.fromkeys(urls.values(), right)))


def test_an_authority_signs_no_server_of_another(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    """A signing policy that does not permit the server's subject, beside the authority that has signed it."""
    assert storages.credentials is not None
    trust = tmp_path / "trust"
    shutil.copytree(storages.credentials.trust, trust)
    good = {each: each.read_text() for each in trust.glob("*.signing_policy")}
    assert good
    places.put(places.a / "file")
    listed = places.url("https", places.a)
    changes = {"X509_CERT_DIR": str(trust)}
    with HelperProcess(RELAY, {**storages.environment(), **changes}) as helper:
        assert isinstance(helper.list(listed)[-1], DoneEvent)
        for text in ("cond_subjects globus '\"/DC=org/DC=elsewhere/*\"'\n", "nonsense\n"):
            for path, before in good.items():
                path.write_text(before.partition("cond_subjects")[0] + text)
            with HelperProcess(RELAY, {**storages.environment(), **changes}) as another:
                event = another.list(listed)[-1]
            assert judged("https", event) == "source CERTIFICATE"
            assert "may not sign such a subject" in str(event)
        for path, before in good.items():
            path.write_text(before)
        assert isinstance(helper.list(listed)[-1], DoneEvent)
