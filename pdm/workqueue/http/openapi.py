"""The OpenAPI 3.1 document, generated from the table of endpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import msgspec

from pdm.workqueue import __version__
from pdm.workqueue.http.endpoint import PATH_PARAMETERS, Allow, Endpoint, Parameter
from pdm.workqueue.http.problems import (
    ApiError,
    BodyTooLargeError,
    DatabaseOutageError,
    ForbiddenError,
    InternalFaultError,
    InvalidInputError,
    NotAuthenticatedError,
    RequestTimeoutError,
    ServiceStoppingError,
    UnsupportedMediaTypeError,
)
from pdm.workqueue.wire.options import OPTIONS
from pdm.workqueue.wire.requests import LARGEST_ID, OPTIONS_OF
from pdm.workqueue.wire.responses import MEDIA_TYPE, JobView, Problem, RetriedJobView

_REF = "#/components/schemas/{name}"
_PATH_SCHEMAS: Mapping[Parameter, dict[str, Any]] = MappingProxyType(
    {
        Parameter.NUMBER: {"type": "integer", "minimum": 0, "maximum": LARGEST_ID},
        Parameter.SIGNED: {"type": "integer", "minimum": -LARGEST_ID, "maximum": LARGEST_ID},
        Parameter.WORD: {"type": "string", "minLength": 1, "maxLength": 100},
    }
)


def errors_of(endpoint: Endpoint) -> list[type[ApiError]]:
    """All errors of an endpoint, by status."""
    found: list[type[ApiError]] = [*endpoint.errors, InternalFaultError]
    if endpoint.allow is not Allow.EVERYBODY:
        found += [NotAuthenticatedError, ForbiddenError, InvalidInputError, ServiceStoppingError, DatabaseOutageError]
    if endpoint.body is not None:
        found += [BodyTooLargeError, RequestTimeoutError]
    if endpoint.body not in (None, bytes):
        found.append(UnsupportedMediaTypeError)
    return sorted(set(found), key=lambda error: (error.status, error.word))


def openapi_document(endpoints: Iterable[Endpoint], root: str) -> dict[str, Any]:
    table = list(endpoints)
    types = [part for endpoint in table for part in (endpoint.body, endpoint.result) if part not in (None, bytes, str)]
    types += OPTIONS.values()
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template=_REF)
    for body, options in OPTIONS_OF.items():
        _type_options(components[body.__name__], options)
    for view in (JobView, RetriedJobView):
        _type_options(components[view.__name__], OPTIONS.values())
    schema_of = dict(zip(map(repr, types), schemas, strict=False))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "PDM Workqueue",
            "version": __version__,
            "description": "Lists, copies, removes, renames and makes directories at storage sites.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": root}],
        "security": [{"certificate": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "certificate": {
                    "type": "mutualTLS",
                    "description": "An X.509 client certificate, or an RFC 3820 proxy of one.",
                }
            },
        },
    }


def _operation(endpoint: Endpoint, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "description": inspect.cleandoc(endpoint.description),
        "parameters": _parameters(endpoint),
        "responses": _responses(endpoint, schema_of),
    }
    if endpoint.body is bytes:
        operation["requestBody"] = {"required": True, "content": {"application/x-pem-file": {}}}
    elif endpoint.body is not None:
        schema = schema_of[repr(endpoint.body)]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if endpoint.allow is Allow.EVERYBODY:
        operation["security"] = []
    return operation


def _type_options(schema: dict[str, Any], options: Iterable[type[msgspec.Struct]]) -> None:
    """Replace the schema of ``extra_opts``, a free object, by the structs that it may be."""
    old = schema["properties"]["extra_opts"]
    references = [{"$ref": _REF.format(name=struct.__name__)} for struct in options]
    null = [{"type": "null"}] if "default" in old else []
    kept = {key: old[key] for key in ("description", "default") if key in old}
    schema["properties"]["extra_opts"] = {"anyOf": references + null, **kept}


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters = []
    for name in endpoint.parameters:
        kind, text = PATH_PARAMETERS[name]
        parameters.append(
            {"name": name, "in": "path", "required": True, "description": text, "schema": _PATH_SCHEMAS[kind]}
        )
    if endpoint.query is not None:
        (reference,), components = msgspec.json.schema_components([endpoint.query])
        properties: dict[str, Any] = components[reference["$ref"].rpartition("/")[2]]["properties"]
        for name, schema in properties.items():
            text = schema.pop("description", "")
            schema.pop("default", None)
            parameters.append({"name": name, "in": "query", "description": text, "schema": schema})
    if endpoint.method == "POST":
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "description": "A request that is repeated with the same key is executed once.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[ -~]+$"},
            }
        )
    return parameters


def _responses(endpoint: Endpoint, schema_of: Mapping[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": HTTPStatus(endpoint.status).phrase}
    if endpoint.media_types:
        success["content"] = {
            each: {"schema": schema_of[repr(endpoint.result)] if each == "application/json" else {"type": "string"}}
            for each in endpoint.media_types
        }
    elif endpoint.result is str:
        success["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif endpoint.result is not None:
        success["content"] = {"application/json": {"schema": schema_of[repr(endpoint.result)]}}
    responses = {str(endpoint.status): success}
    by_status: dict[int, list[type[ApiError]]] = {}
    for error in errors_of(endpoint):
        by_status.setdefault(error.status, []).append(error)
    for status, errors in by_status.items():
        responses[str(status)] = {
            "description": _titles(errors),
            "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(name=Problem.__name__)}}},
        }
    return responses


def _titles(errors: Sequence[type[ApiError]]) -> str:
    return "; ".join(dict.fromkeys(error.title for error in errors))
