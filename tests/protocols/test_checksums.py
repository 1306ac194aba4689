"""Copies proven by a chosen checksum: each protocol, and each pair of unlike ones."""

from __future__ import annotations

import itertools
import os
from functools import partial

import msgspec
import pytest

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.wire.agent_events import DoneEvent, FailedEvent
from tests.helpers.driver import HelperProcess, assert_checked, check_items, digest, tree
from tests.protocols.places import Places, judged

PROTOCOLS = ("ssh", "https", "xroot", "file")
OLD = 1_700_000_000
_UNLIKE = [pair for pair in itertools.product(PROTOCOLS, repeat=2) if len(set(pair)) > 1]


@pytest.mark.parametrize("algorithm", [ChecksumAlgorithm.MD5, ChecksumAlgorithm.SHA256])
@pytest.mark.parametrize(
    "route",
    [
        *((protocol, protocol) for protocol in PROTOCOLS),
        ("ssh", "https"),
        *(pytest.param(pair, marks=pytest.mark.full) for pair in _UNLIKE),
    ],
    ids="-".join,
)
def test_both_ends_are_compared_by_the_algorithm(
    relay: HelperProcess, places: Places, route: tuple[str, str], algorithm: ChecksumAlgorithm
) -> None:
    """Small files, which may be copied in a group, and one that a server may compute the checksum of."""
    contents = [b"", b"content", b"c" * 1000, os.urandom(2_000_003)]
    items = []
    for key, content in enumerate(contents):
        source = places.put(places.a / f"f{key}", content)
        os.utime(source, (OLD, OLD))
        items.append(places.item(route[0], source, places.b / f"f{key}", key, to=route[1]))
    for overwrite, is_there in (("never", False), ("different", True)):
        ended = relay.copy(items, overwrite, checksum=algorithm)
        for key, content in enumerate(contents):
            done = ended[key]
            assert isinstance(done, DoneEvent), done
            assert (done.already_there, done.checksum) == (is_there, digest(algorithm, content))
    # A byte that differs is found, even if size and time are the same.
    changed = places.b / "f1"
    changed.write_bytes(b"cOntent")
    os.utime(changed, (OLD, OLD))
    done = relay.copy(items, "different", checksum=algorithm)[1]
    assert isinstance(done, DoneEvent) and not done.already_there
    assert changed.read_bytes() == b"content"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_size_that_is_not_known_is_taken_and_a_given_checksum_is_proven(
    relay: HelperProcess, places: Places, protocol: str
) -> None:
    algorithm = ChecksumAlgorithm.SHA256
    contents = [b"", b"content", os.urandom(2_000_003)]
    items = []
    for key, content in enumerate(contents):
        item = places.item(protocol, places.put(places.a / f"f{key}", content), places.b / f"f{key}", key)
        items.append(msgspec.structs.replace(item, size=-1, checksum=digest(algorithm, content)))
    items[1] = msgspec.structs.replace(items[1], checksum=digest(algorithm, b"another"))
    ended = relay.copy(items, checksum=algorithm)
    for key in (0, 2):
        done = ended[key]
        assert isinstance(done, DoneEvent), done
        assert (done.size, done.checksum) == (len(contents[key]), digest(algorithm, contents[key]))
        assert (places.b / f"f{key}").read_bytes() == contents[key]
    failed = ended[1]
    assert isinstance(failed, FailedEvent), failed
    assert (failed.fault.code, failed.fault.scope) == ("CHECKSUM_MISMATCH", "source")
    assert not [each.name for each in places.b.iterdir() if "f1" in each.name or "part" in each.name]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("at", ["source", "destination"])
def test_files_are_checked_where_they_are(relay: HelperProcess, places: Places, protocol: str, at: str) -> None:
    directory = places.a if at == "source" else places.b
    items = check_items(partial(places.url, protocol), directory)
    places.storages.give(directory)
    before = tree(places.a), tree(places.b)
    assert_checked(relay.check(items, at), at, partial(judged, protocol))
    assert (tree(places.a), tree(places.b)) == before
