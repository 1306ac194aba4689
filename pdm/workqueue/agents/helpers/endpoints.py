"""What the daemon has given for one endpoint alone: ``PDM_CREDENTIALS`` of the environment.

It is a JSON object: URL of the endpoint → ``{"file": PATH, "account": NAME or null}``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple


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
