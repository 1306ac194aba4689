"""Options of jobs: one struct for each job type, as clients send them in ``extra_opts`` and as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdm.workqueue.domain.copy_plan import CopyRules
from pdm.workqueue.domain.enums import JobType, SyncLevel
from pdm.workqueue.domain.filters import (
    LONGEST_PATTERN,
    MOST_RULES,
    EntryFilter,
    FilterRule,
    PatternList,
    time_from_text,
)
from pdm.workqueue.domain.lifecycle import duration_s
from pdm.workqueue.domain.paths import LONGEST_PATH
from pdm.workqueue.domain.planning import LARGEST_SIZE

Seconds = Annotated[float, Meta(ge=0, le=86400)]
FileSize = Annotated[int, Meta(ge=0, le=LARGEST_SIZE)]
Pattern = Annotated[str, Meta(min_length=1, max_length=LONGEST_PATTERN)]
Timestamp = Annotated[
    str, Meta(min_length=1, max_length=40, description="RFC 3339, or a duration before the submission, such as 7d.")
]

LARGEST_MAX_DELETE = 1_000_000_000
DEFAULT_MAX_DELETE = 100

_OVERWRITE_OF: Mapping[SyncLevel, Literal["never", "always", "different"]] = MappingProxyType(
    {
        SyncLevel.EXISTS: "never",
        SyncLevel.SIZE: "always",
        # The times of unchanged files differ where a destination keeps none: their checksums are compared first.
        SyncLevel.MTIME: "different",
        SyncLevel.CHECKSUM: "different",
    }
)


class DummyOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How simulated work behaves (protocol DUMMY only).

    Attributes:
        files: how many files a listing shows; without it, the path is a file.
        size: bytes of each file.
        delay: seconds that each element takes.
        list_delay: seconds that the listing takes.
        hang: whether elements never end by themselves.
        crash: whether the helper process dies in the first attempt of each element.
        fail: code with which elements fail.
        fail_times: how many attempts of each element fail; all without it.
        there: how many files a listing of the destination shows; those beyond ``files`` are extra.
    """

    files: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    size: Annotated[int, Meta(ge=0, le=2**62)] = 0
    delay: Seconds = 0.0
    list_delay: Seconds = 0.0
    hang: bool = False
    crash: bool = False
    fail: str | None = None
    fail_times: Annotated[int, Meta(ge=0, le=100)] | None = None
    there: Annotated[int, Meta(ge=0, le=10_000_000)] = 0


Mover = Annotated[
    Literal["native", "tools"],
    Meta(description="Who does the work: the service's own clients, or globus-url-copy and gfal."),
]


Deadline = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=40,
        description="When the job is cancelled unless it has ended: RFC 3339, or a duration from the submission, such"
        " as 12h.",
    ),
]


Duration = Annotated[str, Meta(min_length=2, max_length=10)]
Notified = Annotated[
    list[Literal["ended", "failed", "held"]],
    Meta(
        min_length=1,
        max_length=3,
        description="What is mailed of this job, instead of what ``PUT /mail`` has chosen; needs a confirmed address.",
    ),
]


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    dummy: DummyOptions | None = None
    mover: Mover | None = None
    deadline: Deadline | None = None
    notify: Notified | None = None


class ListOptions(_Options, frozen=True):
    """``depth``: levels below the path; 0 is the thing itself, all levels without it."""

    depth: Annotated[int, Meta(ge=0, le=1000)] | None = None


class FilterOption(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Either ``include`` or ``exclude``: a gitignore pattern, relative to the source."""

    include: Pattern | None = None
    exclude: Pattern | None = None

    def __post_init__(self) -> None:
        if (self.include is None) == (self.exclude is None):
            raise ValueError("either include or exclude is expected, with a pattern")

    @property
    def rule(self) -> FilterRule:
        """The rule of the domain."""
        return FilterRule(self.include or self.exclude or "", self.include is not None)


#: Items of one request.
MOST_ITEMS = 100_000


class CopyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file of many to copy."""

    src: Annotated[str, Meta(min_length=1, max_length=LONGEST_PATH, description="Path at the source site.")]
    dst: Annotated[
        str, Meta(min_length=1, max_length=LONGEST_PATH, description="At the destination; into it if it ends in /.")
    ]
    size: Annotated[FileSize | None, Meta(description="Bytes; 0 or none: as it is when it is copied.")] = None
    checksum: Annotated[
        Annotated[str, Meta(max_length=100)] | None,
        Meta(
            description="``ADLER32:``, ``MD5:`` or ``SHA256:`` (as the option checksum), and the value that is proven."
        ),
    ] = None


class CopyOptions(_Options, frozen=True):
    """What a copy can be asked beside its paths."""

    overwrite: Annotated[
        Literal["never", "always", "different"] | None,
        Meta(description="What happens to files that are there: default never; not with sync."),
    ] = None
    verify: Annotated[Literal["checksum", "size"], Meta(description="How arrival is proven.")] = "checksum"
    sync: Annotated[
        SyncLevel | None,
        Meta(description="What counts as already there; anything else that is there is overwritten."),
    ] = None
    filters: Annotated[
        tuple[FilterOption, ...],
        Meta(
            max_length=MOST_RULES,
            description="In order: the first one that matches decides; what none matches is included.",
        ),
    ] = ()
    min_size: Annotated[FileSize | None, Meta(description="Only files of at least so many bytes.")] = None
    max_size: Annotated[FileSize | None, Meta(description="Only files of at most so many bytes.")] = None
    newer_than: Annotated[Timestamp | None, Meta(description="Only files that were changed at this time or later.")] = (
        None
    )
    older_than: Annotated[Timestamp | None, Meta(description="Only files that were changed before this time.")] = None
    delete_extra: Annotated[
        bool, Meta(description="Remove at the destination what the source does not have; only with sync.")
    ] = False
    max_delete: Annotated[
        Annotated[int, Meta(ge=0, le=LARGEST_MAX_DELETE)] | None,
        Meta(description="With delete_extra: nothing is removed if it would be more; default 100."),
    ] = None
    dry_run: Annotated[bool, Meta(description="Plan only: nothing is copied or removed.")] = False
    move: Annotated[bool, Meta(description="Remove each file at the source once its copy is proven.")] = False
    preserve: Annotated[
        tuple[Literal["mtime", "mode"], ...],
        Meta(max_length=2, description="What the copy keeps of a file, where both ends can."),
    ] = ()
    checksum: Annotated[
        Literal["ADLER32", "MD5", "SHA256"] | None, Meta(description="By which arrival is proven; default ADLER32.")
    ] = None
    check: Annotated[
        Literal["source", "destination"] | None,
        Meta(description="Copy nothing: compare the items with the files that are at this end."),
    ] = None
    stage: Annotated[
        bool, Meta(description="Have files that are only on tape brought to disk first, by the site's tape API.")
    ] = False
    stage_lifetime: Annotated[
        Duration | None, Meta(description="With stage: how long they shall stay on disk, such as 12h; default 1d.")
    ] = None
    stage_timeout: Annotated[
        Duration | None, Meta(description="With stage: files that are not on disk by then fail; default 2d.")
    ] = None
    archive: Annotated[
        bool, Meta(description="A file is DONE only once the destination's tape API says that it is on tape.")
    ] = False
    archive_timeout: Annotated[
        Duration | None, Meta(description="With archive: files that are not on tape by then fail; default 2d.")
    ] = None
    items: Annotated[
        Annotated[tuple[CopyPair, ...], Meta(min_length=1, max_length=MOST_ITEMS)] | int | None,
        Meta(description="The files to copy, instead of the two paths; in the answer, their number."),
    ] = None

    def __post_init__(self) -> None:
        for (first, second), contradict, why in (
            (("sync", "overwrite"), self.sync and self.overwrite, "sync says what is overwritten"),
            (("delete_extra", "sync"), self.delete_extra and not self.sync, "delete_extra needs sync"),
            (("max_delete", "delete_extra"), self._is_needless_bound, "max_delete needs delete_extra"),
            (("move", "delete_extra"), self.move and self.delete_extra, "a moved source is no model of what stays"),
            (("verify", "checksum"), self.verify == "size" and self.checksum, "verify=size computes no checksum"),
            (("verify", "sync"), self._is_blind_comparison, "verify=size computes no checksum to compare"),
            (("check", "items"), self.check and self.items is None, "a check needs items, with what they must be"),
            (("check", "overwrite"), self.check and self.overwrite, "a check writes nothing"),
            (("check", "preserve"), self.check and self.preserve, "a check writes nothing"),
            (("check", "stage"), self.check and self.stage, "a check reads what is on disk"),
            (("check", "archive"), self.check and self.archive, "a check writes nothing"),
            (("stage_lifetime", "stage"), self.stage_lifetime and not self.stage, "stage_lifetime needs stage"),
            (("stage_timeout", "stage"), self.stage_timeout and not self.stage, "stage_timeout needs stage"),
            (("archive_timeout", "archive"), self._is_needless_timeout, "archive_timeout needs archive"),
            (("min_size", "max_size"), self._is_no_size, "no file is that large and that small"),
        ):
            if contradict:
                raise ValueError(f"{first} and {second} contradict each other: {why}")
        for name in ("newer_than", "older_than"):
            text = getattr(self, name)
            try:
                _time(text, 0.0)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for name in ("stage_lifetime", "stage_timeout", "archive_timeout"):
            try:
                duration_s(getattr(self, name) or "1s")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    @property
    def _is_needless_timeout(self) -> bool:
        return self.archive_timeout is not None and not self.archive

    @property
    def _is_needless_bound(self) -> bool:
        return self.max_delete is not None and not self.delete_extra

    @property
    def _is_blind_comparison(self) -> bool:
        return self.verify == "size" and self.sync is SyncLevel.CHECKSUM

    @property
    def _is_no_size(self) -> bool:
        return self.min_size is not None and self.max_size is not None and self.min_size > self.max_size

    @property
    def effective_overwrite(self) -> Literal["never", "always", "different"]:
        """What a copy does with a file that is there, once its plan asks for it."""
        overwrite = (self.overwrite or "never") if self.sync is None else _OVERWRITE_OF[self.sync]
        if self.move:
            # Both sites may show one storage: what is the same there may be the source, and is left alone.
            return "never" if overwrite == "never" else "different"
        if self.sync is None:
            return overwrite
        # With verify=size, files are taken for equal by their sizes alone.
        return "always" if overwrite == "different" and self.verify == "size" else overwrite

    def rules(self, submitted: datetime) -> CopyRules:
        """What the plan depends on; compiles the patterns.

        Args:
            submitted: when the job was; durations count back from it.

        Raises:
            InvalidPatternError: a pattern cannot be used.
        """
        seconds = submitted.timestamp()
        return CopyRules(
            sync=self.sync,
            overwrite=self.overwrite or "never",
            entry_filter=EntryFilter(
                patterns=PatternList([option.rule for option in self.filters]) if self.filters else None,
                min_size=self.min_size,
                max_size=self.max_size,
                changed_from=_time(self.newer_than, seconds),
                changed_before=_time(self.older_than, seconds),
            ),
            delete_extra=self.delete_extra,
            max_delete=DEFAULT_MAX_DELETE if self.max_delete is None else self.max_delete,
            dry_run=self.dry_run,
            move=self.move,
        )


def _time(text: str | None, submitted: float) -> float | None:
    return None if text is None else time_from_text(text, submitted)


class RemoveOptions(_Options, frozen=True):
    """``recursive``: whether a directory may be removed with all that is in it.

    ``only_empty``: a directory is removed only if it is empty, and anything else is not.
    """

    recursive: bool = True
    only_empty: bool = False


class RenameOptions(_Options, frozen=True):
    """``overwrite``: whether something that has the new name may be replaced."""

    overwrite: Literal["never", "always"] = "never"


class MkdirOptions(_Options, frozen=True):
    """``parents``: make the directories above too; one that is there already is no error."""

    parents: bool = False


Options = ListOptions | CopyOptions | RemoveOptions | RenameOptions | MkdirOptions

OPTIONS: dict[JobType, type[Options]] = {
    JobType.LIST: ListOptions,
    JobType.COPY: CopyOptions,
    JobType.REMOVE: RemoveOptions,
    JobType.RENAME: RenameOptions,
    JobType.MKDIR: MkdirOptions,
}


def read_options(type_: JobType, values: object) -> Options:
    """Read the stored or sent options of a job.

    Raises:
        msgspec.ValidationError: with the path of what is wrong.
    """
    return msgspec.convert(values, OPTIONS[type_])
