"""What schemathesis must know of this API to come further than "there is no such job": loaded by `fuzzing`."""

from __future__ import annotations

import json
import zlib
from typing import Any

import schemathesis

#: So many numbers of jobs, elements and users are likely to mean something, and so many of sites.
_KNOWN = 12
_SITES = 2
_LARGEST = 2**63 - 1


@schemathesis.hook
def map_path_parameters(context: object, path_parameters: Any) -> Any:
    """Three in four numbers are brought near to those that there are."""
    if isinstance(path_parameters, dict):
        for name, value in path_parameters.items():
            if type(value) is int and 0 <= value <= _LARGEST and value % 4:
                path_parameters[name] = value % _KNOWN
    return path_parameters


@schemathesis.hook
def map_body(context: object, body: Any) -> Any:
    """Three in four submissions are of sites that there are, half of them simulated work.

    What the schema forbids stays forbidden: that it is refused is tested, too.
    """
    if isinstance(body, dict):
        chance = zlib.crc32(json.dumps(body, default=str).encode())
        for name in ("src_siteid", "dst_siteid", "site"):
            if type(value := body.get(name)) is int and 0 <= value <= _LARGEST and chance % 4:
                body[name] = 1 + value % _SITES
        if "src_siteid" in body and body.get("protocol") is None and chance % 4:
            body["protocol"] = "DUMMY"
        for name in ("src_filepath", "dst_filepath", "default_folder"):
            if isinstance(value := body.get(name), str) and value and chance % 4:
                body[name] = "/" + value[1:]
    return body


@schemathesis.serializer("application/x-pem-file")
def pem(context: object, value: Any) -> bytes:
    """A body that is no JSON goes as it is."""
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
