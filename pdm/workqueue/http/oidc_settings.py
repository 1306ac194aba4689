"""Validation of what a site says about tokens."""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve

from pdm.workqueue.domain.oidc import (
    DEFAULT_SCOPE,
    OidcSettings,
    check_base_path,
    check_client_id,
    check_client_secret,
    check_issuer,
    check_scope,
    client_secret_context,
)
from pdm.workqueue.domain.token_profiles import same_issuer
from pdm.workqueue.http.access import Caller, Role
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.problems import ForbiddenError, InvalidInputError
from pdm.workqueue.wire.sites import OidcBody


def checked_oidc(api: ApiContext, caller: Caller, body: OidcBody) -> OidcSettings:
    """The validated settings; the secret of the client is encrypted.

    Raises:
        InvalidInputError: a value is invalid.
        ForbiddenError: the issuer or an audience is only for operators to choose: the service would connect to any
            server, or get tokens that are valid elsewhere for the owner of the site.
    """

    def checked(key: str, check: Callable[[str], str], text: str | None) -> str | None:
        try:
            return None if text is None else check(text)
        except ValueError as error:
            raise InvalidInputError(str(error), f"$.oidc.{key}") from error

    oidc = OidcSettings(
        issuer=checked("issuer", check_issuer, body.issuer),
        client_id=checked("client_id", check_client_id, body.client_id),
        scope=checked("scope", check_scope, body.scope) or DEFAULT_SCOPE,
        audiences=tuple(checked("audience", check_client_id, each) or "" for each in body.audience),
        base_path=checked("base_path", check_base_path, body.base_path),
        exchange=body.exchange,
    )
    if oidc.client_id is not None and oidc.issuer is None:
        raise InvalidInputError("the URL of the issuer is missing", "$.oidc.issuer")
    secret = checked("client_secret", check_client_secret, body.client_secret)
    if secret is not None:
        if oidc.client_id is None:
            raise InvalidInputError("the client of the secret is missing", "$.oidc.client_id")
        context = client_secret_context(oidc.issuer, oidc.client_id)
        oidc = evolve(oidc, sealed_secret=api.vault.seal(secret.encode("ascii"), context))
    if caller.role is not Role.OPERATOR:
        if oidc.audiences:
            raise ForbiddenError("only operators may set audiences of tokens", "$.oidc.audience")
        allowed = api.settings.oidc.issuers
        if oidc.has_login and not any(same_issuer(oidc.issuer or "", each) for each in allowed):
            raise ForbiddenError("only operators may choose this issuer for logins", "$.oidc.issuer")
    return oidc


def with_secret_of(before: OidcSettings | None, oidc: OidcSettings | None) -> OidcSettings | None:
    """The new settings with the secret that is stored, if none is given for the same issuer and client."""
    if before is None or oidc is None or oidc.sealed_secret is not None:
        return oidc
    is_same = (before.issuer, before.client_id) == (oidc.issuer, oidc.client_id)
    return evolve(oidc, sealed_secret=before.sealed_secret) if is_same else oidc
