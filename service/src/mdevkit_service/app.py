"""The ASGI application: requests find their operation, bodies are checked, errors become problem details."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any, Final

import msgspec
from mdevkit.errors import MdevError, wrap
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mdevkit_service import api, definitions_api
from mdevkit_service.problems import problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from mdevkit_service.api import Operation
    from mdevkit_service.service import Service

log = logging.getLogger("mdevkit.service")

#: Every table of operations; each part of the service that has an interface has one.
OPERATIONS: Final[list[Operation]] = [*api.OPERATIONS, *definitions_api.OPERATIONS]

#: The largest body in bytes.
BODY_LIMIT: Final = 1 << 20

_encode: Final = msgspec.json.Encoder().encode


class _Json(Response):
    media_type = "application/json"


class _Problem(Response):
    media_type = "application/problem+json"


def make_app(service: Service) -> Starlette:
    """Return the application that serves `service`."""
    routes = [
        Route(operation.path.replace("{name}", "{name:path}"), _endpoint(service, operation), methods=[operation.method])
        for operation in OPERATIONS
    ]
    return Starlette(routes=routes, exception_handlers={404: _no_such_path, 405: _no_such_method})


def _endpoint(service: Service, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    """Return the Starlette endpoint of an operation."""
    decoder = msgspec.json.Decoder(operation.takes) if operation.takes is not None else None

    async def endpoint(request: Request) -> Response:
        try:
            body = _decode(decoder, await _body(request)) if decoder is not None else None
            if operation.needs_hosts:
                await service.ready()
            result = await operation.handler(service, request, body)
        except MdevError as error:
            return refusal(error)
        except Exception as error:
            log.exception("%s %s", operation.method, operation.path)
            return refusal(wrap(error, f"{operation.method} {operation.path}"))
        if operation.stream:
            return StreamingResponse(result, media_type="application/x-ndjson")
        if result is None:
            return Response(status_code=operation.status)
        return _Json(_encode(result), status_code=operation.status)

    return endpoint


async def _body(request: Request) -> bytes:
    """Read the body; EMSGSIZE for one that no client of good will sends."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_LIMIT:
            raise MdevError(errno.EMSGSIZE, f"a body has at most {BODY_LIMIT} bytes")
    return bytes(body)


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body or b"{}")
    except msgspec.MsgspecError as error:
        raise MdevError(errno.EINVAL, f"the body is not what is wanted: {error}") from error


def refusal(error: OSError, status: int | None = None) -> Response:
    """Return the response that tells of an error."""
    details = problem(error)
    details.status = status or details.status
    return _Problem(_encode(details), status_code=details.status)


async def _no_such_path(request: Request, _error: Exception) -> Response:
    return refusal(MdevError(errno.ENOENT, f"there is no {request.url.path}"))


async def _no_such_method(request: Request, _error: Exception) -> Response:
    return refusal(MdevError(errno.EOPNOTSUPP, f"{request.url.path} knows no {request.method}"), 405)
