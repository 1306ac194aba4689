"""A token issuer on loopback over real TLS that behaves as tests want: device codes, rotation, exchange, and faults."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

from attrs import define, field
from twisted.internet import reactor as _reactor
from twisted.internet.ssl import CertificateOptions
from twisted.web.http import Request
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from pdm.workqueue.certificates.authority import Credential
from tests.security import canary

reactor: Any = _reactor
_DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


def jwt(**claims: object) -> str:
    """A token with a signature that nobody has made."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({}, claims)]
    return ".".join([*parts, secrets.token_urlsafe(16)])


@define(eq=False)
class Issuer:
    """Attributes:
    approved: whether users have approved what they were shown; None for refused.
    lifetime_s: of access tokens.
    rotates: whether each refresh gives another refresh token, and the one before is invalid.
    fault: called with the path of each request: None, or a status, headers and body; or ``hang``.
    asked: path and form of each request.
    """

    approved: bool | None = True
    lifetime_s: int = 3600
    rotates: bool = True
    subject: str = "alice"
    fault: Callable[[str], Any] = lambda path: None
    asked: list[tuple[str, dict[str, str]]] = field(factory=list)
    metadata: dict[str, Any] = field(factory=dict)
    #: Refresh tokens that are valid now.
    valid: set[str] = field(factory=set)
    slow: int = 0
    url: str = ""
    hanging: list[Request] = field(factory=list)
    _port: Any = None

    def listen(self, credential: Credential) -> str:
        """Serve; returns the URL of the issuer."""
        key: Any = credential.key
        certificate: Any = credential.certificate
        site = Site(_Pages(self))
        site.noisy = False
        options = CertificateOptions(privateKey=key, certificate=certificate)
        self._port = reactor.listenSSL(0, site, options, interface="127.0.0.1")
        self.url = f"https://localhost:{self._port.getHost().port}/vo"
        return self.url

    async def close(self) -> None:
        await self._port.stopListening()

    def forms(self, path: str) -> list[dict[str, str]]:
        return [form for asked, form in self.asked if asked == path]

    def answer(self, path: str, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        match path:
            case "/vo/.well-known/openid-configuration":
                grants = ["refresh_token", _DEVICE, _EXCHANGE]
                usual = {"issuer": self.url, "token_endpoint": f"{self.url}/token", "grant_types_supported": grants}
                usual["device_authorization_endpoint"] = f"{self.url}/device"
                usual["revocation_endpoint"] = f"{self.url}/revoke"
                return 200, usual | self.metadata
            case "/vo/device":
                code = {"device_code": secrets.token_hex(8), "user_code": "ABCD-EFGH", "expires_in": 600, "interval": 5}
                return 200, code | {"verification_uri": f"{self.url}/enter"}
            case "/vo/revoke":
                self.valid.discard(form["token"])
                return 200, {}
            case "/vo/token":
                return self._token(form)
        return 404, {}

    def _token(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        grant = form["grant_type"]
        if grant == _DEVICE:
            if self.slow:
                self.slow -= 1
                return 400, {"error": "slow_down"}
            if self.approved is None:
                return 400, {"error": "access_denied"}
            if not self.approved:
                return 400, {"error": "authorization_pending"}
            return 200, self._issued(with_refresh=True)
        if grant == "refresh_token":
            used = form["refresh_token"]
            if used not in self.valid:
                return 400, {"error": "invalid_grant", "error_description": "grant request is invalid"}
            if self.rotates:
                self.valid.discard(used)
            return 200, self._issued(with_refresh=self.rotates)
        return 200, self._issued(with_refresh=False, audience=form.get("audience"), exchanged=True)

    def _issued(self, *, with_refresh: bool, audience: str | None = None, exchanged: bool = False) -> dict[str, Any]:
        claims: dict[str, Any] = {"iss": self.url, "sub": self.subject, "exp": int(time.time()) + self.lifetime_s}
        if audience is not None:
            claims["aud"] = audience
        answer: dict[str, Any] = {"access_token": canary.watched(jwt(**claims)), "token_type": "Bearer"}
        answer["expires_in"] = self.lifetime_s
        if exchanged:
            answer["issued_token_type"] = "urn:ietf:params:oauth:token-type:access_token"
        if with_refresh:
            token = canary.watched(secrets.token_hex(16))
            self.valid.add(token)
            answer["refresh_token"] = token
        return answer


class _Pages(Resource):
    isLeaf = True  # noqa: N815 - Twisted's name

    def __init__(self, issuer: Issuer) -> None:
        super().__init__()
        self._issuer = issuer

    def render(self, request: Any) -> Any:
        path = request.path.decode()
        form = {name: values[0] for name, values in parse_qs(request.content.read().decode()).items()}
        authorization = request.getHeader("authorization")
        self._issuer.asked.append((path, form if authorization is None else form | {"authorization": authorization}))
        fault = self._issuer.fault(path)
        if fault == "hang":
            self._issuer.hanging.append(request)
            return NOT_DONE_YET
        if fault is not None:
            status, headers, body = fault
            request.setResponseCode(status)
            for name, value in headers.items():
                request.setHeader(name, value)
            return body
        status, answer = self._issuer.answer(path, form)
        request.setResponseCode(status)
        request.setHeader("content-type", "application/json")
        return json.dumps(answer).encode()
