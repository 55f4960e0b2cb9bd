"""Who may do what: other users, a group, and that the service opens nothing its client could not open."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree

import pytest
from mdevkit_service.supervisor import _kill
from mdevkit_service.units import units

from tests.services import Running, interpreter, wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"
#: Somebody (nobody on every Linux), and a group he is not in by default.
UID, GID, GROUP = 65534, 65534, "daemon"

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else: sudo ./dev test service/tests")

ASK = """
import json, sys
from mdevkit.client import Client
from mdevkit.errors import MdevError
path, method, where, body = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
try:
    with Client(path, start=False) as client:
        print(json.dumps({"answer": client.request(method, where, body)}))
except MdevError as error:
    print(json.dumps({"errno": error.name, "detail": str(error)}))
"""


def ask_as(service, uid, gid, groups, method, where, body=None):
    """Send a request from a process of another user."""
    done = subprocess.run(
        [service.python, "-P", "-c", ASK, str(service.socket), method, where, json.dumps(body)],
        user=uid, group=gid, extra_groups=groups, capture_output=True, text=True, check=False, timeout=30, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def service(tmp_path):
    """A service in a folder that everybody can enter."""
    folder = Path(tempfile.mkdtemp(prefix="mdevkit-"))
    folder.chmod(0o755)
    running = Running(folder, tmp_path)
    try:
        running.python = interpreter(folder / "venv")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    yield running
    running.clean_up()
    rmtree(folder)


@pytest.fixture
def member(service):
    """Sends a request as a member of the group."""
    import grp

    gid = grp.getgrnam(GROUP).gr_gid
    return lambda *request: ask_as(service, UID, GID, [gid], *request)


@pytest.fixture
def open_folder(tmp_path_factory):
    """A folder that belongs to the other user."""
    folder = Path(tempfile.mkdtemp(prefix="theirs-"))
    os.chown(folder, UID, GID)
    yield folder
    rmtree(folder)


@pytest.fixture
def roots():
    """A folder that belongs to root."""
    folder = Path(tempfile.mkdtemp(prefix="roots-"))
    yield folder
    rmtree(folder)


def returned(client, uuid=UUID):
    """Wait for a device to be there again after its host's death, and return it."""
    wait_until(lambda: client.get(f"/v1/devices/{uuid}")["state"] == "bound", what="the return")
    return client.get(f"/v1/devices/{uuid}")


def restart(service, client, key="demo0"):
    """Kill a host, and return the device when its next one has made it."""
    before = service.hosts()[key]
    service.kill_host(key)
    wait_until(lambda: service.hosts().get(key) not in {None, before}, what="the next host")
    return returned(client)


def test_another_user_cannot_reach_a_users_service(service):
    service.start()
    assert stat.S_IMODE(service.socket.lstat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (service.runtime, service.runtime / "devices")} == {0o700}
    answer = ask_as(service, UID, GID, [], "GET", "/v1/version")
    assert answer["errno"] == "EACCES"
    with service.client() as client:
        endpoint = client.post("/v1/devices", {"type": "demo-small"})["endpoint"]["socket"]
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    done = subprocess.run([service.python, "-c", program, endpoint], user=UID, group=GID, extra_groups=[], capture_output=True)
    assert b"PermissionError" in done.stderr


def test_another_user_who_gets_to_the_socket_is_not_answered(service):
    service.start()
    service.runtime.chmod(0o755)
    service.socket.chmod(0o666)
    # He is let down by the service, not by the file's mode.
    answer = ask_as(service, UID, GID, [], "GET", "/v1/version")
    assert answer["errno"] in {"ECONNRESET", "EPIPE"}
    assert f"user {UID} is not admitted" in service.log()


def test_a_group_is_admitted_and_others_are_not(service, member):
    service.start("--group", GROUP)
    assert stat.S_IMODE(service.socket.lstat().st_mode) == 0o660
    assert member("GET", "/v1/version")["answer"]["api"] == 1
    assert ask_as(service, UID, GID, [], "GET", "/v1/version")["errno"] == "EACCES"


def test_a_group_there_is_not_is_told_of(service):
    service.start("--group", "no-such-group", wait=False)
    assert service.process.wait(20) == 1
    assert "there is no group 'no-such-group'" in service.log()


def test_a_member_cannot_have_a_socket_made_where_he_could_not(service, member, tmp_path):
    service.start("--group", GROUP)
    roots = Path(tempfile.mkdtemp(prefix="roots-"))
    try:
        for wish in ({"socket": f"{roots}/a.sock"}, {"attributes": {"line": f"{roots}/b.sock"}}):
            answer = member("POST", "/v1/devices", {"type": "demo-small", **wish})
            assert answer["errno"] == "EACCES", answer
            assert f"no permission to make files in {roots}" in answer["detail"]
        assert list(roots.iterdir()) == []
        with service.client() as client:
            client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
            assert member("PUT", f"/v1/devices/{UUID}/attributes/line", {"value": f"{roots}/c.sock"})["errno"] == "EACCES"
            # Root may, of course.
            client.put(f"/v1/devices/{UUID}/attributes/line", {"value": f"{roots}/c.sock"})
        assert [path.name for path in roots.iterdir()] == ["c.sock"]
    finally:
        rmtree(roots)


@pytest.mark.parametrize("arguments", [["--group", GROUP], ["--group", GROUP, "--host-user", "daemon"]])
def test_what_a_member_may_have_made_is_his_and_goes_with_the_device(service, member, open_folder, arguments):
    service.start(*arguments)
    paths = [open_folder / "endpoint.sock", open_folder / "line.sock"]
    wish = {"type": "demo-small", "uuid": UUID, "socket": str(paths[0]), "attributes": {"line": str(paths[1])}}
    assert member("POST", "/v1/devices", wish)["answer"]["state"] == "bound"
    assert [(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in paths] == [(UID, 0o600)] * 2
    parent = member("GET", f"/v1/devices/{UUID}")["answer"]["parent"]
    service.kill_host(parent)
    wait_until(lambda: member("GET", f"/v1/devices/{UUID}")["answer"]["state"] == "bound", what="the return")
    assert [path.stat().st_uid for path in paths] == [UID, UID]
    assert "answer" in member("DELETE", f"/v1/devices/{UUID}")
    wait_until(lambda: not list(open_folder.iterdir()), what="the sockets' removal")


def test_sockets_made_for_a_member_go_though_service_and_host_were_others_then(service, member, open_folder):
    service.start("--group", GROUP)
    wish = {"type": "demo-small", "uuid": UUID, "parent": "demo0", "socket": str(open_folder / "endpoint.sock")}
    assert member("POST", "/v1/devices", {**wish, "attributes": {"line": str(open_folder / "line.sock")}})["answer"]
    set_line = ("PUT", f"/v1/devices/{UUID}/attributes/line")
    assert "answer" in member(*set_line, {"value": str(open_folder / "other.sock")})
    service.kill_service()
    service.kill_host("demo0")
    service.start()
    wait_until(lambda: member("GET", f"/v1/devices/{UUID}")["answer"]["state"] == "bound", what="the return")
    assert "answer" in member("DELETE", f"/v1/devices/{UUID}")
    wait_until(lambda: not list(open_folder.iterdir()), what="the sockets' removal")


def test_a_member_cannot_have_the_service_connect(service, member):
    service.start("--group", GROUP)
    answer = member("POST", "/v1/devices", {"type": "demo-small", "socket": "connect:/run/somebody.sock"})
    assert (answer["errno"], "connect nowhere" in answer["detail"]) == ("EPERM", True)


def test_the_capabilities_the_unit_leaves_will_do(service, member, open_folder):
    """Root without any other: hosts as another user, sockets for a third, made again and removed."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing: apt-get install util-linux")
    unit = units(argparse.Namespace(group=GROUP, host_user="daemon", endpoint_owner="nobody"))["mdevkit.service"]
    (names,) = [line.partition("=")[2].split() for line in unit.splitlines() if line.startswith("CapabilityBoundingSet=")]
    bounds = ",".join(["-all", *(f"+{name.lower().removeprefix('cap_')}" for name in names)])
    service.prefix = ["setpriv", f"--bounding-set={bounds}", "--inh-caps=-all", "--no-new-privs"]
    service.start("--group", GROUP, "--host-user", "daemon", "--endpoint-owner", "nobody")
    wish = {"type": "demo-small", "uuid": UUID, "parent": "demo0", "attributes": {"line": str(open_folder / "line.sock")}}
    assert member("POST", "/v1/devices", wish)["answer"]["state"] == "bound"
    os.kill(service.hosts()["demo0"], signal.SIGKILL)
    wait_until(lambda: member("GET", f"/v1/devices/{UUID}")["answer"]["state"] == "bound", what="the return")
    assert "answer" in member("DELETE", f"/v1/devices/{UUID}")
    wait_until(lambda: not list(open_folder.iterdir()), what="the socket's removal")
    service.stop()
    assert service.files() == []


def test_hosts_run_as_another_user_and_come_back(service):
    service.start("--host-user", "daemon")
    uid = pwd.getpwnam("daemon").pw_uid
    with service.client() as client:
        device = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        pid = service.hosts()["demo0"]
        assert Path(f"/proc/{pid}").stat().st_uid == uid
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        assert "Groups:\t \n" in status
        service.kill_host("demo0")
        wait_until(lambda: client.get(f"/v1/devices/{UUID}")["state"] == "bound")
        service.kill_service()
        service.start()
    with service.client() as again:
        assert again.get("/v1/devices") == [device]
        again.delete(f"/v1/devices/{UUID}")
    service.stop()
    assert service.files() == []


def test_the_endpoints_owner_can_attach_and_others_cannot(service):
    service.start("--endpoint-owner", "nobody", "--endpoint-mode", "0600")
    with service.client() as client:
        path = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})["endpoint"]["socket"]
    assert (Path(path).stat().st_uid, stat.S_IMODE(Path(path).stat().st_mode)) == (UID, 0o600)
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for uid, code in ((UID, 0), (1, 1)):
        done = subprocess.run([service.python, "-c", program, path], user=uid, group=1, extra_groups=[], capture_output=True)
        assert done.returncode == code, done.stderr


def test_an_impostor_of_a_host_is_not_believed(service):
    """Whoever can write the hosts' folder cannot make the service talk to a process of a third user."""
    service.start()
    path = service.runtime / "hosts" / "demo0.sock"
    program = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.setuid(65534); s.listen(); print(flush=True)\n"
        "s.settimeout(5); s.accept()\n"
    )
    path.unlink()
    with subprocess.Popen([service.python, "-c", program, path], stdout=subprocess.PIPE) as impostor:
        impostor.stdout.readline()
        before = service.hosts()["demo0"]
        service.kill_host("demo0")
        with service.client() as client:
            wait_until(lambda: client.get("/v1/hosts")[0]["pid"] not in {None, before})
            assert {host["pid"] for host in client.get("/v1/hosts")} == set(service.hosts().values())
        with socket.socket(socket.AF_UNIX) as real:
            real.connect(str(path))
        impostor.kill()


# -- whoever names a path, and nobody else, has it opened with his rights ------------------------------------------------------


def test_a_member_does_not_get_a_socket_from_roots_bind(service, member, roots, open_folder, refused):
    service.start("--group", GROUP)
    with service.client() as client:
        for uuid, folder in ((UUID, roots), (OTHER, open_folder)):
            wish = {"type": "demo-small", "uuid": uuid, "bind": False, "socket": f"{folder}//a.sock"}
            assert member("POST", "/v1/devices", wish)["answer"]["state"] == "unbound"
        refused("EACCES", lambda: client.post(f"/v1/devices/{UUID}/bind"), f"no permission to make files in {roots}")
        assert list(roots.iterdir()) == []
        assert client.post(f"/v1/devices/{OTHER}/bind")["state"] == "bound"
        assert [path.stat().st_uid for path in open_folder.iterdir()] == [UID]


def test_a_path_stays_with_whoever_named_it_when_the_device_is_made_again(service, member, roots, open_folder):
    service.start("--group", GROUP)
    path = open_folder / "inner" / "line.sock"
    path.parent.mkdir()
    os.chown(path.parent, UID, GID)
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0"})
        assert "answer" in member("PUT", f"/v1/devices/{UUID}/attributes/line", {"value": str(path)})
        restart(service, client)
        wait_until(path.exists)
        assert path.stat().st_uid == UID
        # What he could do with the folder, had root opened his path.
        path.unlink()
        path.parent.rmdir()
        path.parent.symlink_to(roots)
        assert restart(service, client)["attributes"]["line"] == ""
        assert list(roots.iterdir()) == []


def test_nobody_takes_over_a_path_another_has_named(service, member, open_folder, refused):
    service.start("--group", GROUP)
    path = open_folder / "line.sock"
    set_line = lambda value: ("PUT", f"/v1/devices/{UUID}/attributes/line", {"value": value})  # noqa: E731
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})
        assert "answer" in member(*set_line(str(path)))
        assert "answer" in member(*set_line(""))
        refused("EPERM", lambda: client.request(*set_line(str(path))), f"user {UID} has named it, not user 0")


@pytest.mark.parametrize("arguments", [[], ["--endpoint-owner", "nobody"]])
def test_what_waits_for_a_resume_gets_its_own_sockets_then(service, member, open_folder, arguments):
    service.start("--group", GROUP, *arguments)
    with service.client() as client:
        client.post("/v1/suspend", {})
        wish = {"type": "demo-small", "parent": "demo0"}
        assert member("POST", "/v1/devices", {**wish, "uuid": UUID})["answer"]["state"] == "deferred"
        named = {**wish, "uuid": OTHER, "socket": str(open_folder / "a.sock")}
        assert member("POST", "/v1/devices", named)["answer"]["state"] == "deferred"
        client.post("/v1/resume", {})
        owners = [Path(returned(client, uuid)["endpoint"]["socket"]).stat().st_uid for uuid in (UUID, OTHER)]
        assert owners == [UID if arguments else 0, UID]


@pytest.mark.parametrize("arguments", [[], ["--host-user", "daemon"]])
def test_definitions_of_root_alone_name_paths_for_root(service, roots, arguments):
    path = roots / "line.sock"
    definition = service.definitions / "demo0" / UUID
    definition.parent.mkdir(parents=True)
    definition.write_text(json.dumps({"mdev_type": "demo-small", "start": "auto", "attrs": [{"line": str(path)}]}))
    service.start(*arguments)
    with service.client() as client:
        wait_until(lambda: client.get("/v1/devices"), what="the start with the parent")
        assert (returned(client)["attributes"]["line"], path.stat().st_uid) == (str(path), 0)
        assert restart(service, client)["attributes"]["line"] == str(path)


def test_devices_of_before_the_group_are_no_way_to_roots_rights(service, member, roots):
    """A host outlives the service that started it."""
    service.start()
    with service.client() as client:
        client.post("/v1/devices", {"type": "demo-small", "uuid": UUID, "parent": "demo0", "attributes": {"line": f"{roots}/a"}})
    pid = service.hosts()["demo0"]
    service.stop()
    service.start("--group", GROUP)
    assert service.hosts()["demo0"] == pid
    assert member("PUT", f"/v1/devices/{UUID}/attributes/line", {"value": f"{roots}/b"})["errno"] == "EACCES"
    wish = {"type": "demo-small", "parent": "demo0", "socket": f"{roots}/c"}
    assert member("POST", "/v1/devices", wish)["errno"] == "EACCES"
    assert [path.name for path in roots.iterdir()] == ["a"]


def test_root_may_have_the_service_connect(service):
    service.start("--group", GROUP)
    with service.client() as client:
        device = client.post("/v1/devices", {"type": "demo-small", "socket": "connect:/run/somebody.sock", "bind": False})
    assert device["state"] == "unbound"


@pytest.mark.parametrize("host_user", ["daemon", "root"])
def test_a_host_that_lies_gets_nothing_for_it(service, member, roots, host_user):
    """Vendor code can send what it likes to the service, which runs as root."""
    service.start("--group", GROUP, "--host-user", host_user)
    root = {"pid": 1, "uid": 0, "gid": 0, "groups": []}
    with service.client() as client:
        client.post(
            "/v1/devices", {"type": "demo-small", "uuid": OTHER, "parent": "demo1", "attributes": {"line": f"{roots}/known"}}
        )
        client.put(f"/v1/devices/{OTHER}/attributes/line", {"value": ""})
        (roots / "known").unlink(missing_ok=True)
        asks = [
            {"path": f"{roots}/nobodys", "uuid": ""},
            {"path": f"{roots}/own", "uuid": UUID},
            {"path": f"{roots}/later", "uuid": UUID, "request": 10**6},
            {"path": f"{roots}/anothers", "uuid": OTHER},
            {"path": f"{roots}/known", "uuid": OTHER},
        ]
        lies = [{"ask": 10**6 + number, "peer": root, **ask} for number, ask in enumerate(asks)]
        wish = {"type": "demo-small", "uuid": UUID, "parent": "demo0", "attributes": {"note": f"lie {json.dumps(lies)}"}}
        assert member("POST", "/v1/devices", wish)["answer"]["state"] == "bound"
        # Opened after those, had they been opened.
        client.put(f"/v1/devices/{UUID}/attributes/line", {"value": f"{roots}/last"})
    assert [path.name for path in roots.iterdir()] == ["last"]
    assert "anothers" not in (service.runtime / "devices" / f"{OTHER}.json").read_text()


def test_creates_that_fill_a_host_get_their_sockets(service, open_folder):
    """As many as a host carries out at once, all of which wait for the service."""
    service.start("--group", GROUP)

    def create(number):
        with service.client() as client:
            wish = {"type": "demo-many", "parent": "demo0", "attributes": {"note": "crowd 64"}, "socket": f"{open_folder}/{number}"}
            return client.post("/v1/devices", wish)["state"]

    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(create, range(64))) == {"bound"}
    assert "no answer" not in service.log()


# -- impostors ----------------------------------------------------------------------------------------------------------------


def test_the_service_follows_no_link_to_a_host(service, roots):
    """The hosts' folder is the host user's, who may have it point to somebody who does not answer."""
    service.start("--host-user", "daemon")
    path = service.runtime / "hosts" / "demo0.sock"
    with socket.socket(socket.AF_UNIX) as victim, service.client() as client:
        victim.bind(str(roots / "victim.sock"))
        victim.listen()
        victim.setblocking(False)
        before = service.hosts()["demo0"]
        path.unlink()
        path.symlink_to(roots / "victim.sock")
        service.kill_host("demo0")
        wait_until(lambda: client.get("/v1/hosts")[0]["pid"] not in {None, before}, what="the next host")
        with pytest.raises(BlockingIOError):
            victim.accept()


def test_only_a_process_of_the_hosts_user_is_killed():
    with subprocess.Popen(["sleep", "60"], user=UID, group=GID, extra_groups=[]) as sleeper:
        _kill(sleeper.pid, 0)
        _kill(2**22 + 1, UID)
        assert sleeper.poll() is None
        _kill(sleeper.pid, UID)
        assert sleeper.wait(10) == -signal.SIGKILL


# -- what is root's alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [("--group", GROUP), ("--host-user", "daemon"), ("--endpoint-owner", "nobody"), ("--endpoint-mode", "0666")]
)
def test_a_users_service_is_for_him_alone(service, open_folder, option):
    command = [service.python, "-P", "-m", "mdevkit_service", "--socket", f"{open_folder}/control.sock", *option]
    if option[0] != "--endpoint-mode":
        install = [service.python, "-P", "-m", "mdevkit_service.units", "--folder", f"{open_folder}", *option]
    else:
        install = command
    for words in (command, install):
        done = subprocess.run(
            words, user=UID, group=GID, extra_groups=[], capture_output=True, text=True, check=False, timeout=20, env={}
        )
        assert (done.returncode, "are for a service of root's" in done.stderr) == (1, True), done.stderr
    assert list(open_folder.iterdir()) == []


def test_the_mode_of_endpoints_needs_no_other_option(service):
    service.start("--endpoint-mode", "0666")
    with service.client() as client:
        path = client.post("/v1/devices", {"type": "demo-small", "uuid": UUID})["endpoint"]["socket"]
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o666
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    subprocess.run([service.python, "-c", program, path], user=UID, group=GID, extra_groups=[], check=True)
