"""OpenID Connect and OAuth 2.0 as the service uses them: the issuer and client of a site, the login of a user."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

from attrs import field, frozen

from pdm.workqueue.domain.paths import checked

#: What is asked for where a site names no scope: an ID, and a refresh token that outlives the session at the issuer.
DEFAULT_SCOPE = "openid offline_access"
_LONGEST_URL, _LONGEST_WORD = 500, 300
MOST_AUDIENCES = 10
_ISSUER = re.compile(
    r"https://(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/%-]*)?",
    re.ASCII,
)
#: Characters of a scope or a client id (RFC 6749, appendix A).
_WORDS = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*", re.ASCII)
_WORD = re.compile(r"[\x21-\x7e]+", re.ASCII)


@frozen(kw_only=True)
class OidcSettings:
    """What a site says about tokens.

    Attributes:
        issuer: of the tokens that it accepts; None for any.
        client_id: under which the service is registered there; None if users cannot log in.
        scope: that a login asks for.
        audiences: of tokens, besides the addresses of the site; the first is asked for.
        base_path: directory that the paths of scopes are relative to; None for the root or that of the endpoint.
        exchange: whether an access token is exchanged for one with the audience and scope (RFC 8693).
        client_secret: None for a public client, or where it is `sealed_secret`.
        sealed_secret: the secret of the client, encrypted.
    """

    issuer: str | None = None
    client_id: str | None = None
    scope: str = DEFAULT_SCOPE
    audiences: Sequence[str] = ()
    base_path: str | None = None
    exchange: bool = False
    client_secret: str | None = field(default=None, repr=False)
    sealed_secret: bytes | None = field(default=None, repr=False)

    @property
    def has_login(self) -> bool:
        """Whether users can log in."""
        return self.issuer is not None and self.client_id is not None

    @property
    def has_secret(self) -> bool:
        return self.client_secret is not None or self.sealed_secret is not None


class LoginState(enum.StrEnum):
    """State of a user's login at the issuer of a site."""

    #: The user has to approve it at the issuer.
    WAITING = "waiting"
    #: The service has a token, and gets the next one in time.
    ACTIVE = "active"
    #: The last renewal failed; it is tried again.
    RETRYING = "retrying"
    #: The user has to log in again.
    ENDED = "ended"


def check_issuer(text: str) -> str:
    """The URL of an issuer.

    Raises:
        ValueError: it is none.
    """
    if len(text) > _LONGEST_URL or not _ISSUER.fullmatch(text):
        raise ValueError("https://HOST[:PORT][/PATH] is expected, as the issuer calls itself")
    return text


def check_client_id(text: str) -> str:
    """The identifier of a client, or an audience.

    Raises:
        ValueError: it is none.
    """
    if len(text) > _LONGEST_WORD or not _WORD.fullmatch(text):
        raise ValueError(f"one word of at most {_LONGEST_WORD} printable ASCII characters is expected")
    return text


def check_client_secret(text: str) -> str:
    """The secret of a client.

    Raises:
        ValueError: it is none.
    """
    if not 1 <= len(text) <= _LONGEST_WORD or not text.isascii() or not text.isprintable():
        raise ValueError(f"at most {_LONGEST_WORD} printable ASCII characters are expected")
    return text


def check_scope(text: str) -> str:
    """Scopes that are asked for.

    Raises:
        ValueError: it is no list of scopes.
    """
    if len(text) > 2 * _LONGEST_URL or not _WORDS.fullmatch(text):
        raise ValueError("scopes with a blank between them are expected")
    return text


def check_base_path(text: str) -> str:
    """A directory that scopes are relative to.

    Raises:
        ValueError: it is no absolute path.
    """
    if not text.startswith("/") or not text.isprintable() or ".." in text.split("/"):
        raise ValueError("an absolute path without '..' is expected")
    return checked(text)


def client_secret_context(issuer: str | None, client_id: str | None) -> str:
    """Associated data of the encrypted secret of a client, so that it goes to no other issuer."""
    return f"secret of client {client_id} at {issuer}"
