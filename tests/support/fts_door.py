"""Requests to a daemon's door for clients of FTS3, by nothing but the standard library."""

from __future__ import annotations

import configparser
import contextlib
import http.client
import json
import ssl
from typing import Any

from pdm.testgrid.service import TestService


def ask_door(service: TestService, user: str, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Send one request to the door of a daemon; its status and decoded body."""
    configuration = configparser.RawConfigParser()
    configuration.read(service.directory / "workqueue.conf")
    context = ssl.create_default_context(cafile=str(service.directory / "certificates" / "ca.crt"))
    context.load_cert_chain(*service.credentials(user))
    port = configuration.getint("fts", "port")
    connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or "null")
