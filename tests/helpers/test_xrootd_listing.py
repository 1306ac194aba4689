"""Listings in XRootD's form give what the XML parser gives, however they arrive."""

from __future__ import annotations

import pytest

from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.helpers.backends.propfind import DavResource, resources
from pdm.workqueue.helpers.storage import StorageError

_BEGIN = (
    '<?xml version="1.0" encoding="utf-8"?>\n'
    '<D:multistatus xmlns:D="DAV:" xmlns:ns1="http://apache.org/dav/props/" xmlns:ns0="DAV:">\n'
)
_END = "</D:multistatus>\n"


def entry(name: str, size: int = 7, *, is_directory: bool = False, status: int = 200) -> str:
    """An entry as XRootD 5.5 writes it."""
    kind = "<lp1:resourcetype><D:collection/></lp1:resourcetype>\n" if is_directory else ""
    flag = f"<lp1:iscollection>{int(is_directory)}</lp1:iscollection>\n"
    return (
        '<D:response xmlns:lp1="DAV:" xmlns:lp2="http://apache.org/dav/props/" xmlns:lp3="LCGDM:">\n'
        f"<D:href>{name}</D:href>\n<D:propstat>\n<D:prop>\n"
        f"<lp1:getcontentlength>{size}</lp1:getcontentlength>\n"
        "<lp1:getlastmodified>Mon, 30 Nov 2026 16:43:50 GMT</lp1:getlastmodified>\n"
        f"{kind}{flag}<lp1:executable>F</lp1:executable>\n{flag if is_directory else ''}"
        f"</D:prop>\n<D:status>HTTP/1.1 {status} OK</D:status>\n</D:propstat>\n</D:response>\n"
    )


def read(document: str, step: int = 1_000_000, *, raw: bool = True) -> list[DavResource]:
    data = document.encode()
    return list(resources("https://x/d", [data[at : at + step] for at in range(0, len(data), step)], raw=raw))


_PLAIN = [entry("/d", is_directory=True), entry("/d/a b"), entry("/d/c", 0), entry("/d/e", is_directory=True)]
_OTHERS = ["/d/\u00e4", "/d/a&amp;b", "/d/&#60;f"]


@pytest.mark.parametrize("step", [1, 7, 100, 1_000_000])
@pytest.mark.parametrize("at", [None, 0, 2, 4])
@pytest.mark.parametrize("other", _OTHERS)
def test_entries_are_those_that_the_xml_parser_reads(step: int, at: int | None, other: str) -> None:
    """One entry in another form is among them, or none is."""
    entries = list(_PLAIN) if at is None else [*_PLAIN[:at], entry(other), *_PLAIN[at:]]
    document = _BEGIN + "".join(entries) + _END
    # A declared name that the plain form does not have: the XML parser reads all of it.
    by_parser = read(document.replace("<D:multistatus ", '<D:multistatus xmlns:x="y" '))
    assert read(document, step) == by_parser
    assert len(by_parser) == len(entries)
    assert [each.is_directory for each in by_parser if each.href in ("/d", "/d/c")] == [True, False]


@pytest.mark.parametrize("step", [50, 1_000_000])
@pytest.mark.parametrize("cut", [10, len(_BEGIN), len(_BEGIN + _PLAIN[0]), len(_BEGIN + _PLAIN[0]) + 50])
def test_a_listing_that_is_cut_short_is_an_error(step: int, cut: int) -> None:
    with pytest.raises(StorageError) as caught:
        read((_BEGIN + "".join(_PLAIN) + _END)[:cut], step)
    assert (caught.value.code, caught.value.lost) == (FailureCode.SERVER_ERROR, True)


@pytest.mark.parametrize("behind", ["<?xml version='1.0'?><x/>", "text"])
def test_what_follows_a_listing_is_an_error(behind: str) -> None:
    with pytest.raises(StorageError):
        read(_BEGIN + "".join(_PLAIN) + _END + behind)


def test_a_refused_entry_keeps_its_status() -> None:
    document = _BEGIN + _PLAIN[0] + entry("/d/x", status=404) + _PLAIN[1] + _END
    assert [each.size for each in read(document)] == [7, None, 7]
