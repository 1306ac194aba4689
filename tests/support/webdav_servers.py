"""WebDAV servers of other makes, each on a free port of loopback with TLS, for the directory of one site.

All present the test grid's host certificate. If started by root they run as a local account, so that permissions apply.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pdm.testgrid.identities import GridCredentials
from pdm.testgrid.storage_servers import ServerProcess

_APACHE_MODULES = (
    *("mpm_event", "authn_core", "authz_core", "authz_host", "dav", "dav_fs", "dav_lock", "dir", "setenvif", "ssl"),
    *("socache_shmcb", "alias", "env"),
)


class WebDavServer(ServerProcess):
    """``https://localhost:PORT``; paths at it begin in the exported directory.

    Args:
        directory: of all servers; accounts must be able to enter it.
        name: of the server.
        exported: the directory that it serves.
        credentials: whose host certificate it has.
        account: local account that it runs as.
    """

    #: Required programs.
    programs: tuple[str, ...] = ()

    def __init__(
        self, directory: Path, name: str, exported: Path, credentials: GridCredentials, account: str | None = None
    ) -> None:
        super().__init__(directory, name, account)
        self.exported = exported
        self.credentials = credentials
        self.own = directory / name
        self.own.mkdir()
        exported.mkdir(parents=True, exist_ok=True)
        host = credentials.host
        shutil.copyfile(host.certificate, self.own / "host.pem")
        shutil.copyfile(host.key, self.own / "host.key")
        (self.own / "both.pem").write_bytes(host.key.read_bytes() + host.certificate.read_bytes())
        for path in self.own.iterdir():
            path.chmod(0o600)
        self._give(self.own, *self.own.iterdir(), exported)

    def _give(self, *paths: Path) -> None:
        who = self.account()
        if who is not None:
            for path in paths:
                os.chown(path, *who)

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def environment(self) -> Mapping[str, str]:
        return {"HOME": str(self.own), "TMPDIR": str(self.own)}

    def configured(self, text: str) -> Path:
        """The path of a configuration file with this content."""
        path = self.own / "conf"
        path.write_text(text)
        path.chmod(0o644)
        return path


class ApacheServer(WebDavServer):
    """Apache httpd with mod_dav.

    Args:
        more: lines for its ``Directory`` section.
        tls: whether it speaks TLS itself.
    """

    programs = ("apache2",)

    def __init__(
        self,
        directory: Path,
        name: str,
        exported: Path,
        credentials: GridCredentials,
        account: str | None = None,
        *,
        more: str = "Require all granted",
        tls: bool = True,
    ) -> None:
        super().__init__(directory, name, exported, credentials, account)
        self.more = more
        self._tls = tls

    def command(self) -> Sequence[str]:
        modules = "\n".join(
            f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in _APACHE_MODULES
        )
        tls = ""
        if self._tls:
            tls = f"SSLEngine on\nSSLCertificateFile {self.own}/host.pem\nSSLCertificateKeyFile {self.own}/host.key"
        configuration = self.configured(f"""\
ServerRoot {self.own}
ServerName localhost
PidFile {self.own}/pid
DefaultRuntimeDir {self.own}
Mutex file:{self.own} default
ErrorLog {self.own}/error.log
{modules}
Listen 127.0.0.1:{self.port}
DocumentRoot {self.exported}
StartServers 1
MinSpareThreads 5
MaxSpareThreads 25
ThreadsPerChild 25
SSLSessionCache none
DavLockDB {self.own}/locks
AllowEncodedSlashes NoDecode
{tls}
<Directory {self.exported}>
  Dav On
  DirectoryIndex disabled
  {self.more}
</Directory>
""")
        return ["/usr/sbin/apache2", "-f", str(configuration), "-DFOREGROUND"]


#: Requests need a client certificate, which Apache requests after it has read the path, in TLS 1.3 after the
#: handshake. mod_ssl accepts no proxy for this, only the user's own certificate.
APACHE_CLIENT_CERTIFICATE = """SSLVerifyClient optional_no_ca
  Require expr "%{SSL_CLIENT_S_DN} =~ /alice/\""""


class NginxServer(WebDavServer):
    """nginx with its own dav module and ngx_http_dav_ext, or as a TLS proxy before another server.

    Args:
        more: lines for its ``location`` section.
        backend: a server to which all requests go; it is started and stopped together with this one.
    """

    programs = ("nginx",)

    def __init__(
        self,
        directory: Path,
        name: str,
        exported: Path,
        credentials: GridCredentials,
        account: str | None = None,
        *,
        more: str = "",
        backend: WebDavServer | None = None,
    ) -> None:
        super().__init__(directory, name, exported, credentials, account)
        self.more = more
        self._backend = backend

    def start(self) -> None:
        if self._backend is not None and self._backend.pid is None:
            self._backend.start()
        super().start()

    def kill(self) -> None:
        super().kill()
        if self._backend is not None:
            self._backend.kill()

    def command(self) -> Sequence[str]:
        served = f"""
      root {self.exported};
      dav_methods PUT DELETE MKCOL COPY MOVE;
      dav_ext_methods PROPFIND OPTIONS;"""
        if self._backend is not None:
            served = f"""
      proxy_pass http://127.0.0.1:{self._backend.port};
      proxy_set_header Host $http_host;
      proxy_request_buffering off;"""
        temporary = "\n".join(
            f"  {kind}_temp_path {self.own}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        configuration = self.configured(f"""\
load_module /usr/lib/nginx/modules/ngx_http_dav_ext_module.so;
daemon off;
worker_processes 1;
pid {self.own}/pid;
error_log stderr;
events {{ worker_connections 256; }}
http {{
  access_log off;
{temporary}
  client_max_body_size 64m;
  server {{
    listen 127.0.0.1:{self.port} ssl;
    ssl_certificate {self.own}/host.pem;
    ssl_certificate_key {self.own}/host.key;
    location / {{{served}
      {self.more}
    }}
  }}
}}
""")
        return ["/usr/sbin/nginx", "-c", str(configuration), "-e", "stderr", "-p", str(self.own)]


class LighttpdServer(WebDavServer):
    """lighttpd with mod_webdav, without TLS: for use behind a proxy."""

    programs = ("lighttpd",)

    def command(self) -> Sequence[str]:
        configuration = self.configured(f"""\
server.modules = ( "mod_webdav" )
server.document-root = "{self.exported}"
server.port = {self.port}
server.bind = "127.0.0.1"
server.upload-dirs = ( "{self.own}" )
server.errorlog = "{self.own}/error.log"
webdav.activate = "enable"
webdav.is-readonly = "disable"
webdav.sqlite-db-name = "{self.own}/webdav.db"
""")
        return ["/usr/sbin/lighttpd", "-D", "-f", str(configuration)]


class RcloneServer(WebDavServer):
    """``rclone serve webdav`` of a local directory."""

    programs = ("rclone",)

    def command(self) -> Sequence[str]:
        return [
            "/usr/bin/rclone",
            *("serve", "webdav", str(self.exported), "--addr", f"localhost:{self.port}"),
            *("--cert", f"{self.own}/host.pem", "--key", f"{self.own}/host.key"),
            *("--config", f"{self.own}/rclone.conf", "--dir-cache-time", "0s", "--cache-dir", f"{self.own}/cache"),
        ]


class _PythonServer(WebDavServer):
    """Runs under the tests' interpreter, which the account may not be able to reach, so as the caller."""

    def account(self) -> tuple[int, int] | None:
        return None


class WsgiDavServer(_PythonServer):
    """WsgiDAV under cheroot."""

    def command(self) -> Sequence[str]:
        configuration = self.configured(f"""\
host: 127.0.0.1
port: {self.port}
server: cheroot
ssl_certificate: {self.own}/host.pem
ssl_private_key: {self.own}/host.key
ssl_adapter: builtin
provider_mapping:
  "/": "{self.exported}"
simple_dc:
  user_mapping: {{"*": true}}
dir_browser:
  enable: false
""")
        yaml = configuration.rename(self.own / "wsgidav.yaml")
        run = "import sys; from wsgidav.server.server_cli import run; sys.argv[0] = 'wsgidav'; run()"
        return [sys.executable, "-c", run, "--config", str(yaml)]


class CopypartyServer(_PythonServer):
    """copyparty."""

    def environment(self) -> Mapping[str, str]:
        return {**super().environment(), "XDG_CONFIG_HOME": str(self.own)}

    def command(self) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "copyparty", "-i", "127.0.0.1", "-p", str(self.port), "--https-only"),
            *("--cert", f"{self.own}/both.pem", "--no-crt", "--hist", f"{self.own}/hist", "--no-thumb", "--no-ses"),
            *("--daw", "--dav-mac", "-v", f"{self.exported}::A:c,wram"),
        ]


#: make → constructor.
MAKES = ("apache", "nginx", "proxy", "lighttpd", "rclone", "wsgidav", "copyparty")


def webdav_server(
    make: str, directory: Path, exported: Path, credentials: GridCredentials, account: str | None
) -> WebDavServer:
    """A server of a make, not started."""
    if make == "apache":
        return ApacheServer(directory, make, exported, credentials, account)
    if make == "nginx":
        return NginxServer(directory, make, exported, credentials, account)
    if make in ("proxy", "lighttpd"):
        behind: WebDavServer
        if make == "proxy":
            behind = ApacheServer(directory, f"behind-{make}", exported, credentials, account, tls=False)
        else:
            behind = LighttpdServer(directory, f"behind-{make}", exported, credentials, account)
        return NginxServer(directory, make, exported, credentials, account, backend=behind)
    others = {"rclone": RcloneServer, "wsgidav": WsgiDavServer, "copyparty": CopypartyServer}
    return others[make](directory, make, exported, credentials, account)
