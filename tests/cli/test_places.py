"""From what was typed to what the API wants."""

from __future__ import annotations

import pytest

from pdm.workqueue.cli.arguments import common_name, protocol_for
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.responses import SiteView


def site(name: str, *protocols: str) -> SiteView:
    endpoints = {protocol: f"{protocol.lower()}://{name}" for protocol in protocols}
    return SiteView(id=1, name=name, description="", protocols=list(protocols), default_folder="/", endpoints=endpoints)


@pytest.mark.parametrize(
    ("source", "destination", "chosen"),
    [
        (["GRIDFTP", "HTTPS"], ["GRIDFTP", "HTTPS"], "GRIDFTP"),
        (["HTTPS", "DUMMY"], ["HTTPS", "DUMMY"], "HTTPS"),
        (["DUMMY"], ["DUMMY"], "DUMMY"),
        # Through the service, rather than not at all, or in make-believe.
        (["FILE"], ["SSH"], "FILE"),
        (["GRIDFTP", "XROOT"], ["FILE"], "XROOT"),
        (["FILE", "DUMMY"], ["HTTPS", "DUMMY"], "FILE"),
    ],
)
def test_the_way_that_leads_there_is_chosen(source: list[str], destination: list[str], chosen: str) -> None:
    found = protocol_for([site("a", *source), site("b", *destination)], None)
    assert found is JobProtocol[chosen]
    # The service would take it.
    offered = {JobProtocol[name] for name in destination}
    assert offered & {found, *MOVERS[found].relays_to}


def test_without_a_way_it_says_what_there_is() -> None:
    with pytest.raises(CommandError) as caught:
        protocol_for([site("a", "GRIDFTP"), site("b", "SSH")], None)
    assert caught.value.code == ExitCode.USAGE
    assert "a offers GRIDFTP; b offers SSH" in caught.value.what
    assert "SSH, FILE, HTTPS, XROOT" in caught.value.advice
    assert protocol_for([site("a", "GRIDFTP"), site("b", "SSH")], "file") is JobProtocol.FILE


def test_common_names() -> None:
    assert common_name("/C=UK/O=Grid/CN=alice smith") == "alice smith"
    assert common_name("/DC=org") == "/DC=org"
