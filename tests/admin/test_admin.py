"""``pdm admin``: instances that work, and what is refused without harm."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import pkcs12

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.names import dn
from pdm.workqueue.cli import admin as admin_module
from pdm.workqueue.cli.admin import admin
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.sites.registry import SiteRegistry
from pdm.workqueue.sites.storage_urls import storage_url


def run(*arguments: object) -> Result:
    return CliRunner(catch_exceptions=False).invoke(admin, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instance made with defaults, by the login user ``erika``."""
    directory = tmp_path_factory.mktemp("made") / "instance one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGNAME", "erika")
        result = run("init", directory)
    assert result.exit_code == 0, result.output
    directory.with_name("said").write_text(result.output)
    return directory


def subject(certificate: Path) -> str:
    return dn(x509.load_pem_x509_certificate(certificate.read_bytes()).subject)


def shake_hands(directory: Path, caller: str, host: str, trust: Path | None = None) -> str:
    """A real handshake between the instance's host and a caller; gives the common name that the server saw."""
    certificates = directory / "certificates"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificates / "host.crt", certificates / "host.key")
    server.load_verify_locations(capath=trust or certificates / "trust")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=certificates / "ca.crt")
    client.load_cert_chain(f"{caller}.crt", f"{caller}.key")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname=host),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    certificate = ends[0].getpeercert(binary_form=True)
    assert certificate is not None
    return dn(x509.load_der_x509_certificate(certificate).subject).rpartition("=")[2]


def test_the_configuration_is_good(instance: Path) -> None:
    settings = read_settings(instance / "workqueue.conf")
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8443)
    assert settings.users.operators == (subject(instance / "certificates" / "admin.crt"),)
    for path in (
        settings.tls.certificate,
        settings.tls.key,
        settings.tls.trust,
        settings.sites.folder,
        settings.logs.folder,
    ):
        assert path.is_relative_to(instance)
        assert path.exists()
    assert list(settings.logs.folder.iterdir()) == []


def test_the_sites_are_two_directories(instance: Path) -> None:
    sites = SiteRegistry.read(instance / "sites.d").all()
    assert [(site.id, site.name) for site in sites] == [(1, "local-a"), (2, "local-b")]
    (instance / "storage" / "a" / "file").write_text("here")
    url = storage_url(sites[0], JobProtocol.FILE, "file")
    assert url == f"file://{instance}/storage/a/file".replace(" ", "%20")
    assert all(JobProtocol.DUMMY in site.endpoints for site in sites)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_certificates_work(instance: Path, host: str) -> None:
    for name in ("erika", "admin"):
        assert shake_hands(instance, str(instance / "certificates" / name), host) == name


def test_keys_are_private(instance: Path) -> None:
    keys = sorted((instance / "certificates").glob("*.key"))
    assert [key.name for key in keys] == ["admin.key", "ca.key", "erika.key", "host.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((instance / "var").stat().st_mode) == 0o700


def test_it_says_what_to_do_next(instance: Path) -> None:
    said = instance.with_name("said").read_text()
    assert f"twistd --nodaemon pdmworkqueue --config '{instance}/workqueue.conf'" in said
    for line in (
        "export PDM_URL=https://127.0.0.1:8443",
        f"export PDM_CERT='{instance}/certificates/erika.crt'",
        f"export PDM_KEY='{instance}/certificates/erika.key'",
        f"export PDM_CA='{instance}/certificates/ca.crt'",
        "pdm ls local-a:",
    ):
        assert line in said
    assert "delegate" not in said, "directories of this machine need no proxy"


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_an_instance_is_not_made_over(instance: Path) -> None:
    before = everything(instance)
    result = run("init", instance)
    assert result.exit_code == 1
    assert "has a workqueue.conf already: choose another directory" in result.output
    assert everything(instance) == before


@pytest.mark.parametrize("entry", ["certificates", "sites.d", "var", "storage"])
def test_what_is_there_is_not_touched(tmp_path: Path, entry: str) -> None:
    (tmp_path / entry).mkdir()
    (tmp_path / entry / "mine").write_text("precious")
    result = run("init", tmp_path)
    assert result.exit_code == 1
    assert f"has a {entry} already" in result.output
    assert everything(tmp_path) == {str(tmp_path / entry / "mine"): b"precious"}


def test_other_files_may_be_there(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    result = run("init", tmp_path, "--port", "0", "--host", "::", "--operator", "/DC=org/CN=Second, One")
    assert result.exit_code == 0, result.output
    assert "export PDM_URL=https://localhost:PORT" in result.output
    settings = read_settings(tmp_path / "workqueue.conf")
    assert settings.server.port == 0
    assert settings.users.operators[1:] == ("/DC=org/CN=Second, One",)
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_host_by_name(tmp_path: Path) -> None:
    result = run("init", tmp_path / "i", "--host", "pdm.example.org")
    assert "https://pdm.example.org:8443" in result.output
    assert shake_hands(tmp_path / "i", str(tmp_path / "i/certificates/admin"), "pdm.example.org") == "admin"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "a b"], "is no address and no host name"),
        (["--host", "a\nport = 1"], "is no address and no host name"),
        (["--host", ""], "is no address and no host name"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--operator", "bob"], "is no subject"),
        (["--operator", "/CN=a\n[tls]"], "is no subject"),
        (["--operator", "/CN=a\n/CN=b"], "is not one subject"),
        (["--operator", ""], "is not one subject"),
        (["--grid", "/nonexistent"], "grid.json: No such file or directory; start a grid with"),
    ],
)
def test_bad_wishes_leave_nothing(tmp_path: Path, arguments: list[str], told: str) -> None:
    result = run("init", tmp_path / "i", *arguments)
    assert result.exit_code != 0
    assert told in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("init", tmp_path / "file" / "i")
    assert result.exit_code == 1
    assert "Not a directory" in result.output
    assert "line end" in run("init", tmp_path / "a\nb").output


@pytest.mark.parametrize(
    ("login", "name"),
    [("erika", "erika"), ("Erika Muster/mann", "ErikaMustermann"), ("admin", "user"), ("-x", "x"), ("é", "user")],
)
def test_login_names(monkeypatch: pytest.MonkeyPatch, login: str, name: str) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: login)
    assert admin_module._login_name() == name


def test_an_account_without_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert admin_module._login_name() == "user"


def certificate_in(file: Path, passphrase: str) -> str:
    """Common name of the certificate in a PKCS#12 file, whose key belongs to it."""
    key, certificate, others = pkcs12.load_key_and_certificates(file.read_bytes(), passphrase.encode())
    assert key is not None and certificate is not None and not others
    assert key.public_key() == certificate.public_key()
    return dn(certificate.subject).rpartition("=")[2]


def test_a_browser_gets_one_file(instance: Path) -> None:
    result = run("user", instance, "web", "--p12")
    assert result.exit_code == 0, result.output
    file = instance / "certificates" / "web.p12"
    (passphrase,) = re.findall(r"shown only now: ([a-z2-9]{5}(?:-[a-z2-9]{5}){3})\n", result.output)
    assert certificate_in(file, passphrase) == "web"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="Invalid password"):
        certificate_in(file, "wrong")
    # For a user with a certificate, the same certificate under another passphrase.
    before = (instance / "certificates" / "web.crt").read_bytes()
    again = run("user", instance, "web", "--p12")
    assert passphrase not in again.output
    assert (instance / "certificates" / "web.crt").read_bytes() == before
    assert run("user", instance, "admin", "--p12").exit_code == 0
    for name in ("web", "admin"):
        (instance / "certificates" / f"{name}.p12").unlink()


def test_the_passphrase_is_asked_for(instance: Path) -> None:
    typed = "short\nshort\nlong enough, é\nlong enough, é\n"
    result = CliRunner().invoke(admin, ["user", str(instance), "asked", "--p12", "--ask-passphrase"], input=typed)
    assert result.exit_code == 0, result.output
    assert "at least 12 characters" in result.output
    assert "long enough" not in result.output and "shown only now" not in result.output
    assert certificate_in(instance / "certificates" / "asked.p12", "long enough, é") == "asked"
    for name in ("host", "ca", "../asked"):
        refused = run("user", instance, name, "--p12")
        assert refused.exit_code == 1 and "is no name for a user" in refused.output
    assert "--ask-passphrase is for --p12" in run("user", instance, "x", "--ask-passphrase").output
    assert "no instance made by" in run("user", instance / "nowhere", "x", "--p12").output
    assert run("user", instance / "nowhere", "admin", "--p12").exit_code == 1


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pk12util") is None, reason="needs libnss3-tools")
def test_the_library_of_firefox_and_chromium_imports_the_file(instance: Path, tmp_path: Path) -> None:
    result = run("user", instance, "nss", "--p12")
    passphrase = result.output.partition("shown only now: ")[2].partition("\n")[0]
    database = f"sql:{tmp_path}"
    file = str(instance / "certificates" / "nss.p12")
    for command in (
        ["certutil", "-N", "-d", database, "--empty-password"],
        ["pk12util", "-i", file, "-d", database, "-W", passphrase],
    ):
        subprocess.run(command, check=True, capture_output=True)
    listed = subprocess.run(["certutil", "-K", "-d", database], check=True, capture_output=True, text=True)
    assert "PDM nss" in listed.stdout


def test_a_user_is_added(instance: Path) -> None:
    result = run("user", instance, "bob.b-1")
    assert result.exit_code == 0, result.output
    assert f"export PDM_KEY='{instance}/certificates/bob.b-1.key'" in result.output
    assert shake_hands(instance, str(instance / "certificates" / "bob.b-1"), "localhost") == "bob.b-1"
    assert stat.S_IMODE((instance / "certificates" / "bob.b-1.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "name", ["", "..", ".x", "-x", "a/b", "../x", "a b", "a\nb", "a\0b", "é", "x" * 41, "ca", "host", "Admin", "trust"]
)
def test_strange_names(instance: Path, name: str) -> None:
    before = everything(instance)
    result = run("user", "--", instance, name)
    assert result.exit_code == 1
    assert "is no name for a user" in result.output
    assert everything(instance) == before


def test_a_user_who_is_there(instance: Path) -> None:
    before = everything(instance)
    result = run("user", instance, "erika")
    assert result.exit_code == 1
    assert "erika has a certificate already" in result.output
    assert everything(instance) == before


def test_a_user_of_no_instance(tmp_path: Path) -> None:
    result = run("user", tmp_path, "bob")
    assert result.exit_code == 1
    assert "is no instance made by 'pdm admin init'" in result.output


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a test grid leaves on disk for others."""
    directory = tmp_path_factory.mktemp("grid")
    authority = Authority.create("/DC=org/DC=rig/CN=Rig CA")
    authority.write_trust(directory / "certificates")
    alice = authority.user("alice")
    alice.write_certificate(directory / "alice.crt")
    alice.write_key(directory / "alice.key")
    user = {"cert": str(directory / "alice.crt"), "key": str(directory / "alice.key"), "proxy": "", "dn": alice.dn}
    description = {
        "ca_dir": str(directory / "certificates"),
        "sites": {
            name: {
                "id": number,
                "root": f"/grid root/{name}",
                "endpoints": {"gsiftp": f"gsiftp://localhost:{2810 + number}"},
            }
            for number, name in enumerate("AB", 1)
        },
        "users": {"alice": user},
    }
    (directory / "grid.json").write_text(json.dumps(description))
    return directory


def test_an_instance_on_a_grid(tmp_path: Path, grid: Path) -> None:
    result = run("init", tmp_path / "i", "--grid", grid)
    assert result.exit_code == 0, result.output
    settings = read_settings(tmp_path / "i" / "workqueue.conf")
    assert settings.credentials.trust_dir == grid / "certificates"
    sites = SiteRegistry.read(settings.sites.folder).all()
    assert [(site.id, site.name, site.default_folder) for site in sites] == [
        (1, "A", "/grid root/A"),
        (2, "B", "/grid root/B"),
    ]
    assert sites[0].endpoints[JobProtocol.GRIDFTP] == "gsiftp://localhost:2811"
    # The grid's users and the instance's own can both call.
    assert shake_hands(tmp_path / "i", str(grid / "alice"), "localhost") == "alice"
    assert shake_hands(tmp_path / "i", str(tmp_path / "i/certificates/admin"), "localhost") == "admin"
    assert f"export PDM_CERT={grid}/alice.crt" in result.output
    assert "  pdm delegate\n  pdm ls A:" in result.output


def _without_users(said: dict[str, object]) -> None:
    del said["users"]


def _strange_site(said: dict[str, object]) -> None:
    said["sites"] = {"1:x": {"id": 1, "root": "/a", "endpoints": {"gsiftp": "gsiftp://h:1"}}}


def _site_without_root(said: dict[str, object]) -> None:
    said["sites"] = {"A": {"id": 1, "endpoints": {}}}


def _no_authorities(said: dict[str, object]) -> None:
    said["ca_dir"] = "/nonexistent"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_without_users, "is no description of a grid: KeyError: 'users'"),
        (_strange_site, "makes no good configuration"),
        (_site_without_root, "site A is not as expected"),
        (_no_authorities, "/nonexistent has no authorities: is the grid up?"),
    ],
)
def test_a_bad_grid_leaves_nothing(
    tmp_path: Path, grid: Path, spoil: Callable[[dict[str, object]], None], told: str
) -> None:
    said = json.loads((grid / "grid.json").read_text())
    spoil(said)
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "grid.json").write_text(json.dumps(said))
    result = run("init", tmp_path / "i", "--grid", tmp_path / "grid")
    assert result.exit_code == 1
    assert told in result.output
    assert not (tmp_path / "i").exists()


def test_garbage_for_a_grid(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_bytes(b"\xff{")
    assert "is no description of a grid" in run("init", tmp_path / "i", "--grid", tmp_path).output
    (tmp_path / "grid.json").write_text("[1]")
    assert "is no description of a grid" in run("init", tmp_path / "i", "--grid", tmp_path).output
