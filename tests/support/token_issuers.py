"""A certified token issuer as a process, and an XRootD server that takes its tokens."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.storage_servers import XrootdServer

_SCRIPT = Path(__file__).with_name("oidc_provider.mjs")
#: Where script/bootstrap installs the package.
_MODULES = Path(__file__).parents[2] / ".venv" / "oidc-provider" / "node_modules"
_PLUGIN = Path("/usr/lib/x86_64-linux-gnu/libXrdAccSciTokens-5.so")
SECRET = "a secret of the tests"
SCOPES = "storage.read:/ storage.modify:/"


def require_issuer() -> None:
    """Skip the test where the packages are not installed."""
    if shutil.which("node") is None or not _MODULES.exists():
        pytest.skip("node or npm's oidc-provider is not installed: run script/bootstrap where npm is")
    if not _PLUGIN.exists():
        pytest.skip("xrootd-scitokens-plugins is not installed")


class OidcProvider:
    """The issuer, with one client; its state is in memory only.

    Args:
        directory: of the tests; the script is copied there, beside the package.
    """

    def __init__(self, directory: Path, credentials: GridCredentials, audience: str, lifetime_s: int) -> None:
        self._directory = directory / "issuer"
        self._directory.mkdir()
        self._host = credentials.host
        self._context = ssl.create_default_context(capath=str(credentials.trust))
        self._audience, self._lifetime_s = audience, lifetime_s
        self._process: subprocess.Popen[str] | None = None
        self.port = reserve_port()
        shutil.copy(_SCRIPT, self._directory)
        (self._directory / "node_modules").symlink_to(_MODULES)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def start(self) -> None:
        host = [str(self._host.certificate), str(self._host.key)]
        command = ["node", _SCRIPT.name, str(self.port), *host, self._audience, str(self._lifetime_s), SCOPES]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._directory, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        assert self._process.stdout is not None
        lines = iter(self._process.stdout.readline, "")
        assert any(line.startswith("https://") for line in lines), (self._directory / "log").read_text()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, context=self._context, timeout=20) as answer:
            return str(answer.read().decode())

    def approve(self, user_code: str) -> None:
        assert self.get(f"/approve?user_code={user_code}") == "approved"


class TokenStorage(XrootdServer):
    """An XRootD server whose HTTPS takes tokens of an issuer, with paths below its exported directory.

    Attributes:
        issuer: URL; its keys are in the server's cache, for its library trusts the authorities of the system only.
    """

    issuer = ""

    def trust(self, issuer: OidcProvider) -> None:
        """Let tokens of an issuer in; before the start."""
        self.issuer = issuer.url
        cache = self._own / "cache" / "scitokens"
        cache.mkdir(parents=True)
        until = int(time.time()) + 86400
        keys = {"jwks": json.loads(issuer.get("/jwks")), "next_update": until, "expires": until}
        with contextlib.closing(sqlite3.connect(cache / "scitokens_cpp.sqllite")) as database, database:
            database.execute("CREATE TABLE keycache (issuer text UNIQUE PRIMARY KEY NOT NULL, keys text NOT NULL)")
            database.execute("INSERT INTO keycache VALUES (?, ?)", (self.issuer, json.dumps(keys)))
        account = self.account()
        for path in (cache.parent, cache, *cache.iterdir()):
            if account is not None:
                shutil.chown(path, *account)

    def environment(self) -> Mapping[str, str]:
        return {**super().environment(), "XDG_CACHE_HOME": str(self._own / "cache")}

    def command(self) -> Sequence[str]:
        command = super().command()
        rules = self._own / "scitokens.cfg"
        rules.write_text(
            f"[Global]\naudience = {self.url}\n[Issuer tests]\nissuer = {self.issuer}\n"
            f"base_path = {self._exported}\nmap_subject = False\n"
        )
        configuration = Path(command[-1])
        text = configuration.read_text()
        configuration.write_text(
            text.replace(
                "ofs.authlib ++ libXrdMacaroons.so", f"ofs.authlib ++ libXrdAccSciTokens.so config={rules}"
            ).replace("http.exthandler xrdmacaroons libXrdMacaroons.so\n", "")
        )
        return command


@contextlib.contextmanager
def issuer_and_storage(
    directory: Path, exported: Path, credentials: GridCredentials, account: str | None, lifetime_s: int
) -> Iterator[tuple[OidcProvider, TokenStorage]]:
    """Both, running."""
    storage = TokenStorage(directory, "tokens", exported, credentials, account)
    storage.port = reserve_port()
    issuer = OidcProvider(directory, credentials, storage.url, lifetime_s)
    try:
        issuer.start()
        storage.trust(issuer)
        storage.start()
        yield issuer, storage
    finally:
        storage.stop()
        issuer.stop()
