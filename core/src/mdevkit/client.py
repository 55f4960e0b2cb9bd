"""Talks to the resident service: HTTP with JSON over its UNIX socket, by a bare socket so that a command starts fast.

Standard library only, and as little of it as will do. One `Client` is one connection and belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import json
import os
import socket

from mdevkit.errors import MdevError
from mdevkit.paths import control_socket
from mdevkit.peers import credentials

TYPE_CHECKING = False  # typing takes as long to import as the rest of a quick command
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Self

#: Seconds a service gets to answer its first connection.
START_LIMIT = 10.0

#: What the connection's end looks like.
_GONE = (errno.EPIPE, errno.ECONNRESET)


class Client:
    """A connection to the service: ``with Client() as service: service.get("/v1/devices")``.

    `path` is the control socket (`mdevkit.paths.control_socket` by default). With `start`, a service is started when none runs.
    Every method raises `MdevError` with the errno and the sentence the service gave, ECONNREFUSED when no service runs, EPERM when
    it is not the user's or root's process that listens there, or EPROTO for an answer that is not one of the service.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, start: bool = True) -> None:
        self.path = os.fspath(path or control_socket())
        self._socket = _connect(self.path, start=start)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def get(self, path: str) -> Any:
        """GET: return the decoded answer. Asks once more when the service has been exchanged since the last request."""
        try:
            return self.request("GET", path)
        except MdevError as error:
            if error.errno not in _GONE:
                raise
        self._socket.close()
        self._socket, self._buffer = _connect(self.path, start=False), b""
        return self.request("GET", path)

    def post(self, path: str, body: Any = None) -> Any:
        """POST a body."""
        return self.request("POST", path, body)

    def put(self, path: str, body: Any = None, **headers: str) -> Any:
        """PUT a body; keyword arguments become headers (``if_none_match="*"``)."""
        return self.request("PUT", path, body, **headers)

    def patch(self, path: str, body: Any) -> Any:
        """PATCH with a body."""
        return self.request("PATCH", path, body)

    def delete(self, path: str) -> Any:
        """DELETE."""
        return self.request("DELETE", path)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Send one request and return the decoded answer, None when it has no body."""
        self._send(method, path, body, headers)
        status, fields = self._head()
        return _result(status, self._body(fields), self.path)

    def events(self, after: int | None = None, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Return events as they happen, from the one after `after` (the newest by default), until none comes for `timeout` seconds.

        When this returns, no event from now on is missed. Takes over the connection until it is closed. ``{"lagged": N}`` stands
        for N events that were lost.
        """
        query = [f"{name}={value}" for name, value in (("after", after), ("timeout", timeout)) if value is not None]
        self._send("GET", "/v1/events" + ("?" + "&".join(query) if query else ""), None, {})
        status, fields = self._head()
        if status != 200:
            _result(status, self._body(fields), self.path)
        return self._lines()

    def _lines(self) -> Iterator[dict[str, Any]]:
        pending = b""
        while chunk := self._chunk():
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (_decoded(line, self.path) for line in lines if line)

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
        payload = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: mdevkit", f"Content-Length: {len(payload)}"]
        if payload:
            lines.append("Content-Type: application/json")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        try:
            self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + payload)
        except OSError as error:
            raise MdevError(error.errno or errno.EIO, f"the service went away: {error.strerror}", self.path) from error

    def _head(self) -> tuple[int, dict[str, str]]:
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        words = head[0].split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
            raise MdevError(errno.EPROTO, f"{self.path} does not speak HTTP", self.path)
        fields = dict(line.split(":", 1) for line in head[1:] if ":" in line)
        return int(words[1]), {name.lower(): value.strip() for name, value in fields.items()}

    def _body(self, fields: dict[str, str]) -> bytes:
        if fields.get("transfer-encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self._exactly(self._size(fields.get("content-length", "0"), 10))

    def _size(self, text: str, base: int) -> int:
        try:
            size = int(text, base)
        except ValueError:
            size = -1
        if size < 0:
            raise MdevError(errno.EPROTO, f"{self.path} announces {text!r:.40} bytes", self.path)
        return size

    def _chunk(self) -> bytes:
        size = self._size(self._until(b"\r\n").decode("latin-1"), 16)
        data = self._exactly(size)
        self._until(b"\r\n")
        return data

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._receive()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _receive(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except OSError as error:
            raise MdevError(error.errno or errno.EIO, f"the service went away: {error.strerror}", self.path) from error
        if not data:
            raise MdevError(errno.ECONNRESET, f"the service at {self.path} closed the connection", self.path)
        self._buffer += data


def _result(status: int, body: bytes, path: str) -> Any:
    value = _decoded(body, path) if body else None
    if status < 400:
        return value
    problem = value if isinstance(value, dict) else {}
    number = getattr(errno, str(problem.get("errno", "EIO")), errno.EIO)
    if not isinstance(number, int):
        number = errno.EIO
    raise MdevError(number, str(problem.get("detail") or f"the service answered {status}"))


def _decoded(text: bytes, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MdevError(errno.EPROTO, f"{path} answers with what is not JSON: {error}", path) from error


def _connect(path: str, *, start: bool) -> socket.socket:
    try:
        return _dial(path)
    except MdevError as error:
        if not start or error.errno != errno.ECONNREFUSED:
            raise
    start_service(path, ["--again"])
    return _dial(path)


def _dial(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    try:
        client.connect(os.fsencode(path))
        # In a folder everybody can write it might be anybody who listens.
        _, owner, _ = credentials(client)
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        raise MdevError(errno.ECONNREFUSED, f"no service runs at {path}", path) from None
    except OSError as error:
        client.close()
        # What the socket module itself refuses, a path that is too long, has no number.
        message = f"the service at {path} cannot be reached: {error.strerror or error}"
        raise MdevError(error.errno or errno.EIO, message, path) from error
    if owner not in {0, os.getuid()}:
        client.close()
        raise MdevError(errno.EPERM, f"{path} is neither this user's nor root's, but user {owner}'s", path)
    return client


def start_service(path: str | os.PathLike[str], arguments: Sequence[str] = ()) -> None:
    """Start a detached service that listens at `path`, with further arguments, and wait until it does.

    With ``--again`` it gets the options of the last one that was started there on purpose (`mdevkit service start`).
    Two that start at once end with one service: the second finds the first. ENOPKG says what to install when there is no
    service here; ETIMEDOUT and EIO tell where it wrote why.
    """
    import subprocess  # these cost 20 ms, which a command that finds a service does without
    import sys
    import time
    from importlib.util import find_spec
    from pathlib import Path

    if find_spec("mdevkit_service") is None:
        raise MdevError(errno.ENOPKG, "the service is not installed (pip install 'mdevkit[service]')", path)
    folder, log = Path(path).parent, Path(path).with_suffix(".log")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        message = f"no service can be started: {log} cannot be written: {error.strerror}"
        raise MdevError(error.errno or errno.EIO, message, path) from error
    with os.fdopen(descriptor, "ab") as output:
        command = [sys.executable, "-P", "-m", "mdevkit_service", "--socket", str(path), *arguments]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, cwd="/"
            )
        except OSError as error:
            message = f"no service can be started: {sys.executable}: {error.strerror}"
            raise MdevError(error.errno or errno.EIO, message, path) from error
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        try:
            _dial(os.fspath(path)).close()
        except MdevError:
            if process.poll() not in {None, 0}:
                raise MdevError(errno.EIO, f"the service ended at once: {_last_line(log)}", path) from None
            time.sleep(0.01)  # the service's start is not ours to be told of
        else:
            # It goes on without us, and nobody here waits for its end.
            process.returncode = 0
            return
    raise MdevError(errno.ETIMEDOUT, f"the service did not answer within {START_LIMIT:g} s; see {log}", path)


def _last_line(log: os.PathLike[str]) -> str:
    with open(log, errors="replace") as file:  # noqa: PTH123
        lines = file.read().split("\n")
    return next((line for line in reversed(lines) if line), f"see {os.fspath(log)}")
