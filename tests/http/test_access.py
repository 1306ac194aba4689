"""Who may call: the configuration's lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdm.workqueue.config.access_settings import UserSettings
from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.http.access import AccessList, Role

ALICE, BOB, EVE = "/DC=org/CN=Alice Jones", "/DC=org/CN=bob", "/DC=org/CN=eve"


def _list(directory: Path, text: str, register: str = "listed", operators: tuple[str, ...] = ()) -> AccessList:
    file = directory / "users"
    file.write_text(text)
    return AccessList.read(UserSettings(register=register, listed_users=file, operators=operators))  # type: ignore[arg-type]


def test_every_subject_is_a_user_unless_only_listed_ones_are() -> None:
    access = AccessList.read(UserSettings(operators=(BOB,)))
    assert access.role_of(ALICE) is Role.USER
    assert access.role_of(BOB) is Role.OPERATOR


def test_only_those_listed(tmp_path: Path) -> None:
    access = _list(tmp_path, f"# people\n{ALICE}\n\n  operator   {BOB}\n", operators=())
    assert access.role_of(ALICE) is Role.USER
    assert access.role_of(BOB) is Role.OPERATOR
    assert access.role_of(EVE) is None


def test_operators_of_the_configuration_are_listed_too(tmp_path: Path) -> None:
    assert _list(tmp_path, f"user {EVE}\n", operators=(EVE,)).role_of(EVE) is Role.OPERATOR


def test_a_listed_role_holds_where_everybody_may_come(tmp_path: Path) -> None:
    access = _list(tmp_path, f"operator {BOB}\n", register="anyone")
    assert (access.role_of(ALICE), access.role_of(BOB)) == (Role.USER, Role.OPERATOR)


@pytest.mark.parametrize("line", ["king /DC=org/CN=eve", "operator", "operator eve", "eve"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"users: line 2: expected /SUBJECT"):
        _list(tmp_path, f"{ALICE}\n{line}\n")


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.* cannot be read"):
        AccessList.read(UserSettings(listed_users=tmp_path / "nowhere"))
