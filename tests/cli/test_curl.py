"""The examples of ``docs/curl.rst``, played with curl and a proxy at a real daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.authority import Credential
from pdm.workqueue.certificates.pem import read_identity

_PAGE = Path(__file__).parents[2] / "docs" / "curl.rst"
_BLOCK = re.compile(r"\.\. code-block:: sh\n\n((?:   .*\n|\n)+)")
_EXPECTED = re.compile(r"^# → (.*)$", re.MULTILINE)


def blocks() -> list[str]:
    return ["\n".join(line[3:] for line in found.splitlines()) for found in _BLOCK.findall(_PAGE.read_text())]


@pytest.mark.full
def test_the_page_is_what_happens(tmp_path: Path) -> None:
    service = TestService(tmp_path / "instance")
    port = reserve_port()
    service.init(admin={"port": str(port)})
    run7 = service.directory / "storage" / "a" / "run7"
    run7.mkdir()
    (run7 / "a.dat").write_text("hello\n")
    (run7 / "b.dat").write_text("12345")
    script = [block for block in blocks() if "example.org" not in block and "admin=" not in block]
    assert len(script) == len(blocks()) - 2
    with service.running():
        proxy = tmp_path / "proxy.pem"
        admin = read_identity(*service.credentials("admin"))
        assert isinstance(admin.key, RSAPrivateKey)
        Credential(admin.certificate, admin.key, admin.chain).proxy().write_bundle(proxy)
        settings = {
            "api": f"{service.url}/workqueue/api/v1.0",
            "proxy": proxy,
            "authorities": service.directory / "certificates" / "trust",
            "admin": f"http://127.0.0.1:{port}",
        }
        assignments = "".join(f"{name}={value}\n" for name, value in settings.items())
        bash = shutil.which("bash")
        assert bash is not None
        played = subprocess.run(
            [bash, "-e", "-c", assignments + "\n".join(script)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert played.returncode == 0, f"{played.stdout}\n{played.stderr}\n{service.tail()}"
        assert played.stdout.splitlines() == _EXPECTED.findall("\n".join(script)), played.stderr
