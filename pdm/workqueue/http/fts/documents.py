"""Reads the body of ``POST /jobs``: types are checked, and what the service does not have is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
from attrs import frozen

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.fts import DEFAULT_FTS_PRIORITY, SELECTION_STRATEGIES, clipped_priority, seconds_in_queue
from pdm.workqueue.domain.jobs import DEFAULT_TRIES, LEAST_TRIES, MOST_TRIES
from pdm.workqueue.domain.planning import LARGEST_SIZE
from pdm.workqueue.http.fts.calls import FileUrl, ServerOfUrl, ServersOfUrls, read_url
from pdm.workqueue.http.problems import InvalidInputError, MethodNotAllowedError
from pdm.workqueue.wire.options import MOST_ITEMS

#: Sources of one file.
MOST_SOURCES = 100
_LONGEST_SID = 1000
_LONGEST_METADATA = 64 * 1024
_LONGEST_WORD = 255
#: Ten years.
_LONGEST_S = 3650 * 86400
#: Texts of an unknown parameter in an error.
_SHOWN = 100

#: Parameters that ask for what the service does not have → what it says of them.
_REFUSED_PARAMS: Mapping[str, str] = MappingProxyType(
    {
        "overwrite_when_only_on_disk": "this service does not look on tape before it overwrites",
        "overwrite_hop": "this service copies without hops",
        "multihop": "this service copies without hops: submit a job for each hop",
        "target_qos": "this service changes no quality of service",
        "source_spacetoken": "space tokens belong to SRM, which this service does not speak",
        "destination_spacetoken": "space tokens belong to SRM, which this service does not speak",
        "spacetoken": "space tokens belong to SRM, which this service does not speak",
        "credential": "this service has no credentials of cloud storages for FTS",
        "credentials": "this service has no credentials of cloud storages for FTS",
        "fail_nearline": "this service stages what is on tape with bring_online, and does not look otherwise",
    }
)
#: Parameters that say how FTS3 is to work, where this service works in its own way: taken, without effect.
HINTS = frozenset(
    {
        *("account", "activity", "buffer_size", "checksum", "disable_cleanup", "dst_file_report"),
        *("gridftp", "ipv4", "ipv6", "nostreams", "overwrite_on_retry", "retry_delay", "reuse"),
        *("scitag", "strict_copy", "timeout", "unmanaged_tokens"),
        *("archive_metadata", "file_metadata", "filesize", "staging_metadata"),
    }
)
_MEANT = frozenset(
    {
        *("verify_checksum", "overwrite", "retry", "priority", "job_metadata"),
        *("max_time_in_queue", "id_generator", "sid", "s3alternate"),
        *("bring_online", "copy_pin_lifetime", "archive_timeout"),
    }
)
_REFUSED_OF_FILES: Mapping[str, str] = MappingProxyType(
    {
        "source_tokens": "store a token of the storage with POST /credentials of the service's own API",
        "destination_tokens": "store a token of the storage with POST /credentials of the service's own API",
    }
)
_KEPT_OF_FILES = ("metadata", "staging_metadata", "archive_metadata", "scitag")
_OF_FILES = frozenset(
    {"sources", "destinations", "filesize", "checksum", "activity", "selection_strategy", *_KEPT_OF_FILES}
)
#: First letter of ``verify_checksum`` → whether checksums are compared.
CHECKSUM_MODES: Mapping[str, bool] = MappingProxyType({"b": True, "s": True, "t": True, "n": False})
_ALGORITHMS = frozenset(each.value for each in ChecksumAlgorithm)
_MODE_WORDS = frozenset({"both", "source", "target", "none", *CHECKSUM_MODES})


# Not tracked by the garbage collector, like `FileUrl`.
class FtsTransfer(msgspec.Struct, frozen=True, gc=False):
    """A file to copy from one of its sources; ``checksum`` is the algorithm and the value, either may be empty."""

    file_index: int
    sources: Sequence[FileUrl]
    destination: FileUrl
    size: int
    checksum: tuple[str, str]
    details: Mapping[str, Any]


@frozen
class FtsSubmission:
    """What a client asks for.

    Attributes:
        compares: whether checksums are compared.
        details: the parameters that its questions are answered from.
        queue_s: seconds after which the job is cancelled unless it has ended; None for never.
        stage_s: seconds within which sources have to come from tape to disk; None to stage nothing.
        pin_s: seconds that staged sources stay on disk; None for the service's default.
        archive_s: seconds within which destinations have to be on tape; None not to wait for it.
        sid: what its id is derived from; None for one by chance.
    """

    transfers: Sequence[FtsTransfer]
    compares: bool
    overwrite: bool
    max_tries: int
    priority: int
    queue_s: int | None
    stage_s: int | None
    pin_s: int | None
    archive_s: int | None
    sid: str | None
    details: Mapping[str, Any]

    @property
    def has_alternatives(self) -> bool:
        """Whether it is one file with several sources."""
        return len(self.transfers[0].sources) > 1


def read_document(body: bytes) -> Mapping[str, Any]:
    """The object that a body has.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInputError(f"Malformed input: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInputError("Malformed input: an object is expected")
    return document


def read_submission(body: bytes) -> FtsSubmission:
    """Read a submission. May take seconds: to be called in a thread.

    Raises:
        InvalidInputError: it is invalid, or asks for what the service does not have; the text names the key.
        MethodNotAllowedError: it asks for deletions.
    """
    document = read_document(body)
    if document.get("delete") is not None:
        raise MethodNotAllowedError("Deletion jobs are no longer supported by FTS")
    if document.get("staging"):
        raise InvalidInputError("staging: submit the files as transfers with bring_online")
    for key in document:
        if key not in ("params", "files", "delete", "staging"):
            raise InvalidInputError(f"unknown key {key[:_SHOWN]!r}: params and files are known")
    params = document.get("params") or {}
    if not isinstance(params, dict):
        raise InvalidInputError("params: an object is expected")
    files = document.get("files")
    if files is None:
        raise InvalidInputError("No transfers operations specified")
    _refuse(params)
    transfers = _transfers(files, buckets_in_paths=_flag(params.get("s3alternate"), "s3alternate"))
    mode, compares = _checksum_mode(params.get("verify_checksum"), transfers)
    retry = _integer(params, "retry", 0)
    priority = clipped_priority(_integer(params, "priority", DEFAULT_FTS_PRIORITY))
    try:
        queue_s = seconds_in_queue(params.get("max_time_in_queue"))
    except ValueError as error:
        raise InvalidInputError(f"max_time_in_queue: {error}") from error
    overwrite = _flag(params.get("overwrite"), "overwrite")
    bring_online, pin, archive = (
        _integer(params, key, -1) for key in ("bring_online", "copy_pin_lifetime", "archive_timeout")
    )
    for key, seconds in (("bring_online", bring_online), ("copy_pin_lifetime", pin), ("archive_timeout", archive)):
        if seconds > _LONGEST_S:
            raise InvalidInputError(f"Invalid value within the request: {key}: at most {_LONGEST_S} seconds")
    metadata = _metadata(params.get("job_metadata"), "job_metadata")
    return FtsSubmission(
        transfers=transfers,
        compares=compares,
        overwrite=overwrite,
        max_tries=DEFAULT_TRIES if retry == 0 else min(max(1 + retry, LEAST_TRIES), MOST_TRIES),
        priority=priority,
        queue_s=queue_s,
        stage_s=bring_online if bring_online > 0 else None,
        # Rucio sends it with every job: alone it stages nothing.
        pin_s=pin if pin > 0 and bring_online > 0 else None,
        archive_s=archive if archive > 0 else None,
        sid=_sid(params),
        details={
            "job_metadata": {**(metadata if isinstance(metadata, dict) else {}), "auth_method": "certificate"}
            if metadata is None or isinstance(metadata, dict)
            else metadata,
            "verify_checksum": mode,
            "overwrite_flag": "Y" if overwrite else None,
            "retry": retry,
            "retry_delay": _integer(params, "retry_delay", 0),
            "copy_pin_lifetime": pin,
            "bring_online": bring_online,
            "archive_timeout": archive,
        },
    )


def _refuse(params: Mapping[str, Any]) -> None:
    for key, value in params.items():
        if not _is_set(value) or key in _MEANT or key in HINTS:
            continue
        why = _REFUSED_PARAMS.get(key)
        if why is not None:
            raise InvalidInputError(f"{key}: {why}")
        raise InvalidInputError(f"unknown parameter {key[:_SHOWN]!r}: it would have no effect, leave it out")


def _is_set(value: object) -> bool:
    """Whether a parameter asks for something: clients also send defaults, such as -1 for no timeout."""
    if isinstance(value, str):
        return value[:1].upper() not in ("", "N")
    return value > 0 if isinstance(value, int | float) else bool(value)


def _integer(params: Mapping[str, Any], key: str, default: int) -> int:
    value = params.get(key)
    if value is None or value == "":
        return default
    try:
        number = int(value) if isinstance(value, int | str) else None
    except ValueError:
        number = None
    if number is None or abs(number) > 2**31:
        raise InvalidInputError(f"Invalid value within the request: {key}: a whole number is expected")
    return number


def _flag(value: object, key: str) -> bool:
    if isinstance(value, str):
        return value[:1].upper() == "Y"
    if value is None or isinstance(value, bool | int):
        return bool(value)
    raise InvalidInputError(f"Invalid value within the request: {key}: true or false is expected")


def _metadata(value: Any, key: str) -> Any:
    if value is None:
        return None
    if len(msgspec.json.encode(value)) > _LONGEST_METADATA:
        raise InvalidInputError(f"{key}: longer than {_LONGEST_METADATA} bytes")
    return value


def _sid(params: Mapping[str, Any]) -> str | None:
    generator = params.get("id_generator") or "standard"
    if generator == "standard":
        return None
    if generator != "deterministic":
        raise InvalidInputError("id_generator: standard or deterministic is expected")
    sid = params.get("sid")
    if sid is None:
        raise InvalidInputError("Need sid for deterministic job id generation")
    text = str(sid)
    if isinstance(sid, dict | list) or not 0 < len(text) <= _LONGEST_SID:
        raise InvalidInputError(f"sid: a text of 1 to {_LONGEST_SID} characters is expected")
    return text


def _checksum_mode(value: object, transfers: Sequence[FtsTransfer]) -> tuple[str, bool]:
    """The letter that FTS3 gives back, and whether checksums are compared."""
    if value is None or value is False or value == "":
        # As in FTS3: by default checksums are compared where one is given.
        mode = "t" if any(transfer.checksum[0] for transfer in transfers) else "n"
    elif value is True:
        mode = "b"
    elif isinstance(value, str) and value.lower() in _MODE_WORDS:
        mode = value[0].lower()
    else:
        raise InvalidInputError("verify_checksum: source, target, both or none is expected")
    compares = CHECKSUM_MODES[mode]
    if compares:
        for transfer in transfers:
            algorithm = transfer.checksum[0]
            if algorithm and algorithm not in _ALGORITHMS:
                raise InvalidInputError(
                    f"files[{transfer.file_index}]: {algorithm[:_SHOWN]} is not computed here: use one of"
                    f" {', '.join(ChecksumAlgorithm)}, or verify_checksum=none"
                )
    return mode, compares


def _transfers(files: object, *, buckets_in_paths: bool) -> list[FtsTransfer]:
    if not isinstance(files, list):
        raise InvalidInputError("files: an array is expected")
    found: list[FtsTransfer] = []
    servers = ServersOfUrls(buckets_in_paths=buckets_in_paths)
    for index, file in enumerate(files):
        found += _transfers_of(index, file, servers)
        if len(found) > MOST_ITEMS:
            raise InvalidInputError(f"files: at most {MOST_ITEMS} are taken at once; submit several jobs")
    if not found:
        raise InvalidInputError("No valid pairs available")
    if len(found) > 1 and any(len(transfer.sources) > 1 for transfer in found):
        raise InvalidInputError("Multiple replica jobs must only have one unique file")
    destinations: dict[tuple[ServerOfUrl, str], int] = {}
    for transfer in found:
        url = transfer.destination
        other = destinations.setdefault((url.server, url.path), transfer.file_index)
        if other != transfer.file_index:
            raise InvalidInputError(f"files[{other}] and files[{transfer.file_index}] have the same destination")
    return found


def _transfers_of(index: int, file: object, servers: ServersOfUrls) -> list[FtsTransfer]:
    place = f"files[{index}]"
    if not isinstance(file, dict):
        raise InvalidInputError(f"{place}: an object is expected")
    if not _OF_FILES.issuperset(file):
        _refuse_keys(file, place)
    sources = _urls(file, "sources", place, servers)
    destinations = _urls(file, "destinations", place, servers)
    if len(sources) > 1 and len(destinations) > 1:
        raise InvalidInputError(f"{place}: several sources with several destinations: submit a job for each")
    if len(sources) > MOST_SOURCES:
        raise InvalidInputError(f"{place}: at most {MOST_SOURCES} sources are taken")
    strategy = file.get("selection_strategy") or "auto"
    if not isinstance(strategy, str) or strategy not in SELECTION_STRATEGIES:
        raise InvalidInputError(f"{str(strategy)[:_SHOWN]} algorithm is not supported by Scheduler")
    checksum = file.get("checksum") or ""
    if not isinstance(checksum, str) or len(checksum) > _LONGEST_WORD:
        raise InvalidInputError(f"{place}.checksum: ALGORITHM or ALGORITHM:VALUE is expected")
    algorithm, _, value = checksum.partition(":")
    size = _size(file.get("filesize"), f"{place}.filesize")
    activity = file.get("activity") or "default"
    if not isinstance(activity, str) or len(activity) > _LONGEST_WORD:
        raise InvalidInputError(f"{place}.activity: a text is expected")
    details = {key: _metadata(file[key], f"{place}.{key}") for key in _KEPT_OF_FILES if file.get(key) is not None}
    details |= {"checksum": checksum or "ADLER32", "activity": activity, "selection_strategy": strategy}
    if size:
        details["filesize"] = size
    return [
        FtsTransfer(index, sources, destination, size, (algorithm.upper(), value), details)
        for destination in destinations
    ]


def _refuse_keys(file: Mapping[str, Any], place: str) -> None:
    for key, value in file.items():
        if key in _REFUSED_OF_FILES and value:
            raise InvalidInputError(f"{place}.{key}: {_REFUSED_OF_FILES[key]}")
        if key not in _OF_FILES and key not in _REFUSED_OF_FILES and _is_set(value):
            raise InvalidInputError(f"{place}: unknown key {key[:_SHOWN]!r}: it would have no effect, leave it out")


def _size(value: object, place: str) -> int:
    if value is None or value == "":
        return 0
    try:
        size = int(value) if isinstance(value, int | str) else int(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        size = -1
    if not 0 <= size <= LARGEST_SIZE:
        raise InvalidInputError(f"Invalid value within the request: {place}: a number of bytes is expected")
    return size


def _urls(file: Mapping[str, Any], key: str, place: str, servers: ServersOfUrls) -> tuple[FileUrl, ...]:
    urls = file.get(key)
    if urls is None:
        raise InvalidInputError(f"Missing parameter: {place}.{key}")
    if not isinstance(urls, list) or not urls:
        raise InvalidInputError(f"{place}.{key}: an array of URLs is expected")
    found = []
    for url in urls:
        if not isinstance(url, str):
            raise InvalidInputError(f"{place}.{key}: a URL is a text")
        try:
            found.append(read_url(url, servers))
        except ValueError as error:
            raise InvalidInputError(f"Invalid value within the request: {place}.{key}: {error}") from error
        if found[-1].path.endswith("/"):
            # For an item of a job it would be a directory to copy into.
            raise InvalidInputError(f"{place}.{key}: a URL of a file does not end with a slash ({url[:_SHOWN]})")
    if len(found) > 1 and len({(each.server, each.path) for each in found}) < len(found):
        raise InvalidInputError(f"{place}.{key}: a URL is given twice")
    return tuple(found)
