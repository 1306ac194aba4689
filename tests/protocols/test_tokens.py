"""HTTPS with a bearer token and no proxy: a macaroon that the server gives; it goes to its own server only."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from urllib.parse import quote

from pdm.testgrid.storages import TestStorages
from pdm.workqueue.wire import agent_messages as wire
from tests.agents.helpers.driver import HelperProcess
from tests.protocols.places import Places, judged

RELAY = ["-m", "pdm.workqueue.agents.helpers.relay"]


def macaroon(storages: TestStorages, site: str, path: Path) -> str:
    """What the server of a site gives to alice's proxy for all that is below a path."""
    environment = storages.environment()
    context = ssl.create_default_context(capath=environment["X509_CERT_DIR"])
    context.load_cert_chain(environment["X509_USER_PROXY"])
    connection = http.client.HTTPSConnection("localhost", storages.xrootd[site].port, context=context)
    asked = json.dumps({"caveats": ["activity:DOWNLOAD,UPLOAD,LIST,MANAGE,DELETE"], "validity": "PT60M"})
    connection.request("POST", quote(bytes(path)), asked, {"Content-Type": "application/macaroon-request"})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert answer.status == 200, said
    return str(json.loads(said)["macaroon"])


def test_each_server_gets_its_own_token(storages: TestStorages, places: Places, tmp_path: Path) -> None:
    told = {}
    for site, folder in (("A", places.a), ("B", places.b)):
        (tmp_path / site).write_text(macaroon(storages, site, folder))
        told[storages.xrootd[site].url] = {"file": str(tmp_path / site), "account": None}
    environment = {**storages.environment(), "X509_USER_PROXY": ""}
    source = places.put(places.a / "file", b"content")
    with HelperProcess(RELAY, {**environment, "PDM_CREDENTIALS": json.dumps(told)}) as helper:
        assert isinstance(helper.list(places.url("https", places.a))[-1], wire.Done)
        copied = helper.copy([places.item("https", source, places.b / "copy")])[1]
        assert isinstance(copied, wire.Done), copied
    assert (places.b / "copy").read_bytes() == b"content"
    del told[storages.xrootd["A"].url]
    with HelperProcess(RELAY, {**environment, "PDM_CREDENTIALS": json.dumps(told)}) as helper:
        assert judged("https", helper.list(places.url("https", places.a))[-1]) == "source PERMISSION_DENIED"
