"""S3 servers of other makes, each on a free port of loopback with TLS: one in memory, one that keeps files on disk."""

from __future__ import annotations

import ssl
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.storage_servers import ServerProcess

ACCESS_KEY, SECRET_KEY = "AKIACANARY4711", "canarysecretofs3"
_BIN = Path(sys.executable).parent


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


class MotoServer(S3Server):
    """moto: objects in memory; heeds conditions, and does not check the MD5 of a request."""

    def command(self) -> Sequence[str]:
        certificate, key = str(self.host.certificate), str(self.host.key)
        return [str(_BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port), "-c", certificate, "-k", key]

    def start(self) -> None:
        super().start()
        # Its state is gone with it; it takes any signature.
        context = ssl.create_default_context(cafile=str(self.host.certificate))
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        made = urllib.request.Request(f"https://localhost:{self.port}/bucket", method="PUT")
        made.add_header("Authorization", f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/20260101/us-east-1/s3/aws4_request")
        with urllib.request.urlopen(made, context=context):
            pass


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


MAKES: Mapping[str, type[S3Server]] = {"moto": MotoServer, "rclone": RcloneServer}
