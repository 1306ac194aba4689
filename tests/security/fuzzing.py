"""Requests made by schemathesis from the service's own OpenAPI document, against a daemon that runs.

``script/fuzz [--examples N] [--seed N]`` runs it by hand; `test_fuzz` runs a small part of it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from pdm.testgrid.service import TestService

_API = "/workqueue/api/v1.0"
_HOOKS = Path(__file__).with_name("fuzz_hooks.py")
#: What fits the schema may still be refused: a site that is not there, a path that cannot be. And the DELETE of a job
#: cancels it: it stays to be seen.
_NOT_CHECKED = "positive_data_acceptance,use_after_free"
#: Work that is there when it begins.
_PREPARED = 4


@frozen
class Outcome:
    """What came of a run.

    Attributes:
        cases: requests that were made.
        text: the report of schemathesis.
        passed: whether every check held.
        faults: lines of the daemon's log about faults of its own.
    """

    cases: int
    text: str
    passed: bool
    faults: Sequence[str]


def run(service: TestService, directory: Path, options: Sequence[str]) -> Outcome:
    """Send requests to a daemon as one of its operators.

    Args:
        service: that runs.
        directory: for the report.
        options: of ``schemathesis run``.
    """
    for number in range(_PREPARED):
        service.submit("admin", "list", src_siteid=1, src_filepath=f"/{number}", protocol="DUMMY")
    cert, key = service.credentials("admin")
    authority = service.environment("admin")["PDM_CA"]
    report = directory / "report.json"
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}{_API}/openapi.json",
        "--request-cert", str(cert), "--request-cert-key", str(key), "--tls-verify", authority,
        "--exclude-checks", _NOT_CHECKED, "--no-color", "--continue-on-failure", "--warnings", "off",
        "--report", "json", "--report-json-path", str(report), *options,
    ]  # fmt: skip
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(_HOOKS)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    log = service.log_path.read_text(errors="replace").splitlines()
    faults = [line for line in log if re.search(r" (error|crit) |Traceback|incident", line)]
    generated = re.search(r"(\d[\d,]*) generated", done.stdout)
    cases = int(generated[1].replace(",", "")) if generated else 0
    return Outcome(cases, done.stdout + done.stderr, done.returncode == 0, faults)


def main() -> None:
    """A whole run, by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=150, help="requests of each operation, about (default 150)")
    parser.add_argument("--seed", help="to have the same requests again")
    options = parser.parse_args()
    more = ["--max-examples", str(options.examples), "--workers", "2"]
    if options.seed:
        more += ["--seed", options.seed]
    with tempfile.TemporaryDirectory(prefix="pdm-fuzz-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        service = TestService(directory / "instance")
        service.init()
        with service.running():
            outcome = run(service, directory, more)
    print(outcome.text)
    for fault in outcome.faults:
        print(fault)
    print(f"{outcome.cases} requests, {len(outcome.faults)} faults of the daemon")
    sys.exit(0 if outcome.passed and not outcome.faults else 1)


if __name__ == "__main__":
    main()
