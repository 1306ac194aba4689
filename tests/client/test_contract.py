"""The client and the table of endpoints: each endpoint is reached by a method, each method reaches an endpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from pdm.workqueue.certificates.delegation import new_request
from pdm.workqueue.client.errors import NotFoundError
from pdm.workqueue.client.settings import ClientSettings
from pdm.workqueue.http.endpoint import Allow
from pdm.workqueue.http.endpoints import ENDPOINTS
from pdm.workqueue.WorkqueueClient import WorkqueueClient

#: For browsers and monitors.
NOT_CALLED = {"GET /openapi.json"}
NOT_CALLED |= {f"{each.method} {each.path}" for each in ENDPOINTS if each.allow is Allow.NODES}
CALLS: dict[str, tuple[Any, ...]] = {
    "list": (1, "a"),
    "ls": (1, "a"),
    "copy": (1, "a", 2, "b"),
    "copy_items": (1, 2, [{"src": "a", "dst": "b"}]),
    "remove": (1, "a"),
    "rename": (1, "a", "b"),
    "mkdir": (1, "a"),
    "submit": ("LIST", {}),
    "jobs": (),
    "job": (1,),
    "elements": (1,),
    "element": (1, 0),
    "status": (1,),
    "element_status": (1, 0),
    "skipped": (1,),
    "output": (1,),
    "element_output": (1, 0),
    "live_output": (1, 0),
    "receipt": (1, bytes),
    "errors": (1,),
    "inspect_server": (),
    "whoami": (),
    "sites": (),
    "routes": (),
    "route_activity": (),
    "site_activity": (),
    "queue": (),
    "nodes": (),
    "drain_node": ("node1", "closed"),
    "resume_node": ("node1",),
    "rate": (1,),
    "why": (1,),
    "health": (),
    "site": (1,),
    "add_site": ("A", {"GRIDFTP": "gsiftp://h:1"}),
    "change_site": (1,),
    "remove_site": (1,),
    "check_site": (1,),
    "drain_site": (1, "repairs"),
    "resume_site": (1,),
    "users": (),
    "ban": (1, "abuse"),
    "unban": (1,),
    "audit": (),
    "events_page": (),
    "wait": (1,),
    "cancel": (1,),
    "retry": (1,),
    "hold": (1,),
    "resume": (1,),
    "change_job": (1,),
    "schedules": (),
    "schedule": (1,),
    "add_schedule": ("every 6h", {}),
    "pause_schedule": (1,),
    "edit_schedule": (1,),
    "resume_schedule": (1,),
    "remove_schedule": (1,),
    "webhooks": (),
    "webhook": (1,),
    "add_webhook": ("https://example.org/", ["job"]),
    "test_webhook": (1,),
    "remove_webhook": (1,),
    "mail": (),
    "set_mail": ("a@example.org", ["failed"]),
    "confirm_mail": ("0123",),
    "stop_mail": (),
    "delegation": (),
    "delegate": (),
    "undelegate": (),
    "credentials": (),
    "remove_credential": (1,),
    "s3_key": ("AKIAEXAMPLE", "a secret key", 1),
    "ssh_key": (1,),
    "token": ("abc",),
    "session": (1,),
    "log_on": (1, "alice", "a password"),
    "log_off": (1,),
    "logins": (),
    "login_state": (1,),
    "begin_login": (1,),
    "continue_login": (1,),
    "put_refresh_token": (1, "a refresh token"),
    "log_out": (1,),
}
#: Methods that call others, or nothing.
HELPERS = {
    *("from_settings", "from_environment", "close", "pause", "events"),
    *("iterate_jobs", "iterate_elements", "iterate_skipped"),
}


class Recorder:
    """Stands for the connection: notes what is asked, and answers what a delegation needs to go on."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def request(self, method: str, path: str, *, key: str | None = None, **_: Any) -> bytes:
        assert (key is not None) == (method == "POST"), f"{method} {path}: a POST has a key, and nothing else has"
        self.asked.append(f"{method} {path}")
        if path == "/whoami":
            me = {"user_id": 1, "subject": "/CN=A", "role": "user", "delegation_id": "0123", "limited_proxy": False}
            until = {"certificate_valid_until": "2030-01-01T00:00:00Z", "credential_valid_until": None}
            return msgspec.json.encode(me | until)
        if path.endswith("/request"):
            return new_request("/CN=A", 2048)[1]
        raise NotFoundError(404, "no", "no")


@pytest.fixture
def asked(pki: Path, result_of: Callable[[Deferred[Any]], Any]) -> list[str]:
    settings = ClientSettings("https://127.0.0.1:1", pki / "alice.crt", pki / "alice.key", pki / "ca.crt")
    client = WorkqueueClient.from_settings(reactor, settings)
    recorder = Recorder()
    client._connection = recorder  # type: ignore[assignment]
    for name, arguments in CALLS.items():
        before = len(recorder.asked)
        getattr(client, name)(*arguments).addErrback(lambda failure: failure.trap(NotFoundError))
        assert len(recorder.asked) > before, f"{name} asked nothing"
    client.events_page(1).addErrback(lambda failure: failure.trap(NotFoundError))
    client.element_output(1, 0, -1).addErrback(lambda failure: failure.trap(NotFoundError))
    return recorder.asked


def test_this_test_knows_each_method() -> None:
    methods = {
        name for name, value in vars(WorkqueueClient).items() if callable(value) or isinstance(value, classmethod)
    }
    assert {name for name in methods if not name.startswith("_")} == CALLS.keys() | HELPERS


def test_each_endpoint_is_reached_and_nothing_else(asked: list[str]) -> None:
    templates = {
        f"{endpoint.method} {endpoint.path}": re.compile(
            re.sub(r"\\\{\w+\\\}", "(?:-?[0-9]+|node1)", re.escape(f"{endpoint.method} {endpoint.path}"))
        )
        for endpoint in ENDPOINTS
    }
    reached = {name for call in asked for name, template in templates.items() if template.fullmatch(call)}
    assert reached == templates.keys() - NOT_CALLED
    assert [call for call in asked if not any(template.fullmatch(call) for template in templates.values())] == []
