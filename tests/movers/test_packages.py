"""Movers of installed packages; the example of docs/adding-a-protocol.rst, installed and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

from twisted.logger import LogEvent

from pdm.workqueue.movers import installed
from pdm.workqueue.wire.agent_events import DoneEvent
from tests.helpers.driver import HelperProcess, copy_item, entries

_DOCS = Path(__file__).resolve().parents[2] / "docs"
#: The page shows these files, whole.
_EXAMPLES = _DOCS / "examples"


def entry_points_of_the_page() -> str:
    """The entry points that the page tells, as an installer writes them down."""
    page = (_DOCS / "adding-a-protocol.rst").read_text()
    for name in ("echo_mover", "echo_helper"):
        assert f".. literalinclude:: examples/{name}.py\n\n" in page
    found = re.search(r"\[options\.entry_points\]\n +([\w.]+) =\n +(.+)\n", page)
    assert found is not None
    return f"[{found.group(1)}]\n{found.group(2)}\n"


def test_the_example_is_found_once_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "echo-1.dist-info").mkdir()
    (tmp_path / "echo-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: echo\nVersion: 1\n")
    (tmp_path / "echo-1.dist-info" / "entry_points.txt").write_text(entry_points_of_the_page())
    script = (
        "from pdm.workqueue.movers import MOVERS; print([m.helper for p, m in MOVERS.items() if p.name == 'XROOT'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(_EXAMPLES), str(tmp_path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "['echo_helper']\n"


def test_its_helper_lists() -> None:
    path = os.pathsep.join([str(Path.cwd()), str(_EXAMPLES)])
    with HelperProcess(["-m", "echo_helper"], {"ECHO_NAME": "hello", "PYTHONPATH": path}) as helper:
        assert entries(helper.list("root://h//x"))["hello"].size == 5


def test_a_backend_is_one_module_and_one_line(tmp_path: Path) -> None:
    """The backend of the page, added to a copy of the service, moves files; nothing else has to know of it."""
    shutil.copytree(Path.cwd() / "pdm", tmp_path / "pdm", ignore=shutil.ignore_patterns("__pycache__"))
    workqueue = tmp_path / "pdm" / "workqueue"
    shutil.copy(_EXAMPLES / "memory_backend.py", workqueue / "helpers" / "backends")
    page = (_DOCS / "adding-a-protocol.rst").read_text()
    line = re.search(r"\n( +MEMORY = ProtocolInfo\(.+\)\n)", page)
    assert line is not None
    enums = workqueue / "domain" / "enums.py"
    before = "    @classmethod\n    def of_scheme("
    assert before in enums.read_text()
    enums.write_text(enums.read_text().replace(before, f"{line.group(1)}\n{before}"))

    script = (
        "from pdm.workqueue.domain.enums import JobProtocol; from pdm.workqueue.movers import MOVERS;"
        " from pdm.workqueue.sites.checks import check_endpoint; memory = JobProtocol.parse('memory');"
        " print(memory.value, MOVERS[memory].helper, check_endpoint(memory, 'memory://host:1'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "7 pdm.workqueue.helpers.main_relay memory://host:1\n", done.stderr

    site = tmp_path / "site"
    site.mkdir()
    (site / "file").write_bytes(b"content")
    environment = {"PYTHONPATH": "", "PDM_FILE_ROOTS": json.dumps([str(site)])}
    with HelperProcess([str(workqueue / "helpers" / "main_relay.py")], environment) as helper:
        there, back = "memory://host:1/d/file", (site / "back").as_uri()
        for key, (source, destination) in enumerate((((site / "file").as_uri(), there), (there, back))):
            event = helper.copy([copy_item(key, source, destination, 7)])[key]
            assert isinstance(event, DoneEvent), event
        assert set(entries(helper.list("memory://host:1/"))) == {"d", "d/file"}
    assert (site / "back").read_bytes() == b"content"


def test_one_that_cannot_be_used_is_left_out(lost_errors: list[LogEvent]) -> None:
    broken = [
        EntryPoint(name, value, "pdm_workqueue.movers")
        for name, value in (("NOPE", "a:B"), ("XROOT", "no_such_module:B"))
    ]
    assert installed(broken) == {}
    assert len(lost_errors) == 2
    lost_errors.clear()
