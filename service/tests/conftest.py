"""A service of its own for each test, or one for a module whose tests leave it running."""

from __future__ import annotations

import json

import pytest
from mdevkit.errors import MdevError

from tests.services import Running


@pytest.fixture
def service(tmp_path_factory, tmp_path):
    """A service that is not started yet."""
    # pytest's own folders are too deep for a socket's path.
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    running = Running(folder, tmp_path)
    yield running
    running.clean_up()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A service that runs, for a module whose tests leave it running."""
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    running = Running(folder, folder).start()
    yield running
    running.clean_up()


@pytest.fixture
def client(service):
    """A client of a service that runs."""
    with service.start().client() as client:
        yield client


@pytest.fixture
def refused():
    """Checks that a call fails with an errno, in these words."""

    def check(number, call, *words):
        with pytest.raises(MdevError) as caught:
            call()
        assert caught.value.name == number, caught.value
        for word in words:
            assert word in str(caught.value)
        return caught.value

    return check


@pytest.fixture
def problem_of(service):
    """Sends a raw request and returns status, fields and the decoded body."""

    def send(method, path, body=None, raw=None):
        with service.client() as client:
            client._send(method, path, body, {})
            if raw is not None:
                client._socket.sendall(raw)
            status, fields = client._head()
            data = client._body(fields)
            return status, fields, json.loads(data) if data else None

    return send
