"""What the daemon has given for one endpoint alone: ``PDM_CREDENTIALS`` and ``PDM_TRUST`` of the environment.

Both are JSON objects: URL of the endpoint → ``{"file": PATH, "account": NAME or null}``, or the folder with the
authorities that may vouch for it; ``X509_CERT_DIR`` has those for all other servers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

#: Names the folder of the authorities that are trusted everywhere, when the helper begins.
_VARIABLE = "X509_CERT_DIR"
_USUAL_TRUST = os.environ.get(_VARIABLE)
_switching = threading.RLock()


class EndpointCredential(NamedTuple):
    """What is used at one endpoint.

    Attributes:
        file: with the private key or the token.
        account: who to be there; None if the user has not said.
    """

    file: str
    account: str | None


def credential_at(schemes: tuple[str, ...], authority: str) -> EndpointCredential | None:
    """What is given for a server; None for nothing.

    Args:
        schemes: by which its endpoint may be called.
        authority: ``HOST:PORT`` of it.
    """
    given = _given(os.environ.get("PDM_CREDENTIALS", ""))
    return next((given[url] for scheme in schemes if (url := f"{scheme}://{authority}") in given), None)


@functools.lru_cache(maxsize=1)
def _given(text: str) -> Mapping[str, EndpointCredential]:
    told: dict[str, dict[str, Any]] = json.loads(text) if text else {}
    return {
        "/".join(url.split("/")[:3]): EndpointCredential(each["file"], each.get("account"))
        for url, each in told.items()
    }


def trust_at(authority: str) -> str | None:
    """The folder with the authorities that may vouch for a server; None if there is no such folder.

    Args:
        authority: ``HOST:PORT`` of it.
    """
    folder = _trusted(os.environ.get("PDM_TRUST", "")).get(_plain(authority))
    # One that is not there vouches for nobody.
    return _USUAL_TRUST if folder is None else folder or os.devnull


@contextlib.contextmanager
def trusting(authority: str) -> Iterator[None]:
    """Have a library that reads ``X509_CERT_DIR`` find there, while this lasts, what may vouch for one server.

    Only one thread at a time may have its own: the others wait. Where nothing is told of single servers, nobody does.
    """
    if not os.environ.get("PDM_TRUST"):
        yield
        return
    with _switching:
        before = os.environ.get(_VARIABLE)
        _set(trust_at(authority))
        try:
            yield
        finally:
            _set(before)


def _set(folder: str | None) -> None:
    if folder is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = folder


@functools.lru_cache(maxsize=1)
def _trusted(text: str) -> Mapping[str, str]:
    told: dict[str, str] = json.loads(text) if text else {}
    folders: dict[str, str] = {}
    for url, folder in told.items():
        place = _plain(url.split("/", 3)[2])
        # Two names of one server that are trusted by unlike authorities: by none of them.
        folders[place] = folder if folders.get(place, folder) == folder else ""
    return folders


def _plain(authority: str) -> str:
    """One spelling of a server's address: libraries keep connections by what it means."""
    return authority.rpartition("@")[2].lower().removesuffix(":2811").removesuffix(":443").removesuffix(":1094")
