"""Bearer tokens that the XRootD servers of the tests take: macaroons, which they give for alice's proxy."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from urllib.parse import quote

from pdm.testgrid.storages import TestStorages
from tests.security import canary


def macaroon(storages: TestStorages, site: str, path: Path, validity_s: int = 3600) -> str:
    """What the server of a site gives to alice's proxy for all that is below a path."""
    environment = storages.environment()
    context = ssl.create_default_context(capath=environment["X509_CERT_DIR"])
    context.load_cert_chain(environment["X509_USER_PROXY"])
    connection = http.client.HTTPSConnection("localhost", storages.xrootd[site].port, context=context)
    asked = json.dumps({"caveats": ["activity:DOWNLOAD,UPLOAD,LIST,MANAGE,DELETE"], "validity": f"PT{validity_s}S"})
    connection.request("POST", quote(bytes(path)), asked, {"Content-Type": "application/macaroon-request"})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert answer.status == 200, said
    return canary.watched(str(json.loads(said)["macaroon"]))
