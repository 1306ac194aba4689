"""Check what operators and users write about a site: its name, its endpoints, its servers, its limits."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes, urlsplit

from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.domain.paths import InvalidPathError, checked

#: Schemes of servers that only the tools can reach, with the user's proxy; they are GRIDFTP by their name in jobs.
TOOL_SCHEMES = ("srm", "dcap", "gsidcap")
#: Where the web service of an SRM stands, and what comes before the path.
_SRM_SERVICE = re.compile(r"(?<=.)/[A-Za-z0-9/._-]{1,200}\?SFN=\Z", re.ASCII)
#: Largest site number: the database keeps 32 bits with a sign.
LARGEST_ID = 2**31 - 1
LONGEST_NAME = 64
_LONGEST_DESCRIPTION = 500
#: As many helpers as there can be.
_LARGEST_LIMIT = 1000
_NAME = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\])"
_HOST = re.compile(_NAME, re.ASCII)
_AUTHORITY = re.compile(_NAME + r"(?::[0-9]{1,5})?", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,10}", re.ASCII)


def check_name(name: str) -> str:
    """A name for a site.

    Raises:
        ValueError: it cannot be one; says why.
    """
    # SITE:PATH on the command line takes a number or a name: a name must never look like a number or hold a colon.
    good = (
        name[:1].isalpha()
        and len(name) <= LONGEST_NAME
        and all(character.isalnum() or character in "._-" for character in name)
    )
    if not good:
        raise ValueError(
            f"a letter first, then letters, digits, dots, dashes and underscores (at most {LONGEST_NAME} characters)"
        )
    return name


def check_id(text: str) -> str:
    if not _DIGITS.fullmatch(text) or not 1 <= int(text) <= LARGEST_ID:
        raise ValueError(f"a whole number from 1 to {LARGEST_ID} is expected")
    return text


def check_limit(text: str) -> str:
    if not _DIGITS.fullmatch(text) or not 1 <= int(text) <= _LARGEST_LIMIT:
        raise ValueError(f"a whole number from 1 to {_LARGEST_LIMIT} is expected")
    return text


def check_description(text: str) -> str:
    """A line about a site.

    Raises:
        ValueError: it is longer, or not printable.
    """
    if not text.isprintable() or len(text) > _LONGEST_DESCRIPTION:
        raise ValueError(f"one line of at most {_LONGEST_DESCRIPTION} characters is expected")
    return text


def check_default_folder(text: str) -> str:
    """Where relative paths of a site begin.

    Raises:
        ValueError: it is no such place.
    """
    if not text.isprintable():
        raise ValueError("one line is expected")
    if text != "~" and not text.startswith(("/", "~/")):
        raise ValueError("an absolute path is expected, or one that begins with ~")
    if ".." in text.split("/"):
        raise ValueError("a path without '..' is expected")
    return checked(text)


def check_host_and_port(text: str) -> str:
    """Where a server listens.

    Raises:
        ValueError: it is no such place.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or not _DIGITS.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise ValueError("HOST:PORT is expected")
    return text


def check_tape(text: str) -> str:
    """The URL of a tape API, without a slash at its end.

    Raises:
        ValueError: it is none.
    """
    if not text.startswith("https://"):
        raise ValueError("a URL that begins with https:// is expected, such as https://tape.example.org:8444/api/v1")
    return check_endpoint(JobProtocol.HTTPS, text)


def check_fts(text: str) -> str:
    """The address of an FTS3.

    Raises:
        ValueError: it is none.
    """
    scheme, separator, server = text.rstrip("/").partition("://")
    host, colon, port = server.rpartition(":")
    digits = _DIGITS.fullmatch(port)
    if scheme != "https" or not separator or not colon or not _HOST.fullmatch(host):
        raise ValueError("https://HOST:PORT of an FTS3 is expected")
    if digits is None or not 1 <= int(port) <= 65535:
        raise ValueError("a port from 1 to 65535 is expected")
    return f"https://{server}"


def check_mover(text: str) -> str:
    """Who carries out the elements of a site's jobs.

    Raises:
        ValueError: no account has that name.
    """
    if text not in list(MoverKind):
        raise ValueError(f"{' or '.join(MoverKind)} is expected")
    return text


def check_endpoint(protocol: JobProtocol, text: str, mover: MoverKind = MoverKind.NATIVE) -> str:
    """An endpoint of a site, in the one way in which it is written everywhere.

    Args:
        protocol: by which it is reached.
        text: the URL.
        mover: of the site: the tools know of more schemes.

    Raises:
        ValueError: it is none for the protocol.
    """
    schemes = protocol.info.schemes
    if mover is MoverKind.TOOLS and protocol is JobProtocol.GRIDFTP:
        schemes += TOOL_SCHEMES
        if text.startswith("srm://") and (service := _SRM_SERVICE.search(text)):
            return check_endpoint(protocol, text[: service.start()], mover) + service.group()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a URL of plain characters is expected; write others percent-encoded")
    scheme, separator, rest = text.partition("://")
    if scheme == "s3" and protocol is JobProtocol.S3:
        raise ValueError("s3:// is without TLS, by which anybody could read and change the bytes: s3s:// is expected")
    if not separator or scheme not in schemes:
        raise ValueError(f"a URL that begins with {' or '.join(f'{known}://' for known in schemes)} is expected")
    if "@" in rest.partition("/")[0]:
        raise ValueError("a URL without user and password is expected: credentials belong to users, not to sites")
    if "?" in rest or "#" in rest or "\\" in rest:
        raise ValueError("a URL without '?', '#' and '\\' is expected")
    return _root(rest) if protocol is JobProtocol.FILE else _server(protocol, text)


def _root(rest: str) -> str:
    """The endpoint of a local directory: ``file:///srv/data``, without a slash at its end unless it is ``/``."""
    if not rest.startswith("/"):
        raise ValueError("file:///DIRECTORY is expected, with three slashes")
    raw = unquote_to_bytes(rest)
    if b"\0" in raw or b".." in raw.split(b"/"):
        raise ValueError("a directory without NUL and '..' is expected")
    names = [name for name in raw.split(b"/") if name not in (b"", b".")]
    return "file:///" + "/".join(quote(name, safe="~") for name in names)


def check_bucket(scheme: str, host: str, path: str) -> None:
    """Check the bucket of an S3 endpoint: the first part of the path, or of the host's name.

    Raises:
        ValueError: there is none.
    """
    if scheme == "s3sv" and (not _HOST.fullmatch(host) or "." not in host):
        raise ValueError("s3sv://BUCKET.HOST:PORT is expected; s3s://HOST:PORT/BUCKET where the bucket is in the path")
    names = path.split("/")[1:]
    if scheme == "s3s" and not names:
        raise ValueError("s3s://HOST:PORT/BUCKET is expected: an endpoint is a bucket, or a prefix of its keys")
    if any(name in ("", ".", "..") for name in names):
        raise ValueError("a path without empty names, '.' and '..' is expected")


def _server(protocol: JobProtocol, text: str) -> str:
    parts = urlsplit(text)
    if not _AUTHORITY.fullmatch(parts.netloc):
        raise ValueError("SCHEME://HOST:PORT is expected")
    if parts.port == 0:  # urlsplit itself refuses one beyond 65535, with a ValueError
        raise ValueError("a port from 1 to 65535 is expected")
    path = parts.path.rstrip("/")
    # Only WebDAV and S3 endpoints are below a path; elsewhere paths are the server's own and a prefix would go
    # unnoticed.
    if protocol is JobProtocol.S3:
        check_bucket(parts.scheme, parts.hostname or "", path)
    elif path and protocol is not JobProtocol.HTTPS:
        raise ValueError("an endpoint ends after HOST:PORT; where relative paths begin is the key default_folder")
    try:
        checked(path or "/")
    except InvalidPathError as error:
        raise ValueError(str(error)) from error
    return f"{parts.scheme}://{parts.netloc}{path}"
