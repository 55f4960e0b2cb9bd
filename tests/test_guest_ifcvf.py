"""The simulated IFC VF card in stock Debian guests: a function whole over VFIO, one over vhost-user, and two guests on its switch.

Functions of one card share a host process, so the service serves them here.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack

import pytest

from tests.guests.network import Card, boot
from tests.services import private_service

pytestmark = pytest.mark.alone

PLUGINS = "mdevkit-ifcvf-sim,mdevkit-vfio,mdevkit-virtio"


@pytest.fixture(scope="module")
def service():
    with private_service(PLUGINS) as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def client(service):
    with service.client() as client:
        yield client


def create(client, group, parent=None):
    return client.post("/v1/devices", {"type": f"ifcvf-{group}", "parent": parent})


def arguments(*devices):
    """QEMU's arguments as printed for each device; the guest's memory, which each of them wants shared, is stated once."""
    words = {}
    for device in devices:
        printed = device["attach"]["qemu"]
        words |= dict.fromkeys(zip(printed[::2], printed[1::2], strict=True))
    return [word for pair in words for word in pair]


def remove(client, devices):
    for device in devices:
        client.delete(f"/v1/devices/{device['uuid']}?force=1")


@pytest.fixture(scope="class")
def devices(client):
    """Two functions, by how they come to a guest."""
    devices = {kind: create(client, kind) for kind in ("vhost_mdev", "vfio_pci")}
    yield devices
    remove(client, devices.values())


@pytest.fixture(scope="class")
def guest(kit, devices):
    with boot(kit, arguments(*devices.values())) as guest:
        yield guest


@pytest.fixture(scope="class")
def cards(guest):
    """The guest's cards, by how they come to it."""
    cards = {}
    for name in ("eth0", "eth1"):
        whole = _subsystem(guest, _device_of(guest, name)) == "0x8086:0x001a"
        cards["vfio_pci" if whole else "vhost_mdev"] = Card(guest, name)
        Card(guest, name).bring_up()
    assert set(cards) == {"vfio_pci", "vhost_mdev"}
    return cards


class TestOneGuest:
    """The same card twice in one guest, by two classes; what is sent comes back."""

    @pytest.mark.parametrize("kind", ["vhost_mdev", "vfio_pci"])
    def test_frames_come_back(self, guest, cards, kind):
        for size in (60, 1500):
            cards[kind].exchange(size)
        counted = cards[kind].generate(200, 20_000)
        assert (counted.sent, counted.received) == (20_000, 20_000)

    def test_the_whole_function_interrupts_by_msix(self, guest, cards):
        before = _interrupts(guest, _device_of(guest, cards["vfio_pci"].name))
        cards["vfio_pci"].exchange(60)
        assert _interrupts(guest, _device_of(guest, cards["vfio_pci"].name)) > before

    @pytest.mark.parametrize("kind", ["vhost_mdev", "vfio_pci"])
    def test_the_link_stays_over_suspend_and_resume(self, client, devices, cards, kind):
        """Traffic runs all the time: none of it is lost, and the guest's link never goes down."""
        card, device = cards[kind], {"device": devices[kind]["uuid"]}
        losses, before = card.carrier_losses(), card.counters()
        card.generate_on(200)
        for _ in range(3):
            card.wait_traffic()
            client.post("/v1/suspend", device)
            assert client.get(f"/v1/devices/{device['device']}")["suspended"]
            client.post("/v1/resume", device)
        card.wait_traffic()
        card.stop()
        card.wait_received(before, (card.counters() - before).sent)
        counted = card.counters() - before
        assert counted.sent == counted.received > 400
        card.exchange(1500)
        assert (card.carrier_losses(), card.carrier()) == (losses, True)

    def test_nothing_passes_a_suspended_backend(self, client, devices, cards):
        """Frames wait in the guest's ring, and go on from there."""
        card, device = cards["vhost_mdev"], {"device": devices["vhost_mdev"]["uuid"]}
        card.generate_on(200)
        card.wait_traffic()
        client.post("/v1/suspend", device)
        before = card.counters()
        time.sleep(0.5)  # what is shown is that nothing comes
        assert card.counters().received == before.received
        assert card.carrier()
        client.post("/v1/resume", device)
        card.wait_traffic()
        card.stop()

    def test_the_guest_has_no_complaint(self, guest, cards):
        text = guest.run("dmesg")
        assert not re.search(r"not a head|WARNING|BUG:|Oops|NETDEV WATCHDOG|unknown header", text)


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
        stack.callback(remove, client, devices)
        guests = [stack.enter_context(boot(kit, arguments(device))) for device in devices]
        for number, guest in enumerate(guests, 1):
            Card(guest, "eth0").bring_up()
            guest.run(f"ip addr add 10.77.0.{number}/24 dev eth0")
        text = guests[0].run("ping -c 20 -i 0.05 -s 1000 -w 30 10.77.0.2", timeout=60)
        assert "20 packets transmitted, 20 packets received, 0% packet loss" in text
        text = guests[1].run("ping -c 5 -w 30 10.77.0.1", timeout=60)
        assert "5 packets received" in text
