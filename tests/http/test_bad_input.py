"""Whatever clients send: a 4xx problem that names the place, nothing stored, never a 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import pytest_twisted
from attrs import frozen

from pdm.workqueue.http.endpoint import Allow
from pdm.workqueue.http.endpoints import ENDPOINTS
from tests.http.service import Service

_GOOD: dict[str, dict[str, Any]] = {
    "/jobs": {"type": 0, "src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"},
    "/list": {"src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"},
    "/remove": {"src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"},
    "/mkdir": {"src_siteid": 1, "src_filepath": "f", "protocol": "DUMMY"},
    "/copy": {"src_siteid": 1, "src_filepath": "f", "dst_siteid": 2, "dst_filepath": "g", "protocol": "DUMMY"},
    "/rename": {"src_siteid": 1, "src_filepath": "f", "dst_filepath": "g", "protocol": "DUMMY"},
}
_HUGE = 10**40
_ENDLESS = "9" * 5000


@frozen
class Case:
    """A body, and where it is wrong."""

    path: str
    body: bytes
    place: str
    what: str

    def __str__(self) -> str:
        return f"{self.path[1:]} {self.what}"


def _with(path: str, **values: Any) -> bytes:
    return json.dumps(_GOOD[path] | values).encode()


def _raw(path: str, key: str, value: str) -> bytes:
    """A body in which the value of a key stands as JSON that Python could not write."""
    return _with(path, **{key: "@@"}).replace(b'"@@"', value.encode())


def _wrong_values(key: str) -> list[tuple[str, Any]]:
    numbers = [("a fraction", 1.5), ("true", True), ("a list", []), ("an object", {}), ("huge", _HUGE)]
    if key in ("src_siteid", "dst_siteid"):
        return [*numbers, ("null", None), ("negative", -1), ("words", "one"), ("empty", ""), ("unknown", 77)]
    if key in ("src_filepath", "dst_filepath"):
        texts = [("a number", 1), ("null", None), ("empty", ""), ("NUL", "a\0b"), ("too long", "x/" * 2100)]
        return [*texts, ("a long name", "x" * 256), ("a list", []), ("half a pair", "\ud800")]
    if key == "type":
        return [*numbers, ("null", None), ("words", "ERASE"), ("out of range", 5), ("long", "C" * 1000)]
    if key == "protocol":
        return [*numbers, ("words", "FTP"), ("out of range", 6), ("not movable", "SSH"), ("not here", "HTTPS")]
    if key in ("priority", "max_tries"):
        return [*numbers, ("digits", "3"), ("too large", 11), ("negative", -1)]
    if key == "label":
        return [("a number", 1), ("empty", ""), ("too long", "x" * 256), ("a newline", "a\nb"), ("NUL", "\0")]
    if key == "max_active":
        return [*numbers, ("digits", "3"), ("zero", 0), ("negative", -1)]
    return [("a number", 1), ("a list", []), ("words", "none")]


def _nullable(path: str, key: str) -> bool:
    """Keys with a default may be null."""
    return key == "dst_siteid" and path == "/rename"


def _cases() -> Iterator[Case]:
    for endpoint in ENDPOINTS:
        if endpoint.path not in _GOOD or endpoint.method != "POST":
            continue
        path = endpoint.path
        assert isinstance(endpoint.body, type)
        assert issubclass(endpoint.body, msgspec.Struct)
        keys = [field.encode_name for field in msgspec.structs.fields(endpoint.body)]
        base = dict(_GOOD[path])
        if path == "/jobs":
            # Only with a destination all keys mean something.
            base |= {"type": 1, "dst_siteid": 2, "dst_filepath": "g"}
        for key in keys:
            for what, value in _wrong_values(key):
                if value is None and _nullable(path, key):
                    continue
                yield Case(path, json.dumps(base | {key: value}).encode(), _place(key, what), f"{key} {what}")
            yield Case(path, _raw(path, key, _ENDLESS), f"$.{key}", f"{key} with 5000 digits")
            yield Case(path, _raw(path, key, "1e999"), f"$.{key}", f"{key} infinite")
            if key in base and key != "protocol":
                without = {name: value for name, value in base.items() if name != key}
                yield Case(path, json.dumps(without).encode(), f"$.{key}", f"without {key}")
        yield Case(path, json.dumps(base | {"colour": "red"}).encode(), "$.colour", "unknown key")
        for what, body in _whole_bodies():
            yield Case(path, body, "$", what)


def _place(key: str, what: str) -> str:
    return "$" if what == "half a pair" else f"$.{key}"


def _whole_bodies() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "a list", b"[]"
    yield "a number", b"1"
    yield "null", b"null"
    yield "not JSON", b"src_siteid=1&src_filepath=f"
    yield "half of it", b'{"src_siteid": 1, '
    yield "NaN", b'{"src_siteid": NaN}'
    yield "a byte order mark", b"\xef\xbb\xbf{}"
    yield "deep", b'{"extra_opts": {"x": ' + b"[" * 100_000
    yield "deep and closed", b'{"extra_opts":' + b'{"x":' * 50_000 + b"1" + b"}" * 50_001
    yield "not UTF-8", b'{"src_filepath": "\xff\xfe"}'
    yield "UTF-16", '{"src_siteid": 1}'.encode("utf-16")


@pytest.mark.parametrize("path", sorted(_GOOD))
@pytest_twisted.ensureDeferred
async def test_bad_bodies(service: Service, path: str) -> None:
    cases = [case for case in _cases() if case.path == path]
    assert len(cases) > 60
    wrong = []
    for case in cases:
        answer = await service.call("bad", "POST", path, raw=case.body)
        if answer.status != 400 or answer.problem != f"invalid-input {case.place}":
            wrong.append(f"{case}: {answer.status} {answer.body[:300]!r}")
    assert not wrong, "\n".join(wrong)
    assert (await service.call("bad", "GET", "/jobs")).json == []


@pytest.mark.parametrize("path", [*sorted(_GOOD), "/sites", "/credentials", "/sites/4/session"])
@pytest_twisted.ensureDeferred
async def test_keys_that_read_like_a_place(service: Service, path: str) -> None:
    for key in ("a` - at `$.nowhere", "a` - at `$.label", "a` - at `$", "` - at `$.protocol.x`", " - at `$" * 1000):
        for body in ({key: 1}, {"extra_opts": {key: 1}}):
            answer = await service.call("bad", "POST", path, body)
            assert answer.status == 400, answer.body
            assert answer.problem.startswith("invalid-input $"), answer.body


@pytest.mark.parametrize("path", sorted(_GOOD))
@pytest_twisted.ensureDeferred
async def test_the_good_bodies_are_good(service: Service, path: str) -> None:
    """Else the cases above would prove nothing."""
    assert (await service.call("good", "POST", path, _GOOD[path])).status == 200


@pytest.mark.parametrize("path", sorted(_GOOD))
@pytest_twisted.ensureDeferred
async def test_wrong_content_types(service: Service, path: str) -> None:
    for value in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", "?"):
        answer = await service.call("bad", "POST", path, _GOOD[path], Content_Type=value)
        assert (answer.status, answer.problem) == (415, "unsupported-media-type Content-Type")
    form = await service.call("bad", "POST", path, _GOOD[path], Content_Type="application/x-www-form-urlencoded")
    assert "curl" in form.json["detail"]


@pytest_twisted.ensureDeferred
async def test_good_content_types(service: Service) -> None:
    for value in ("application/json", "Application/JSON; charset=utf-8", ""):
        assert (await service.call("good", "POST", "/list", _GOOD["/list"], Content_Type=value)).status == 200


@pytest_twisted.ensureDeferred
async def test_strings_of_a_mebibyte(service: Service) -> None:
    for key in ("src_filepath", "label", "protocol", "extra_opts", "src_siteid"):
        answer = await service.call("bad", "POST", "/list", _GOOD["/list"] | {key: "x" * 1024**2})
        assert (answer.status, answer.problem) == (413, "body-too-large")
        answer = await service.call("bad", "POST", "/list", _GOOD["/list"] | {key: "x" * (1024**2 - 500)})
        assert (answer.status, answer.problem) == (400, f"invalid-input $.{key}")
        assert len(answer.body) < 3000


_OPTIONS = {
    "/list": [("depth", -1), ("depth", "1"), ("depth", 1.5), ("depth", 1001), ("overwrite", "always")],
    "/copy": [("overwrite", "maybe"), ("overwrite", 1), ("verify", "md5"), ("depth", 1)],
    "/remove": [("recursive", "yes"), ("recursive", 1), ("overwrite", "never")],
    "/rename": [("overwrite", "different"), ("overwrite", True)],
    "/mkdir": [("parents", "yes"), ("recursive", True)],
}
_DUMMY = [("files", -1), ("files", 10**9), ("size", 2**63), ("delay", -1), ("hang", 1), ("fail", "NO"), ("colour", 1)]


@pytest.mark.parametrize("path", sorted(_OPTIONS))
@pytest_twisted.ensureDeferred
async def test_bad_options(service: Service, path: str) -> None:
    for name, value in _OPTIONS[path]:
        answer = await service.call("bad", "POST", path, _GOOD[path] | {"extra_opts": {name: value}})
        assert (answer.status, answer.problem) == (400, f"invalid-input $.extra_opts.{name}"), answer.body
    for name, value in _DUMMY:
        answer = await service.call("bad", "POST", path, _GOOD[path] | {"extra_opts": {"dummy": {name: value}}})
        assert (answer.status, answer.problem) == (400, f"invalid-input $.extra_opts.dummy.{name}"), answer.body
    answer = await service.call("bad", "POST", path, _GOOD[path] | {"protocol": "FILE", "extra_opts": {"dummy": {}}})
    assert answer.problem == "invalid-input $.extra_opts.dummy"


@pytest_twisted.ensureDeferred
async def test_an_unknown_option_lists_the_known_ones(service: Service) -> None:
    answer = await service.call("bad", "POST", "/copy", _GOOD["/copy"] | {"extra_opts": {"overwrit": "always"}})
    assert answer.json["detail"].startswith(
        "unknown key 'overwrit'; known are dummy, mover, deadline, notify, overwrite, verify"
    )
    answer = await service.call("bad", "POST", "/list", _GOOD["/list"] | {"src_site": 1})
    known = "protocol, extra_opts, priority, max_tries, label, max_active, after, after_any, src_siteid, src_filepath"
    assert answer.json["detail"] == f"unknown key 'src_site'; known are {known}"


#: Options of a COPY → what the error says of them.
_CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"sync": "size", "overwrite": "never"}, "sync and overwrite contradict"),
    ({"delete_extra": True}, "delete_extra and sync contradict"),
    ({"sync": "size", "max_delete": 5}, "max_delete and delete_extra contradict"),
    ({"sync": "size", "move": True, "delete_extra": True}, "move and delete_extra contradict"),
    ({"verify": "size", "checksum": "MD5"}, "verify and checksum contradict"),
    ({"verify": "size", "sync": "checksum"}, "verify and sync contradict"),
    ({"min_size": 2, "max_size": 1}, "min_size and max_size contradict"),
    ({"newer_than": "1d", "older_than": "2d"}, "newer_than and older_than contradict"),
    ({"newer_than": "yesterday"}, "newer_than: a time such as"),
    ({"sync": "content"}, "invalid enum value"),
    ({"filters": [{}]}, "either include or exclude"),
    ({"filters": [{"include": "a", "exclude": "b"}]}, "either include or exclude"),
    ({"filters": [{"include": "*.root"}]}, "leave nothing out"),
    ({"filters": [{"exclude": "x"}, {"exclude": "[a"}]}, "pattern 2, '[a'"),
    ({"filters": [{"exclude": "x"}] * 1001}, "length <= 1000"),
    ({"filters": [{"exclude": "x" * 4097}]}, "length <= 4096"),
    ({"filters": [{"exclude": "!x"}]}, "use include"),
    ({"filters": "*.root"}, "expected array"),
]


@pytest_twisted.ensureDeferred
async def test_options_that_contradict_each_other_are_named(service: Service) -> None:
    for options, words in _CONTRADICTIONS:
        answer = await service.call("bad", "POST", "/copy", _GOOD["/copy"] | {"extra_opts": options})
        assert answer.status == 400, options
        assert answer.problem.startswith("invalid-input $.extra_opts"), answer.body
        assert words in answer.json["detail"], answer.body


@pytest_twisted.ensureDeferred
async def test_a_copy_that_would_remove_its_own_source_is_refused(service: Service) -> None:
    place = {**_GOOD["/copy"], "src_filepath": "/d/sub/f", "dst_siteid": _GOOD["/copy"]["src_siteid"]}
    mirror = {"sync": "size", "delete_extra": True}
    for destination, options, problem in (
        ("/d", mirror, "$.extra_opts.delete_extra"),
        ("/d//sub/", mirror, "$.extra_opts.delete_extra"),
        ("/d/sub/", {"move": True}, "$.dst_filepath"),
        ("/d/./sub/../sub/", {"move": True, "sync": "checksum"}, "$.dst_filepath"),
    ):
        body = {**place, "dst_filepath": destination, "extra_opts": options}
        answer = await service.call("bad", "POST", "/copy", body)
        assert (answer.status, answer.problem) == (400, f"invalid-input {problem}"), (body, answer.body)
    for destination, options in (("/d/other/", mirror), ("/d/", {"move": True})):
        body = {**place, "dst_filepath": destination, "extra_opts": options}
        assert (await service.call("bad", "POST", "/copy", body)).status == 200, body


_QUERIES = (
    ("status=DUNNO", "?status"),
    ("status=DONE,,FAILED", "?status"),
    ("status=", "?status"),
    ("type=9", "?type"),
    ("site=NOWHERE", "?site"),
    ("since=yesterday", "?since"),
    ("since=2026-13-01", "?since"),
    ("since=99999999999999999999", "?since"),
    ("since=0001-01-01T00:00:00%2B23:00", "?since"),
    ("limit=0", "?limit"),
    ("limit=-1", "?limit"),
    ("limit=x", "?limit"),
    ("limit=" + "9" * 40, "?limit"),
    ("limit=" + "9" * 5000, "?limit"),
    ("limit=1&limit=2", "?limit"),
    ("after=-1", "?after"),
    ("after=9223372036854775808", "?after"),
    ("after=1.5", "?after"),
    ("colour=red", "?colour"),
    ("label", "?"),
    ("label=%ff", "?"),
    ("&".join(["label=x"] * 200), "?"),
)


@pytest_twisted.ensureDeferred
async def test_bad_queries(service: Service) -> None:
    job = await service.submit("querying")
    for query, place in _QUERIES:
        for path in ("/jobs", f"/jobs/{job['id']}/elements"):
            answer = await service.call("querying", "GET", f"{path}?{query}")
            assert (answer.status, answer.problem) == (400, f"invalid-input {place}"), (query, answer.body)


@pytest_twisted.ensureDeferred
async def test_an_unknown_parameter_is_refused_everywhere(service: Service) -> None:
    values = {
        "job_id": 1,
        "element_id": 0,
        "attempt": 1,
        "site_id": 1,
        "user_id": 1,
        "delegation_id": "x",
        "credential_id": 1,
        "schedule_id": 1,
        "webhook_id": 1,
        "node": "node1",
    }
    for endpoint in ENDPOINTS:
        # Nodes are admitted before their questions are read (test_peers).
        if endpoint.query is None and endpoint.allow is Allow.USERS:
            path, body = endpoint.path.format(**values), b"{}" if endpoint.body is not None else None
            answer = await service.call("querying", endpoint.method, f"{path}?colour=red", raw=body)
            assert (answer.status, answer.problem) == (400, "invalid-input ?colour"), endpoint.name
            assert answer.json["detail"] == "unknown query parameter 'colour'; known are none"


@pytest_twisted.ensureDeferred
async def test_bad_idempotency_keys(service: Service) -> None:
    job = await service.submit("keys")
    for path, body in [*_GOOD.items(), (f"/jobs/{job['id']}/retry", None)]:
        for key in (" ", "x" * 256, "é", "a\tb"):
            answer = await service.call("keys", "POST", path, body, Idempotency_Key=key)
            assert (answer.status, answer.problem) == (400, "invalid-input Idempotency-Key")
