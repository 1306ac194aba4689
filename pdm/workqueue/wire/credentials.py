"""Credentials and logins, as the service answers them, without their secrets. Times are UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta, field

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.oidc import LoginState


class DelegationView(msgspec.Struct, frozen=True, kw_only=True):
    """A delegated credential."""

    termination_time: datetime
    subject: str


class VomsView(msgspec.Struct, frozen=True, kw_only=True):
    """VOMS attributes that a proxy carries; shown, not verified."""

    vo: str
    fqans: list[str]


class CredentialView(msgspec.Struct, frozen=True, kw_only=True):
    """A credential that the service holds, without its secret."""

    id: int
    kind: Annotated[str, Meta(extra_json_schema={"enum": [kind.value for kind in CredentialKind]})]
    subject: Annotated[
        str, Meta(description="Whose it is; the fingerprint of an SSH key, the id of an access key of S3.")
    ]
    site: Annotated[int | None, Meta(description="The site that it is for; null for every one.")]
    label: str | None
    valid_until: Annotated[datetime | None, Meta(description="Null for one without an expiry, or with an unknown one.")]
    stored_at: datetime
    voms: Annotated[list[VomsView], Meta(description="Of a proxy.")]
    account: Annotated[str | None, Meta(description="Of an SSH key: the account at the site.")]
    public_key: Annotated[str | None, Meta(description="Of an SSH key: the line to install at the site.")]


class LoginView(msgspec.Struct, frozen=True, kw_only=True):
    """The caller's login at the issuer of a site, without its secrets."""

    site: int
    issuer: str
    state: Annotated[
        str,
        Meta(
            description="waiting: the caller has to approve it at ``verification_uri``; active: the service renews the"
            " token; retrying: the last renewal failed, and is tried again; ended: the caller has to log in again.",
            extra_json_schema={"enum": [state.value for state in LoginState]},
        ),
    ]
    subject: Annotated[str | None, Meta(description="Of the token; null before the first login.")]
    logged_in_at: datetime | None
    refreshed_at: Annotated[datetime | None, Meta(description="When the service got the present access token.")]
    valid_until: Annotated[datetime | None, Meta(description="End of the present access token.")]
    next_renewal: Annotated[datetime | None, Meta(description="Null for never: the issuer gave no refresh token.")]
    failure: Annotated[str | None, Meta(description="Why the last renewal failed.")] = field(name="error")
    user_code: Annotated[str | None, Meta(description="While waiting: what to enter there.")] = None
    verification_uri: Annotated[str | None, Meta(description="While waiting: the page of the issuer.")] = None
    verification_uri_complete: Annotated[str | None, Meta(description="The same with the code in it.")] = None
    code_valid_until: datetime | None = None
    interval: Annotated[int | None, Meta(description="While waiting: seconds between two questions.")] = None
