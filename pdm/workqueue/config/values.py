"""Values of ``workqueue.conf``: their types, and how durations, sizes, subjects, addresses and paths are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from msgspec import Meta

from pdm.workqueue.domain.addresses import AddressRange
from pdm.workqueue.domain.oidc import check_issuer
from pdm.workqueue.domain.subjects import normal_subject


def kind(name: str, **limits: Any) -> Meta:
    """Marks how `pdm.workqueue.config.values` reads the text of a key."""
    return Meta(extra={"kind": name}, **limits)


DAY_S = 86400.0

#: Seconds, written ``500ms``, ``30s``, ``5m``, ``12h`` or ``7d``; more than none.
Duration = Annotated[float, kind("duration", gt=0, le=3650 * DAY_S)]
#: Seconds, or 0 for "not at all".
DurationOrZero = Annotated[float, kind("duration", ge=0, le=3650 * DAY_S)]
#: Seconds, or ``forever``, which is infinite.
DurationOrForever = Annotated[float, kind("duration-or-forever", gt=0)]
#: Seconds, or nothing.
OptionalDuration = Annotated[float | None, kind("optional-duration")]
#: Bytes, written ``512``, ``64KiB``, ``1MB``.
Size = Annotated[int, kind("size", ge=1, le=2**62)]
#: A path; a relative one is relative to the directory of the configuration file.
FilePath = Annotated[Path, kind("path")]
#: A path; the default is relative to the state directory.
StatePath = Annotated[Path, kind("state-path")]
#: A path, or nothing.
OptionalPath = Annotated[Path | None, kind("optional-path")]
#: Certificate subjects, one a line, in slash form: ``/C=XX/O=Grid/CN=Name``.
Subjects = Annotated[tuple[str, ...], kind("subjects")]

#: Addresses and networks, one a line: ``10.0.0.0/8``, ``127.0.0.1:8080``, ``[::1]:8080``.
AddressRanges = Annotated[tuple[AddressRange, ...], kind("addresses")]

#: A name for people and for a segment of a URL, or empty.
NodeName = Annotated[str, kind("node-name")]
#: ``https://HOST:PORT``, or empty.
NodeAddress = Annotated[str, kind("node-address")]

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
#: Streams of work at once: no more than there can be helpers.
StreamCount = Annotated[int, Meta(ge=1, le=1000)]
Text = Annotated[str, Meta(min_length=1)]
#: Certificate subject → share of the work, one a line: ``3 /C=XX/O=Grid/CN=Name``.
Weights = Annotated[Mapping[str, float], kind("weights")]


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
        raise ValueError(f"{quoted(text)}: letters, digits, '.', '_' and '-' are expected, 100 at most")
    return text


def node_address(text: str) -> str:
    """The URL of a node, without a path: ``https://HOST:PORT``.

    Raises:
        ValueError: it is another URL, or none.
    """
    if not text:
        return text
    complaint = f"{quoted(text)}: https://HOST:PORT is expected, such as https://node1.example.org:8443"
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


def quoted(text: str) -> str:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return repr(shown)
