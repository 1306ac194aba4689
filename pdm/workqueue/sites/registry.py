"""The sites that the service knows, read from the files of ``sites.d``: one section a site.

::

    [RAL]
    id = 13
    description = Rutherford Appleton Laboratory
    default_folder = /store/user
    gridftp = gsiftp://gridftp.example.org:2811
    https = https://dav.example.org:443
    myproxy = myproxy.example.org:7512
    mover = tools
    tape = https://tape.example.org:8444/api/v1
    fts = https://fts3.example.org:8446

A protocol may have several endpoints of one storage: a URL a line, those after the first indented. Sites that
users registered come from the database; where two have one number, the site of the file wins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen
from twisted.logger import Logger

from pdm.workqueue.config.reader import ConfigError, parse_ini, suggestion
from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, MoverKind
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
from pdm.workqueue.sites.checks import (
    LONGEST_NAME,
    check_default_folder,
    check_description,
    check_endpoint,
    check_fts,
    check_host_and_port,
    check_id,
    check_limit,
    check_mover,
    check_name,
    check_tape,
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


@frozen
class Site:
    """A storage site.

    Attributes:
        id: the number in the REST API and in the database; stays when the site moves.
        name: what people call it; never a number.
        default_folder: where relative paths begin; absolute, or begins with ``~``.
        mover: who carries out the elements of its jobs, unless a job says so itself.
        fts: ``https://HOST:PORT`` of the FTS3 that carries out copies from and to it; None where there is none.
        myproxy: ``HOST:PORT`` of the MyProxy server at which its users log on; None where it has none.
        tape: URL of its tape API; None where its HTTPS endpoint names it, or where it has none.
        endpoints: protocol → URL without path (FILE: with the root directory), percent-encoded, no slash at its end.
        alternatives: protocol → further URLs of the same storage.
        owner_id: user that registered it; None for a site of the files.
        public: whether everybody may use it; else only its owner.
        limit_in: streams of work that go into it at once, at most; None for what the configuration says.
        limit_out: likewise, out of it.
        authorities: PEM of authorities that are trusted for this site only; may be empty.
        unlisted: whether the service has made it of a URL: lists of sites leave it out.
        oidc: the issuer of its tokens, and the client that users log in with; None where it says nothing of them.
    """

    id: int
    name: str
    description: str
    default_folder: str
    endpoints: Mapping[JobProtocol, str]
    alternatives: Mapping[JobProtocol, Sequence[str]] = field(factory=dict)
    owner_id: int | None = None
    public: bool = True
    limit_in: int | None = None
    limit_out: int | None = None
    authorities: str = ""
    myproxy: str | None = None
    mover: MoverKind = MoverKind.NATIVE
    tape: str | None = None
    fts: str | None = None
    unlisted: bool = False
    oidc: OidcSettings | None = None

    @property
    def may_have_tape(self) -> bool:
        """Whether it has a tape API, or an endpoint that may name one."""
        return self.tape is not None or JobProtocol.HTTPS in self.endpoints

    def endpoint_urls(self, protocol: JobProtocol) -> Sequence[str]:
        """All URLs of a protocol, the preferred one first; empty where it is not offered."""
        first = self.endpoints.get(protocol)
        return () if first is None else (first, *self.alternatives.get(protocol, ()))

    def is_open_to(self, user_id: int) -> bool:
        """Whether a user may use it."""
        return self.public or self.owner_id == user_id


def moved_by_tools(protocol: JobProtocol, asked: object, sites: Iterable[Site]) -> bool:
    """Whether the elements of a job are carried out by the field's own commands.

    Args:
        protocol: of the job.
        asked: its option ``mover``; None where it has none.
        sites: its own; one that is moved by the tools is enough.
    """
    if protocol not in TOOL_PROTOCOLS:
        return False
    if asked is not None:
        return asked == MoverKind.TOOLS
    return any(site.mover is MoverKind.TOOLS for site in sites)


#: Key → protocol.
ENDPOINT_KEYS = {member.name.lower(): member for member in JobProtocol}
_OTHER_KEYS = (
    "id",
    "description",
    "default_folder",
    "limit_in",
    "limit_out",
    "myproxy",
    "mover",
    "tape",
    "fts",
    *OIDC_KEYS,
)


class SiteRegistry:
    """All sites; those of the files, and those of the database, are replaced as a whole when they are read again."""

    _log = Logger()

    def __init__(self, directory: Path, sites: Iterable[Site]) -> None:
        self._directory = directory
        self._of_files = {site.id: site for site in sites}
        self._stored: dict[int, Site] = {}
        self._sites = dict(self._of_files)

    @classmethod
    def read(cls, directory: Path) -> SiteRegistry:
        """Read the files of a directory.

        Raises:
            ConfigError: the directory or a file cannot be read, or something in it is wrong; names file, site and key.
        """
        return cls(directory, _read_directory(directory))

    def by_id(self, number: int) -> Site | None:
        return self._sites.get(number)

    def is_of_file(self, number: int) -> bool:
        """Whether a site is described in a file, and so cannot be changed through the API."""
        return number in self._of_files

    def has_file_name(self, name: str) -> bool:
        """Whether a site of the files has a name, in any case."""
        return any(site.name.casefold() == name.casefold() for site in self._of_files.values())

    def take_stored(self, sites: Iterable[Site]) -> None:
        """Replace the sites of the database."""
        self._stored = {site.id: site for site in sites}
        self._join()

    def _join(self) -> None:
        for number in self._stored.keys() & self._of_files.keys():
            self._log.warn(
                "site {number} of the database is hidden by the one of that number in the files", number=number
            )
        # One assignment: another thread sees the old sites or the new ones.
        self._sites = self._stored | self._of_files

    def all(self) -> list[Site]:
        """Every site, lowest number first."""
        return [self._sites[number] for number in sorted(self._sites)]

    def listed(self) -> list[Site]:
        """Every site that somebody has described, lowest number first."""
        return [site for site in self.all() if not site.unlisted]

    def reload(self) -> str | None:
        """Read the files again; if anything is wrong, all stays as it was.

        Returns:
            None, or what is wrong; the log says it too.
        """
        try:
            fresh = _read_directory(self._directory)
        except ConfigError as error:
            self._log.error("the sites stay as they were: {reason}", reason=str(error))
            return str(error)
        self._of_files = {site.id: site for site in fresh}
        self._join()
        self._log.info("{count} sites read from {directory}", count=len(fresh), directory=str(self._directory))
        return None


def _read_directory(directory: Path) -> list[Site]:
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix == ".conf" and not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{directory}: the directory of sites cannot be read: {error.strerror}") from error
    sites: list[Site] = []
    places: dict[int | str, str] = {}
    for file in files:
        for name, keys in parse_ini(file).items():
            place = f"{file}: [{_display(name)}]"
            site = _read_site(place, name, keys)
            for mark, what in ((site.id, f"id {site.id}"), (site.name.casefold(), f"the name {site.name}")):
                if mark in places:
                    raise ConfigError(f"{place} has {what}, and so has {places[mark]}")
                places[mark] = place
            sites.append(site)
    return sites


def _display(text: str) -> str:
    shown = ascii(text)[1:-1] if not text.isprintable() else text
    return shown if len(shown) <= LONGEST_NAME else shown[:LONGEST_NAME] + "..."


def _read_site(place: str, name: str, keys: Mapping[str, str]) -> Site:
    known = (*_OTHER_KEYS, *ENDPOINT_KEYS)
    for key in keys:
        if key not in known:
            raise ConfigError(f"{place} unknown key {_display(key)}{suggestion(key, known)}")

    def checked_by(key: str, check: Callable[[str], str], default: str) -> str:
        try:
            return check(keys.get(key, default))
        except ValueError as error:
            raise ConfigError(f"{place} {key}: {error}") from error

    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"{place} is no name for a site: {error}") from error
    mover = MoverKind(checked_by("mover", check_mover, MoverKind.NATIVE))
    try:
        oidc = read_oidc(keys)
    except ValueError as error:
        raise ConfigError(f"{place} {error}") from error
    endpoints: dict[JobProtocol, list[str]] = {}
    for key, protocol in ENDPOINT_KEYS.items():
        for line in keys[key].split("\n") if key in keys else ():
            try:
                endpoints.setdefault(protocol, []).append(check_endpoint(protocol, line, mover))
            except ValueError as error:
                raise ConfigError(f"{place} {key}: {error}") from error
        if protocol is JobProtocol.FILE and len(endpoints.get(protocol, ())) > 1:
            raise ConfigError(f"{place} {key}: one directory is expected")
    if not endpoints:
        raise ConfigError(f"{place} has no endpoint: give at least one of {', '.join(ENDPOINT_KEYS)}")
    return Site(
        id=int(checked_by("id", check_id, "")),
        name=name,
        description=checked_by("description", check_description, ""),
        default_folder=checked_by("default_folder", check_default_folder, "~"),
        endpoints={protocol: urls[0] for protocol, urls in endpoints.items()},
        alternatives={protocol: tuple(urls[1:]) for protocol, urls in endpoints.items() if urls[1:]},
        limit_in=int(checked_by("limit_in", check_limit, "1")) if "limit_in" in keys else None,
        limit_out=int(checked_by("limit_out", check_limit, "1")) if "limit_out" in keys else None,
        myproxy=checked_by("myproxy", check_host_and_port, "") if "myproxy" in keys else None,
        mover=mover,
        tape=checked_by("tape", check_tape, "") if "tape" in keys else None,
        fts=checked_by("fts", check_fts, "") if "fts" in keys else None,
        oidc=oidc,
    )
