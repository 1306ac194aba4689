"""HTTPS with a bearer token and no proxy: a macaroon that the server gives; it goes to its own server only."""

from __future__ import annotations

import json
from pathlib import Path

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire.agent_events import DoneEvent
from tests.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged
from tests.protocols.tokens import macaroon

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]


def test_each_server_gets_its_own_token(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    told = {}
    for site, directory in (("A", places.a), ("B", places.b)):
        (tmp_path / site).write_text(macaroon(storages, site, directory))
        told[storages.xrootd[site].url] = {"file": str(tmp_path / site), "account": None}
    environment = {**storages.environment(), "X509_USER_PROXY": ""}
    source = places.put(places.a / "file", b"content")
    with HelperProcess(RELAY, {**environment, "PDM_CREDENTIALS": json.dumps(told)}) as helper:
        assert isinstance(helper.list(places.url("https", places.a))[-1], DoneEvent)
        copied = helper.copy([places.item("https", source, places.b / "copy")])[1]
        assert isinstance(copied, DoneEvent), copied
    assert (places.b / "copy").read_bytes() == b"content"
    del told[storages.xrootd["A"].url]
    with HelperProcess(RELAY, {**environment, "PDM_CREDENTIALS": json.dumps(told)}) as helper:
        assert judged("https", helper.list(places.url("https", places.a))[-1]) == "source PERMISSION_DENIED"
