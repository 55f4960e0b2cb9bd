"""The simulated IFC VF card in stock Debian guests: a function whole over VFIO, one over vhost-user, and two guests on its switch.

Functions of one card share a host process, so the service serves them here.
"""

from __future__ import annotations

import re
from contextlib import ExitStack

import pytest

from tests.guests.network import Card, boot
from tests.services import Running

PLUGINS = "mdevkit-ifcvf-sim,mdevkit-vfio,mdevkit-virtio"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    running = Running(folder, folder)
    running.environment["MDEVKIT_PLUGINS"] = PLUGINS
    running.start()
    yield running
    running.clean_up()


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")


def create(client, group, parent=None):
    return client.post("/v1/devices", {"type": f"ifcvf-{group}", "parent": parent})


#: What a guest needs whose rings a device of the VFIO class reads; vhost-user devices print the same.
SHARED = ("-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-machine", "memory-backend=mem")


def arguments(*devices):
    """QEMU's arguments as printed for each device; the guest's memory is stated once."""
    words = dict.fromkeys(zip(SHARED[::2], SHARED[1::2], strict=True))
    for device in devices:
        printed = device["attach"]["qemu"]
        words |= dict.fromkeys(zip(printed[::2], printed[1::2], strict=True))
    return [word for pair in words for word in pair]


def test_a_function_whole_and_one_through_the_parent_driver(kit, client):
    """The same card twice in one guest, by two classes: frames loop, contents are checked, and the link stays over a suspend."""
    vhost, whole = create(client, "vhost_mdev"), create(client, "vfio_pci")
    with boot(kit, arguments(vhost, whole)) as guest:
        assert "[1af4:1041]" not in guest.run("dmesg | grep -i 'unknown header' || true")
        cards = {_device_of(guest, name): Card(guest, name) for name in ("eth0", "eth1")}
        for card in cards.values():
            card.bring_up()
            for size in (60, 1500):
                card.exchange(size)
            counted = card.generate(200, 20_000)
            assert (counted.sent, counted.received) == (20_000, 20_000)
        function = next(path for path in cards if _subsystem(guest, path) == "0x8086:0x001a")
        assert int(_interrupts(guest, function)) > 0, "the function's MSI-X interrupts"
        for device in (vhost, whole):
            client.post("/v1/suspend", {"device": device["uuid"]})
            client.post("/v1/resume", {"device": device["uuid"]})
        for card in cards.values():
            card.exchange(1500)
        assert not re.search(r"not a head|WARNING|BUG:|Oops|NETDEV WATCHDOG", guest.run("dmesg"))


def _device_of(guest, name):
    """The PCI address of a network card."""
    path = guest.run(f"readlink -f /sys/class/net/{name}/device").strip()
    return path.split("/")[-2]


def _subsystem(guest, address):
    return ":".join(guest.run(f"cd /sys/bus/pci/devices/{address} && cat subsystem_vendor subsystem_device").split())


def _interrupts(guest, address):
    """How many MSI-X interrupts a function has had."""
    numbers = guest.run(f"ls /sys/bus/pci/devices/{address}/msi_irqs").split()
    total = 0
    for line in guest.run("cat /proc/interrupts").splitlines():
        number, _, rest = line.partition(":")
        if number.strip() in numbers:
            total += int(rest.split()[0])
    return total


def test_two_guests_reach_each_other_through_the_cards_switch(kit, client):
    client.put("/v1/parents/0000:1a:00.0/attributes/forwarding", {"value": "switch"})
    kinds = ("vfio_pci", "vhost_mdev")
    devices = [create(client, kind, f"0000:1a:00.{number}") for number, kind in enumerate(kinds)]
    with ExitStack() as stack:
        guests = [stack.enter_context(boot(kit, arguments(device))) for device in devices]
        for number, guest in enumerate(guests, 1):
            Card(guest, "eth0").bring_up()
            guest.run(f"ip addr add 10.77.0.{number}/24 dev eth0")
        text = guests[0].run("ping -c 20 -i 0.05 -s 1000 -w 30 10.77.0.2", timeout=60)
        assert "20 packets transmitted, 20 packets received, 0% packet loss" in text
        text = guests[1].run("ping -c 5 -w 30 10.77.0.1", timeout=60)
        assert "5 packets received" in text
