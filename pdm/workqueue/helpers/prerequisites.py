"""Print the missing prerequisites of each protocol on this machine: a JSON object, protocol → message for an operator.

Runs with the helpers' interpreter and search paths for programs and libraries.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

if not __package__:
    # When started as a script, sys.path has the directory of the helpers instead of the project's.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from pdm.workqueue.domain.enums import RELAYED
from pdm.workqueue.helpers.main_relay import backend_class
from pdm.workqueue.helpers.tools.runner import package_of


def _tools() -> str | None:
    for program in ("globus-url-copy", "gfal-copy", "setpriv"):
        if shutil.which(program) is None:
            return f"there is no {program} on the PATH: install the package {package_of(program)}"
    return None


def find_missing() -> dict[str, str]:
    """Protocol, or ``TOOLS`` for the tools mover, → missing prerequisites."""
    found = {protocol: backend_class(protocol).missing_software() for protocol in sorted(RELAYED)}
    missing = {protocol.name: why for protocol, why in found.items() if why}
    return missing if (why := _tools()) is None else {**missing, "TOOLS": why}


def main() -> None:
    """Print what is missing."""
    json.dump(find_missing(), sys.stdout)


if __name__ == "__main__":
    main()
