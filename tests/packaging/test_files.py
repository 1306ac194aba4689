"""What an operator installs: the wheel with its files, the unit of systemd and its account."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_UNIT = _ROOT / "etc" / "systemd" / "pdmworkqueue.service"
#: What systemd calls well hardened begins here.
_EXPOSURE = 2.0


@pytest.mark.full
@pytest.mark.timeout(180)
def test_the_wheel_brings_the_files_of_etc(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", tmp_path, _ROOT],
        check=True,
        timeout=150,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shared = {name.partition("/share/pdm-workqueue/")[2] for name in names}
    present = {str(path.relative_to(_ROOT / "etc")) for path in (_ROOT / "etc").rglob("*") if path.is_file()}
    # Where each shell looks for them.
    present -= {path for path in present if path.startswith("completion/")}
    assert shared - {""} == present
    assert "pdm/workqueue/store/migrations/env.py" in names


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_hardened() -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(_UNIT)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    level = re.search(r"exposure level for pdmworkqueue.service: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= _EXPOSURE


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_the_account_of_the_unit_is_made(tmp_path: Path) -> None:
    user = re.search(r"^User=(\w+)$", _UNIT.read_text(), re.MULTILINE)
    assert user is not None
    (tmp_path / "etc").mkdir()
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}", str(_ROOT / "etc" / "sysusers.d" / "pdmworkqueue.conf")],
        check=True,
        timeout=30,
    )
    assert re.search(rf"^{user[1]}:", (tmp_path / "etc" / "passwd").read_text(), re.MULTILINE)


@pytest.mark.full
@pytest.mark.timeout(240)
def test_the_source_archive_passes_its_own_tests(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, _ROOT], check=True, timeout=100)
    (archive,) = tmp_path.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True, timeout=30)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # Rooms with data files.
    rooms = ["tests/certificates", "tests/movers"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-m", "not full", *rooms],
        cwd=unpacked,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
