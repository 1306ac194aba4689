"""The options of a job (``extra_opts``), one struct for each type."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pdm.workqueue.domain.enums import JobType

Seconds = Annotated[float, Meta(ge=0, le=86400)]


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
    """

    files: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    size: Annotated[int, Meta(ge=0, le=2**62)] = 0
    delay: Seconds = 0.0
    list_delay: Seconds = 0.0
    hang: bool = False
    crash: bool = False
    fail: str | None = None
    fail_times: Annotated[int, Meta(ge=0, le=100)] | None = None


Mover = Annotated[
    Literal["native", "tools"],
    Meta(description="Who does the work: the service's own clients, or globus-url-copy and gfal."),
]


class _Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    dummy: DummyOptions | None = None
    mover: Mover | None = None


class ListOptions(_Options, frozen=True):
    """``depth``: levels below the path; 0 is the thing itself, all levels without it."""

    depth: Annotated[int, Meta(ge=0, le=1000)] | None = None


class CopyOptions(_Options, frozen=True):
    """``overwrite``: what happens to files that are there; ``verify``: how arrival is proven."""

    overwrite: Literal["never", "always", "different"] = "never"
    verify: Literal["checksum", "size"] = "checksum"


class RemoveOptions(_Options, frozen=True):
    """``recursive``: whether a directory may be removed with all that is in it."""

    recursive: bool = True


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
