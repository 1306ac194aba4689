"""Refusal of requests that a page of another site makes a browser send (cross-site request forgery).

A browser presents the user's certificate by itself, also with what a foreign page submits or fetches. What may change
something must therefore come from a page of this service, as the browser says in headers that a page cannot set:
``Sec-Fetch-Site``, else ``Origin``. Programs send neither and are not concerned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from twisted.web.http_headers import Headers

#: Methods that change nothing on any route.
SAFE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS"})

_SCHEME = b"https://"
#: A host, by name, IPv4 or IPv6 literal, and a port, as both ``Host`` and ``Origin`` have it.
_AUTHORITY = re.compile(rb"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,255})(?::([0-9]{0,5}))?")
_DEFAULT_PORT = b"443"


def foreign_origin(headers: Headers) -> str | None:
    """Whether a request that may change something comes from a page of another site.

    Where ``Sec-Fetch-Site`` says that it does not, ``Origin: null`` is accepted: browsers send it for forms of a page
    with the policy ``no-referrer``, as ours are.

    Returns:
        What the browser says about it; None for programs and for pages of this service.
    """
    sites = headers.getRawHeaders(b"Sec-Fetch-Site")
    origins = headers.getRawHeaders(b"Origin")
    if sites is None and origins is None:
        return None
    if sites is not None and sites != [b"same-origin"]:
        return f"Sec-Fetch-Site: {_shown(sites)}"
    if origins is None or (sites is not None and origins == [b"null"]):
        return None
    hosts = headers.getRawHeaders(b"Host") or []
    if len(origins) == len(hosts) == 1:
        # The daemon ends TLS itself: the scheme is always https, and Host is what the browser's user sees.
        scheme, authority = origins[0][: len(_SCHEME)].lower(), origins[0][len(_SCHEME) :]
        own = _host_and_port(hosts[0])
        if scheme == _SCHEME and own is not None and _host_and_port(authority) == own:
            return None
    return f"Origin: {_shown(origins)}"


def _host_and_port(authority: bytes) -> tuple[bytes, bytes] | None:
    """Host in lower case, and port; None if it is malformed."""
    match = _AUTHORITY.fullmatch(authority.lower())
    return None if match is None else (match[1], match[2] or _DEFAULT_PORT)


def _shown(values: Sequence[bytes]) -> str:
    return ", ".join(value.decode("latin-1") for value in values)[:200]
