"""A service of its own for each test, or one for a module whose tests leave it running."""

from __future__ import annotations

import json
import os
from ctypes.util import find_library

import pytest
from mdevkit.errors import MdevError

from tests.services import Running
from tests.sysfs import Mount


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


# -- the tree of sysfs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fuse():
    """Skip without FUSE."""
    missing = not os.access("/dev/fuse", os.W_OK) or not (find_library("fuse3") or find_library("fuse"))
    if missing or os.geteuid() != 0:
        pytest.skip("FUSE and root are needed: apt-get install fuse3 libfuse3-3")


@pytest.fixture
def mounts(service, fuse, tmp_path):
    """Mounts the tree, several times if need be, and ends all."""
    made = []

    def mount(*options, name="sys"):
        made.append(Mount(service, tmp_path / name, *options))
        return made[-1]

    yield mount
    for one in made:
        one.end()


@pytest.fixture
def tree(mounts, client):
    """A mount of its own, over a service of its own."""
    return mounts()


@pytest.fixture(scope="module")
def shared_tree(shared, fuse, tmp_path_factory):
    mount = Mount(shared, tmp_path_factory.mktemp("mount") / "sys")
    yield mount
    mount.end()


@pytest.fixture
def world(shared, shared_tree):
    """The module's service and mount, without devices: for tests that break neither."""
    with shared.client() as client:
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")
    return shared_tree


@pytest.fixture
def api(shared, world):
    """A client of the module's service."""
    with shared.client() as client:
        yield client
