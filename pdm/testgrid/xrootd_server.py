"""An XRootD server: root:// with GSI, and HTTPS with WebDAV; third-party copies by both."""

from __future__ import annotations

import base64
import os
import pwd
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdm.testgrid.credentials import GridCredentials
from pdm.testgrid.daemons import Daemon, free_port
from pdm.testgrid.programs import program

_WIDTH = 64


class XrootdServer(Daemon):
    """``https://localhost:PORT`` and ``root://localhost:PORT``; paths at it are the real ones.

    XRootD refuses to run as root: started by root it runs as ``account``.

    Args:
        folder: of all servers; accounts must be able to enter it.
        name: of the server.
        exported: the folder that it serves.
        credentials: whose certificates it has and trusts.
        account: local account that it runs as.
    """

    def __init__(
        self, folder: Path, name: str, exported: Path, credentials: GridCredentials, account: str | None = None
    ) -> None:
        super().__init__(folder, name)
        self._exported = exported
        self._credentials = credentials
        self._account = account
        self._own = folder / name
        #: Where it speaks its own protocol; kept over `stop` and `start`, as `port` is.
        self.root_port = 0
        self._prepare()

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def root_url(self) -> str:
        """Where it speaks its own protocol."""
        return f"root://localhost:{self.root_port}"

    def account(self) -> tuple[int, int] | None:
        if self._account is None:
            return None
        entry = pwd.getpwnam(self._account)
        return entry.pw_uid, entry.pw_gid

    def environment(self) -> Mapping[str, str]:
        # The program that copies on a client's behalf looks for the authorities here.
        return {"X509_CERT_DIR": str(self._credentials.trust)}

    def _prepare(self) -> None:
        for sub in ("admin", "pid"):
            (self._own / sub).mkdir(parents=True)
        host = self._credentials.host
        shutil.copyfile(host.certificate, self._own / "host.pem")
        shutil.copyfile(host.key, self._own / "host.key")
        text = base64.b64encode(os.urandom(64)).decode()
        (self._own / "macaroon.secret").write_text(
            "".join(text[start : start + _WIDTH] + "\n" for start in range(0, len(text), _WIDTH))
        )
        name = self._account or pwd.getpwuid(os.geteuid()).pw_name
        (self._own / "gridmap").write_text(f'"{self._credentials.users["alice"].dn}" {name}\n')
        (self._own / "authdb").write_text(f"u {name} / a\n")
        account = self.account()
        for path in (self._own, *self._own.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o600)
            if account is not None:
                os.chown(path, *account)

    def command(self) -> Sequence[str]:
        own, trust = self._own, self._credentials.trust
        configuration = self.folder / f"{self.name}.conf"
        self.root_port = self.root_port or free_port()
        configuration.write_text(f"""\
all.sitename {self.name}
all.adminpath {own}/admin
all.pidpath {own}/pid
all.export {self._exported}
xrd.port {self.root_port}
xrd.network nodnr
xrd.allow host localhost
xrd.tls {own}/host.pem {own}/host.key
xrd.tlsca certdir {trust}
xrootd.seclib libXrdSec.so
sec.protocol gsi -certdir:{trust} -cert:{own}/host.pem -key:{own}/host.key -gridmap:{own}/gridmap -gmapopt:2 \
-crl:0 -vomsat:0 -dlgpxy:1 -exppxy:=creds
sec.protbind * only gsi
ofs.authorize 1
ofs.authlib ++ libXrdMacaroons.so
acc.authdb {own}/authdb
ofs.tpc fcreds ?gsi =X509_USER_PROXY ttl 60 60 xfr 100 autorm pgm {program("xrdcp")} --server
macaroons.secretkey {own}/macaroon.secret
xrootd.chksum max 4 adler32 crc32 md5
xrd.protocol http:{self.port} libXrdHttp.so
http.gridmap {own}/gridmap
http.listingdeny no
http.exthandler xrdtpc libXrdHttpTPC.so
http.exthandler xrdmacaroons libXrdMacaroons.so
http.header2cgi Authorization authz
""")
        return [str(program("xrootd")), "-c", str(configuration)]
