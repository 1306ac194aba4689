"""The Debian package: built, installed on a bare Debian 12, run there under systemd, upgraded, removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.testgrid.ports import reserve_port
from pdm.testgrid.processes import missing_of
from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.support.debian_root import PROGRAMS, DebianRoot

_ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

_OVERRIDE = """\
[Service]
ReadWritePaths=/srv/data
WatchdogSec=6
"""
#: Runs in the container. Each protocol copies from A to B; then the reload, the rotation, the watchdog and the stop.
_TRIAL = """\
set -x
cd /root/found
pdm() { timeout 60 /usr/bin/pdm "$@"; }
timeout 100 systemctl enable --now pdmworkqueue; echo $? > started
journalctl -u pdmworkqueue -o cat --no-pager > journal
grep -qx 0 started || exit
systemctl show pdmworkqueue -p ActiveState -p StatusText -p NRestarts -p User > state
systemd-analyze security --no-pager pdmworkqueue | tail -n 1 > exposure
export PDM_URL=https://localhost:PORT PDM_CA=/etc/grid-security/certificates
as() { export PDM_CERT=/root/users/$1.crt PDM_KEY=/root/users/$1.key; }
as grid; pdm delegate
pdm cp gridA:GRIDA/data gridB:GRIDB/data > gridftp 2>&1; rc=$?; pdm logs 1 >> gridftp 2>&1; echo "rc $rc" >> gridftp
# The same subject, by another authority.
as storages; pdm delegate
for protocol in ssh https xroot; do
    pdm cp --protocol $protocol ${protocol}A:STORAGEA/data ${protocol}B:STORAGEB/$protocol > $protocol 2>&1
    echo "rc $?" >> $protocol
done
pdm cp fileA:/srv/data/a/tree fileB:/srv/data/b/tree > file 2>&1; echo "rc $?" >> file
diff -r /srv/data/a/tree /srv/data/b/tree >> file && echo same >> file
systemctl reload pdmworkqueue; echo $? > reloaded
logrotate --force --verbose /etc/logrotate.d/pdm-workqueue > rotated 2>&1; sleep 2
ls /var/log/pdm >> rotated
dpkg --install /root/*.deb > upgraded 2>&1; systemctl is-active pdmworkqueue >> upgraded
main=$(systemctl show -P MainPID pdmworkqueue)
tr '\\0' ' ' < /proc/$main/cmdline > command
ls -ln /run/credentials/pdmworkqueue.service >> command
[ "$main" -gt 1 ] || exit
kill -STOP $main
for _ in $(seq 60); do
    sleep 1; now=$(systemctl show -P MainPID pdmworkqueue)
    [ "$(systemctl is-active pdmworkqueue)" = active ] && [ "$now" != "$main" ] && break
done
systemctl show pdmworkqueue -p NRestarts -p ActiveState > after_watchdog
pdm jobs > jobs 2>&1
systemctl stop pdmworkqueue; systemctl show pdmworkqueue -p Result -p ExecMainStatus > stopped
journalctl -u pdmworkqueue -o cat --no-pager > journal
cp /var/log/pdm/workqueue.log.1 log.1; cp /var/log/pdm/workqueue.log log
"""


@pytest.fixture(scope="module", autouse=True)
def _programs() -> None:
    missing = missing_of(*PROGRAMS) if os.geteuid() == 0 else ["root"]
    if missing:
        text = f"THE DEBIAN PACKAGE CANNOT BE TESTED: {', '.join(missing)} not found: run script/bootstrap as root"
        if os.environ.get("CI") == "true":
            pytest.fail(text, pytrace=False)
        pytest.skip(text)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that script/package has filled."""
    output = tmp_path_factory.mktemp("packages")
    _build(_ROOT, output)
    return output


def _build(source: Path, output: Path, **environment: str) -> None:
    done = subprocess.run(
        [source / "script" / "package", output],
        # To compress it well, and to decompress it each time, would take longer than all else.
        env={**os.environ, "DPKG_DEB_COMPRESSOR_TYPE": "gzip", "DPKG_DEB_COMPRESSOR_LEVEL": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def package(built: Path) -> Path:
    (found,) = built.glob("*.deb")
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare Debian, to be copied."""
    root = DebianRoot(tmp_path_factory.mktemp("debian") / "bare")
    root.make()
    return root.directory


@pytest.fixture
def debian(bare: Path, tmp_path: Path) -> Iterator[DebianRoot]:
    subprocess.run(["cp", "-a", str(bare), str(tmp_path / "root")], check=True)
    root = DebianRoot(tmp_path / "root")
    yield root
    shutil.rmtree(root.directory, ignore_errors=True)


def test_two_builds_of_one_commit_have_identical_bytes(built: Path, tmp_path: Path) -> None:
    """From another directory, into another one, in another time zone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", _ROOT, *arguments], capture_output=True, text=True, check=True).stdout

    source, output = tmp_path / "elsewhere" / "source", tmp_path / "output"
    for name in filter(None, git("ls-files", "-z").split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(_ROOT / name, source / name, follow_symlinks=False)
    (source / ".venv").symlink_to(_ROOT / ".venv")
    _build(source, output, SOURCE_DATE_EPOCH=git("log", "-1", "--format=%ct").strip(), TZ="Asia/Tokyo", LC_ALL="C")
    assert {path.name for path in output.iterdir()} == {path.name for path in built.iterdir()}
    assert [path.name for path in output.iterdir() if path.read_bytes() != (built / path.name).read_bytes()] == []


def test_lintian_finds_nothing(package: Path) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=warning,error", str(package)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_list_of_what_is_bundled(built: Path, package: Path, tmp_path: Path) -> None:
    (listed,) = built.glob("*.cdx.json")
    bom = json.loads(listed.read_text())
    assert bom["bomFormat"] == "CycloneDX"
    names = {each["name"].lower() for each in bom["components"]}
    assert {"twisted", "sqlalchemy", "psycopg-binary", "cryptography"} <= names
    subprocess.run(["dpkg-deb", "--extract", str(package), str(tmp_path)], check=True)
    licences = (tmp_path / "usr/share/doc/pdm-workqueue/copyright").read_text().lower()
    assert {name for name in names if f"\ncomment: {name} " not in licences} == {"pdm-workqueue"} & names


def test_manual_pages_have_no_warnings(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", str(package), str(tmp_path)], check=True)
    pages = sorted((tmp_path / "usr/share/man").rglob("*.gz"))
    assert {"pdm.1.gz", "pdm-cp.1.gz", "pdmworkqueue.8.gz", "workqueue.conf.5.gz"} <= {page.name for page in pages}
    for page in pages:
        done = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page)],
            env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFSEQ": ""},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), page


def test_it_installs_upgrades_and_goes(debian: DebianRoot, package: Path, tmp_path: Path) -> None:
    debian.install(_older(package, tmp_path))
    assert re.search(r"^pdm:x:\d+:", (debian / "/etc/passwd").read_text(), re.MULTILINE)
    assert debian.run("systemctl", "is-enabled", "pdmworkqueue").stdout == "disabled\n"
    assert debian.run("pdm", "--version").stdout.startswith("pdm ")
    assert debian.run("man", "-w", "pdm-cp", "pdmworkqueue", "workqueue.conf").returncode == 0
    # An edited configuration is kept by an upgrade, also where the package's own has changed.
    with (debian / "/etc/pdm/workqueue.conf").open("a") as configuration:
        configuration.write("# mine\n")
    debian.install(package)
    assert (debian / "/etc/pdm/workqueue.conf").read_text().endswith("# mine\n")
    assert "0.0.1" not in debian.run("dpkg-query", "-W", "pdm-workqueue").stdout
    assert debian.run("dpkg", "--remove", "pdm-workqueue").returncode == 0
    assert (debian / "/etc/pdm/workqueue.conf").exists()
    assert not (debian / "/usr/lib/pdm-workqueue").exists()
    (debian / "/var/lib/pdm").mkdir(exist_ok=True)
    purged = debian.run("dpkg", "--purge", "pdm-workqueue")
    assert (purged.returncode, purged.stderr) == (0, "")
    left = [path for path in ("/etc/pdm", "/var/lib/pdm", "/var/log/pdm", "/usr/bin/pdm") if (debian / path).exists()]
    assert left == []


def _older(package: Path, directory: Path) -> Path:
    """The package as an earlier version, with another configuration."""
    tree = directory / "older"
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(tree)], check=True)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"^Version: .*", "Version: 0.0.1", control.read_text(), flags=re.MULTILINE))
    with (tree / "etc/pdm/workqueue.conf").open("a") as configuration:
        configuration.write("# as it was once\n")
    older = directory / "older.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", str(tree), str(older)], check=True, timeout=300
    )
    shutil.rmtree(tree)
    return older


def test_it_runs_under_systemd(
    debian: DebianRoot, package: Path, grid: TestGrid, open_directory: Path, tmp_path: Path
) -> None:
    debian.install(package)
    with TestStorages(open_directory / "package-storages") as storages:
        port = _configure(debian, grid, storages, tmp_path)
        places = {"PORT": str(port), "GRIDA": str(grid.sites["A"].root), "GRIDB": str(grid.sites["B"].root)}
        places |= {f"STORAGE{letter}": str(storages.root(letter)) for letter in "AB"}
        found = debian.boot(re.sub("|".join(places), lambda match: places[match[0]], _TRIAL))
        assert found["started"] == "0\n", found["journal"]
        assert "stopped" in found, found["trial"]
        protocols = {name: found[name].splitlines()[-1] for name in ("gridftp", "ssh", "https", "xroot", "file")}
        assert protocols == dict.fromkeys(protocols, "rc 0") | {"file": "same"}, "\n".join(
            f"{name}: {found[name]}" for name in [*protocols, "journal"]
        )
        for protocol in ("ssh", "https", "xroot"):
            assert (storages.root("B") / protocol / "one").read_text() == "1"
    _check(found, port)


def _check(found: Mapping[str, str], port: int) -> None:
    assert f"StatusText=serves https://0.0.0.0:{port}\n" in found["state"]
    assert "ActiveState=active\n" in found["state"] and "User=pdm\n" in found["state"]
    level = re.search(r"exposure level for pdmworkqueue.service: ([0-9.]+)", found["exposure"])
    assert level is not None and float(level[1]) <= 2.0
    assert found["command"].startswith("/usr/lib/pdm-workqueue/bin/python ") and "hostkey.pem" in found["command"]
    assert found["reloaded"] == "0\n"
    assert found["upgraded"].endswith("\nactive\n")
    assert "SIGUSR1" in found["log"] and "SIGUSR1" not in found["log.1"]
    assert "NRestarts=1\n" in found["after_watchdog"] and "ActiveState=active\n" in found["after_watchdog"]
    assert "DONE" in found["jobs"]
    assert "Result=success\n" in found["stopped"] and "ExecMainStatus=0\n" in found["stopped"]


def _configure(debian: DebianRoot, grid: TestGrid, storages: TestStorages, scratch: Path) -> int:
    """Certificates, sites and a drop-in, as an operator would write them; returns the daemon's port."""
    port = reserve_port()
    instance = TestService(scratch / "instance")
    instance.init()
    certificates = instance.directory / "certificates"
    security = debian / "/etc/grid-security"
    assert storages.credentials is not None
    shutil.copytree(certificates / "trust", security / "certificates")
    for trust in (grid.credentials.trust, storages.credentials.trust):
        shutil.copytree(trust, security / "certificates", dirs_exist_ok=True)
    shutil.copy(certificates / "host.crt", security / "hostcert.pem")
    shutil.copy(certificates / "host.key", security / "hostkey.pem")
    users = debian / "/root/users"
    users.mkdir()
    for name, user in (("grid", grid.credentials.users["alice"]), ("storages", storages.credentials.users["alice"])):
        shutil.copy(user.certificate, users / f"{name}.crt")
        shutil.copy(user.key, users / f"{name}.key")
    environment = storages.environment()
    shutil.copy(environment["PDM_SSH_KEY"], debian / "/etc/pdm/ssh_key")
    shutil.copy(environment["PDM_SSH_KNOWN_HOSTS"], debian / "/etc/pdm/known_hosts")
    debian.run("chown", "pdm:pdm", "/etc/pdm/ssh_key")
    text = (debian / "/etc/pdm/workqueue.conf").read_text()
    for section, lines in {
        "server": f"host = 0.0.0.0\nport = {port}",
        "sites": "local_addresses = yes",
        "logs": "file = /var/log/pdm/workqueue.log",
        "ssh": f"key = /etc/pdm/ssh_key\nuser = {environment['PDM_SSH_USER']}",
        "agents": "max_agents = 4",
    }.items():
        text = text.replace(f"[{section}]\n", f"[{section}]\n{lines}\n")
    debian.write("/etc/pdm/workqueue.conf", text)
    endpoints = {f"grid{letter}": f"gridftp = {grid.sites[letter].server.url}" for letter in "AB"}
    for letter in "AB":
        endpoints[f"ssh{letter}"] = f"ssh = {storages.sftp[letter].url}"
        endpoints[f"https{letter}"] = f"https = {storages.xrootd[letter].url}"
        endpoints[f"xroot{letter}"] = f"xroot = {storages.xrootd[letter].root_url}"
        endpoints[f"file{letter}"] = "file = file:///"
    sites = [f"[{name}]\nid = {number}\n{line}\n" for number, (name, line) in enumerate(endpoints.items(), 1)]
    debian.write("/etc/pdm/sites.d/sites.conf", "\n".join(sites))
    debian.write("/etc/systemd/system/pdmworkqueue.service.d/override.conf", _OVERRIDE)
    debian.write("/srv/data/a/tree/inner/file", "content\n")
    (debian / "/srv/data/b").mkdir()
    debian.run("chown", "-R", "pdm:pdm", "/srv/data")
    (grid.sites["A"].root / "data").mkdir()
    (grid.sites["A"].root / "data" / "one").write_text("1")
    for site in grid.sites.values():
        grid.give(site.root)
    source = storages.root("A") / "data"
    source.mkdir()
    (source / "one").write_text("1")
    storages.give(source)
    return port
