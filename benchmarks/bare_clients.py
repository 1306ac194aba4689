"""The bare clients of SSH, HTTPS and XROOT that the service is compared with: rclone, sftp, curl, xrdcp and xrdfs.

Each is given what makes it faster: the list of files and the directories at the destination. It checks neither the
destination nor checksums nor times, and uses one token for all files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import bare
from attrs import frozen
from figures import BenchmarkError

#: Files on their way at once.
_TRANSFERS = (4, 16)
_TOKEN_REQUEST = '{"caveats": ["activity:DOWNLOAD,LIST"], "validity": "PT60M"}'
_SSH, _HTTPS, _XROOT = "ssh", "https", "xroot"


@frozen
class Route:
    """What a bare client is to copy, or to list.

    Attributes:
        protocol: ssh, https or xroot.
        urls: of the sites A and B, without a path.
        environment: with what the client needs to be the user, as helpers have it.
        certificate: of the user.
        key: of the user.
        directory: for lists and what the client prints.
        memory: for files on their way, where a client cannot copy from site to site.
    """

    protocol: str
    urls: tuple[str, str]
    environment: Mapping[str, str]
    certificate: Path
    key: Path
    directory: Path
    memory: Path

    def _ports(self) -> tuple[str, str]:
        return self.urls[0].rpartition(":")[2], self.urls[1].rpartition(":")[2]

    # -- copies

    def copy_modes(self, kind: str) -> Sequence[str]:
        """The ways to copy that are installed and may be the best; of one ``large`` file, or of ``small`` ones."""
        return [name for name in self._modes(kind) if shutil.which(_program(name)) is not None]

    def _modes(self, kind: str) -> Iterator[str]:
        if self.protocol != _XROOT:
            yield from (f"rclone --transfers {count}" for count in _TRANSFERS[: 1 if kind == "large" else None])
        if self.protocol == _SSH:
            yield "sftp, get and put"
        elif self.protocol == _HTTPS:
            yield "curl -X COPY"
            yield "curl, GET and PUT"
        elif kind == "large":
            yield "xrdcp"
            yield "xrdcp --tpc delegate only"
        else:
            yield "xrdcp -r"
            yield "xrdcp -r --parallel 4"

    def copy(self, mode: str, source: Path, destination: Path, files: Sequence[Path]) -> float:
        """Copy files from a directory at A to one at B, where all directories are; seconds.

        Raises:
            BenchmarkError: the client failed, or did not end.
        """
        name, *rest = mode.replace(",", " ").split()
        if name == "rclone":
            options = ["--transfers", rest[1], "--checkers", rest[1]]
            return self._run([[*self._rclone(), "copy", *options, f"A:{source}", f"B:{destination}"]])
        if name == "xrdcp":
            return self._xrdcp(rest, source, destination, files)
        if "COPY" in rest:
            return self._curl_copy(source, destination, files)
        local = self.memory / "local"
        try:
            if name == "sftp":
                return self._sftp("A", [f'get -r "{source}" "{local}"']) + self._sftp(
                    "B", [f'put -r "{local}/." "{destination}"']
                )
            return self._curl_get_and_put(source, destination, local, files)
        finally:
            shutil.rmtree(local, ignore_errors=True)

    def _xrdcp(self, options: Sequence[str], source: Path, destination: Path, files: Sequence[Path]) -> float:
        first, second = (f"{url}/" for url in self.urls)
        if "-r" not in options:
            return self._run(
                [["xrdcp", "-s", *options, f"{first}{source / files[0]}", f"{second}{destination / files[0]}"]]
            )
        # It copies the directory by its name: it goes beside, and is moved to its place afterwards.
        beside = destination.with_name(f"{destination.name}-beside")
        beside.mkdir()
        shutil.chown(beside, *_owner(destination))
        seconds = self._run([["xrdcp", "-s", *options, f"{first}{source}/", f"{second}{beside}"]])
        shutil.rmtree(destination)
        (beside / source.name).rename(destination)
        beside.rmdir()
        return seconds

    def _sftp(self, site: str, commands: Sequence[str]) -> float:
        batch = self.directory / "batch"
        batch.write_text("".join(f"{command}\n" for command in commands))
        options = [f"IdentityFile={self.environment['PDM_SSH_KEY']}", "BatchMode=yes"]
        options.append(f"UserKnownHostsFile={self.environment['PDM_SSH_KNOWN_HOSTS']}")
        arguments = [word for option in options for word in ("-o", option)]
        port = self._ports()["AB".index(site)]
        account = f"{self.environment['PDM_SSH_USER']}@localhost"
        return self._run([["sftp", "-q", *arguments, "-b", str(batch), "-P", port, account]])

    def _rclone(self) -> Sequence[str]:
        sections = []
        for site, url, port in zip("AB", self.urls, self._ports(), strict=True):
            if self.protocol == _SSH:
                user = self.environment["PDM_SSH_USER"]
                sections.append(
                    f"[{site}]\ntype = sftp\nhost = localhost\nport = {port}\nuser = {user}\n"
                    f"key_file = {self.environment['PDM_SSH_KEY']}\nshell_type = none\nset_modtime = false\n"
                    f"known_hosts_file = {self.environment['PDM_SSH_KNOWN_HOSTS']}\ndisable_hashcheck = true\n"
                )
            else:
                sections.append(f"[{site}]\ntype = webdav\nurl = {url}\nvendor = other\n")
        configuration = self.directory / "rclone.conf"
        configuration.write_text("".join(sections))
        command = ["rclone", "--config", str(configuration), "--size-only", "--no-check-dest", "--retries", "1"]
        if self.protocol == _HTTPS:
            authorities = self.directory / "authorities.pem"
            trust = Path(self.environment["X509_CERT_DIR"])
            authorities.write_text("".join(file.read_text() for file in sorted(trust.glob("*.0"))))
            command += ["--ca-cert", str(authorities), "--client-cert", str(self.certificate)]
            command += ["--client-key", str(self.key)]
        return command

    def _curl_options(self) -> Mapping[str, str]:
        return {
            "capath": self.environment["X509_CERT_DIR"],
            "cert": str(self.certificate),
            "key": str(self.key),
        }

    def _curl(self, requests: Sequence[Mapping[str, str]], common: Sequence[tuple[str, str]] = ()) -> float:
        """Requests over kept connections, some at once; each has its options, and all have those in common."""
        lines = []
        for request in requests:
            options = [*self._curl_options().items(), *common, *request.items()]
            lines.append(
                "silent\nshow-error\nfail\n" + "".join(f"{name}={_quoted(value)}\n" for name, value in options)
            )
        file = self.directory / "requests"
        file.write_text("next\n".join(lines))
        return self._run([["curl", "--parallel", "--parallel-max", str(_TRANSFERS[0]), "--config", str(file)]])

    def _curl_copy(self, source: Path, destination: Path, files: Sequence[Path]) -> float:
        token = self._token(source)
        common = [
            ("request", "COPY"),
            ("header", "Credential: none"),
            ("header", f"TransferHeaderAuthorization: Bearer {token}"),
        ]
        return self._curl(
            [
                {"header": f"Source: {self.urls[0]}{source / file}", "url": f"{self.urls[1]}{destination / file}"}
                for file in files
            ],
            common,
        )

    def _token(self, source: Path) -> str:
        options = [word for name, value in self._curl_options().items() for word in (f"--{name}", value)]
        header = "Content-Type: application/macaroon-request"
        command = ["curl", "-sSf", *options, "-X", "POST", "-H", header, "-d", _TOKEN_REQUEST]
        done = subprocess.run(
            [*command, f"{self.urls[0]}{source}"], capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise BenchmarkError(f"curl got no token: {done.stderr}")
        token: str = json.loads(done.stdout)["macaroon"]
        return token

    def _curl_get_and_put(self, source: Path, destination: Path, local: Path, files: Sequence[Path]) -> float:
        for directory in {(local / file).parent for file in files}:
            directory.mkdir(parents=True, exist_ok=True)
        first, second = self.urls
        got = self._curl([{"output": str(local / file), "url": f"{first}{source / file}"} for file in files])
        # Without a question before each body.
        header = [("header", "Expect:")]
        return got + self._curl(
            [{"upload-file": str(local / file), "url": f"{second}{destination / file}"} for file in files], header
        )

    # -- listings

    def list_modes(self) -> Sequence[str]:
        """The ways to list that are installed."""
        modes = {
            _SSH: ["rclone lsf -R", "sftp, ls -ln of each directory"],
            _HTTPS: ["rclone lsf -R", "curl, PROPFIND of each directory"],
            _XROOT: ["xrdfs ls -l -R"],
        }[self.protocol]
        return [name for name in modes if shutil.which(_program(name)) is not None]

    def list_tree(self, mode: str, root: Path, folders: Sequence[Path], expected: int) -> float:
        """List a tree at A; seconds.

        Raises:
            BenchmarkError: the client failed, or has not shown ``expected`` files.
        """
        if mode.startswith("rclone"):
            seconds = self._run([[*self._rclone(), "lsf", "-R", "--files-only", "--format", "ps", f"A:{root}"]])
        elif mode.startswith("sftp"):
            seconds = self._sftp("A", [f'ls -ln "{directory}"' for directory in folders])
        elif mode.startswith("curl"):
            seconds = self._curl(
                [
                    {"request": "PROPFIND", "header": "Depth: 1", "url": f"{self.urls[0]}{directory}"}
                    for directory in folders
                ]
            )
        else:
            seconds = self._run([["xrdfs", self.urls[0], "ls", "-l", "-R", str(root)]])
        shown = (self.directory / "output0").read_bytes()
        # rclone tells paths below the root, curl in elements of XML, the others paths from the top; all with a size.
        marks = {"rclone": b"/f", "curl": b"<D:href>", "sftp": b"\n-rw", "xrdfs": b"\n-rw"}
        found = shown.count(marks[_program(mode)])
        if mode.startswith("curl"):
            # Each directory is shown in its own answer, and all but the first in that of the directory above.
            found -= 2 * len(folders) - 1
        if found != expected:
            raise BenchmarkError(f"{mode} found {found} files instead of {expected}: {shown[:300]!r}")
        return seconds

    def _run(self, commands: Sequence[Sequence[str]]) -> float:
        return bare.run_all(commands, self.environment, self.directory)


def _program(mode: str) -> str:
    """The program of a mode."""
    return mode.split(maxsplit=1)[0].rstrip(",")


def _owner(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def missing_clients(protocol: str) -> list[str]:
    """The programs that a row of a protocol cannot be measured without, and that are not installed."""
    wanted = {
        _SSH: ("sshd", "ssh", "rclone", "sftp"),
        _HTTPS: ("xrootd", "rclone", "curl"),
        _XROOT: ("xrootd", "xrdcp", "xrdfs"),
    }
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return [name for name in wanted[protocol] if shutil.which(name, path=path) is None]
