"""Arguments that are typed: what is understood, and what is refused before anything is sent."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta

import click
import pytest

from pdm.workqueue.cli.arguments import (
    DURATION,
    SITE_PATH,
    TIMESTAMP,
    ExtraOptionType,
    SitePath,
    common_name,
    merged_options,
    protocol_for,
)
from pdm.workqueue.cli.exit_codes import CommandError, ExitCode
from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.sites import SiteView


@pytest.mark.parametrize(
    ("typed", "place"),
    [
        ("1:/data", SitePath("1", "/data")),
        ("cern:~/x y", SitePath("cern", "~/x y")),
        ("cern:", SitePath("cern", "")),
        ("cern:a:b", SitePath("cern", "a:b")),
        ("cern:-x", SitePath("cern", "-x")),
        ("cern:" + os.fsdecode(b"\xe9"), SitePath("cern", "\uefe9")),
    ],
)
def test_places(typed: str, place: SitePath) -> None:
    assert SITE_PATH.convert(typed, None, None) == place


@pytest.mark.parametrize("typed", ["/local/file", "", ":", ":/x", "./a:b", "cern"])
def test_no_places(typed: str) -> None:
    with pytest.raises(click.BadParameter, match="SITE:path"):
        SITE_PATH.convert(typed, None, None)


@pytest.mark.parametrize(("typed", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("12h", 43200), ("2d", 172800)])
def test_durations(typed: str, seconds: float) -> None:
    assert DURATION.convert(typed, None, None) == seconds


@pytest.mark.parametrize("typed", ["", "-1s", "5 minutes", "h", "nan"])
def test_no_durations(typed: str) -> None:
    with pytest.raises(click.BadParameter):
        DURATION.convert(typed, None, None)


def test_moments() -> None:
    assert TIMESTAMP.convert("2026-03-02T11:04", None, None) == datetime(2026, 3, 2, 11, 4, tzinfo=UTC)
    assert TIMESTAMP.convert("2026-03-02T11:04+01:00", None, None) == datetime(2026, 3, 2, 10, 4, tzinfo=UTC)
    before = datetime.now(UTC)
    ago = TIMESTAMP.convert("12h", None, None)
    assert before <= ago + timedelta(hours=12) <= datetime.now(UTC)
    with pytest.raises(click.BadParameter):
        TIMESTAMP.convert("yesterday", None, None)


def test_extra_options_are_json_and_nest() -> None:
    read = ExtraOptionType()
    pairs = [
        read.convert(text, None, None) for text in ("dummy.delay=1.5", "dummy.hang=true", 'a=[1,"x"]', "verify=size")
    ]
    assert merged_options(pairs) == {"dummy": {"delay": 1.5, "hang": True}, "a": [1, "x"], "verify": "size"}


def test_an_option_is_not_both_a_value_and_an_object() -> None:
    with pytest.raises(click.UsageError, match="dummy already has a value"):
        merged_options([("dummy", 1), ("dummy.delay", 2)])
    with pytest.raises(click.BadParameter):
        ExtraOptionType().convert("novalue", None, None)


# -- from what was typed to what the API wants


def site(name: str, *protocols: str) -> SiteView:
    endpoints = {protocol: f"{protocol.lower()}://{name}" for protocol in protocols}
    return SiteView(id=1, name=name, description="", protocols=list(protocols), default_folder="/", endpoints=endpoints)


@pytest.mark.parametrize(
    ("source", "destination", "chosen"),
    [
        (["GRIDFTP", "HTTPS"], ["GRIDFTP", "HTTPS"], "GRIDFTP"),
        (["HTTPS", "DUMMY"], ["HTTPS", "DUMMY"], "HTTPS"),
        (["DUMMY"], ["DUMMY"], "DUMMY"),
        # Through the service, rather than not at all, or in make-believe.
        (["FILE"], ["SSH"], "FILE"),
        (["GRIDFTP", "XROOT"], ["FILE"], "XROOT"),
        (["GRIDFTP"], ["SSH", "FILE"], "GRIDFTP"),
        (["FILE", "DUMMY"], ["HTTPS", "DUMMY"], "FILE"),
    ],
)
def test_the_way_that_leads_there_is_chosen(source: list[str], destination: list[str], chosen: str) -> None:
    found = protocol_for([site("a", *source), site("b", *destination)], None)
    assert found is JobProtocol[chosen]
    # The service would take it.
    offered = {JobProtocol[name] for name in destination}
    assert offered & {found, *MOVERS[found].relays_to}


def test_without_a_way_it_says_what_there_is() -> None:
    with pytest.raises(CommandError) as caught:
        protocol_for([site("a", "GRIDFTP"), site("b", "DUMMY")], None)
    assert caught.value.code == ExitCode.USAGE
    assert "a offers GRIDFTP; b offers DUMMY" in caught.value.what
    assert "GRIDFTP, SSH, FILE, HTTPS, XROOT" in caught.value.advice
    assert protocol_for([site("a", "GRIDFTP"), site("b", "SSH")], "file") is JobProtocol.FILE


def test_common_names() -> None:
    assert common_name("/C=UK/O=Grid/CN=alice smith") == "alice smith"
    assert common_name("/DC=org") == "/DC=org"
