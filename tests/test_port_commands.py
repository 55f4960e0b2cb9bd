"""Sub-functions by the commands of the mailing-list proposal, in devlink's shape, over a real service.

Each flavour is walked through whole: add, configure, activate, use, deactivate, delete; and every wrong order is refused.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from mdevkit.errors import MdevError

from tests.services import private_service, wait_until

CARD = "0000:06:00.0"
UUID = "5ffd5757-0000-4000-8000-0000000000{:02}"
PLACE = {
    "virtio": ("mdev_virtio", "virtio_mdev"),
    "mdev": ("mdev", "vfio_mdev"),
    "mlx5": ("vdev", "mlx5_sf"),
}


@pytest.fixture(scope="module")
def running():
    with private_service("mdevkit-subfunction,mdevkit-vfio,mdevkit-virtio,mdevkit-vdev") as running:
        running.start()
        yield running


@pytest.fixture
def client(running):
    with running.client() as client:
        yield client
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")
        for index in json.loads(client.get(f"/v1/parents/{CARD}/attributes/ports")["value"]):
            client.put(f"/v1/parents/{CARD}/attributes/port_del", {"value": index})


@pytest.fixture
def mdevkit(running, client):
    def run(*words, code=0):
        command = [sys.executable, "-m", "mdevkit", *words]
        done = subprocess.run(command, env=running.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    return run


def shown(mdevkit, handle=f"{CARD}/32856"):
    return json.loads(mdevkit("port", "show", handle, "--json"))["port"][f"pci/{handle}"]


@pytest.mark.parametrize("flavour", ["virtio", "mdev", "mlx5"])
def test_a_sub_function_from_slot_to_driver_and_back(mdevkit, client, flavour):
    uuid = UUID.format(1)
    mdevkit("dev", "eswitch", "set", f"pci/{CARD}", "mode", "switchdev")
    text = mdevkit("port", "add", f"pci/{CARD}", "flavour", flavour, "sfnum", "88", "uuid", uuid)
    assert text.splitlines() == [
        f"pci/{CARD}/32856: type eth netdev pf0sf88 flavour {flavour} controller 0 pfnum 0 sfnum 88 uuid {uuid}",
        "  function:",
        "    hw_addr 00:00:00:00:00:00 state inactive opstate detached",
        "  stats:",
        "    rx_packets 0 rx_bytes 0 tx_packets 0 tx_bytes 0 rx_dropped 0 tx_dropped 0",
    ]
    assert shown(mdevkit)["function"] == {"hw_addr": "00:00:00:00:00:00", "state": "inactive", "opstate": "detached"}
    mdevkit("port", "function", "set", f"{CARD}/32856", "hw_addr", "02:00:00:00:88:88", "state", "active")
    assert shown(mdevkit)["function"] == {"hw_addr": "02:00:00:00:88:88", "state": "active", "opstate": "attached"}
    device = client.get(f"/v1/devices/{uuid}")
    assert (device["bus"], device["driver"]) == PLACE[flavour]
    assert device["attributes"]["hw_addr"] == "02:00:00:00:88:88"
    mdevkit("port", "function", "set", f"{CARD}/32856", "state", "inactive")
    assert shown(mdevkit)["function"] == {"hw_addr": "02:00:00:00:88:88", "state": "inactive", "opstate": "detached"}
    assert client.get("/v1/devices") == []
    mdevkit("port", "del", f"{CARD}/32856")
    assert json.loads(mdevkit("port", "show", "--json")) == {"port": {}}


def test_one_card_serves_several_classes_at_once(mdevkit, client):
    for number, flavour in enumerate(PLACE):
        mdevkit("create", f"subfunction-{flavour}", "--uuid", UUID.format(number))
    ports = json.loads(mdevkit("port", "show", CARD, "--json"))["port"]
    assert [port["flavour"] for port in ports.values()] == list(PLACE)
    assert {port["function"]["opstate"] for port in ports.values()} == {"attached"}
    assert [device["bus"] for device in client.get("/v1/devices")] == [bus for bus, _ in PLACE.values()]
    for number in range(len(PLACE)):
        mdevkit("remove", UUID.format(number))
    assert json.loads(mdevkit("port", "show", "--json")) == {"port": {}}


def test_devlinks_own_words_are_taken(mdevkit):
    """As in its manual: devlink port add pci/0000:06:00.0 flavour pcisf pfnum 0 sfnum 88."""
    text = mdevkit("port", "add", f"pci/{CARD}", "flavour", "pcisf", "pfnum", "0", "sfnum", "88", "name", "sf88")
    assert "netdev sf88 flavour mlx5" in text


#: What devlink has for a port of flavour pcisf, with the types of its values (iproute2, devlink/devlink.c).
DEVLINK_PORT = {
    "type": str,
    "netdev": str,
    "flavour": str,
    "controller": int,
    "pfnum": int,
    "sfnum": int,
    "external": bool,
    "splittable": bool,
    "function": dict,
}


def test_the_json_is_devlinks(mdevkit):
    added = json.loads(mdevkit("port", "add", CARD, "flavour", "virtio", "sfnum", "3", "--json"))
    assert list(added) == ["port"]
    (handle, port), *others = added["port"].items()
    assert (handle, others) == (f"pci/{CARD}/32771", [])
    assert {name: type(value) for name, value in port.items() if name in DEVLINK_PORT} == DEVLINK_PORT
    assert list(port["function"]) == ["hw_addr", "state", "opstate"]
    assert json.loads(mdevkit("port", "show", handle, "--json")) == added
    shown = json.loads(mdevkit("dev", "eswitch", "show", CARD, "--json"))
    assert shown == {"dev": {f"pci/{CARD}": {"mode": "switchdev"}}}


def test_an_active_port_comes_back_as_it_was_when_its_host_has_died(mdevkit, client, running):
    """The device is made anew, and its port with it: number, address and name are what was set; from then on they go together."""
    handle, uuids = f"{CARD}/32856", [UUID.format(number) for number in range(4)]
    mdevkit("port", "add", CARD, "flavour", "mlx5", "sfnum", "88", "name", "sf88", "uuid", uuids[0])
    mdevkit("port", "function", "set", handle, "hw_addr", "02:00:00:00:88:88", "state", "active")
    mdevkit("port", "add", CARD, "flavour", "mlx5", "sfnum", "9", "uuid", uuids[3])
    for number, flavour in enumerate(("virtio", "mdev"), 1):
        mdevkit("create", f"subfunction-{flavour}", "--uuid", uuids[number])
    before = json.loads(mdevkit("port", "show", "--json"))["port"]
    running.kill_host(CARD)
    wait_until(lambda: attached(client) == set(uuids[:3]), what="the devices' return")
    del before[f"pci/{CARD}/32777"]  # an inactive port is gone, as after a card's reset
    assert json.loads(mdevkit("port", "show", "--json"))["port"] == before
    mdevkit("port", "function", "set", handle, "state", "inactive")
    assert "has no port 32856 [ENODEV]" in mdevkit("port", "show", handle, code=1)


def attached(client):
    """The UUIDs of ports that a driver has, now."""
    try:
        ports = json.loads(client.get(f"/v1/parents/{CARD}/attributes/ports")["value"])
    except MdevError:  # the host is starting
        return set()
    return {port["uuid"] for port in ports.values() if port["function"]["opstate"] == "attached"}


def test_every_wrong_order_is_refused_with_the_reason(mdevkit):
    handle = f"{CARD}/32775"

    def refused(*words):
        return mdevkit(*words, code=1).rstrip()

    assert refused("port", "function", "set", handle, "state", "active") == f"{CARD} has no port 32775 [ENODEV]"
    assert "has no port 32775 [ENODEV]" in refused("port", "del", handle)
    mdevkit("dev", "eswitch", "set", CARD, "mode", "legacy")
    assert "is in legacy mode; `mdevkit dev eswitch set" in refused("port", "add", CARD, "flavour", "virtio", "sfnum", "7")
    assert "[EOPNOTSUPP]" in refused("create", "subfunction-virtio")
    mdevkit("dev", "eswitch", "set", CARD, "mode", "switchdev")
    mdevkit("port", "add", CARD, "flavour", "virtio", "sfnum", "7", "uuid", UUID.format(7))
    assert "stays in switchdev mode while it has sub-functions" in refused("dev", "eswitch", "set", CARD, "mode", "legacy")
    assert "sfnum 7 is that of port" in refused("port", "add", CARD, "flavour", "mdev", "sfnum", "7")
    assert "has flavour virtio" in refused("create", "subfunction-mdev", "--uuid", UUID.format(7))
    mdevkit("port", "function", "set", handle, "state", "active")
    mdevkit("port", "function", "set", handle, "state", "active")  # as it is already
    assert "[EBUSY]" in refused("port", "del", handle)
    assert "then its address can be set [EBUSY]" in refused("port", "function", "set", handle, "hw_addr", "02:00:00:00:00:01")
    mdevkit("port", "function", "set", handle, "state", "inactive")
    assert "is not the address of one interface" in refused("port", "function", "set", handle, "hw_addr", "ff:ff:ff:ff:ff:ff")
    mdevkit("port", "del", handle)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["flavour", "virtual", "sfnum", "1"], "flavour 'virtual' is none of virtio, mdev, mlx5"),
        (["flavour", "virtio", "sfnum", "one"], "sfnum wants a number, not 'one'"),
        (["flavour", "virtio", "sfnum"], "sfnum needs a value"),
        (["flavour", "virtio", "sfnum", "1", "sfnum", "2"], "sfnum is given twice"),
        (["flavour", "virtio", "pfnum", "1"], "the card has one PCI function, pfnum 0, and no 1"),
        (["flavour", "virtio", "controller", "0"], "'controller' is none of flavour, name, uuid, pfnum, sfnum"),
        (["flavour", "virtio", "name", "sixteen-letters-"], "is not that of a network interface"),
        (["flavour", "virtio", "uuid", "1234"], "'1234' is not a UUID"),
        (["sfnum", "1"], "flavour virtio, mdev or mlx5 is wanted"),
        (["flavour", "virtio", "sfnum", "5000"], "sfnum 5000 is not between 0 and 4095"),
    ],
)
def test_bad_words(mdevkit, words, text):
    assert text in mdevkit("port", "add", CARD, *words, code=1)


@pytest.mark.parametrize("handle", [CARD, f"{CARD}/", f"{CARD}/x", "/1"])
def test_a_handle_names_a_port(mdevkit, handle):
    assert "does not name a port, as 0000:06:00.0/32768 does" in mdevkit("port", "del", handle, code=1)
