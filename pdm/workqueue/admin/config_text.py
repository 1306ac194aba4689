"""Change one key in the text of a configuration file; comments and all other lines stay."""

from __future__ import annotations

import re


def set_key(text: str, section: str, key: str, value: str) -> str:
    """The text with a key set: in place of the former line and its continuations, or as the first one of its section.

    ``text``: of a valid file. ``section``: is added at the end if there is none. ``value``: one line.
    """
    lines = text.splitlines()
    header = re.compile(rf"\[{re.escape(section)}\]\s*")
    start = next((number for number, line in enumerate(lines) if header.fullmatch(line)), None)
    if start is None:
        return "\n".join([*lines, "", f"[{section}]", f"{key} = {value}".rstrip()]) + "\n"
    end = next((number for number in range(start + 1, len(lines)) if lines[number].startswith("[")), len(lines))
    same = re.compile(rf"{re.escape(key)}\s*=")
    at = next((number for number in range(start + 1, end) if same.match(lines[number])), None)
    new = f"{key} = {value}".rstrip()
    if at is None:
        return "\n".join([*lines[: start + 1], new, *lines[start + 1 :]]) + "\n"
    after = at + 1
    # Indented lines continue the value; comments and empty lines may be among them.
    last = at
    while after < end and (not lines[after].strip() or lines[after][0] in " \t#;"):
        if lines[after].strip() and lines[after][0] in " \t" and lines[after].lstrip()[0] not in "#;":
            last = after
        after += 1
    return "\n".join([*lines[:at], new, *lines[last + 1 :]]) + "\n"
