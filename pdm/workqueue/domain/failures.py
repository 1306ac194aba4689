"""What can go wrong with an attempt: stable codes, whose fault it is, and what to do next."""

from __future__ import annotations

import enum
import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from pdm.workqueue.domain.enums import JobType


class FailureScope(enum.StrEnum):
    """Where the fault lies."""

    SOURCE = "source"
    DESTINATION = "destination"
    TRANSFER = "transfer"
    SERVICE = "service"


class Remedy(enum.StrEnum):
    """What the queue does about a failure."""

    #: The same again would fail again: the element fails at once.
    GIVE_UP = "give-up"
    #: It may pass: the element is tried again after a pause.
    RETRY = "retry"
    #: Something outside must be mended first: the element is held and burns no attempt.
    HOLD = "hold"


class FailureCode(enum.StrEnum):
    """Stable words for clients; `MEANINGS` and `hint_for` say the rest."""

    NOT_FOUND = "NOT_FOUND"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    EXISTS = "EXISTS"
    IS_A_DIRECTORY = "IS_A_DIRECTORY"
    NOT_A_DIRECTORY = "NOT_A_DIRECTORY"
    NOT_EMPTY = "NOT_EMPTY"
    INVALID_NAME = "INVALID_NAME"
    NO_SPACE = "NO_SPACE"
    READ_ONLY = "READ_ONLY"
    UNSUPPORTED = "UNSUPPORTED"
    SPECIAL_FILE = "SPECIAL_FILE"
    SIZE_CHANGED = "SIZE_CHANGED"
    CHANGED = "CHANGED"
    DIFFERS = "DIFFERS"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    TIMEOUT = "TIMEOUT"
    STALLED = "STALLED"
    CONNECTION = "CONNECTION"
    BUSY = "BUSY"
    LOCKED = "LOCKED"
    TOO_LARGE = "TOO_LARGE"
    SERVER_ERROR = "SERVER_ERROR"
    NO_CHECKSUM = "NO_CHECKSUM"
    CREDENTIAL_EXPIRED = "CREDENTIAL_EXPIRED"
    CREDENTIAL_MISSING = "CREDENTIAL_MISSING"
    CREDENTIAL_REFUSED = "CREDENTIAL_REFUSED"
    CREDENTIAL_UNFIT = "CREDENTIAL_UNFIT"
    ISSUER_UNAVAILABLE = "ISSUER_UNAVAILABLE"
    CERTIFICATE = "CERTIFICATE"
    HOST_KEY = "HOST_KEY"
    CRASHED = "CRASHED"
    BAD_LISTING = "BAD_LISTING"
    INCOMPLETE_LISTING = "INCOMPLETE_LISTING"
    TOO_MANY_DELETIONS = "TOO_MANY_DELETIONS"
    SAME_PLACE = "SAME_PLACE"
    STAGING = "STAGING"
    ARCHIVING = "ARCHIVING"
    LOST = "LOST"
    UNAVAILABLE = "UNAVAILABLE"
    TAPE_ERROR = "TAPE_ERROR"
    TAPE_TIMEOUT = "TAPE_TIMEOUT"
    DEPENDENCY_MISSING = "DEPENDENCY_MISSING"
    INTERNAL = "INTERNAL"
    UNKNOWN = "UNKNOWN"


class _Meaning(NamedTuple):
    remedy: Remedy
    hint: str


_GIVE_UP, _RETRY, _HOLD = Remedy.GIVE_UP, Remedy.RETRY, Remedy.HOLD
_GIVE_CREDENTIAL = (
    "Run 'pdm delegate' (or 'pdm login', 'pdm ssh-key', 'pdm token', 'pdm s3-key' for the site),"
    " and the job resumes by itself."
)

#: code → what the queue does and what the user can do, where `_HINTS` has nothing for the type of the job. One
#: sentence each; the words in braces are those of `API_WORDS`.
MEANINGS: Mapping[FailureCode, _Meaning] = MappingProxyType(
    {
        FailureCode.NOT_FOUND: _Meaning(_GIVE_UP, "Check the path: list the directory that should contain it."),
        FailureCode.PERMISSION_DENIED: _Meaning(
            _GIVE_UP,
            "Ask the owner of that directory, or the site, to let your account in;"
            " a token may be for another directory, or have ended.",
        ),
        FailureCode.EXISTS: _Meaning(_GIVE_UP, "Something is there already: choose another path."),
        FailureCode.IS_A_DIRECTORY: _Meaning(_GIVE_UP, "The path is a directory: choose another one."),
        FailureCode.NOT_A_DIRECTORY: _Meaning(
            _GIVE_UP, "A part of the path is a file: choose another path, or move that file away."
        ),
        FailureCode.NOT_EMPTY: _Meaning(_GIVE_UP, "See what failed inside that directory, mend it, then {retry}."),
        FailureCode.INVALID_NAME: _Meaning(_GIVE_UP, "The site cannot have such a name: choose another one."),
        FailureCode.NO_SPACE: _Meaning(_RETRY, "Free space or ask for quota at the site, then {retry}."),
        FailureCode.READ_ONLY: _Meaning(_GIVE_UP, "The storage is read-only: ask the site when it will take writes."),
        FailureCode.UNSUPPORTED: _Meaning(_GIVE_UP, "The server cannot do this: ask the site."),
        FailureCode.SPECIAL_FILE: _Meaning(
            _GIVE_UP, "It is a pipe, a socket or a device, which has no content to copy: name a file or a directory."
        ),
        FailureCode.SIZE_CHANGED: _Meaning(
            _RETRY, "The source is being written: wait until its writer has ended, then {retry}."
        ),
        FailureCode.CHANGED: _Meaning(
            _GIVE_UP, "It is not what was listed: look at it, and submit the removal again if it is to go."
        ),
        FailureCode.DIFFERS: _Meaning(
            _GIVE_UP,
            "The file was changed or damaged since: find out by what, then copy it again from where it is good.",
        ),
        FailureCode.CHECKSUM_MISMATCH: _Meaning(
            _RETRY, "The bytes arrived damaged and were removed: if it happens again, report it to the site."
        ),
        FailureCode.TIMEOUT: _Meaning(_RETRY, "The server did not finish in time: retry later, or ask the site."),
        FailureCode.STALLED: _Meaning(_RETRY, "No byte moved for too long: retry later, or ask the site."),
        FailureCode.CONNECTION: _Meaning(_RETRY, "The server could not be reached: check that the site is up."),
        FailureCode.BUSY: _Meaning(
            _RETRY, "The server is busy and asks to come back later: if it stays so, ask the site."
        ),
        FailureCode.LOCKED: _Meaning(_RETRY, "Another client has locked it: {retry} once the lock has ended."),
        FailureCode.TOO_LARGE: _Meaning(_GIVE_UP, "The file is larger than the site takes: ask it to raise its limit."),
        FailureCode.SERVER_ERROR: _Meaning(
            _RETRY, "The server failed at this request: if it happens again, report the message to the site."
        ),
        FailureCode.NO_CHECKSUM: _Meaning(_GIVE_UP, "The server gives no such checksum: ask the site."),
        FailureCode.CREDENTIAL_EXPIRED: _Meaning(
            _HOLD,
            _GIVE_CREDENTIAL,
        ),
        FailureCode.CREDENTIAL_MISSING: _Meaning(
            _HOLD,
            _GIVE_CREDENTIAL,
        ),
        FailureCode.CREDENTIAL_REFUSED: _Meaning(
            _GIVE_UP,
            "The site does not accept your identity: ask it to let in your certificate, SSH key, token or S3 key.",
        ),
        FailureCode.CREDENTIAL_UNFIT: _Meaning(
            _HOLD,
            "Give the service a token that fits ('pdm token SITE', or 'pdm login SITE --oidc'), and the job resumes by"
            " itself; if the site accepts other tokens than the message says, its owner corrects the site.",
        ),
        FailureCode.ISSUER_UNAVAILABLE: _Meaning(
            _HOLD,
            "The token issuer gives no new token: the service asks it again, and the job resumes by itself then; if it"
            " stays so, tell the operators of the issuer.",
        ),
        FailureCode.CERTIFICATE: _Meaning(
            _GIVE_UP, "A certificate is not trusted: check that service and site trust each other's authorities."
        ),
        FailureCode.HOST_KEY: _Meaning(
            _GIVE_UP,
            "The service does not know the host key of this server: an operator compares its fingerprint with the site"
            " (ssh-keyscan, ssh-keygen -lf) and puts the key into the file known_hosts of [ssh].",
        ),
        FailureCode.CRASHED: _Meaning(_RETRY, "The transfer helper died: it is tried again; if not, tell an operator."),
        FailureCode.BAD_LISTING: _Meaning(_GIVE_UP, "The server's listing is not valid: report it to the site."),
        FailureCode.INCOMPLETE_LISTING: _Meaning(
            _GIVE_UP,
            "Nothing was removed: see which directories could not be listed, then submit it again.",
        ),
        FailureCode.TOO_MANY_DELETIONS: _Meaning(
            _GIVE_UP,
            "Nothing was removed: check the paths, then allow more.",
        ),
        FailureCode.SAME_PLACE: _Meaning(_GIVE_UP, "One path leads into the other: choose another one."),
        FailureCode.STAGING: _Meaning(
            _HOLD, "The tape system brings the file to disk: its copy begins by itself once it is there."
        ),
        FailureCode.ARCHIVING: _Meaning(
            _HOLD, "Nothing needs to be done: the file is copied, and is DONE once the tape system has it."
        ),
        FailureCode.LOST: _Meaning(
            _GIVE_UP, "The site has lost the file: ask it, and take another copy of the file if there is one."
        ),
        FailureCode.UNAVAILABLE: _Meaning(
            _RETRY, "The tape system cannot reach the file now: ask the site when it will, then {retry}."
        ),
        FailureCode.TAPE_ERROR: _Meaning(
            _RETRY, "The tape system could not bring the file: ask the site with this message, then {retry}."
        ),
        FailureCode.TAPE_TIMEOUT: _Meaning(
            _RETRY, "The tape system did not finish in time: ask the site, then {retry}, or allow more time."
        ),
        FailureCode.DEPENDENCY_MISSING: _Meaning(
            _HOLD,
            "The service lacks a program or library: tell an operator; once it is installed the job resumes by itself.",
        ),
        FailureCode.INTERNAL: _Meaning(_RETRY, "A fault of the service: tell an operator the job and element numbers."),
        FailureCode.UNKNOWN: _Meaning(_RETRY, "See the log of the attempt; if it does not explain it, ask the site."),
    }
)
_COPY, _RENAME, _REMOVE, _MKDIR = JobType.COPY, JobType.RENAME, JobType.REMOVE, JobType.MKDIR

#: code and type of the job → the hint, where another one fits that type better.
_HINTS: Mapping[tuple[FailureCode, JobType], str] = MappingProxyType(
    {
        (FailureCode.EXISTS, _COPY): "Choose another destination, or allow to overwrite: {overwrite_or_different}.",
        (FailureCode.NO_CHECKSUM, _COPY): "The server gives no such checksum: copy with {verify}, or ask the site.",
        (FailureCode.EXISTS, _RENAME): "Choose another name, or allow to overwrite: {overwrite}.",
        (FailureCode.EXISTS, _MKDIR): "Nothing needs to be done if it is a directory: with {parents} that is no error.",
        (FailureCode.NOT_FOUND, _MKDIR): "The directory above it is missing: with {parents} it is made, too.",
        (FailureCode.NOT_FOUND, _RENAME): (
            "Check both paths: the source must be there, and so must the directory of the new name."
        ),
        (FailureCode.IS_A_DIRECTORY, _COPY): (
            "The destination is a directory: end its path in / to put the file into it, or choose another path."
        ),
        (FailureCode.TOO_MANY_DELETIONS, _COPY): (
            "Nothing was removed: check both paths; if all of it is to go, submit it again with {max_delete}."
        ),
        (FailureCode.IS_A_DIRECTORY, _REMOVE): "To remove a directory with all that is in it: {recursive}.",
        (FailureCode.NOT_EMPTY, _REMOVE): (
            "To remove a directory with all that is in it: {recursive}; where that was asked for, see what failed"
            " inside it, then {retry}."
        ),
        (FailureCode.INVALID_NAME, _COPY): "The site cannot store that name: rename it at the source.",
        (FailureCode.NO_SPACE, _COPY): "Free space or ask for quota at the destination, then {retry}.",
        (FailureCode.UNSUPPORTED, _COPY): "A server cannot do this: copy with {verify}, or ask the site.",
        (FailureCode.UNSUPPORTED, _RENAME): "The server cannot do this: copy it, then remove the source.",
    }
)

#: What a hint names, in the words of the REST API; the command line has its own.
API_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "overwrite": "overwrite=always",
        "overwrite_or_different": "overwrite=always or overwrite=different",
        "recursive": "recursive=true",
        "parents": "parents=true",
        "verify": "verify=size",
        "retry": "retry the job",
        "max_delete": "max_delete=N",
    }
)


def hint_for(code: FailureCode, type_: JobType, words: Mapping[str, str] = API_WORDS) -> str:
    """What a user can do about a failure: one sentence, for the API and the command line alike.

    Args:
        code: of the failure.
        type_: of the job; a look at a site counts as a LIST.
        words: what the options are called where the hint is read; has all keys of `API_WORDS`.
    """
    return (_HINTS.get((code, type_)) or MEANINGS[code].hint).format_map(words)


#: After these it is unknown whether the server has carried out the request.
OUTCOME_UNKNOWN = frozenset(
    {
        FailureCode.CRASHED,
        FailureCode.CONNECTION,
        FailureCode.STALLED,
        FailureCode.TIMEOUT,
        FailureCode.SERVER_ERROR,
        FailureCode.INTERNAL,
        FailureCode.UNKNOWN,
    }
)

_BY_ERRNO: Mapping[int, FailureCode] = MappingProxyType(
    {
        errno.ENOENT: FailureCode.NOT_FOUND,
        errno.EACCES: FailureCode.PERMISSION_DENIED,
        errno.EPERM: FailureCode.PERMISSION_DENIED,
        errno.EEXIST: FailureCode.EXISTS,
        errno.EISDIR: FailureCode.IS_A_DIRECTORY,
        errno.ENOTDIR: FailureCode.NOT_A_DIRECTORY,
        errno.ENOTEMPTY: FailureCode.NOT_EMPTY,
        errno.ENAMETOOLONG: FailureCode.INVALID_NAME,
        errno.EILSEQ: FailureCode.INVALID_NAME,
        errno.EINVAL: FailureCode.INVALID_NAME,
        errno.ELOOP: FailureCode.NOT_FOUND,
        errno.ENOSPC: FailureCode.NO_SPACE,
        errno.EDQUOT: FailureCode.NO_SPACE,
        errno.EROFS: FailureCode.READ_ONLY,
        errno.EOPNOTSUPP: FailureCode.UNSUPPORTED,
        errno.EXDEV: FailureCode.UNSUPPORTED,
        errno.ENOSYS: FailureCode.UNSUPPORTED,
        errno.EFBIG: FailureCode.TOO_LARGE,
        errno.ETIMEDOUT: FailureCode.TIMEOUT,
        errno.ECONNREFUSED: FailureCode.CONNECTION,
        errno.ECONNRESET: FailureCode.CONNECTION,
        errno.EHOSTUNREACH: FailureCode.CONNECTION,
        errno.ENETUNREACH: FailureCode.CONNECTION,
        errno.EPIPE: FailureCode.CONNECTION,
    }
)


_UNREACHABLE_ERRNOS = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN})


def is_unreachable_errno(number: int | None) -> bool:
    """Whether an operating system's error number says that nothing answers there."""
    return number in _UNREACHABLE_ERRNOS


def code_for_errno(number: int | None) -> FailureCode:
    """The code for an operating system's error number; `FailureCode.UNKNOWN` for one that has none."""
    return FailureCode.UNKNOWN if number is None else _BY_ERRNO.get(number, FailureCode.UNKNOWN)


class AttemptFailure(NamedTuple):
    """Why an attempt failed.

    Attributes:
        scope: whose side failed.
        code: the stable word.
        message: what the tool or server said, bounded, for people.
        retry_after_s: seconds for which the server asks not to be asked again; None if it did not say.
        unreachable: whether it shows that no server answered: it was not connected, or never greeted.
    """

    scope: FailureScope
    code: FailureCode
    message: str
    retry_after_s: float | None = None
    unreachable: bool = False

    @property
    def remedy(self) -> Remedy:
        return MEANINGS[self.code].remedy

    @property
    def retryable(self) -> bool:
        """Whether the same may pass later, by itself or once something outside is mended."""
        return self.remedy is not Remedy.GIVE_UP
