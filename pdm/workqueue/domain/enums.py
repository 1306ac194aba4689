"""The enumerations of the REST reference; their numbers are part of the wire."""

from __future__ import annotations

import enum
from typing import Self


class _NamedEnum(enum.IntEnum):
    """An enumeration that is given out as a name and taken as number, digit string or name."""

    @classmethod
    def parse(cls, value: object) -> Self:
        """Read a member from what a client sent.

        Args:
            value: a member, its number (``1``), its number in digits (``"1"``) or its name in any case (``"copy"``).

        Raises:
            ValueError: it is none of these; the text names what is known.
        """
        if isinstance(value, int) and not isinstance(value, bool):
            if value in cls._value2member_map_:
                return cls(value)
        elif isinstance(value, str):
            # isdecimal() accepts every script's digits and int() reads them; the wire means ASCII.
            if value.isascii() and value.isdecimal() and len(value) <= 3 and int(value) in cls._value2member_map_:
                return cls(int(value))
            member = cls.__members__.get(value.upper())
            if member is not None:
                return member
        known = ", ".join(f"{member.name} ({member.value})" for member in cls)
        raise ValueError(f"not a {cls.__name__}: one of {known} is expected")


class JobType(_NamedEnum):
    """What a job asks for."""

    #: Names, sizes and times of what is at a path.
    LIST = 0
    #: A file, or a directory with all that is in it, to another place.
    COPY = 1
    #: A file, or a directory with all that is in it, away.
    REMOVE = 2
    #: A new name at the same site.
    RENAME = 3
    #: A new directory.
    MKDIR = 4


class JobProtocol(_NamedEnum):
    """How the bytes are moved."""

    #: GridFTP with grid proxies.
    GRIDFTP = 0
    #: SFTP.
    SSH = 1
    #: Simulated work, for tests and benchmarks.
    DUMMY = 2
    #: Folders that the service itself can see.
    FILE = 3
    #: WebDAV over HTTPS.
    HTTPS = 4
    #: XRootD.
    XROOT = 5


#: Protocols that one helper, the relay, reaches all of: a copy goes from any of them to any other through the service.
RELAYED = frozenset({JobProtocol.FILE, JobProtocol.SSH, JobProtocol.HTTPS, JobProtocol.XROOT})

#: Protocols that the field's own commands (globus-url-copy, gfal-*) can move. Not SSH: gfal2 checks no host keys.
TOOL_PROTOCOLS = frozenset({JobProtocol.GRIDFTP, JobProtocol.HTTPS, JobProtocol.XROOT})


class MoverKind(enum.StrEnum):
    """Who carries out the elements of a job."""

    #: The service's own clients of the protocols.
    NATIVE = "native"
    #: The field's own commands.
    TOOLS = "tools"


class JobStatus(_NamedEnum):
    """Where a job or an element stands."""

    #: Known, not yet accepted for running.
    NEW = 0
    #: All that was asked is done and proven.
    DONE = 1
    #: Ended without success; the last attempt says why.
    FAILED = 2
    #: Waiting for its turn, or for the time of its next try.
    SUBMITTED = 3
    #: Being carried out now.
    RUNNING = 4
    #: Ended because it was asked to.
    CANCELLED = 5
    #: Waiting until something outside is mended (an expired credential).
    HELD = 6

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more, unless a retry is asked for."""
        return self in (JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)
