"""What becomes of clients, fronts and consoles when processes of the service die: real processes, our own vfio-user client.

One situation at a time; a real guest in the middle of a stream is in test_guest_survival.py.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio.client import VfioUserClient

from tests.services import alive, private_service, wait_until
from tests.survivor import PATIENCE, Survivor

MDEVKIT = Path(sys.executable).with_name("mdevkit")
#: Registers of the serial card, and of the fragile one.
DATA, MCR, LSR, MSR, SCR = 0, 4, 5, 6, 7
VALUE, DIE = 0, 4


@pytest.fixture
def service():
    with private_service("mdevkit-mtty,mdevkit-vfio,mdevkit-fragile") as running:
        running.start()
        yield running


@pytest.fixture
def api(service):
    with service.client() as client:
        yield client


@pytest.fixture
def card(service):
    return Survivor(service)


@pytest.fixture
def attach():
    """Connects to a device; a request may take as long as a front has patience."""
    clients = []

    def attach(path):
        clients.append(VfioUserClient.connect(path, timeout=PATIENCE + 2))
        return clients[-1]

    yield attach
    for client in clients:
        client.close()


def facts_of(api, uuid):
    """What the list says, which asks no host that is away."""
    return next(device for device in api.get("/v1/devices") if device["uuid"] == uuid)


def state(api, uuid):
    return facts_of(api, uuid)["state"]


def bound(api, uuid):
    wait_until(lambda: state(api, uuid) == "bound", what="the device's return")


def processes(name):
    """The processes of that name."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                found.append(int(comm.parent.name))
        except OSError:
            continue
    return found


def front_of(uuid):
    (front,) = processes(f"front {uuid[:8]}")
    return front


def porter_of(service):
    """The process that holds the fronts' control socket: the only porter whose arguments name it."""
    path = os.fsencode(service.runtime / "hosts" / "mtty.front")
    (porter,) = [pid for pid in processes("mdev porter") if path in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    return porter


# -- a client ----------------------------------------------------------------------------------------------------------


def test_a_client_goes_on_over_the_hosts_deaths(api, card, attach):
    register = attach(card.socket).region(0)
    for number in range(10):
        register.write_int(SCR, 1, number)
        card.kill()
        assert register.read_int(SCR, 1) == number
        bound(api, card.uuid)
    card.report()
    assert card.deaths >= 10
    assert card.pauses[-1] < PATIENCE


def test_a_client_does_not_notice_the_services_death(service, card, attach):
    register = attach(card.socket).region(0)
    register.write_int(SCR, 1, 7)
    service.kill_service()
    assert register.read_int(SCR, 1) == 7
    service.start()
    assert register.read_int(SCR, 1) == 7
    assert card.deaths == 0


def test_a_client_goes_on_when_both_have_died(service, card, attach):
    register = attach(card.socket).region(0)
    register.write_int(SCR, 1, 7)
    service.kill_service()
    card.kill()
    service.start()
    assert register.read_int(SCR, 1) == 7


def test_without_a_service_a_dead_host_costs_errors_in_time_and_then_goes_on(service, card, attach):
    register = attach(card.socket).region(0)
    register.write_int(SCR, 1, 7)
    service.kill_service()
    card.kill()
    with pytest.raises(MdevError, match="the server refuses REGION_READ: ETIMEDOUT"):
        register.read_int(SCR, 1)
    service.start()
    wait_until(lambda: read_or_none(register) == 7)


def read_or_none(register):
    try:
        return register.read_int(SCR, 1)
    except MdevError:
        return None


def test_a_client_may_come_while_there_is_neither_host_nor_service(service, card, attach):
    service.kill_service()
    card.kill()
    with ThreadPoolExecutor() as pool:
        client = pool.submit(attach, card.socket)
        wait_until(lambda: processes(f"front {card.uuid[:8]}"), what="a front")
        assert not client.done()
        service.start()
        assert client.result().region(0).read_int(LSR, 1) == 0x60


def test_removal_takes_the_client_off_and_leaves_nothing(service, api, card, attach):
    client = attach(card.socket)
    with pytest.raises(MdevError, match=rf"in use by .*{os.getpid()}") as caught:
        api.delete(f"/v1/devices/{card.uuid}?timeout=0")
    assert caught.value.errno == errno.EBUSY
    api.delete(f"/v1/devices/{card.uuid}?force=1&timeout=0")
    assert not Path(card.socket).exists()
    with pytest.raises(MdevError):
        client.region(0).read_int(SCR, 1)
    service.stop()
    assert service.files() == []


def test_a_device_removed_while_its_host_is_away_is_gone(service, api, card, attach):
    """Another of the same UUID is another device: the old one's client has lost its own."""
    client = attach(card.socket)
    log = service.runtime / "hosts" / "mtty.log"
    saved = log.read_bytes()
    log.unlink()
    log.mkdir()
    card.kill()
    wait_until(lambda: state(api, card.uuid) == "failed")
    api.delete(f"/v1/devices/{card.uuid}")
    log.rmdir()
    log.write_bytes(saved)
    wait_until(
        lambda: ("mtty", "running") in {(host["key"], host["state"]) for host in api.get("/v1/hosts")}, what="the host's return"
    )
    again = Survivor(service, "mtty-2", uuid=card.uuid)
    with pytest.raises(MdevError):
        client.region(0).read_int(SCR, 1)
    assert attach(again.socket).region(1).read_int(LSR, 1) == 0x60


# -- requests that kill ------------------------------------------------------------------------------------------------


def test_a_request_that_kills_its_host_twice_fails_the_device_and_not_the_host(api, service, attach):
    bad, good = (api.post("/v1/devices", {"type": "fragile-1"}) for _ in range(2))
    victim, neighbour = (attach(device["endpoint"]["socket"]) for device in (bad, good))
    neighbour.region(0).write_int(VALUE, 4, 11)
    with pytest.raises(MdevError, match="the server refuses REGION_WRITE: EIO"):
        victim.region(0).write_int(DIE, 4, 1)
    bound(api, good["uuid"])
    reason = f"{bad['uuid']} has failed: its process has died 2 times in a row of a client's REGION_WRITE"
    wait_until(lambda: reason in (facts_of(api, bad["uuid"])["error"] or ""), what=reason)
    assert neighbour.region(0).read_int(VALUE, 4) == 11
    (host,) = [host for host in api.get("/v1/hosts") if host["key"] == "fragile"]
    assert (host["state"], host["restarts"]) == ("running", 2)
    # The client is told as long as it asks; when it has gone, the device can be made again.
    with pytest.raises(MdevError, match="the server refuses REGION_READ: EIO"):
        victim.region(0).read_int(VALUE, 4)
    api.delete(f"/v1/devices/{bad['uuid']}")
    victim.close()
    again = api.post("/v1/devices", {"type": "fragile-1", "uuid": bad["uuid"]})
    assert attach(again["endpoint"]["socket"]).region(0).read_int(VALUE, 4) == 0


def test_a_device_that_cannot_be_parked_is_served_directly_and_loses_its_client(api, service, attach):
    device = api.post("/v1/devices", {"type": "fragile-2"})
    client = attach(device["endpoint"]["socket"])
    assert processes(f"front {device['uuid'][:8]}") == []
    service.kill_host("fragile")
    with pytest.raises(MdevError):
        client.region(0).read_int(VALUE, 4)
    bound(api, device["uuid"])
    assert attach(device["endpoint"]["socket"]).region(0).read_int(VALUE, 4) == 0


# -- fronts and their porter -------------------------------------------------------------------------------------------


def test_a_fronts_death_costs_its_client_the_device_and_nobody_else_anything(api, service, card, attach):
    other = Survivor(service)
    client, neighbour = attach(card.socket), attach(other.socket)
    neighbour.region(0).write_int(SCR, 1, 7)
    os.kill(front_of(card.uuid), signal.SIGKILL)
    with pytest.raises(MdevError):
        client.region(0).read_int(SCR, 1)
    assert neighbour.region(0).read_int(SCR, 1) == 7
    # The device is free for the next one, whom a front serves again.
    register = attach(card.socket).region(0)
    register.write_int(SCR, 1, 9)
    card.kill()
    assert register.read_int(SCR, 1) == 9
    assert neighbour.region(0).read_int(SCR, 1) == 7


def test_a_porters_death_costs_nothing_but_the_next_survival_of_who_is_attached(api, service, card, attach):
    other = Survivor(service)
    attached = attach(card.socket).region(0)
    porter = porter_of(service)
    os.kill(porter, signal.SIGKILL)
    # Who comes while there is none waits in the socket, which is the same.
    register = attach(other.socket).region(0)
    register.write_int(SCR, 1, 9)
    assert porter_of(service) != porter
    attached.write_int(SCR, 1, 7)
    assert attached.read_int(SCR, 1) == 7
    card.kill()
    assert register.read_int(SCR, 1) == 9
    with pytest.raises(MdevError, match="the server refuses REGION_READ: ETIMEDOUT"):
        attached.read_int(SCR, 1)
    assert "the porter has died" in card.log


def test_a_host_that_ends_in_order_leaves_no_front_and_no_porter(api, service, card, attach):
    attach(card.socket)
    front, porter = front_of(card.uuid), porter_of(service)
    done = service.mdevkit("service", "stop", "--remove", "--force")
    assert (done.returncode, service.files()) == (0, []), done.stderr
    wait_until(lambda: not alive(front) and not alive(porter), what="the end of front and porter")


# -- consoles ----------------------------------------------------------------------------------------------------------


def talk(register):
    """A byte each way, as the guest's driver does it."""
    register.write_int(MCR, 1, 0x02)
    register.write_int(DATA, 1, ord("g"))


def hears(register):
    wait_until(lambda: register.read_int(LSR, 1) & 1, what="a byte")
    return register.read_int(DATA, 1)


def test_a_terminal_hangs_up_when_the_host_dies_and_there_is_another_at_once(api, service, attach):
    """The terminal is the host's: it dies with it, and what waited in it is lost. The new one may have another name."""
    card = Survivor(service, attributes={"port0": "pty"})
    register = attach(card.socket).region(0)
    register.write_int(SCR, 1, 7)
    terminal = os.open(card.attribute("port0_path"), os.O_RDWR | os.O_NOCTTY)
    try:
        card.kill()
        assert select.select([terminal], [], [], 10)[0]
        with pytest.raises(OSError, match="Input/output error"):
            os.write(terminal, b"x")
        assert register.read_int(SCR, 1) == 7
        bound(api, card.uuid)
        again = os.open(card.attribute("port0_path"), os.O_RDWR | os.O_NOCTTY)
        try:
            assert not termios.tcgetattr(again)[3] & termios.ECHO, "it is raw like the first"
            talk(register)
            assert os.read(again, 1) == b"g"
            os.write(again, b"p")
            assert hears(register) == ord("p")
        finally:
            os.close(again)
    finally:
        os.close(terminal)


def test_a_far_ends_socket_stays_where_it_is_and_its_peer_connects_again(api, service, attach):
    path = f"{service.folder}/p"
    card = Survivor(service, attributes={"port0": f"unix:{path}"})
    register = attach(card.socket).region(0)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(10)
        peer.connect(path)
        wait_until(lambda: register.read_int(MSR, 1) & 0x80, what="the carrier")
        talk(register)
        assert peer.recv(1) == b"g"
        card.kill()
        assert peer.recv(1) == b""
    bound(api, card.uuid)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(b"p")
        assert hears(register) == ord("p")


def test_mdevkit_console_says_that_the_device_has_closed_it_and_can_be_started_again(api, service, attach):
    card = Survivor(service, attributes={"port0": "pty"})
    register = attach(card.socket).region(0)

    def console():
        pipe = subprocess.PIPE
        return subprocess.Popen([MDEVKIT, "console", card.uuid], stdin=pipe, stdout=pipe, stderr=pipe, env=service.environment)

    with console() as person:
        talk(register)
        assert person.stdout.read(1) == b"g"
        card.kill()
        assert person.wait(10) == 1
        assert person.stderr.read() == b"the device has closed port0 [ENODEV]\n"
    bound(api, card.uuid)
    with console() as person:
        talk(register)
        assert person.stdout.read(1) == b"g"
        person.stdin.close()
        assert person.wait(10) == 0
