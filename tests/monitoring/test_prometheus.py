"""Alert rules and the Grafana board, by the tools of Prometheus and by a Prometheus that scrapes a real daemon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from attrs import frozen

from pdm.testgrid.ports import reserve_port
from pdm.testgrid.service import TestService
from pdm.workqueue.telemetry.metrics import METRICS, MetricKind

_ROOT = Path(__file__).parents[2]
_ALERTS = _ROOT / "etc" / "prometheus" / "alerts.yml"
_SCRAPE = _ROOT / "etc" / "prometheus" / "scrape.yml"
_BOARD = _ROOT / "etc" / "grafana" / "pdm-workqueue.json"
_NAME = re.compile(r"\b(?:pdm|process)_[a-z_]+\b")
_INTERVAL_S = 1


@pytest.fixture(scope="module")
def promtool() -> Callable[..., str]:
    """Runs promtool, which must succeed; its output."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is missing (Debian: prometheus)")

    def run(*arguments: str | Path, text: str | None = None) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


def queries() -> list[str]:
    """The expressions of the board, for all instances."""
    panels = json.loads(_BOARD.read_text())["panels"]
    return [target["expr"].replace("$instance", ".*") for panel in panels for target in panel.get("targets", ())]


def rules() -> dict[str, str]:
    """Alert → expression, as far as one can read it without a parser of YAML."""
    parts = _ALERTS.read_text().split("- alert: ")[1:]
    return {part.partition("\n")[0]: part.partition("expr: ")[2].partition("\n        for:")[0] for part in parts}


def test_the_rules_are_valid_and_fire_when_they_should(promtool: Callable[..., str], tmp_path: Path) -> None:
    for file in (_ALERTS, _SCRAPE, Path(__file__).with_name("alert_tests.yml")):
        shutil.copy(file, tmp_path)
    assert f"SUCCESS: {len(rules())} rules found" in promtool("check", "rules", tmp_path / "alerts.yml")
    promtool("check", "config", tmp_path / "scrape.yml")
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "alert_tests.yml")
    tested = (tmp_path / "alert_tests.yml").read_text()
    assert [alert for alert in rules() if f"alertname: {alert}\n" not in tested] == []


def test_rules_and_board_name_metrics_of_the_catalogue() -> None:
    known = {metric.name for metric in METRICS if metric.kind is not MetricKind.HISTOGRAM}
    for metric in METRICS:
        if metric.kind is MetricKind.HISTOGRAM:
            known |= {f"{metric.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    named = {name for text in (*queries(), *rules().values()) for name in _NAME.findall(text)}
    assert {name for name in named if name.startswith("pdm_")} - known == set()
    used = {metric.name for metric in METRICS if {metric.name, f"{metric.name}_bucket"} & named}
    unused = {metric.name for metric in METRICS} - used
    assert unused <= {"pdm_worker_up", "pdm_filesystem_free_inodes"}, "metrics that the board does not show"


def test_each_alert_leads_to_its_runbook() -> None:
    page = (_ROOT / "docs" / "monitoring.rst").read_text()
    text = _ALERTS.read_text()
    for alert in rules():
        url = f"{{{{ $externalLabels.documentation }}}}/monitoring.html#{alert.lower()}"
        assert f'runbook_url: "{url}"\n' in text
        assert f".. _{alert.lower()}:\n\n{alert}\n{'~' * len(alert)}\n" in page


@frozen
class Prometheus:
    """A running Prometheus."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def value(self, query: str) -> list[Any]:
        return self.ask("query", query=query)["result"]

    def wait_for(self, query: str, timeout_s: float = 30.0) -> None:
        """Wait until a query has a result."""
        give_up_at = time.monotonic() + timeout_s
        while not self.value(query):
            assert time.monotonic() < give_up_at, f"{query} has no result"
            time.sleep(0.2)


@pytest.fixture
def port() -> int:
    """The admin port of the daemon."""
    return reserve_port()


@pytest.fixture
def prometheus(tmp_path: Path, port: int) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the admin port; alerts fire without delay."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is missing (Debian: prometheus)")
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \d+[mh]", "for: 0s", _ALERTS.read_text()))
    scrape = _SCRAPE.read_text().replace("127.0.0.1:9464", f"127.0.0.1:{port}")
    scrape = re.sub(r"scrape_(interval|timeout): \d+s", rf"scrape_\1: {_INTERVAL_S}s", scrape)
    scrape = scrape.replace("global:\n", f"global:\n  evaluation_interval: {_INTERVAL_S}s\n")
    (tmp_path / "prometheus.yml").write_text(scrape)
    listens = f"127.0.0.1:{reserve_port()}"
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={tmp_path}/prometheus.yml",
                f"--storage.tsdb.path={tmp_path}/prometheus",
                f"--web.listen-address={listens}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        give_up_at = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://{listens}/-/ready", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < give_up_at, (tmp_path / "prometheus.log").read_text()
                time.sleep(0.1)
        yield Prometheus(f"http://{listens}")
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.full
@pytest.mark.timeout(180)
def test_a_prometheus_scrapes_a_daemon(
    tmp_path: Path, prometheus: Prometheus, port: int, promtool: Callable[..., str]
) -> None:
    service = TestService(tmp_path / "instance")
    service.init(admin={"port": str(port)}, queue={"first_pause": "50ms", "longest_pause": "50ms"})
    with service.running():
        (service.directory / "storage" / "a" / "file").write_text("hello")
        places = {"src_siteid": 1, "src_filepath": "file", "dst_siteid": 2, "dst_filepath": "copy"}
        copy = service.submit("admin", "copy", **places, protocol="FILE")
        remove = service.submit("admin", "remove", src_siteid=1, src_filepath="nothing", protocol="FILE")
        assert service.wait_for("admin", copy["id"])["status"] == "DONE", service.tail()
        assert service.wait_for("admin", remove["id"])["status"] == "FAILED", service.tail()
        service.delegate("admin")
        service.submit("admin", "mkdir", src_siteid=1, src_filepath="x", protocol="DUMMY", extra_opts=_HANGS)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        # Its rules: names, units, help.
        promtool("check", "metrics", text=text)

        prometheus.wait_for('pdm_elements{type="mkdir", state="running"} == 1')
        named = {name for query in (*queries(), *rules().values()) for name in _NAME.findall(query)}
        missing = [name for name in sorted(named) if not prometheus.value(f'count({{__name__="{name}"}})')]
        assert missing == []
        for query in queries():
            prometheus.value(query)
        # The counters tell the truth: a file and its listing, and a listing for a removal, which failed.
        done = 'sum(pdm_attempts_total{result="done", src_site="local-a", dst_site="local-b"}) == 2'
        prometheus.wait_for(done)
        failed = 'type="list", result="failed", scope="source", code="NOT_FOUND", src_site="local-a", dst_site=""'
        assert prometheus.value(f"pdm_attempts_total{{{failed}}} == 1")
        assert prometheus.value('pdm_transfer_bytes_total{src_site="local-a", dst_site="local-b"} == 5')
        assert prometheus.value('pdm_elements_finished_total{type="copy", result="done", code=""} == 1')
        assert prometheus.value("pdm_transfer_duration_seconds_count == 1")
        assert prometheus.value('pdm_queue_wait_seconds_count{class="listing"} >= 1')
        groups = prometheus.ask("rules")["groups"]
        evaluated = {rule["name"]: (rule["health"], rule.get("lastError")) for rule in groups[0]["rules"]}
        assert evaluated == dict.fromkeys(rules(), ("ok", None))
        assert not prometheus.value('ALERTS{severity="critical"}')
    prometheus.wait_for('ALERTS{alertname="PdmDown", alertstate="firing"}')


_HANGS = {"dummy": {"hang": True}}
