"""Settings of the client: service, certificate, authorities; and choice of sites and protocols by name."""

from __future__ import annotations

import configparser
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from attrs import field, frozen

from pdm.workqueue.client.errors import NoCommonProtocolError, SettingsError, UnknownSiteError
from pdm.workqueue.domain.enums import RELAYED, TOOL_PROTOCOLS, JobProtocol, MoverKind, relay_order
from pdm.workqueue.wire.sites import SiteView

_KEYS = ("url", "certificate", "key", "ca")


@frozen
class ClientSettings:
    """Settings of a client.

    Attributes:
        url: ``https://HOST:PORT`` of the service.
        certificate: PEM file of the caller's certificate, with its chain, and with the key if `key` is None; None to
            call without a certificate.
        key: PEM file.
        ca: PEM file or grid-style directory of the authorities of the service; None for those of the system.
        ca_named_by: origin of `ca`, for messages.
        passphrase: of an encrypted key.
    """

    url: str
    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    ca_named_by: str = field(default="", eq=False)
    passphrase: bytes | None = field(default=None, repr=False)


def find_settings(environ: Mapping[str, str], home: Path, uid: int, url: str | None = None) -> ClientSettings:
    """Collect the settings; the first source that has a setting wins.

    Sources in order: ``PDM_URL``, ``PDM_CERT`` with ``PDM_KEY``, ``PDM_CA``; the file ``pdm/client.conf``
    below ``XDG_CONFIG_HOME`` or ``~/.config``; ``X509_USER_PROXY``, ``X509_USER_CERT`` with ``X509_USER_KEY``,
    ``/tmp/x509up_u<uid>``, ``~/.globus/usercert.pem`` with ``userkey.pem``; ``X509_CERT_DIR``,
    ``~/.globus/certificates``, ``/etc/grid-security/certificates``. Certificate and key always come from the same
    source. An explicit `url` overrides all.

    Raises:
        SettingsError: missing or invalid service URL, or an invalid file.
    """
    path = _file_path(environ, home)
    stored = _read_file(path, home)
    found = url or environ.get("PDM_URL") or stored.get("url")
    if not found:
        raise SettingsError(
            "the service URL is missing",
            f"Set PDM_URL=https://HOST:PORT, or write 'url = ...' under [client] into {path}.",
        )
    certificate, key = _identity(environ, stored, home, uid)
    return ClientSettings(_checked_url(found), certificate, key, *_authorities(environ, stored, home))


def find_authorities(environ: Mapping[str, str], home: Path) -> Path | None:
    """The authorities alone, as `find_settings` finds them; None for those of the system.

    Raises:
        SettingsError: client.conf is invalid.
    """
    return _authorities(environ, _read_file(_file_path(environ, home), home), home)[0]


def _file_path(environ: Mapping[str, str], home: Path) -> Path:
    return Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pdm" / "client.conf"


def _identity(
    environ: Mapping[str, str], stored: Mapping[str, str], home: Path, uid: int
) -> tuple[Path | None, Path | None]:
    for certificate, key, names in (
        (environ.get("PDM_CERT"), environ.get("PDM_KEY"), "PDM_KEY is set, but not PDM_CERT"),
        (stored.get("certificate"), stored.get("key"), "client.conf has a key, but no certificate"),
    ):
        if certificate:
            return Path(certificate), Path(key) if key else None
        if key:
            raise SettingsError(names, "Set the certificate that belongs to the key.")
    if proxy := environ.get("X509_USER_PROXY"):
        return Path(proxy), None
    if (certificate := environ.get("X509_USER_CERT")) and (key := environ.get("X509_USER_KEY")):
        return Path(certificate), Path(key)
    usual = Path(f"/tmp/x509up_u{uid}")  # noqa: S108 - the grid's fixed place; only read, and checked by who reads it
    if usual.is_file() and usual.stat().st_uid == uid:
        return usual, None
    pair = home / ".globus" / "usercert.pem", home / ".globus" / "userkey.pem"
    return pair if all(each.is_file() for each in pair) else (None, None)


def _authorities(environ: Mapping[str, str], stored: Mapping[str, str], home: Path) -> tuple[Path | None, str]:
    """Path of the authorities, and the setting that names it."""
    for named, by in (
        (environ.get("PDM_CA"), "PDM_CA"),
        (stored.get("ca"), "ca in client.conf"),
        (environ.get("X509_CERT_DIR"), "X509_CERT_DIR"),
    ):
        if named:
            return Path(named), by
    for usual in (home / ".globus" / "certificates", Path("/etc/grid-security/certificates")):
        if usual.is_dir():
            return usual, ""
    return None, ""


def _read_file(path: Path, home: Path) -> Mapping[str, str]:
    """Read client.conf; paths in it are relative to it, ``~`` is the home directory."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        text = path.read_text(encoding="utf-8")
        parser.read_string(text, source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error})", "Correct the file, or remove it.") from error
    except configparser.Error as error:
        raise SettingsError(" ".join(str(error).split()), "Correct the file, or remove it.") from error
    for section in parser.sections():
        if section != "client":
            raise SettingsError(f"{path}: unknown section [{section}]", "The only section is [client].")
    values = dict(parser["client"]) if parser.has_section("client") else {}
    for name in values:
        if name not in _KEYS:
            near = difflib.get_close_matches(name, _KEYS, n=1)
            advice = f"Did you mean {near[0]}?" if near else f"Known keys are {', '.join(_KEYS)}."
            raise SettingsError(f"{path}: [client] has an unknown key {name}", advice)
    for name in ("certificate", "key", "ca"):
        if value := values.get(name):
            values[name] = str(home / value[2:] if value.startswith("~/") else path.parent / value)
    return values


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(f"invalid service URL {url!r}", "It has the form https://HOST:PORT.")
    return url.rstrip("/")


def find_site(sites: Sequence[SiteView], name: str) -> SiteView:
    """The site with a name, or else with a number in digits; a name may consist of digits, and comes first.

    Raises:
        UnknownSiteError: there is none.
    """
    for same in (lambda site: site.name == name, lambda site: str(site.id) == name):
        for site in sites:
            if same(site):
                return site
    known = ", ".join(sorted(f"{site.name} ({site.id})" for site in sites)) or "none"
    near = did_you_mean(name, [site.name for site in sites])
    raise UnknownSiteError(f"no site {name}", f"{near}Known sites: {known}.")


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """``Did you mean cern? `` for a word that is like a known one, in any case; else empty."""
    by_lower = {word.lower(): word for word in known}
    near = difflib.get_close_matches(typed.lower(), by_lower, n=1)
    return f"Did you mean {by_lower[near[0]]}? " if near else ""


def choose_protocol(sites: Sequence[SiteView], mover: str | None = None) -> JobProtocol:
    """GridFTP if all sites offer it, else the first protocol that all offer.

    Without a common protocol, the first by `relay_order` from which the service can copy to the destination. DUMMY
    comes last, because it only simulates work. `sites` are the source and, if different, the destination; they choose a
    `mover` of None.

    Raises:
        NoCommonProtocolError: no protocol connects the sites.
    """
    offered = [{protocol for protocol in JobProtocol if protocol.name in site.protocols} for site in sites]
    common = set.intersection(*offered)
    by_tools = MoverKind.TOOLS in ([site.mover for site in sites] if mover is None else [mover])
    reaching = TOOL_PROTOCOLS if by_tools else RELAYED
    relayed = offered[0] & reaching if offered[-1] & reaching else set()
    if common - {JobProtocol.DUMMY}:
        return min(common - {JobProtocol.DUMMY})
    if relayed:
        return min(relayed, key=relay_order)
    if common:
        return JobProtocol.DUMMY
    offers = "; ".join(f"{site.name} offers {', '.join(site.protocols) or 'nothing'}" for site in sites)
    others = ", ".join(protocol.name for protocol in sorted(reaching))
    raise NoCommonProtocolError(
        f"the sites have no protocol in common: {offers}",
        f"Copies use one protocol, or go from one of {others} to another of these.",
    )
