"""Hosts: what becomes of devices when one dies, and that service and hosts outlive each other."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mdevkit.client import Client
from mdevkit_service.supervisor import BACK_OFF

from tests.services import alive, wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"


def create(client, **wish):
    return client.post("/v1/devices", {"type": "demo-small", "parent": "demo0", **wish})


def bound(client, uuid=UUID):
    return client.get(f"/v1/devices/{uuid}")["state"] == "bound"


def state(client, uuid=UUID):
    return next(device["state"] for device in client.get("/v1/devices") if device["uuid"] == uuid)


def failures(service, after=0):
    return [
        (event["subject"], event["env"]["ERROR"])
        for event in service.client().events(after=after, timeout=0.2)
        if event["env"].get("MDEV_STATE") == "failed"
    ]


def test_a_device_returns_with_all_it_had_when_its_host_dies(service, client, tmp_path):
    socket = str(tmp_path / "its.sock")
    before = create(client, uuid=UUID, attributes={"speed": "5", "note": "first"}, socket=socket, owner="me")
    client.put(f"/v1/devices/{UUID}/attributes/note", {"value": "second"})
    client.put(f"/v1/devices/{UUID}/attributes/moody", {"value": "7"})
    neighbour = create(client, uuid=OTHER, parent="demo1")
    pids = service.hosts()
    service.kill_host("demo0")
    wait_until(lambda: service.hosts().get("demo0") not in {None, pids["demo0"]}, what="the restart")
    wait_until(lambda: bound(client), what="the device's return")
    after = client.get(f"/v1/devices/{UUID}")
    attributes = after.pop("attributes")
    assert after == before
    assert (attributes["speed"], attributes["note"], attributes["moody"]) == ("5", "second", "7")
    assert client.get(f"/v1/devices/{OTHER}") == neighbour | {"attributes": client.get(f"/v1/devices/{OTHER}")["attributes"]}
    assert service.hosts()["demo1"] == pids["demo1"]
    reason = "its host process was killed by SIGKILL"
    assert failures(service) == [("demo0", reason), (UUID, reason)]


def test_devices_return_in_the_order_they_were_created_and_as_they_were_bound(service, client):
    uuids = [create(client, type="demo-many", bind=False)["uuid"] for _ in range(5)]
    client.post(f"/v1/devices/{uuids[2]}/bind", {"driver": "demo_drv"})
    client.post(f"/v1/devices/{uuids[3]}/driver_override", {"driver": "special"})
    create(client, uuid=UUID)
    client.post(f"/v1/devices/{UUID}/unbind")
    service.kill_host("demo0")
    wait_until(lambda: bound(client, uuids[2]), what="the devices' return")
    devices = client.get("/v1/devices")
    assert [device["uuid"] for device in devices] == [*uuids, UUID]
    assert [device["driver"] for device in devices] == [None, None, "demo_drv", None, None, None]
    assert devices[3]["driver_override"] == "special"


def test_both_parents_of_a_shared_host_are_told_of(service, client):
    create(client, uuid=UUID, parent="twin0")
    create(client, uuid=OTHER, parent="twin1")
    service.kill_host("twins")
    wait_until(lambda: bound(client, UUID) and bound(client, OTHER))
    assert {subject for subject, _ in failures(service)} == {"twin0", "twin1", UUID, OTHER}


def test_a_create_that_kills_the_host_fails_and_leaves_nothing(service, client, refused):
    create(client, uuid=OTHER)
    refused("EIO", lambda: create(client, uuid=UUID, attributes={"note": "crash"}), "its host died while it was created")
    wait_until(lambda: bound(client, OTHER))
    assert [device["uuid"] for device in client.get("/v1/devices")] == [OTHER]
    assert create(client, uuid=UUID)["state"] == "bound"


def test_a_device_whose_requests_kill_its_host_twice_is_left_failed(service, client, refused):
    create(client, uuid=UUID)
    create(client, uuid=OTHER)
    for _ in range(2):
        wait_until(lambda: state(client, OTHER) == "bound")
        crash = lambda: client.put(f"/v1/devices/{UUID}/attributes/crash", {"value": "11"})  # noqa: E731
        refused("EIO", crash, f"device {UUID}: its host died during this request")
    wait_until(lambda: bound(client, OTHER), what="the neighbour's return")
    device = client.get(f"/v1/devices/{UUID}")
    assert device["state"] == "failed"
    assert "its host died 2 times in a row of requests about it" in device["error"]
    refused("EIO", lambda: client.get(f"/v1/devices/{UUID}/attributes/note"), "has failed", "2 times in a row")
    client.delete(f"/v1/devices/{UUID}")
    assert create(client, uuid=UUID)["state"] == "bound"


def test_one_death_between_requests_that_go_well_is_forgiven(service, client, refused):
    create(client, uuid=UUID)
    for _ in range(3):
        refused("EIO", lambda: client.put(f"/v1/devices/{UUID}/attributes/crash", {"value": "9"}), "its host died")
        wait_until(lambda: bound(client))
        client.put(f"/v1/devices/{UUID}/attributes/note", {"value": "fine"})


def test_a_host_that_cannot_be_started_is_told_of_and_tried_again(service, client, refused):
    create(client, uuid=UUID)
    blocked = service.runtime / "hosts" / "demo0.log"
    blocked.unlink()
    blocked.mkdir()
    service.kill_host("demo0")
    wait_until(lambda: state(client) == "failed")
    (host,) = [host for host in client.get("/v1/hosts") if host["key"] == "demo0"]
    wait_until(lambda: next(host for host in client.get("/v1/hosts") if host["key"] == "demo0")["state"] == "failed")
    refused("EIO", lambda: create(client, uuid=OTHER), "host demo0 does not run", "demo0.log")
    (parent,) = client.get("/v1/parents?parent=demo0")
    assert "demo0.log" in parent["error"]
    assert {type_["available_instances"] for type_ in parent["types"]} == {0}
    assert len(client.get("/v1/parents")) == 4
    blocked.rmdir()
    wait_until(lambda: bound(client), what="the next try")
    assert host["key"] == "demo0"


#: A host that can be greeted, and has a bug in what comes next; tells when it was asked.
WRONG = """
import fcntl, os, socket, sys, time
from mdevkit_service.wire import Reader, send
folder, key = sys.argv[1:]
lock = open(f"{folder}/{key}.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print(os.getpid(), key, file=lock, flush=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(f"{folder}/{key}.sock")
listener.listen()
print("ready", flush=True)
while True:
    sock, _ = listener.accept()
    print(time.monotonic(), flush=True)
    for message, _ in Reader(sock):
        hello = {"result": {"epoch": "one", "parents": []}}
        wrong = {"error": {"errno": 5, "message": "the list is lost"}}
        send(sock, {"id": message["id"], **(hello if message["op"] == "hello" else wrong)})
"""


def test_a_host_that_answers_wrongly_is_not_asked_without_pause(service, client):
    service.kill_service()
    command = [sys.executable, "-c", WRONG, service.runtime / "hosts", "wrong"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrong:
        try:
            assert wrong.stdout.readline() == "ready\n"
            service.start()
            first, *_, fourth = [float(wrong.stdout.readline()) for _ in range(4)]
            with service.client() as again:
                (error,) = [host["error"] for host in again.get("/v1/hosts") if host["key"] == "wrong"]
        finally:
            wrong.kill()
    assert fourth - first > 2.5 * BACK_OFF[0]
    assert error == "the list is lost"


def test_a_slow_create_holds_up_nobody(service, client):
    with service.client() as slow:
        slow._send("POST", "/v1/devices", {"type": "demo-small", "parent": "demo0", "attributes": {"note": "slow 3"}}, {})
        create(client, uuid=UUID)
        assert state(client) == "bound"


# -- the service's own death -----------------------------------------------------------------------------------------------


def test_devices_do_not_notice_a_service_that_dies(service, client):
    before = [create(client, uuid=UUID, attributes={"note": "kept"}), create(client, uuid=OTHER, parent="twin1")]
    client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    pids = service.hosts()
    service.kill_service()
    service.start()
    with service.client() as again:
        after = again.get("/v1/devices")
        assert after[0]["endpoint"]["client"] == "pid 4711"
        after[0]["endpoint"]["client"] = ""
        assert after == before
    assert service.hosts() == pids


def test_devices_return_when_service_and_hosts_die(service, client):
    before = create(client, uuid=UUID, attributes={"note": "kept"})
    pids = service.hosts()
    service.kill_service()
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not service.hosts())
    service.start()
    with service.client() as again:
        assert again.get("/v1/devices") == [before]
        assert again.get(f"/v1/devices/{UUID}/attributes/note") == {"value": "kept"}


def gone_for_good(service):
    """Whether nothing is left of any device, for a later service too."""
    files = [name for name in service.files() if name.startswith("devices/")]
    service.kill_service()
    service.start()
    with service.client() as again:
        return (files, again.get("/v1/devices")) == ([], [])


def test_a_change_during_a_removal_does_not_bring_the_device_back(service, client):
    create(client, uuid=UUID)
    client.put(f"/v1/devices/{UUID}/attributes/client", {"value": "pid 4711"})
    with service.client() as remover:
        remover._send("DELETE", f"/v1/devices/{UUID}?timeout=60", None, {})
        wait_until(lambda: f"devices/{UUID}.gone" in service.files())
        client.put(f"/v1/devices/{UUID}/attributes/note", {"value": "last words"})
        assert [name for name in service.files() if UUID in name] == [f"devices/{UUID}.gone", f"devices/{UUID}.sock"]
        client.put(f"/v1/devices/{UUID}/attributes/client", {"value": ""})
        assert remover._head()[0] == 204
    assert gone_for_good(service)


def test_a_removal_during_a_change_removes_the_device_for_good(service, client):
    create(client, uuid=UUID)
    with service.client() as slow:
        slow._send("PATCH", f"/v1/devices/{UUID}", {"attributes": {"note": "begun", "hang": "2"}}, {})
        wait_until(lambda: client.get(f"/v1/devices/{UUID}/attributes/note") == {"value": "begun"})
        client.delete(f"/v1/devices/{UUID}")
        assert slow._head()[0] == 204
    assert gone_for_good(service)


def test_a_create_the_service_did_not_live_to_acknowledge_is_adopted(service, client):
    with service.client() as lost:
        lost._send("POST", "/v1/devices", {"type": "demo-small", "uuid": UUID, "owner": "me", "attributes": {"note": "slow 1"}}, {})
        wait_until(lambda: (service.runtime / "devices" / f"{UUID}.new").exists())
        service.kill_service()
    service.start()
    with service.client() as again:
        wait_until(lambda: any(device["uuid"] == UUID for device in again.get("/v1/devices")), what="the adoption")
        assert again.get("/v1/devices")[0]["owner"] == "me"
        again.delete(f"/v1/devices/{UUID}")


def test_a_reservation_whose_host_died_too_is_dropped(service, client):
    with service.client() as lost:
        wish = {"type": "demo-small", "parent": "demo0", "uuid": UUID, "attributes": {"note": "slow 30"}}
        lost._send("POST", "/v1/devices", wish, {})
        wait_until(lambda: (service.runtime / "devices" / f"{UUID}.new").exists())
        service.kill_service()
        service.kill_host("demo0")
    service.start()
    with service.client() as again:
        assert again.get("/v1/devices") == []
    assert not [name for name in service.files() if name.startswith("devices/")]


def test_a_service_told_to_end_leaves_devices_and_ends_idle_hosts(service, client):
    create(client, uuid=UUID)
    pids = service.hosts()
    service.stop()
    assert service.hosts() == {"demo0": pids["demo0"]}
    assert service.files() == [f"devices/{UUID}.json", f"devices/{UUID}.sock", "hosts/demo0.lock", "hosts/demo0.sock"]
    service.start()
    with service.client() as again:
        assert bound(again)
        again.delete(f"/v1/devices/{UUID}")
    service.stop()
    assert service.files() == []
    assert service.hosts() == {}


def test_an_idle_host_without_a_service_ends(service, client):
    pids = service.hosts()
    service.kill_service()
    wait_until(lambda: not service.hosts(), seconds=15, what="the hosts' end")
    wait_until(lambda: not any(map(alive, pids.values())))


def test_the_socket_of_fronts_that_are_gone_is_swept_and_that_of_others_is_not(service, client):
    service.kill_service()
    folder = service.runtime / "hosts"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as fronts:
        fronts.bind(str(folder / "there.front"))
        fronts.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(folder / "gone.front"))
        service.start()
        assert [path.name for path in folder.glob("*.front")] == ["there.front"]


def test_records_of_an_earlier_boot_are_dropped(service, client):
    create(client, uuid=UUID)
    service.kill_service()
    service.kill_host("demo0")
    record = service.runtime / "devices" / f"{UUID}.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "boot": "another"}))
    service.start()
    with service.client() as again:
        assert again.get("/v1/devices") == []
    assert not record.exists()


def test_a_zygote_that_dies_is_replaced(service, client):
    (zygote,) = zygotes(service)
    os.kill(zygote, signal.SIGKILL)
    create(client, uuid=UUID)
    service.kill_host("demo0")
    wait_until(lambda: bound(client))


def zygotes(service):
    """Return the children of the service."""
    task = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    return [int(pid) for pid in task.read_text().split()]


def test_a_broken_plugin_is_told_of_and_harms_nobody(service, tmp_path):
    for name, body in {"hangs": "import time; time.sleep(60)", "dies": "import os; os._exit(3)", "raises": "1 / 0"}.items():
        (tmp_path / f"{name}.py").write_text(body)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mdevkit.parents]\n{name} = {name}:make\n")
    service.environment["PYTHONPATH"] += f":{tmp_path}"
    service.environment["MDEVKIT_PLUGINS"] = "mdevkit-demo,dies,raises"
    service.start()
    with service.client() as client:
        create(client, uuid=UUID)
        errors = {host["key"]: host["error"] for host in client.get("/v1/hosts") if host["state"] == "failed"}
    assert errors["dies"] == "its process ended with exit code 3"
    assert "ZeroDivisionError" in errors["raises"]


# -- starting --------------------------------------------------------------------------------------------------------------


def test_many_starters_at_once_end_with_one_service(service):
    service.environment["PATH"] = os.environ["PATH"]
    program = "from mdevkit.client import Client\nwith Client() as c: print(c.get('/v1/version')['pid'], flush=True)"
    starters = [
        subprocess.Popen([sys.executable, "-P", "-c", program], env=service.environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    pids = {starter.communicate(timeout=60)[0].strip() for starter in starters}
    assert all(starter.returncode == 0 for starter in starters)
    (pid,) = pids
    assert int(pid) == service.pid()
    os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: not alive(pid), what="the end")
    assert service.files() == []


def test_a_second_service_finds_the_first_and_ends(service, client):
    first = service.process
    service.start(wait=False)
    assert service.process.wait(20) == 0
    assert client.get("/v1/version")["pid"] == first.pid
    service.process = first


def test_a_stale_socket_is_replaced(service, client):
    service.kill_service()
    assert service.socket.is_socket()
    service.start()


@pytest.mark.parametrize("wrong", ["mode", "length"])
def test_a_folder_that_will_not_do_is_named(service, wrong, refused):
    if wrong == "mode":
        service.runtime.mkdir()
        service.runtime.chmod(0o777)
    else:
        service.runtime = service.runtime / ("x" * 60)
        service.runtime.mkdir(parents=True, mode=0o700)
        service.socket = service.runtime / "control.sock"
    service.start(wait=False)
    assert service.process.wait(20) == 1
    expected = "is not a folder of this user that nobody else can write" if wrong == "mode" else "is too long for the sockets in it"
    assert str(service.runtime) in service.log()
    assert expected in service.log()


def test_the_client_tells_why_a_service_does_not_start(service):
    service.runtime.mkdir()
    service.runtime.chmod(0o777)
    done = service.mdevkit("create", "demo-small")
    assert done.returncode == 1
    assert "the service ended at once" in done.stderr
    assert "nobody else can write" in done.stderr


def test_socket_activation(service):
    """As systemd does it: the socket is passed as descriptor 3, and it stays when the service ends."""
    service.runtime.mkdir(mode=0o700)
    program = (
        "import os, socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()\n"
        "os.dup2(listener.fileno(), 3); os.set_inheritable(3, True)\n"
        "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}\n"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'mdevkit_service', '--socket', sys.argv[1]])\n"
    )
    with (service.runtime / "control.log").open("ab") as log:
        service.process = subprocess.Popen(
            [sys.executable, "-c", program, service.socket], env=service.environment, stdout=log, stderr=log
        )
    wait_until(service.answers)
    service.stop()
    assert service.socket.is_socket()
    service.process = None


def test_hosts_see_a_clean_environment(service):
    service.environment |= {"LD_BIND_NOW": "1", "PYTHONWARNINGS": "default", "SECRET": "x"}
    service.start()
    pid = service.hosts()["demo0"]
    names = {entry.partition(b"=")[0].decode() for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")}
    assert not names & {"LD_BIND_NOW", "PYTHONWARNINGS", "SECRET"}
    assert "MDEVKIT_PLUGINS" in names
    assert b"-P" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def test_the_client_asks_again_after_the_service_was_exchanged(service, client):
    service.kill_service()
    service.start()
    assert client.get("/v1/version")["pid"] == service.process.pid


def test_a_client_refuses_a_service_of_somebody_else(service, tmp_path, refused):
    """In a folder everybody can write, a socket of the right name may be anybody's."""
    if os.getuid() != 0:
        pytest.skip("needs root, to be somebody else: sudo")
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    program = (
        "import os, socket, sys\n"
        "os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(flush=True); s.accept()\n"
    )
    path = folder / "control.sock"
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as stranger:
        stranger.stdout.readline()
        refused("EPERM", lambda: Client(path), "is neither this user's nor root's, but user 65534's")
