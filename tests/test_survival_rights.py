"""Whose sockets VFIO devices are served at, directly and through a front: their owner's, and nobody's who could not make them.

Needs root, to be somebody else.
"""

from __future__ import annotations

import json
import os
import pwd
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import pytest

from tests.services import Running, interpreter, wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
#: Somebody (nobody on every Linux), and a group he is not in by default.
UID, GID, GROUP = 65534, 65534, "daemon"
#: A device that is served through a front, and one that is served directly.
TYPES = ("fragile-1", "fragile-2")

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else: sudo ./dev test tests")

#: Reads and writes a register at each line on stdin; prints the value, or what went wrong.
CLIENT = """
import sys
from mdevkit.errors import MdevError
from mdevkit_vfio.client import VfioUserClient
try:
    with VfioUserClient.connect(sys.argv[1], timeout=7) as client:
        register = client.region(0)
        for line in sys.stdin:
            print(register.read_int(0, 4), flush=True)
            register.write_int(0, 4, int(line))
except MdevError as error:
    print(error.name, flush=True)
"""

#: Asks the service to make a device.
CREATE = """
import json, sys
from mdevkit.client import Client
from mdevkit.errors import MdevError
try:
    with Client(sys.argv[1], start=False) as client:
        print(json.dumps(client.post("/v1/devices", json.loads(sys.argv[2]))))
except MdevError as error:
    print(json.dumps({"error": str(error), "errno": error.name}))
"""


@pytest.fixture
def service(tmp_path):
    """A service in a folder that everybody can enter."""
    folder = Path(tempfile.mkdtemp(prefix="mdevkit-"))
    folder.chmod(0o755)
    running = Running(folder, tmp_path)
    running.environment["MDEVKIT_PLUGINS"] = "mdevkit-vfio,mdevkit-fragile"
    try:
        running.python = interpreter(folder / "venv")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield running
    running.clean_up()
    rmtree(folder)


@pytest.fixture
def open_folder():
    """A folder that belongs to the other user."""
    folder = Path(tempfile.mkdtemp(prefix="theirs-"))
    os.chown(folder, UID, GID)
    yield folder
    rmtree(folder)


@pytest.fixture
def client_as(service):
    """Starts clients that run as another user."""
    started = []

    def start(uid, path):
        process = subprocess.Popen(
            [service.python, "-P", "-c", CLIENT, path],
            user=uid, group=GID, extra_groups=[], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def exchange(client, value):
    """Have a client read the register and then write it; return what it has read, or what has ended it."""
    with suppress(BrokenPipeError):
        client.stdin.write(b"%d\n" % value)
    return client.stdout.readline().decode().strip()


def create_as_member(service, wish):
    """Have a member of the group ask for a device."""
    import grp

    done = subprocess.run(
        [service.python, "-P", "-c", CREATE, str(service.socket), json.dumps(wish)],
        user=UID, group=GID, extra_groups=[grp.getgrnam(GROUP).gr_gid], capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def restart(service, client):
    service.kill_host("fragile")
    wait_until(lambda: client.get("/v1/devices")[0]["state"] == "bound", what="the return")


@pytest.mark.parametrize("host_user", [(), ("--host-user", "daemon")])
@pytest.mark.parametrize("type_", TYPES)
def test_the_endpoints_owner_uses_the_device_and_others_do_not(service, client_as, type_, host_user):
    service.start("--endpoint-owner", "nobody", *host_user)
    with service.client() as api:
        path = api.post("/v1/devices", {"type": type_, "uuid": UUID})["endpoint"]["socket"]
        assert (Path(path).stat().st_uid, stat.S_IMODE(Path(path).stat().st_mode)) == (UID, 0o600)
        assert Path(f"/proc/{service.hosts()['fragile']}").stat().st_uid == (pwd.getpwnam("daemon").pw_uid if host_user else 0)
        stranger = client_as(2, path)
        assert exchange(stranger, 1) == "EACCES"
        owner = client_as(UID, path)
        assert exchange(owner, 5) == "0"
        restart(service, api)
        if type_ == "fragile-1":
            assert exchange(owner, 6) == "5"
        else:
            assert exchange(owner, 6) == "ENOTCONN"
            assert exchange(client_as(UID, path), 7) == "0"
        assert Path(path).stat().st_uid == UID
        api.delete(f"/v1/devices/{UUID}?force=1&timeout=0")
    assert not Path(path).exists()
    service.stop()
    wait_until(lambda: service.files() == [], what="the sockets' removal")


@pytest.mark.parametrize("host_user", [(), ("--host-user", "daemon")])
@pytest.mark.parametrize("type_", TYPES)
def test_a_member_gets_sockets_where_he_may_make_them_and_nowhere_else(service, open_folder, client_as, type_, host_user):
    service.start("--group", GROUP, *host_user)
    roots = Path(tempfile.mkdtemp(prefix="roots-"))
    try:
        refused = create_as_member(service, {"type": type_, "socket": f"{roots}/a.sock"})
        assert (refused["errno"], list(roots.iterdir())) == ("EACCES", [])
        assert f"no permission to make files in {roots}" in refused["error"]
    finally:
        rmtree(roots)
    path = open_folder / "a.sock"
    assert create_as_member(service, {"type": type_, "uuid": UUID, "socket": str(path)})["state"] == "bound"
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (UID, 0o600)
    member = client_as(UID, str(path))
    assert exchange(member, 5) == "0"
    member.kill()
    with service.client() as api:
        restart(service, api)
        assert path.stat().st_uid == UID
        assert exchange(client_as(UID, str(path)), 6) == "0"
        api.delete(f"/v1/devices/{UUID}?force=1&timeout=0")
    wait_until(lambda: not path.exists(), what="the socket's removal")


@pytest.mark.parametrize("host_user", [(), ("--host-user", "daemon")])
def test_the_endpoints_owner_sees_the_screen_and_others_do_not(service, host_user):
    """A display's second socket, which shows its screen, is the owner's as its endpoint is, and goes with the device."""
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-vfio,mdevkit-mbochs"
    service.start("--endpoint-owner", "nobody", *host_user)
    with service.client() as api:
        api.post("/v1/devices", {"type": "mdpy-vga", "uuid": UUID})
        screen = Path(api.get(f"/v1/devices/{UUID}")["attributes"]["screen_path"])
        assert (screen.stat().st_uid, stat.S_IMODE(screen.stat().st_mode)) == (UID, 0o600)
        look = [
            service.python,
            "-P",
            "-c",
            "import sys; from mdevkit.screen import Screen; print(Screen(sys.argv[1]).look().frame.width)",
        ]
        seen = {
            uid: subprocess.run(
                [*look, str(screen)], user=uid, group=GID, extra_groups=[], capture_output=True, text=True, timeout=30
            )
            for uid in (2, UID)
        }
        assert (seen[UID].returncode, seen[UID].stdout) == (0, "640\n"), seen[UID].stderr
        assert seen[2].returncode != 0
        assert "EACCES" in seen[2].stderr or "Permission denied" in seen[2].stderr
        service.kill_host("mdpy")
        wait_until(lambda: api.get("/v1/devices")[0]["state"] == "bound", what="the return")
        assert screen.stat().st_uid == UID
        api.delete(f"/v1/devices/{UUID}?force=1&timeout=0")
    assert not screen.exists()
