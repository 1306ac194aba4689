"""The REST reference, written from the program's own table of endpoints.

``endpoint-table`` writes a directive of sphinxcontrib-httpdomain for each endpoint, ``answer-table`` the members of
each object that is answered. Names, types and texts come from the JSON schema of the structs that the service decodes
and encodes with, so the page says what the program does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from pdm.workqueue.http.endpoint import PATH_PARAMETERS, Allow, Endpoint, Parameter, PlainText
from pdm.workqueue.http.endpoints import ENDPOINTS

_PREFIX = "/workqueue/api/v1.0"
_CONVERTERS = {Parameter.NUMBER: "int:", Parameter.SIGNED: "int:", Parameter.WORD: ""}
# What is plain text in a request or an answer.
_PLAIN = (str, bytes, PlainText)
Schema = Mapping[str, Any]


class GeneratedDirective(SphinxDirective):
    """A directive whose content is reStructuredText that a program writes."""

    def lines(self) -> Iterable[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        container = nodes.section()
        container.document = self.state.document
        content = StringList(list(self.lines()), self.get_source_info()[0])
        self.state.nested_parse(content, self.content_offset, container)
        return list(container.children)


class EndpointTable(GeneratedDirective):
    """All endpoints, in the order of the table."""

    def lines(self) -> Iterable[str]:
        return (line for endpoint in ENDPOINTS for line in _endpoint(endpoint))


class AnswerTable(GeneratedDirective):
    """All objects that are answered, and those inside them, in the order in which the endpoints have them."""

    def lines(self) -> Iterable[str]:
        results = [endpoint.result for endpoint in ENDPOINTS if endpoint.result not in (None, *_PLAIN)]
        _, components = _schemas(results)
        return (line for name, schema in components.items() for line in _answer(name, schema, components))


def _endpoint(endpoint: Endpoint) -> Iterator[str]:
    path = endpoint.path
    for name in endpoint.parameters:
        path = path.replace(f"{{{name}}}", f"({_CONVERTERS[PATH_PARAMETERS[name][0]]}{name})")
    yield f".. http:{endpoint.method.lower()}:: {_PREFIX}{path}"
    yield ""
    for block in (endpoint.summary, *endpoint.description.split("\n\n")):
        yield from (f"   {line}" for line in block.splitlines())
        yield ""
    if endpoint.allow is Allow.EVERYBODY:
        yield "   Open to everybody, without a certificate."
        yield ""
    yield from (f"   {field}" for field in _fields(endpoint))
    yield ""


def _fields(endpoint: Endpoint) -> Iterator[str]:
    for name in endpoint.parameters:
        yield f":param {name}: {PATH_PARAMETERS[name][1]}"
    for role, shape in (("query", endpoint.query), ("reqjson", endpoint.body)):
        if shape not in (None, *_PLAIN):
            (schema,), components = _schemas([shape])
            for name, member, required in _members(_resolved(schema, components)):
                optional = "" if required else " Optional."
                yield f":{role} {_kind(member)} {name}: {_description(member, components)}{optional}"
    if endpoint.method == "POST" and endpoint.body is not None:
        yield ":reqheader Idempotency-Key: sent again with the same key, the request is carried out once."
    if endpoint.body in _PLAIN:
        yield ":reqheader Content-Type: text/plain"
    answered = " or ".join(f"``{each}``" for each in endpoint.media_types) or _answered(endpoint.result)
    yield f":statuscode {endpoint.status}: {answered}"
    errors: dict[int, list[str]] = {}
    for error in endpoint.errors:
        errors.setdefault(error.status, []).append(error.title)
    for status, titles in sorted(errors.items()):
        yield f":statuscode {status}: {'; '.join(titles)}"


def _answer(name: str, schema: Schema, components: Mapping[str, Schema]) -> Iterator[str]:
    yield f".. _answer-{name.lower()}:"
    yield ""
    yield f".. rubric:: {_title(name)}"
    yield ""
    yield from schema.get("description", "").splitlines()
    yield ""
    yield ".. list-table::"
    yield "   :widths: 25 20 55"
    yield ""
    for member_name, member, required in _members(schema):
        optional = "" if required else " Not always there."
        yield f"   * - ``{member_name}``"
        yield f"     - {_linked(member)}"
        yield f"     - {_description(member, components)}{optional}"
    yield ""


def _schemas(shapes: Iterable[Any]) -> tuple[tuple[Schema, ...], Mapping[str, Schema]]:
    return msgspec.json.schema_components(shapes, ref_template="{name}")


def _members(schema: Schema) -> Iterator[tuple[str, Schema, bool]]:
    """Name and schema of each member of an object, and whether it is always there."""
    for name, member in schema["properties"].items():
        yield name, member, name in schema.get("required", ())


def _resolved(schema: Schema, components: Mapping[str, Schema]) -> Schema:
    return components[schema["$ref"]] if "$ref" in schema else schema


def _title(component: str) -> str:
    return component.removesuffix("View")


def _link(component: str) -> str:
    return f":ref:`{_title(component)} <answer-{component.lower()}>`"


def _answered(result: Any) -> str:
    if result is None:
        return "done; nothing is given out"
    if result in _PLAIN:
        return "plain text"
    (schema,), _ = _schemas([result])
    return f"an array of {_linked(schema['items'])}" if "items" in schema else _linked(schema)


def _linked(schema: Schema) -> str:
    """The type in words, with links to the objects in it."""
    if "$ref" in schema:
        return _link(schema["$ref"])
    if "anyOf" in schema:
        return " or ".join(_linked(choice) for choice in schema["anyOf"])
    if schema.get("type") == "array" and schema.get("items"):
        return f"array of {_linked(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_linked(schema['additionalProperties'])}"
    return _kind(schema)


def _kind(schema: Schema) -> str:
    """The type in one word, which is all that the fields of httpdomain take."""
    if "anyOf" in schema:
        return "|".join(dict.fromkeys(_kind(choice) for choice in schema["anyOf"] if choice != {"type": "null"}))
    if "enum" in schema:
        return "string"
    return "object" if "$ref" in schema else str(schema.get("type", "value"))


def _description(schema: Schema, components: Mapping[str, Schema]) -> str:
    # A reference's own description is that of the object, which has its own place.
    described = schema.get("description", "")
    if described in {component.get("description") for component in components.values()}:
        described = ""
    choices = [choice["enum"] for choice in (schema, *schema.get("anyOf", ())) if "enum" in choice]
    words = [" ".join(described.split())]
    words += ["One of " + ", ".join(f"``{value}``" for value in values) + "." for values in choices]
    return " ".join(word for word in words if word)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_directive("endpoint-table", EndpointTable)
    app.add_directive("answer-table", AnswerTable)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
