"""Read ini files and ``workqueue.conf``. Every error names the file and the line, or the section and the key."""

from __future__ import annotations

import configparser
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import quote

import msgspec
from msgspec.structs import FieldInfo, fields, replace

from pdm.workqueue.config.settings import SECTIONS, Settings
from pdm.workqueue.config.values import quoted, readers


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


#: Least and greatest value of ``[events] keep``, in seconds.
_EVENTS_KEPT_S = (3600, 3650 * 86400)


def _take_events_keep(source: Path, sections: dict[str, Any], texts: Mapping[str, Mapping[str, str]]) -> None:
    """Take ``[events] keep``, the earlier name of ``[retention] events``."""
    kept_s: float | None = sections["events"].keep_s
    if kept_s is None:
        return
    least, most = _EVENTS_KEPT_S
    if not least <= kept_s <= most:
        text = quoted(texts["events"]["keep"])
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
            raise ValueError(f"{quoted(text)} is not known: one of {', '.join(choices)} is expected")
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
    return f"{quoted(text)} is out of range: {limit.removeprefix('Expected ')} is expected"


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
