"""Ini files, read so that every mistake names its file and line."""

from __future__ import annotations

import configparser
import difflib
from collections.abc import Iterable
from pathlib import Path


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line that says where and why."""


def parse(source: Path) -> dict[str, dict[str, str]]:
    """The sections and keys of an ini file, as text.

    Comments are whole lines that begin with ``#`` or ``;``. A value goes on in the lines that are indented below it.

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
        raise ConfigError(f"{source}: line {error.lineno}: a key stands before the first [section]") from error
    except configparser.DuplicateSectionError as error:
        raise ConfigError(f"{source}: line {error.lineno}: section [{error.section}] stands there twice") from error
    except configparser.DuplicateOptionError as error:
        raise ConfigError(
            f"{source}: line {error.lineno}: [{error.section}] {error.option} stands there twice"
        ) from error
    except configparser.ParsingError as error:
        line, _ = error.errors[0]
        raise ConfigError(f"{source}: line {line}: 'key = value' or '[section]' is expected") from error
    return {section: dict(parser.items(section)) for section in parser.sections()}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: the known one that was perhaps meant, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(names)}"
