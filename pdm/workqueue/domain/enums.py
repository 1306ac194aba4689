"""The enumerations of the REST reference; their numbers are part of the wire."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple, Self


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


class ProtocolInfo(NamedTuple):
    """What the service knows of a protocol: one line of `JobProtocol` adds one.

    Attributes:
        number: its number on the wire and in the database; never used twice.
        schemes: of its URLs; the first is the usual one.
        default_port: where its servers listen if the URL names no port.
        backend: ``module:Class`` in ``pdm/workqueue/helpers/backends/``, by which the relay helper reads and writes
            its storage; empty for a protocol that has a helper of its own.
        credentials: kinds of credentials (values of `CredentialKind`) that the backend logs in with, the preferred one
            first.
        has_homes: whether a path may begin with ``~``, the home directory of the account.
    """

    number: int
    schemes: tuple[str, ...]
    default_port: int | None = None
    backend: str = ""
    credentials: tuple[str, ...] = ()
    has_homes: bool = False


class JobProtocol(_NamedEnum):
    """How the bytes are moved. Each member is a number on the wire, and has a `ProtocolInfo`."""

    info: ProtocolInfo

    def __new__(cls, *info: Any) -> Self:
        known = ProtocolInfo(*info)
        member = int.__new__(cls, known.number)
        member._value_ = known.number
        member.info = known
        return member

    #: GridFTP with grid proxies.
    GRIDFTP = ProtocolInfo(0, ("gsiftp",), 2811, "gridftp_groups:GroupedGridFtpBackend", ("proxy",), has_homes=True)
    #: SFTP.
    SSH = ProtocolInfo(1, ("sftp",), 22, "sftp:SftpBackend", ("ssh-key",), has_homes=True)
    #: Simulated work, for tests and benchmarks.
    DUMMY = ProtocolInfo(2, ("dummy",), has_homes=True)
    #: Directories that the service itself can see.
    FILE = ProtocolInfo(3, ("file",), None, "local_groups:GroupedLocalBackend")
    #: WebDAV over HTTPS.
    HTTPS = ProtocolInfo(4, ("https", "davs"), 443, "webdav_groups:GroupedWebdavBackend", ("token", "proxy"))
    #: XRootD.
    XROOT = ProtocolInfo(5, ("root", "roots"), 1094, "xrootd_groups:GroupedXrootdBackend", ("proxy",))
    #: Object storage with the protocol of Amazon S3, over TLS.
    S3 = ProtocolInfo(6, ("s3s", "s3sv"), 443, "s3_groups:GroupedS3Backend", ("s3-key",))

    @classmethod
    def of_scheme(cls, scheme: str) -> Self | None:
        """The protocol whose URLs have a scheme; None if there is none."""
        return next((member for member in cls if scheme in member.info.schemes), None)


#: Protocols that one helper, the relay, reaches all of: a copy goes from any of them to any other through the service.
RELAYED = frozenset(protocol for protocol in JobProtocol if protocol.info.backend)


def relay_order(protocol: JobProtocol) -> tuple[bool, JobProtocol]:
    """Sort key of the protocols by which one end of a relayed copy can be reached: by number, and GRIDFTP last.

    At a site with others, too, GRIDFTP costs more logins, and wants a proxy where others take a token or a key.
    """
    return protocol is JobProtocol.GRIDFTP, protocol


#: Protocols that the field's own commands (globus-url-copy, gfal-*) can move. Not SSH: gfal2 checks no host keys.
TOOL_PROTOCOLS = frozenset({JobProtocol.GRIDFTP, JobProtocol.HTTPS, JobProtocol.XROOT})


class MoverKind(enum.StrEnum):
    """Who carries out the elements of a job."""

    #: The service's own clients of the protocols.
    NATIVE = "native"
    #: The field's own commands.
    TOOLS = "tools"


class SyncLevel(enum.StrEnum):
    """What of a COPY counts as already there; what else is at the destination is overwritten."""

    #: Whatever file has the name.
    EXISTS = "exists"
    #: A file of the same size.
    SIZE = "size"
    #: A file of the same size and modification time.
    MTIME = "mtime"
    #: A file of the same size and checksum.
    CHECKSUM = "checksum"


class ChecksumAlgorithm(enum.StrEnum):
    """By which a copied file is compared with its source."""

    ADLER32 = "ADLER32"
    MD5 = "MD5"
    SHA256 = "SHA256"


class PlannedAction(enum.StrEnum):
    """What the plan of a COPY says of an element, by what the listing of the destination has."""

    #: Nothing is at the destination.
    COPY = "COPY"
    #: Something else is at the destination, and is replaced.
    OVERWRITE = "OVERWRITE"
    #: It counts as already there.
    SAME = "SAME"
    #: It is at the destination only, and is removed there.
    DELETE = "DELETE"
    #: A moved source, which is removed.
    MOVED = "MOVED"


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
