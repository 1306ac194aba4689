"""The grid's programs: where they are, and which Debian packages bring those that are not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pdm.testgrid.errors import GridMissingError

#: program → Debian package
PACKAGES = {
    "globus-gridftp-server": "globus-gridftp-server-progs",
    "globus-url-copy": "globus-gass-copy-progs",
    "myproxy-server": "myproxy-server",
    "myproxy-logon": "myproxy",
}

# Servers and account tools live in sbin folders, which an ordinary user's PATH lacks.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing_programs() -> list[str]:
    """The names of the programs that are needed and not installed."""
    return [name for name in PACKAGES if shutil.which(name, path=_SEARCH_PATH) is None]


def missing_of(*names: str) -> list[str]:
    """Those of some programs that are not installed."""
    return [name for name in names if shutil.which(name, path=_SEARCH_PATH) is None]


def require_programs() -> None:
    """Check that a grid can run here.

    Raises:
        GridMissingError: it cannot; the text names the command that installs what is missing.
    """
    missing = missing_programs()
    if missing:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise GridMissingError(f"{', '.join(missing)} not found: as root, run: apt-get install {packages}")


def program(name: str) -> Path:
    """The full path of an installed program.

    Raises:
        GridMissingError: there is no such program.
    """
    path = shutil.which(name, path=_SEARCH_PATH)
    if path is None:
        raise GridMissingError(f"{name} not found")
    return Path(path)
