"""Requests to token issuers: metadata, device codes, refresh, exchange, revocation (RFC 8414, 8628, 6749, 8693, 7009).

An issuer was chosen by an operator, and is trusted no further than that: its answers are bounded in size and time,
redirects are not followed, and addresses of this machine are refused.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import quote_plus, urlencode, urlsplit

import msgspec
from attrs import define, field, frozen

from pdm.workqueue.certificates.tokens import TokenError, describe_token, token_payload
from pdm.workqueue.certificates.vault import Vault, VaultError
from pdm.workqueue.domain.oidc import OidcSettings, client_secret_context
from pdm.workqueue.domain.token_profiles import TokenClaims, same_issuer
from pdm.workqueue.execution.receivers import HttpAnswer, Receivers, UnansweredError

_DISCOVERY = ".well-known/openid-configuration"
_SERVER_METADATA = "/.well-known/oauth-authorization-server"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
EXCHANGE_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - the name of a type
_METADATA_LIFETIME = timedelta(minutes=10)
_MOST_ISSUERS = 1000
_LONGEST_TOKEN = 16384
_LONGEST_TEXT = 300
#: Seconds that an access token is used whose end is unknown.
_UNKNOWN_LIFETIME_S = 900
_LEAST_INTERVAL_S, _MOST_INTERVAL_S = 1, 300
_LONGEST_CODE_S = 3600
#: Error codes (RFC 6749, 5.2) that are no refusal.
_TEMPORARY = frozenset({"temporarily_unavailable", "server_error"})
#: Parameters of requests whose values are secrets.
_SECRET = frozenset({"refresh_token", "device_code", "subject_token", "token", "client_secret"})
_T = TypeVar("_T", bound=msgspec.Struct)


class IssuerUnavailableError(Exception):
    """The issuer does not answer, or with something else than the protocol has; a later try may succeed."""


class IssuerRefusedError(Exception):
    """The issuer has refused a request.

    Attributes:
        code: of OAuth 2.0, such as ``invalid_grant``.
    """

    def __init__(self, code: str, description: str) -> None:
        super().__init__(f"{code}: {description}" if description else code)
        self.code = code


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What an issuer publishes about itself."""

    issuer: str
    token_endpoint: str
    device_authorization_endpoint: str | None = None
    revocation_endpoint: str | None = None
    grant_types_supported: list[str] | None = None
    token_endpoint_auth_methods_supported: list[str] | None = None


class _TokenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    access_token: str
    token_type: str = "bearer"  # noqa: S105 - the name of a type
    expires_in: float | None = None
    refresh_token: str | None = None


class _DeviceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    device_code: str
    user_code: str
    verification_uri: str
    expires_in: float
    verification_uri_complete: str | None = None
    interval: float = 5


class _ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    error: str
    error_description: str = ""


@frozen(kw_only=True)
class IssuedTokens:
    """What an issuer gives.

    Attributes:
        subject: of the access token, for people.
        refresh_token: None if it gives none: after a refresh, the one that was used stays valid.
    """

    access_token: str = field(repr=False)
    subject: str
    valid_until: datetime
    refresh_token: str | None = field(repr=False)


@frozen(kw_only=True)
class IssuedDeviceCode:
    """A code that the user has to approve; all but `device_code` is shown."""

    device_code: str = field(repr=False)
    user_code: str
    verification_uri: str
    verification_uri_complete: str | None
    expires_in_s: float
    interval_s: int


@define(eq=False, kw_only=True)
class Issuers:
    """Asks token issuers.

    Attributes:
        requests: sends what is asked; its addresses and authorities are those for issuers.
    """

    requests: Receivers
    vault: Vault
    clock: Callable[[], datetime]
    _known: dict[str, tuple[datetime, Metadata]] = field(factory=dict)

    async def device_code(self, oidc: OidcSettings) -> IssuedDeviceCode:
        """Begin a login.

        Raises:
            IssuerUnavailableError: no usable answer.
            IssuerRefusedError: it is refused, or not offered.
        """
        metadata = await self._metadata(oidc)
        if metadata.device_authorization_endpoint is None:
            raise IssuerRefusedError("unsupported_grant_type", "the issuer offers no device authorization (RFC 8628)")
        asked = {"scope": oidc.scope, **_audience(oidc)}
        answer = await self._post(oidc, metadata, metadata.device_authorization_endpoint, asked)
        found = _decoded(answer, _DeviceAnswer)
        for uri in (found.verification_uri, found.verification_uri_complete):
            if uri is not None and not _is_page(uri):
                raise IssuerUnavailableError("it gives no usable URL for the approval")
        if not math.isfinite(found.expires_in) or not math.isfinite(found.interval):
            raise IssuerUnavailableError("it gives no usable times")
        if not _is_secret(found.device_code) or not found.user_code.isprintable() or len(found.user_code) > 100:
            raise IssuerUnavailableError("it gives no usable device code")
        return IssuedDeviceCode(
            device_code=found.device_code,
            user_code=found.user_code,
            verification_uri=found.verification_uri,
            verification_uri_complete=found.verification_uri_complete,
            expires_in_s=min(max(found.expires_in, 1), _LONGEST_CODE_S),
            interval_s=int(min(max(found.interval, _LEAST_INTERVAL_S), _MOST_INTERVAL_S)),
        )

    async def redeem(self, oidc: OidcSettings, device_code: str) -> IssuedTokens:
        """Ask whether the user has approved a code; errors as of `device_code`."""
        return await self._tokens(oidc, {"grant_type": DEVICE_GRANT, "device_code": device_code, **_audience(oidc)})

    async def refresh(self, oidc: OidcSettings, refresh_token: str) -> IssuedTokens:
        """Get another access token, and perhaps another refresh token; errors as of `device_code`."""
        asked = {"grant_type": "refresh_token", "refresh_token": refresh_token, **_audience(oidc)}
        return await self._tokens(oidc, asked)

    async def exchange(self, oidc: OidcSettings, access_token: str) -> IssuedTokens:
        """Get an access token with the site's audience and scope; errors as of `device_code`."""
        asked = {
            "grant_type": EXCHANGE_GRANT,
            "subject_token": access_token,
            "subject_token_type": _ACCESS_TOKEN,
            "requested_token_type": _ACCESS_TOKEN,
            "scope": " ".join(word for word in oidc.scope.split() if word not in ("openid", "offline_access")),
        }
        if oidc.audiences:
            asked["audience"] = oidc.audiences[0]
        return await self._tokens(oidc, {name: value for name, value in asked.items() if value})

    async def revoke(self, oidc: OidcSettings, refresh_token: str) -> None:
        """Revoke a refresh token, if the issuer offers that; errors as of `device_code`."""
        metadata = await self._metadata(oidc)
        if metadata.revocation_endpoint is not None:
            asked = {"token": refresh_token, "token_type_hint": "refresh_token"}
            _check(await self._post(oidc, metadata, metadata.revocation_endpoint, asked))

    async def _tokens(self, oidc: OidcSettings, asked: dict[str, str]) -> IssuedTokens:
        metadata = await self._metadata(oidc)
        supported = metadata.grant_types_supported
        if supported is not None and asked["grant_type"] not in supported:
            raise IssuerRefusedError("unsupported_grant_type", f"the issuer does not offer {asked['grant_type']}")
        found = _decoded(await self._post(oidc, metadata, metadata.token_endpoint, asked), _TokenAnswer)
        if found.token_type.lower() not in ("bearer", "n_a"):
            raise IssuerUnavailableError("it gives no bearer token")
        for token in (found.access_token, found.refresh_token):
            if token is not None and not _is_secret(token):
                raise IssuerUnavailableError("it gives no usable token")
        try:
            described = describe_token(found.access_token)
        except TokenError as error:
            raise IssuerUnavailableError("it gives no usable token") from error
        payload = token_payload(found.access_token)
        claimed = None if payload is None else TokenClaims.of(payload).issuer
        if claimed and not same_issuer(claimed, oidc.issuer or ""):
            raise IssuerUnavailableError(f"it gives a token of another issuer ({_shown(claimed)})")
        lifetime_s = found.expires_in
        if lifetime_s is None or not math.isfinite(lifetime_s):
            lifetime_s = _UNKNOWN_LIFETIME_S
        end = described.valid_until or self.clock() + timedelta(seconds=min(max(lifetime_s, 0), 30 * 86400))
        return IssuedTokens(
            access_token=found.access_token,
            subject=described.subject if payload is not None else f"a login at {oidc.issuer}",
            valid_until=end,
            refresh_token=found.refresh_token,
        )

    async def _post(self, oidc: OidcSettings, metadata: Metadata, url: str, asked: dict[str, str]) -> HttpAnswer:
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        client, secret = oidc.client_id or "", self._secret(oidc)
        if secret is None:
            asked = {**asked, "client_id": client}
        elif "client_secret_basic" in (metadata.token_endpoint_auth_methods_supported or ["client_secret_basic"]):
            pair = f"{quote_plus(client)}:{quote_plus(secret)}".encode("ascii")
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode("ascii")
        else:
            asked = {**asked, "client_id": client, "client_secret": secret}
        try:
            answer = await self.requests.ask(url, urlencode(asked).encode("ascii"), headers)
        except UnansweredError as error:
            raise IssuerUnavailableError(str(error)) from error
        _check(answer, [secret or "", *(value for name, value in asked.items() if name in _SECRET)])
        return answer

    def _secret(self, oidc: OidcSettings) -> str | None:
        if oidc.sealed_secret is None:
            return oidc.client_secret
        try:
            context = client_secret_context(oidc.issuer, oidc.client_id)
            return self.vault.unseal(oidc.sealed_secret, context).decode("ascii")
        except VaultError as error:
            raise IssuerRefusedError(
                "invalid_client", f"the stored secret of the client cannot be read ({error}): set it again"
            ) from error

    async def _metadata(self, oidc: OidcSettings) -> Metadata:
        issuer, now = oidc.issuer or "", self.clock()
        read_at, known = self._known.get(issuer, (now, None))
        if known is not None and abs(now - read_at) < _METADATA_LIFETIME:
            return known
        for url in _metadata_urls(issuer):
            try:
                answer = await self.requests.ask(url, headers={"Accept": "application/json"})
            except UnansweredError as error:
                raise IssuerUnavailableError(str(error)) from error
            if answer.status != 404:
                break
        found = _decoded(answer, Metadata)
        if not same_issuer(found.issuer, issuer):
            raise IssuerUnavailableError(f"its metadata are those of another issuer, {_shown(found.issuer)}")
        if len(self._known) >= _MOST_ISSUERS:
            self._known.clear()
        self._known[issuer] = now, found
        return found


def _metadata_urls(issuer: str) -> Sequence[str]:
    parts = urlsplit(issuer)
    path = parts.path.rstrip("/")
    return f"{issuer.rstrip('/')}/{_DISCOVERY}", f"{parts.scheme}://{parts.netloc}{_SERVER_METADATA}{path}"


def _audience(oidc: OidcSettings) -> dict[str, str]:
    return {"audience": oidc.audiences[0]} if oidc.audiences and not oidc.exchange else {}


def _check(answer: HttpAnswer, secrets: Sequence[str] = ()) -> None:
    """Raise the error of an answer that is no success; without the secrets that were sent, which some send back."""
    if 200 <= answer.status < 300:
        return
    if 300 <= answer.status < 400:
        raise IssuerUnavailableError(f"it answered {answer.status}, a redirect, which is not followed")
    refused: _ErrorAnswer | None = None
    if 400 <= answer.status < 500 and answer.status != 429:
        try:
            refused = msgspec.json.decode(answer.body, type=_ErrorAnswer, strict=False)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            refused = None
    if refused is None or refused.error in _TEMPORARY:
        raise IssuerUnavailableError(f"it answered {answer.status}")
    words = [refused.error, refused.error_description]
    for secret in filter(None, secrets):
        words = [text.replace(secret, "***") for text in words]
    raise IssuerRefusedError(*map(_shown, words))


def _decoded(answer: HttpAnswer, type_: type[_T]) -> _T:
    _check(answer)
    try:
        return msgspec.json.decode(answer.body, type=type_, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IssuerUnavailableError(f"its answer is not valid ({_shown(str(error))})") from error


def _is_secret(token: Any) -> bool:
    return 0 < len(token) <= _LONGEST_TOKEN and token.isascii() and token.isprintable() and " " not in token


def _is_page(uri: str) -> bool:
    return uri.startswith("https://") and len(uri) <= 2000 and uri.isprintable() and " " not in uri


def _shown(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_TEXT])
