"""``etc/workqueue.conf`` names every key, with its true default."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec.structs import fields

from pdm.workqueue.config.reader import parse_ini, read_settings
from pdm.workqueue.config.settings import SECTIONS

_DOCUMENTED = Path(__file__).parents[2] / "etc" / "workqueue.conf"
#: A key that is shown with its default: "#key = value", without a blank after the #.
_SHOWN = re.compile(r"^#(?=[a-z_]+ =)", re.MULTILINE)


def _uncommented(directory: Path) -> Path:
    file = directory / "uncommented.conf"
    file.write_text(_SHOWN.sub("", _DOCUMENTED.read_text(encoding="utf-8")), encoding="utf-8")
    return file


def test_every_key_is_there_and_no_other(tmp_path: Path) -> None:
    shown = {name: set(keys) for name, keys in parse_ini(_uncommented(tmp_path)).items()}
    known = {name: {info.encode_name for info in fields(struct)} for name, struct in SECTIONS.items()}
    assert shown == known


def test_the_defaults_are_those_of_the_program(tmp_path: Path) -> None:
    empty = tmp_path / "empty.conf"
    empty.write_text("")
    shown = msgspec.structs.replace(read_settings(_uncommented(tmp_path)), source=empty)
    assert shown == read_settings(empty)


def test_the_file_as_it_is_changes_nothing(tmp_path: Path) -> None:
    copy = tmp_path / "copy.conf"
    copy.write_bytes(_DOCUMENTED.read_bytes())
    empty = tmp_path / "empty.conf"
    empty.write_text("")
    assert msgspec.structs.replace(read_settings(copy), source=empty) == read_settings(empty)


def test_every_key_has_a_comment() -> None:
    lines = _DOCUMENTED.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if _SHOWN.match(line):
            before = lines[number - 1]
            assert before.startswith("#"), f"{line} follows no comment and no key with one"
