"""The keys of a site's section that are about tokens: ``oidc`` for the issuer, and ``oidc_*``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pdm.workqueue.domain.oidc import (
    DEFAULT_SCOPE,
    MOST_AUDIENCES,
    OidcSettings,
    check_base_path,
    check_client_id,
    check_client_secret,
    check_issuer,
    check_scope,
)

OIDC_KEYS = (
    "oidc",
    "oidc_client",
    "oidc_secret_file",
    "oidc_scope",
    "oidc_audience",
    "oidc_base_path",
    "oidc_exchange",
)
_LONGEST_SECRET = 1024
_SWITCH = {"yes": True, "no": False}


def read_oidc(keys: Mapping[str, str]) -> OidcSettings | None:
    """What the keys of a section say about tokens; None if they say nothing.

    Raises:
        ValueError: a value is wrong; the text begins with its key.
    """
    if not any(key in keys for key in OIDC_KEYS):
        return None

    def read(key: str, check: Callable[[str], str]) -> str | None:
        try:
            return check(keys[key]) if key in keys else None
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    exchange = keys.get("oidc_exchange", "no")
    if exchange not in _SWITCH:
        raise ValueError("oidc_exchange: yes or no is expected")
    audiences = keys["oidc_audience"].split("\n") if "oidc_audience" in keys else []
    if len(audiences) > MOST_AUDIENCES:
        raise ValueError(f"oidc_audience: at most {MOST_AUDIENCES} lines are expected")
    oidc = OidcSettings(
        issuer=read("oidc", check_issuer),
        client_id=read("oidc_client", check_client_id),
        scope=read("oidc_scope", check_scope) or DEFAULT_SCOPE,
        audiences=tuple(_audience(line) for line in audiences),
        base_path=read("oidc_base_path", check_base_path),
        exchange=_SWITCH[exchange],
        client_secret=read("oidc_secret_file", _secret),
    )
    if oidc.client_id is not None and oidc.issuer is None:
        raise ValueError("oidc_client: the key oidc, the URL of the issuer, is missing")
    if oidc.has_secret and oidc.client_id is None:
        raise ValueError("oidc_secret_file: the key oidc_client is missing")
    return oidc


def _audience(line: str) -> str:
    try:
        return check_client_id(line)
    except ValueError as error:
        raise ValueError(f"oidc_audience: {error}") from error


def _secret(file: str) -> str:
    path = Path(file)
    if not path.is_absolute():
        raise ValueError("an absolute path is expected")
    try:
        with path.open(encoding="ascii") as opened:
            return check_client_secret(opened.read(_LONGEST_SECRET).strip())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not ASCII") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
