"""The OpenAPI document of the control API, made of the table of operations and the types they take and give.

``python -m mdevkit_service.openapi FILE`` writes it; a test holds the file in docs/ up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from mdevkit.version import VERSION

from mdevkit_service.app import OPERATIONS
from mdevkit_service.journal import Event
from mdevkit_service.schema import Problem

if TYPE_CHECKING:
    from mdevkit_service.api import Operation

_REF: Final = "#/components/schemas/{name}"


def document() -> dict[str, Any]:
    """Return the document."""
    types = [type_ for operation in OPERATIONS for type_ in (operation.takes, operation.gives) if type_ is not None]
    types += [Problem, Event]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = {repr(type_): schema for type_, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mdevkit control API",
            "version": VERSION,
            "description": "HTTP/1.1 on the service's UNIX socket. Errors are problem details (RFC 9457) with an errno.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.handler.__name__, "summary": operation.summary}
    parameters = [_parameter(name, "path", "string", "") for name in re.findall(r"{(\w+)}", operation.path)]
    parameters += [_parameter(query.name, "query", query.type, query.doc) for query in operation.query]
    if parameters:
        described["parameters"] = parameters
    if operation.takes is not None:
        described["requestBody"] = {"content": {"application/json": {"schema": schemas[repr(operation.takes)]}}}
    described["responses"] = {
        str(operation.status): _answer(operation, schemas),
        "default": {
            "description": "What went wrong",
            "content": {"application/problem+json": {"schema": schemas[repr(Problem)]}},
        },
    }
    return described


def _parameter(name: str, where: str, kind: str, doc: str) -> dict[str, Any]:
    parameter: dict[str, Any] = {"name": name, "in": where, "schema": {"type": kind}}
    return parameter | ({"required": True} if where == "path" else {"description": doc})


def _answer(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": operation.handler.__doc__}
    if operation.stream:
        answer["content"] = {"application/x-ndjson": {"schema": schemas[repr(Event)]}}
    elif operation.gives is not None:
        answer["content"] = {"application/json": {"schema": schemas[repr(operation.gives)]}}
    return answer


def text() -> str:
    """Return the document as it is kept."""
    return json.dumps(document(), indent=2) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text())
