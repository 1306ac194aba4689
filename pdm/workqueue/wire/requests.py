"""What clients send: one struct for each body, and one for each set of query parameters.

Types, protocols and site numbers are taken as numbers and as digit strings (the reference's clients send both), types
and protocols also by name; all other numbers are JSON numbers. A key that is left out, or null, has its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.jobs import FIRST_PRIORITY, LAST_PRIORITY, LEAST_TRIES, MOST_PREDECESSORS, MOST_TRIES
from pdm.workqueue.domain.paths import LONGEST_PATH
from pdm.workqueue.wire.options import OPTIONS

#: The largest number of a job, an element or a site that a database holds.
LARGEST_ID = 2**63 - 1
LONGEST_LABEL = 255

_WORD = Meta(max_length=20)

SiteNumber = Annotated[
    Annotated[int, Meta(ge=0, le=LARGEST_ID)] | Annotated[str, Meta(pattern=r"^[0-9]{1,19}$")],
    Meta(description="Number of a site (a string of digits is taken, too)."),
]
FilePath = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=LONGEST_PATH,
        description="Absolute, relative to the site's default directory, or beginning with ~ (the account's home).",
    ),
]
TypeWord = Annotated[
    int | Annotated[str, _WORD],
    Meta(description="Job type: " + ", ".join(f"{member.value} or {member.name}" for member in JobType) + "."),
]
ProtocolWord = Annotated[
    int | Annotated[str, _WORD] | None,
    Meta(
        description="How to move, default GRIDFTP: "
        + ", ".join(f"{member.value} or {member.name}" for member in JobProtocol)
        + "."
    ),
]
ExtraOptions = Annotated[dict[str, Any] | None, Meta(description="Options of the job type; an unknown one is refused.")]
Priority = Annotated[
    Annotated[int, Meta(ge=FIRST_PRIORITY, le=LAST_PRIORITY)] | None, Meta(description="0 is served first; default 5.")
]
Tries = Annotated[
    Annotated[int, Meta(ge=LEAST_TRIES, le=MOST_TRIES)] | None,
    Meta(description="How many attempts each element may have, the first one included; default 2."),
]
Label = Annotated[
    Annotated[str, Meta(min_length=1, max_length=LONGEST_LABEL)] | None,
    Meta(description="A word of your own to find the job by."),
]

After = Annotated[
    Annotated[list[Annotated[int, Meta(ge=1, le=LARGEST_ID)]], Meta(min_length=1, max_length=MOST_PREDECESSORS)] | None,
    Meta(description="Jobs of the caller: it begins when all of them are DONE, and is cancelled if one is not."),
]
AfterAny = Annotated[
    bool | None, Meta(description="With ``after``: begin when all of them have ended, in whatever state.")
]


#: Elements of a job that may run at once, if it has a limit of its own.
MOST_ACTIVE = 100_000
MaxActive = Annotated[
    Annotated[int, Meta(ge=1, le=MOST_ACTIVE)] | None,
    Meta(description="How many of its elements may run at once, on all nodes; default: no limit of its own."),
]


class _Submission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    protocol: ProtocolWord = None
    extra_opts: ExtraOptions = None
    priority: Priority = None
    max_tries: Tries = None
    label: Label = None
    max_active: MaxActive = None
    after: After = None
    after_any: AfterAny = None


class SubmitList(_Submission, frozen=True, kw_only=True):
    """List what is at a path."""

    src_siteid: SiteNumber
    src_filepath: FilePath


class SubmitRemove(_Submission, frozen=True, kw_only=True):
    """Remove a file, or a directory with all that is in it."""

    src_siteid: SiteNumber
    src_filepath: FilePath


class SubmitMkdir(_Submission, frozen=True, kw_only=True):
    """Make a directory."""

    src_siteid: SiteNumber
    src_filepath: FilePath


class SubmitCopy(_Submission, frozen=True, kw_only=True):
    """Copy a file, or what is in a directory; or the option ``items`` instead of the two paths."""

    src_siteid: SiteNumber
    src_filepath: FilePath | None = None
    dst_siteid: SiteNumber
    dst_filepath: FilePath | None = None


class SubmitRename(_Submission, frozen=True, kw_only=True):
    """Give a new name at the same site; ``dst_siteid`` need not be given."""

    src_siteid: SiteNumber
    src_filepath: FilePath
    dst_filepath: FilePath
    dst_siteid: SiteNumber | None = None


class SubmitJob(_Submission, frozen=True, kw_only=True):
    """A job of any type; ``dst_*`` where the type has a destination."""

    type: TypeWord
    src_siteid: SiteNumber
    src_filepath: FilePath | None = None
    dst_siteid: SiteNumber | None = None
    dst_filepath: FilePath | None = None


#: The options that a body may have in ``extra_opts``; read after the body, so that a job gives them back as sent.
OPTIONS_OF: Mapping[type[msgspec.Struct], tuple[type[msgspec.Struct], ...]] = MappingProxyType(
    {
        SubmitList: (OPTIONS[JobType.LIST],),
        SubmitRemove: (OPTIONS[JobType.REMOVE],),
        SubmitMkdir: (OPTIONS[JobType.MKDIR],),
        SubmitCopy: (OPTIONS[JobType.COPY],),
        SubmitRename: (OPTIONS[JobType.RENAME],),
        SubmitJob: tuple(OPTIONS.values()),
    }
)

Submission = SubmitList | SubmitRemove | SubmitMkdir | SubmitCopy | SubmitRename | SubmitJob

#: The end of a text in a pattern; a dollar would also match before a last newline.
_END = r"(?![\s\S])"
#: Who somebody is at a site: no option of a program, and one line.
_ACCOUNT = rf"^[A-Za-z0-9_.@/=+:,][A-Za-z0-9_.@/=+:, -]{{0,254}}{_END}"
_SSH_ACCOUNT = rf"^[A-Za-z0-9_][A-Za-z0-9_.@+$\\-]{{0,63}}{_END}"
#: It stands in a header between a "=" and a "/".
_S3_ACCESS_KEY = rf"^[A-Za-z0-9._~+@:-]{{1,128}}{_END}"
#: What is sent once and never shown again; one line.
_ONE_LINE = rf"^[^\x00-\x1f\x7f]+{_END}"
#: What a pattern asks for, in words, for error messages.
PATTERN_WORDS: Mapping[str, str] = {
    _ACCOUNT: "a user name of one line is expected, at most 255 letters, digits, blanks and . _ @ / = + : , -",
    _SSH_ACCOUNT: (
        "the name of an account is expected, such as alice, alice@site.org or DOMAIN\\alice:"
        " at most 64 letters, digits and . _ @ + $ \\ -"
    ),
    _S3_ACCESS_KEY: "the id of an access key of S3 is expected: at most 128 letters, digits and . _ ~ + @ : -",
    _ONE_LINE: "one line without control characters is expected",
}


class SiteLogon(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Log on at the MyProxy server of a site."""

    username: Annotated[str, Meta(pattern=_ACCOUNT, description="At the MyProxy server.")]
    password: Annotated[
        str, Meta(min_length=1, max_length=1024, pattern=_ONE_LINE, description="Used once; kept nowhere.")
    ]
    lifetime: Annotated[
        Annotated[int, Meta(ge=600, le=30 * 86400)] | None,
        Meta(description="Seconds that the proxy is to be valid, default 12 hours; the server may give less."),
    ] = None

    def __repr__(self) -> str:
        return f"SiteLogon(username={self.username!r})"


class NewCredential(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key or a token for the service to use."""

    kind: Annotated[
        Literal["ssh-key", "token", "s3-key"], Meta(description="What it is; a proxy is delegated instead.")
    ]
    site: Annotated[SiteNumber | None, Meta(description="For which site; null for every one.")] = None
    label: Label = None
    account: Annotated[
        Annotated[str, Meta(pattern=_SSH_ACCOUNT)] | None,
        Meta(description="ssh-key: the account at the site; one of a Windows domain with its backslash."),
    ] = None
    secret: Annotated[
        Annotated[str, Meta(min_length=1, max_length=16384)] | None,
        Meta(
            description="The token, a private key without passphrase, or the secret key of S3; without it, the service"
            " makes an SSH key."
        ),
    ] = None
    access_key: Annotated[
        Annotated[str, Meta(pattern=_S3_ACCESS_KEY)] | None, Meta(description="s3-key: the id of the key.")
    ] = None
    session_token: Annotated[
        Annotated[str, Meta(min_length=1, max_length=16384)] | None,
        Meta(description="s3-key: the session token of temporary keys, as a security token service (STS) gives them."),
    ] = None
    valid_until: Annotated[
        datetime | None, Meta(description="s3-key: when temporary keys end, RFC 3339; null if it is not known.")
    ] = None

    def __repr__(self) -> str:
        return f"NewCredential(kind={self.kind!r}, site={self.site!r})"


class NewRefreshToken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A refresh token that the user has from the issuer of a site."""

    refresh_token: Annotated[
        str,
        Meta(min_length=1, max_length=16384, pattern=_ONE_LINE, description="Of the site's client; encrypted."),
    ]

    def __repr__(self) -> str:
        return "NewRefreshToken()"


_Limit = Annotated[int, Meta(ge=1, le=1_000_000_000)]
_After = Annotated[int, Meta(ge=0, le=LARGEST_ID)]
#: Names out of an enumeration; the parameter may be repeated, and each may be a list with commas.
StatusWords = Annotated[
    tuple[str, ...], Meta(description=f"Only these: {', '.join(JobStatus.__members__)}; repeated, or with commas.")
]
TypeWords = Annotated[
    tuple[str, ...], Meta(description=f"Only these: {', '.join(JobType.__members__)}; repeated, or with commas.")
]


FailureCodes = Annotated[
    tuple[str, ...],
    Meta(description="Only what failed with one of these codes; repeated, or with commas."),
]


class _PageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    status: StatusWords = ()
    type: TypeWords = ()
    site: Annotated[str | None, Meta(description="Number or name of the source or destination site.")] = None
    label: Annotated[str | None, Meta(description="The job's label.")] = None
    since: Annotated[datetime | None, Meta(description="Registered at this time or later, RFC 3339.")] = None
    limit: Annotated[_Limit | None, Meta(description="At most so many.")] = None
    after: Annotated[_After | None, Meta(description="Only those with a larger id.")] = None


class ElementQuery(_PageQuery, frozen=True, kw_only=True):
    """Which elements of a job; a site or label that is not the job's leaves none."""

    code: FailureCodes = ()


#: The longest time that a request for a job may wait.
LONGEST_WAIT_S = 60


class SkippedQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of the entries that a job leaves out; without parameters, all."""

    limit: Annotated[_Limit | None, Meta(description="At most so many.")] = None
    after: Annotated[_After | None, Meta(description="Only those with a larger id.")] = None


class WaitQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a job is given out."""

    wait: Annotated[
        Annotated[float, Meta(ge=0, le=LONGEST_WAIT_S)],
        Meta(description="Seconds to wait for the status to change; a job that has ended is given out at once."),
    ] = 0.0


class RetryQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is retried; without parameters, all that is failed or cancelled."""

    code: FailureCodes = ()
    force: Annotated[
        bool, Meta(description="0 leaves elements whose failure a retry cannot help, and says how many (``left``).")
    ] = True


#: Of a person's hold.
LONGEST_MESSAGE = 500


class HoldRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a job is held, and until when."""

    message: Annotated[
        Annotated[str, Meta(max_length=LONGEST_MESSAGE)] | None,
        Meta(description="One line for people; operators that hold a job of another user must say why."),
    ] = None
    until: Annotated[
        Annotated[str, Meta(max_length=40)] | None,
        Meta(description="When it is resumed by itself: RFC 3339, or a duration such as 30m, 12h, 7d; default never."),
    ] = None


class ChangeJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is changed of a job; a key that is left out stays as it is."""

    priority: Annotated[
        Annotated[int, Meta(ge=FIRST_PRIORITY, le=LAST_PRIORITY)] | msgspec.UnsetType,
        Meta(description="0 is served first."),
    ] = msgspec.UNSET
    max_active: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_ACTIVE)] | msgspec.UnsetType | None,
        Meta(description="How many of its elements may run at once, on all nodes; null for no limit of its own."),
    ] = msgspec.UNSET


class OutputQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an output is read."""

    live: Annotated[
        bool, Meta(description="1 for the log of a running attempt too: what is written so far, in pieces.")
    ] = False
    offset: Annotated[
        Annotated[int, Meta(ge=0, le=LARGEST_ID)] | None,
        Meta(description="With live: where the piece begins, as the answer before it says; 0 at first."),
    ] = None


class JobQuery(_PageQuery, frozen=True, kw_only=True):
    """Which jobs; without parameters, all of the caller's."""

    user: Annotated[
        str | None, Meta(description="For operators: the number of a user, or 'all'; without it, one's own jobs.")
    ] = None
    order: Annotated[
        Literal["oldest", "newest"], Meta(description="Which comes first; with a limit, newest leaves the newest.")
    ] = "oldest"
    before: Annotated[_After | None, Meta(description="Only those with a smaller id.")] = None
