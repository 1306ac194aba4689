"""Listings of GridFTP servers, honest and hostile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.helpers.gridftp.replies import LONGEST_ENTRY, ListingEntry, read_entry, read_listing
from pdm.workqueue.helpers.storage import FileStat, StorageError

# As globus-gridftp-server 13.24 sends it, shortened.
REAL = (
    b"Type=cdir;Modify=20261123194518;Size=4096;Perm=el;UNIX.mode=0755;UNIX.owner=root;X.count=7; .\r\n"
    b"Type=pdir;Modify=20261123194518;Size=4096;Perm=cfmpel;UNIX.mode=1777;UNIX.owner=root;Unique=fe00-20c995; ..\r\n"
    b"Type=dir;Modify=20261123194518;Size=4096;Perm=el;UNIX.mode=0755;Unique=fe00-21e121; d0\r\n"
    b"Type=dir;Modify=20261123194518;Size=4096;UNIX.mode=0755;Unique=fe00-21e121;UNIX.slink=/data/a/d0; dlink\r\n"
    b"Type=OS.unix=pipe;Modify=20261123194518;Size=0;Perm=;UNIX.mode=0644;Unique=fe00-21e12b; ff\r\n"
    b"Type=file;Modify=20261123194518;Size=6;Perm=r;UNIX.mode=0644;UNIX.slink=/data/a/tgt%3Bx%20y; l2\r\n"
    b"Type=file;Modify=20261123194518;Size=6;Perm=r;UNIX.mode=0644;Unique=fe00-21e128; nl\nx;y=\r\n"
)
WHEN = 1795463118


def test_a_real_listing_is_read_to_the_last_fact() -> None:
    assert list(read_listing([REAL])) == [
        ListingEntry(b".", FileStat("directory", 0, 0o755, WHEN, "root"), "cdir", 7),
        ListingEntry(b"..", FileStat("directory", 0, 0o1777, WHEN, "root"), "pdir"),
        ListingEntry(b"d0", FileStat("directory", 0, 0o755, WHEN)),
        ListingEntry(b"dlink", FileStat("link", 0, 0o755, WHEN, target=b"/data/a/d0", target_kind="directory")),
        ListingEntry(b"ff", FileStat("other", 0, 0o644, WHEN)),
        ListingEntry(b"l2", FileStat("link", 6, 0o644, WHEN, target=b"/data/a/tgt;x y", target_kind="file")),
        ListingEntry(b"nl\nx;y=", FileStat("file", 6, 0o644, WHEN)),
    ]


@pytest.mark.parametrize("kind", ["file", "dir"])
@pytest.mark.parametrize(
    ("facts", "owner", "group"),
    [
        (b"UNIX.owner=alice;UNIX.group=cms;UNIX.uid=1000;UNIX.gid=50;", "alice", "cms"),
        (b"UNIX.uid=54321;UNIX.gid=54322;", "54321", "54322"),
        (b"UNIX.owner=alice;UNIX.uid=1000;UNIX.gid=50;", "alice", "50"),
        (b"UNIX.owner=D\\m\xfcller;UNIX.group=" + b"g" * 257 + b";", "D\\m\\xfcller", None),
        (b"", None, None),
    ],
)
def test_owners_are_names_or_else_numbers(kind: str, facts: bytes, owner: str | None, group: str | None) -> None:
    line = b"Type=%s;Modify=20261123194518;Size=6;UNIX.mode=0644;%s name" % (kind.encode(), facts)
    found = read_entry(line).file_stat
    assert (found.mtime, found.owner, found.group) == (WHEN, owner, group)


_NAMES = st.binary(min_size=1, max_size=60).filter(
    lambda name: b"\0" not in name and b"/" not in name and b"\r\n" not in name and not name.endswith(b"\r")
)


@given(st.lists(_NAMES, max_size=20), st.lists(st.integers(1, 200), max_size=60))
def test_every_name_comes_through_wherever_the_pieces_are_cut(names: list[bytes], cuts: list[int]) -> None:
    text = b"".join(b"Type=file;Size=%d; %s\r\n" % (number, name) for number, name in enumerate(names))
    pieces = []
    for cut in cuts:
        pieces.append(text[:cut])
        text = text[cut:]
    lines = list(read_listing([*pieces, text]))
    assert [(line.name, line.file_stat.size) for line in lines] == [(name, number) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    "line",
    [
        b"no facts at all",
        b"Type=file;Size=3;name without a space",
        b"Size=3; no type",
        b"Type=file; no size",
        b"Type=file;Size=-1; negative",
        b"Type=file;Size=9223372036854775808; too large",
        b"Type=file;Size=1e3; garbage",
        b"Type=file;Size=99999999999999999999999999; far too large",
        b"Type=file;Size=3; ",
        b"Type=file;Size=3; nul\0",
        b"Type=file;Modify=20261123194518;Size=6;UNIX.mode=0644; ",
        b"Type=file;Modify=20261123194518;Size=6;UNIX.mode=0644; nul\0",
        b"=;; ",
        b"",
    ],
)
def test_an_entry_that_cannot_be_true_is_a_bad_listing(line: bytes) -> None:
    with pytest.raises(StorageError) as caught:
        read_entry(line)
    assert caught.value.code == "BAD_LISTING"


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("name", [b"one", b"two; three", b"; ", b"Size=9;Type=dir; x"])
def test_files_of_the_same_facts_have_their_own_names(size: int, name: bytes) -> None:
    found = read_entry(b"Type=file;Modify=20261123194518;Size=%d;UNIX.mode=0644; %b" % (size, name))
    assert (found.name, found.file_stat.size, found.file_stat.mtime) == (name, size, WHEN)


def test_the_largest_size_of_the_database_is_legal() -> None:
    assert read_entry(b"Type=file;Size=9223372036854775807; x").file_stat.size == 2**63 - 1


@pytest.mark.parametrize("moment", [b"20261399000000", b"2026", b"garbage", b"", b"00000000000000"])
def test_a_time_that_is_none_is_unknown(moment: bytes) -> None:
    assert read_entry(b"Type=file;Size=1;Modify=" + moment + b"; x").file_stat.mtime is None


def test_a_listing_without_an_end_of_line_takes_no_memory() -> None:
    seen = 0

    def endless() -> object:
        nonlocal seen
        while True:
            seen += 1000
            yield b"x" * 1000

    with pytest.raises(StorageError) as caught:
        list(read_listing(endless()))  # type: ignore[arg-type]
    assert caught.value.code == "BAD_LISTING"
    assert seen <= LONGEST_ENTRY + 1000


@given(st.binary(max_size=2000))
def test_garbage_is_refused_and_never_crashes(garbage: bytes) -> None:
    refusal = None
    try:
        sizes = [line.file_stat.size for line in read_listing([garbage])]
    except StorageError as error:
        refusal, sizes = error.code, []
    assert refusal in (None, "BAD_LISTING")
    assert all(0 <= size < 2**63 for size in sizes)
