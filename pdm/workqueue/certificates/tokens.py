"""Bearer tokens: what can be seen of one without knowing who issued it."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
from datetime import UTC, datetime

from attrs import frozen

_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*", re.ASCII)
_LONGEST_CLAIM = 200
#: The first packet of a macaroon, and the caveat of its end.
_LOCATION = re.compile(rb"[0-9a-f]{4}location ([^\n]{0,1000})\n")
_BEFORE = re.compile(rb"cid before:([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}Z)\n")
#: 9999-12-31; a later expiry is not meant.
_LAST_SECOND = 253402300799


class TokenError(Exception):
    """It is no bearer token; the text holds nothing of it."""


@frozen
class TokenDescription:
    """Contents of a token.

    Attributes:
        subject: ``SUB at ISSUER`` of a JWT; else a text that says it is opaque.
        valid_until: ``exp`` of a JWT, the first ``before:`` of a macaroon (UTC); None where it has none.
    """

    subject: str
    valid_until: datetime | None


def describe_token(token: str) -> TokenDescription:
    """Look into a token; its signature is for the server to check.

    Raises:
        TokenError: it holds characters that no bearer token has (RFC 6750).
    """
    if not _TOKEN.fullmatch(token):
        raise TokenError("a bearer token is one word of letters, digits and -._~+/: leave 'Bearer' and quotes out")
    claims = token_payload(token)
    if claims is None:
        return _macaroon(token) or TokenDescription("an opaque token", None)
    words = [_printable(claims.get("sub")), _printable(claims.get("iss"))]
    subject = " at ".join(word for word in words if word) or "a token without a subject"
    end = claims.get("exp")
    if isinstance(end, bool) or not isinstance(end, int | float) or not 0 <= end <= _LAST_SECOND:
        return TokenDescription(subject, None)
    return TokenDescription(subject, datetime.fromtimestamp(int(end), UTC))


def _macaroon(token: str) -> TokenDescription | None:
    """Contents of a macaroon, None if it is something else; XRootD and dCache put its expiry into a caveat."""
    try:
        packets = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except (binascii.Error, ValueError):
        return None
    place = _LOCATION.match(packets)
    if place is None:
        return None
    subject = f"a macaroon of {_printable(place.group(1).decode('ascii', 'replace'))}"
    ends = []
    for caveat in _BEFORE.findall(packets):
        with contextlib.suppress(ValueError):
            ends.append(datetime.fromisoformat(caveat.decode("ascii")))
    return TokenDescription(subject, min(ends, default=None))


def token_payload(token: str) -> dict[str, object] | None:
    """The claims of a JWT, None if it is something else; its signature is not verified."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        padded = parts[1] + "=" * (-len(parts[1]) % 4)
        claims = json.loads(base64.urlsafe_b64decode(padded))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def _printable(claim: object) -> str:
    text = claim if isinstance(claim, str) else ""
    return "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_CLAIM])
