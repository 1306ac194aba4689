"""Print the prerequisites that this machine lacks for each protocol: a JSON object, protocol → message for an operator.

It runs as the helpers do: with their interpreter and their search paths for programs and libraries.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if not __package__:
    # Started by its path: the folder of the helpers must not be on the path, the project must.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.helpers.backends import xrootd_session
from pdm.workqueue.helpers.gridftp import globus
from pdm.workqueue.helpers.tools.runner import package_of

_LONGEST_S = 30.0
_LIBRARIES = ("libglobus_common.so.0", "libglobus_ftp_client.so.2")


def _gridftp() -> str | None:
    for name in _LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            return f"{error}: install the package {globus.PACKAGE}"
    return None


def _ssh() -> str | None:
    return None if shutil.which("ssh") else "there is no ssh on the PATH: install the package openssh-client"


def _xroot() -> str | None:
    python = xrootd_session.interpreter()
    install = f"install the package {xrootd_session.PACKAGE}"
    try:
        # As the worker begins.
        done = subprocess.run(
            [python, "-I", "-c", "from pyxrootd import client; from XRootD.client import flags"],
            capture_output=True,
            text=True,
            timeout=_LONGEST_S,
            check=False,
        )
    except (FileNotFoundError, PermissionError) as error:
        return f"{python} cannot be run ({error.strerror}): {install}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{python} cannot load XRootD's Python bindings ({last[:200]}): {install}"
    return None


def _tools() -> str | None:
    for program in ("globus-url-copy", "gfal-copy", "setpriv"):
        if shutil.which(program) is None:
            return f"there is no {program} on the PATH: install the package {package_of(program)}"
    return None


#: Protocol, or ``TOOLS`` for sites and jobs that are moved by them, → what looks for its software.
CHECKS: Mapping[str, Callable[[], str | None]] = {
    "GRIDFTP": _gridftp,
    "SSH": _ssh,
    "XROOT": _xroot,
    "TOOLS": _tools,
}


def main() -> None:
    """Print what is missing."""
    found = {protocol: check() for protocol, check in CHECKS.items()}
    json.dump({protocol: why for protocol, why in found.items() if why}, sys.stdout)


if __name__ == "__main__":
    main()
