"""Read ini files and ``workqueue.conf``. Every error names the file and the line, or the section and the key."""

from __future__ import annotations

import configparser
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import quote, urlsplit

import msgspec
from msgspec.structs import FieldInfo, fields, replace

from pdm.workqueue.config.settings import SECTIONS, Settings
from pdm.workqueue.domain.addresses import AddressRange
from pdm.workqueue.domain.oidc import check_issuer
from pdm.workqueue.domain.subjects import normal_subject

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_BYTES = {
    "": 1,
    "B": 1,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)", re.ASCII)
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
_NODE_NAME = re.compile(r"[A-Za-z0-9._-]{0,100}", re.ASCII)
_SHARE = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,6})?", re.ASCII)
_LEAST_SHARE, _LARGEST_SHARE = 0.01, 100
_YES = frozenset({"yes", "true", "on", "1"})
_NO = frozenset({"no", "false", "off", "0"})


def _quantity(text: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None or len(text) > 40:
        return math.nan, ""
    return float(match.group(1)), match.group(2)


def duration(text: str) -> float:
    """Seconds in ``500ms``, ``30s``, ``5m``, ``12h``, ``7d`` or ``0``.

    Raises:
        ValueError: it is no duration, or has no unit.
    """
    number, unit = _quantity(text)
    if unit in _UNITS_S and not math.isnan(number):
        return number * _UNITS_S[unit]
    if number == 0 and unit == "":
        return 0.0
    raise ValueError("a duration is expected, such as 500ms, 30s, 5m, 12h or 7d")


def duration_or_forever(text: str) -> float:
    """Seconds, or infinity for ``forever``.

    Raises:
        ValueError: it is neither.
    """
    if text == "forever":
        return math.inf
    try:
        return duration(text)
    except ValueError as error:
        raise ValueError(f"{error}; or forever") from error


def optional_duration(text: str) -> float | None:
    """Seconds, or None where nothing is written.

    Raises:
        ValueError: it is no duration.
    """
    return duration(text) if text else None


def size(text: str) -> int:
    """Bytes in ``512``, ``64KiB``, ``1MB``.

    Raises:
        ValueError: it is no size, or not a whole number of bytes.
    """
    number, unit = _quantity(text)
    if math.isnan(number) or unit not in _UNITS_BYTES:
        raise ValueError("a size is expected, such as 512, 64KiB, 1MiB or 2GB")
    exact = number * _UNITS_BYTES[unit]
    if exact != int(exact):
        raise ValueError("a whole number of bytes is expected")
    return int(exact)


def whole(text: str) -> int:
    """A whole number.

    Raises:
        ValueError: it is none.
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError("a whole number is expected")
    return int(text)


def yes_or_no(text: str) -> bool:
    """A decision: yes or no (also true/false, on/off, 1/0).

    Raises:
        ValueError: it is neither.
    """
    if text.lower() in _YES:
        return True
    if text.lower() in _NO:
        return False
    raise ValueError("yes or no is expected")


def subjects(text: str) -> tuple[str, ...]:
    """Subjects of certificates, one a line; in the form in which they are compared.

    Raises:
        ValueError: a line is no subject in slash form.
    """
    return tuple(normal_subject(line.strip()) for line in text.splitlines() if line.strip())


def weights(text: str) -> dict[str, float]:
    """Shares of subjects, one a line: ``3 /C=XX/O=Organisation/CN=Name``.

    Raises:
        ValueError: a line is not of that form, or a share is not between 0.01 and 100.
    """
    found: dict[str, float] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        number, _, subject = line.partition(" ")
        if not _SHARE.fullmatch(number) or not _LEAST_SHARE <= float(number) <= _LARGEST_SHARE:
            raise ValueError(f"{line[:60]!r}: a share ({_LEAST_SHARE} to {_LARGEST_SHARE}) and a subject are expected")
        (known,) = subjects(subject) or ("",)
        if not known or known in found:
            raise ValueError(f"{line[:60]!r}: {'each subject once' if known else 'a subject'} is expected")
        found[known] = float(number)
    return found


def addresses(text: str) -> tuple[AddressRange, ...]:
    """Addresses and networks, one a line.

    Raises:
        ValueError: a line is neither.
    """
    return tuple(AddressRange.parse(line.strip()) for line in text.splitlines() if line.strip())


def issuers(text: str) -> tuple[str, ...]:
    """URLs of token issuers, one a line.

    Raises:
        ValueError: a line is none.
    """
    return tuple(check_issuer(line.strip()) for line in text.splitlines() if line.strip())


def node_name(text: str) -> str:
    """The name of a node, which is also a part of URLs and of command lines.

    Raises:
        ValueError: it has other characters, or is too long.
    """
    if not _NODE_NAME.fullmatch(text):
        raise ValueError(f"{_quoted(text)}: letters, digits, '.', '_' and '-' are expected, 100 at most")
    return text


def node_address(text: str) -> str:
    """The URL of a node, without a path: ``https://HOST:PORT``.

    Raises:
        ValueError: it is another URL, or none.
    """
    if not text:
        return text
    complaint = f"{_quoted(text)}: https://HOST:PORT is expected, such as https://node1.example.org:8443"
    try:
        parts = urlsplit(text)
        is_complete = parts.hostname and parts.port
    except ValueError as error:
        raise ValueError(complaint) from error
    if not is_complete or text != f"https://{parts.netloc}" or re.search(r"[@\s]", text):
        raise ValueError(complaint)
    return text


def one_line(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it goes over several lines (a following line was indented by mistake).
    """
    if "\n" in text:
        raise ValueError("one line is expected: is the line after it indented by mistake?")
    return text


def path_below(directory: Path) -> Callable[[str], Path]:
    """Reads a path; a relative one is below the directory, ``~`` is the home of the daemon's account."""

    def read(text: str) -> Path:
        if not text:
            raise ValueError("a path is expected")
        if "\0" in text:
            raise ValueError("a path must not contain NUL")
        return directory / Path(one_line(text)).expanduser()

    return read


def optional_path_below(directory: Path) -> Callable[[str], Path | None]:
    """Reads a path, or None where nothing is written."""
    read = path_below(directory)
    return lambda text: read(text) if text else None


def readers(directory: Path) -> dict[str, Callable[[str], Any]]:
    """How to read each kind of key of a file in this directory."""
    path = path_below(directory)
    return {
        "duration": duration,
        "duration-or-forever": duration_or_forever,
        "optional-duration": optional_duration,
        "size": size,
        "path": path,
        "state-path": path,
        "optional-path": optional_path_below(directory),
        "subjects": subjects,
        "weights": weights,
        "addresses": addresses,
        "issuers": issuers,
        "node-name": node_name,
        "node-address": node_address,
        "int": whole,
        "bool": yes_or_no,
        "str": one_line,
    }


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line that says where and why."""


def parse_ini(source: Path) -> dict[str, dict[str, str]]:
    """The sections and keys of an ini file, as text.

    Comments are whole lines that begin with ``#`` or ``;``. Indented lines continue a value.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has a line that is neither section, key nor comment.
    """
    parser = configparser.ConfigParser(
        delimiters=("=",),
        comment_prefixes=("#", ";"),
        interpolation=None,
        # No section gives defaults to others: [DEFAULT] is unknown like any other stranger.
        default_section="\0",
    )
    # A key in the wrong case is a mistake to be named, not to be understood.
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way, python/typeshed#5008
    try:
        text = source.read_text(encoding="utf-8-sig")
        parser.read_string(text, source=str(source))
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8 text (byte {error.start})") from error
    except configparser.MissingSectionHeaderError as error:
        raise ConfigError(f"{source}: line {error.lineno}: a key is before the first [section]") from error
    except configparser.DuplicateSectionError as error:
        raise ConfigError(f"{source}: line {error.lineno}: section [{error.section}] is there twice") from error
    except configparser.DuplicateOptionError as error:
        raise ConfigError(f"{source}: line {error.lineno}: [{error.section}] {error.option} is there twice") from error
    except configparser.ParsingError as error:
        line, _ = error.errors[0]
        raise ConfigError(f"{source}: line {line}: 'key = value' or '[section]' is expected") from error
    return {section: dict(parser.items(section)) for section in parser.sections()}


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: the known one that was perhaps meant, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(names)}"


#: The database where no URL is set, below the state directory.
DATABASE_NAME = "workqueue.sqlite"

_SQLITE_FILE = re.compile(r"(sqlite(?:\+[a-z]+)?:///)(.+)", re.DOTALL)
_URL = re.compile(r"[a-z][a-z0-9+]*://[^\n]*")
#: How msgspec writes limits → how people do.
_LIMITS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}

ValueReader = Callable[[str], Any]


def read_settings(path: Path, overrides: Mapping[str, str] | None = None) -> Settings:
    """Read and check the whole configuration.

    Args:
        overrides: ``section.key`` → text, stronger than the file (for tests and command lines).

    Returns:
        Settings with absolute paths and with a database URL.

    Raises:
        ConfigError: the file cannot be read, or something in it is unknown, missing or wrong.
    """
    source = Path(path).absolute()
    texts = {section: dict(keys) for section, keys in parse_ini(source).items()}
    for name, text in (overrides or {}).items():
        section, _, key = name.partition(".")
        texts.setdefault(section, {})[key] = text
    kinds = readers(source.parent)
    for section in texts:
        if section not in SECTIONS:
            raise ConfigError(f"{source}: unknown section [{section}]{suggestion(section, SECTIONS)}")
    sections = {
        name: _read_section(source, name, struct, texts.get(name, {}), kinds) for name, struct in SECTIONS.items()
    }
    _take_events_keep(source, sections, texts)
    return _located(Settings(source=source, **sections))


#: Bounds of ``[events] keep``, in seconds.
_EVENTS_KEPT_S = (3600, 3650 * 86400)


def _take_events_keep(source: Path, sections: dict[str, Any], texts: Mapping[str, Mapping[str, str]]) -> None:
    """Take ``[events] keep``, the earlier name of ``[retention] events``."""
    kept_s: float | None = sections["events"].keep_s
    if kept_s is None:
        return
    least, most = _EVENTS_KEPT_S
    if not least <= kept_s <= most:
        text = _quoted(texts["events"]["keep"])
        raise ConfigError(f"{source}: [events] keep: {text} is out of range: at least {least} is expected")
    if "events" in texts.get("retention", {}):
        raise ConfigError(f"{source}: [events] keep is the earlier name of [retention] events: remove it")
    sections["retention"] = replace(sections["retention"], events_s=kept_s)


def _read_section(
    source: Path, section: str, struct: type[msgspec.Struct], texts: Mapping[str, str], kinds: Mapping[str, ValueReader]
) -> Any:
    known = {info.encode_name: info for info in fields(struct)}
    values = {}
    for key, text in texts.items():
        if key not in known:
            raise ConfigError(f"{source}: [{section}] unknown key {key}{suggestion(key, known)}")
        try:
            values[known[key].name] = _read_value(known[key], text, kinds)
        except ValueError as error:
            raise ConfigError(f"{source}: [{section}] {key}: {error}") from error
    return struct(**(_default_paths(known.values(), source.parent) | values))


def _read_value(info: FieldInfo, text: str, kinds: Mapping[str, ValueReader]) -> Any:
    """Read the text of one key.

    Raises:
        ValueError: it is wrong; ``msgspec.ValidationError`` is one.
    """
    base, kind = _type_and_kind(info.type)
    if get_origin(base) is Literal:
        choices = {str(choice): choice for choice in get_args(base)}
        if text not in choices:
            raise ValueError(f"{_quoted(text)} is not known: one of {', '.join(choices)} is expected")
        return choices[text]
    value = kinds[kind](text)
    if base in (int, float, str):
        # The limits of the declared type; its complaints are rewritten in the words of the file.
        try:
            msgspec.convert(value, info.type)
        except msgspec.ValidationError as error:
            raise ValueError(_complaint(str(error), text)) from error
    return value


def _type_and_kind(declared: Any) -> tuple[Any, str]:
    if get_origin(declared) is not Annotated:
        return declared, getattr(declared, "__name__", "")
    base, *notes = get_args(declared)
    for note in notes:
        if isinstance(note, msgspec.Meta) and note.extra:
            return base, str(note.extra["kind"])
    return base, base.__name__


def _complaint(error: str, text: str) -> str:
    if not text:
        return "a value is expected"
    limit = re.sub(r"`\w+` (\S+) (\S+)", lambda match: f"{_LIMITS[match.group(1)]} {match.group(2)}", error)
    return f"{_quoted(text)} is out of range: {limit.removeprefix('Expected ')} is expected"


def _quoted(text: str) -> str:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return repr(shown)


def _default_paths(known: Iterable[FieldInfo], directory: Path) -> dict[str, Path]:
    """The defaults that are paths below the directory of the file."""
    return {
        info.name: directory / info.default
        for info in known
        if _type_and_kind(info.type)[1] == "path" and isinstance(info.default, Path)
    }


def _located(settings: Settings) -> Settings:
    """Settings whose paths in the state directory, and whose database, have their place."""
    state = settings.state.folder

    def in_state(section: Any) -> Any:
        # What was given is absolute by now, so what is relative still is a default.
        return replace(
            section,
            **{
                info.name: state / getattr(section, info.name)
                for info in fields(section)
                if _type_and_kind(info.type)[1] == "state-path"
            },
        )

    return replace(
        settings,
        agents=replace(settings.agents, python=settings.agents.python or Path(sys.executable)),
        database=replace(settings.database, url=_database_url(settings)),
        logs=in_state(settings.logs),
        credentials=in_state(settings.credentials),
    )


def _database_url(settings: Settings) -> str:
    """The URL with an absolute, percent-encoded path, for SQLAlchemy decodes it."""
    given = settings.database.url
    if not given:
        return f"sqlite:///{quote(str(settings.state.folder / DATABASE_NAME))}"
    if not _URL.fullmatch(given):
        # The text stays out of the message: it may hold a password.
        raise ConfigError(
            f"{settings.source}: [database] url: a URL is expected, such as sqlite:///var/workqueue.sqlite"
        )
    file = _SQLITE_FILE.fullmatch(given)
    if file is None or file.group(2).startswith(("/", ":memory:", "file:")):
        return given
    return f"{file.group(1)}{quote(str(settings.source.parent))}/{file.group(2)}"
