"""Netdevs of this host as the network of stock Debian guests, over QEMU's ``-netdev stream``, with the arguments just as printed.

A virtio device of mvnet_loopback, driven by virtio_mdev and virtio_net here, sends back what a guest sends; two sub-functions of
flavour mlx5 connect two guests through the switch of their card.
"""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from tests.guests.network import Card, boot
from tests.services import private_service

pytestmark = pytest.mark.alone

PLUGINS = "mdevkit-mvnet,mdevkit-subfunction,mdevkit-vfio,mdevkit-virtio,mdevkit-vdev"
CARD = "0000:06:00.0"


@pytest.fixture(scope="module")
def service():
    with private_service(PLUGINS) as running:
        running.start()
        yield running


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client
        for device in client.get("/v1/devices"):
            client.delete(f"/v1/devices/{device['uuid']}?force=1")


def create(client, type_, **params):
    return client.post("/v1/devices", {"type": type_, "attributes": params})


def test_a_guests_frames_come_back_through_a_netdev_of_this_host(kit, client):
    device = create(client, "mvnet_loopback-virtio")
    assert device["driver"] == "virtio_mdev"
    with boot(kit, device["attach"]["qemu"]) as guest:
        card = Card(guest)
        card.bring_up()
        assert guest.run("cat /sys/class/net/eth0/address").strip() == device["endpoint"]["mac"]
        # QEMU's card, unlike a vhost-user backend, keeps from the guest what is for nobody's address.
        guest.run("ip link set eth0 promisc on")
        for size in (60, 1500):
            card.exchange(size)
        counted = card.generate(200, 5_000, watched=500)
        assert (counted.sent, counted.received) == (5_000, 5_000)
        # The loopback has had each frame, and nothing else.
        attributes = client.get(f"/v1/devices/{device['uuid']}")["attributes"]
        assert int(attributes["rx_packets"]) == int(attributes["tx_packets"]) == 5_000 + 2 * 200
        assert "pid" in client.get(f"/v1/devices/{device['uuid']}")["endpoint"]["client"]


def ports(client):
    return json.loads(client.get(f"/v1/parents/{CARD}/attributes/ports")["value"])


def test_two_sub_functions_connect_two_guests(kit, client):
    devices = [create(client, "subfunction-mlx5", hw_addr=f"02:00:00:00:06:0{number}") for number in (1, 2)]
    with ExitStack() as stack:
        guests = [stack.enter_context(boot(kit, device["attach"]["qemu"])) for device in devices]
        for number, guest in enumerate(guests, 1):
            Card(guest).bring_up()
            assert guest.run("cat /sys/class/net/eth0/address").strip() == f"02:00:00:00:06:0{number}"
            guest.run(f"ip addr add 10.6.0.{number}/24 dev eth0")
        text = guests[0].run("ping -c 20 -i 0.05 -s 1000 -w 30 10.6.0.2", timeout=60)
        assert "20 packets transmitted, 20 packets received, 0% packet loss" in text
        # A suspended interface holds its guest off: nothing is lost that was sent meanwhile.
        client.post("/v1/suspend", {"device": devices[0]["uuid"]})
        guests[0].run("ping -c 5 -i 0.1 -W 20 10.6.0.2 >/ping 2>&1 & sleep 1")
        assert "bytes from" not in guests[0].run("cat /ping")
        client.post("/v1/resume", {"device": devices[0]["uuid"]})
        guests[0].wait("grep -q '5 packets received, 0% packet loss' /ping", timeout=30)
        assert Card(guests[0]).carrier()
        shown = [port["stats"] for port in ports(client).values()]
        assert [(stats["rx_dropped"], stats["tx_dropped"]) for stats in shown] == [(0, 0)] * 2
        assert all(stats["rx_packets"] >= 26 for stats in shown), shown
