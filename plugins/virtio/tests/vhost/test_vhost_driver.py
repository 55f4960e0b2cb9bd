"""The driver in a registry, with the devices of a parent: binding, endpoints, arguments for clients, letting go, suspending."""

from __future__ import annotations

import errno
import os
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from mdevkit import MdevType, ParentOps, Registry, hookimpl
from mdevkit.errors import MdevError
from mdevkit_virtio.bus import ClassId, VirtioMdev, VirtioMdevBus
from mdevkit_virtio.vhost.driver import VhostMdevDriver


class Cards(ParentOps):
    """Makes loopback cards, of either class."""

    name = "cards"

    def __init__(self, make):
        self.make = make
        self.types = [MdevType(group, VirtioMdevBus.name, f"{group}_mdev") for group in ("virtio", "vhost")]

    @hookimpl
    def parent_create(self, mdev, params):
        mdev.drvdata = self.make()
        mdev.set_ops(ClassId[mdev.type.group.upper()], mdev.drvdata)

    @hookimpl
    def parent_remove(self, mdev):
        mdev.drvdata.close()


@pytest.fixture
def registry(runtime_folder, loopback, later):
    """A registry with the parent ``cards``; ``registry.make`` makes its devices' ops."""
    cards = Cards(loopback)
    registry = Registry([cards, VirtioMdevBus(), VhostMdevDriver()])
    later(lambda: registry.__exit__(None, None, None))
    registry.__enter__()
    registry.cards = cards
    return registry


@pytest.fixture
def create(registry, runtime_folder):
    """Creates a device at a socket in the test's runtime folder."""

    def make(path="card.sock", type_="cards-vhost", **more):
        return registry.create(type_, endpoint_path=str(runtime_folder / path), **more)

    return make


def value(words, option):
    """Return what follows an option, as a dictionary of its settings."""
    head, *settings = words[words.index(option) + 1].split(",")
    return {"": head} | dict(setting.split("=", 1) for setting in settings)


def test_a_device_is_bound_and_served(registry, create, connect):
    mdev = create()
    assert (mdev.driver, mdev.modalias) == ("vhost_mdev", "mdev_virtio:c02")
    net = connect(mdev.endpoint.describe()["socket"])
    net.check()
    path = Path(mdev.endpoint_path)
    assert mdev.endpoint.describe() == {
        "kind": "vhost-user",
        "socket": str(path),
        "client": f"pid {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})",
        "mode": "server",
    }
    net.frontend.close()
    registry.remove(mdev.uuid)
    assert not path.exists()


def test_the_socket_is_in_the_runtime_folder_by_default(registry, runtime_folder):
    mdev = registry.create("cards-vhost")
    assert mdev.endpoint.describe()["socket"] == str(runtime_folder / "mdevkit" / f"{mdev.name}.sock")


def test_a_device_of_the_other_class_is_taken_by_override(registry, create, connect):
    mdev = create(type_="cards-virtio", bind=False)
    with pytest.raises(MdevError) as caught:
        registry.bind(mdev.uuid, "vhost_mdev")
    assert caught.value.errno == errno.ENODEV
    registry.bind(mdev.uuid, "vhost_mdev", override=True)
    connect(mdev.endpoint_path).check()


def test_devices_that_are_no_network_cards(registry, create, loopback):
    class Disk(loopback):
        """Of another kind."""

        device_id = 2

    registry.cards.make = Disk
    with pytest.raises(MdevError, match=r"is virtio device 2; vhost_mdev serves network devices \(1\)") as caught:
        create()
    assert caught.value.errno == errno.ENOTSUP
    assert not registry.mdevs


def test_a_socket_that_cannot_be_made(registry, create):
    with pytest.raises(MdevError, match="does not exist") as caught:
        create("no/card.sock")
    assert caught.value.errno == errno.ENOENT
    assert not registry.mdevs


def test_a_device_in_use_names_its_client(registry, create, connect):
    registry.remove_timeout = 0.05
    mdev = create()
    net = connect(mdev.endpoint_path)
    with pytest.raises(MdevError, match=f"is in use by pid {os.getpid()}") as caught:
        registry.remove(mdev.uuid)
    assert caught.value.errno == errno.EBUSY
    net.check()
    registry.remove(mdev.uuid, force=True)
    assert net.frontend.channel.closed_by_backend()


def test_suspend_and_resume(registry, create, connect):
    mdev = create()
    net = connect(mdev.endpoint_path)
    net.check(20)
    registry.suspend(mdev.parent.name)
    net.pairs[0].send([b"x" * 60])
    assert not mdev.drvdata.get_vq_ready(0)
    registry.resume(mdev.parent.name)
    assert net.pairs[0].exchange([b"y" * 60]) == [b"x" * 60]


def test_a_device_the_driver_does_not_serve(registry, create):
    mdev = create(bind=False)
    with pytest.raises(MdevError, match="is not served") as caught:
        VhostMdevDriver().driver_remove(mdev)
    assert caught.value.errno == errno.ENODEV
    assert isinstance(mdev, VirtioMdev)


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_arguments_for_qemu(create):
    mdev = create()
    words = mdev.endpoint.attach("qemu")
    name = mdev.name.split("-", 1)[0]
    assert value(words, "-object") == {"": "memory-backend-memfd", "id": "mem", "size": "1G", "share": "on"}
    assert words[words.index("-machine") + 1] == "memory-backend=mem"
    chardev = {"": "socket", "id": f"vhost-{name}", "path": mdev.endpoint_path, "reconnect-ms": "1000"}
    assert value(words, "-chardev") == chardev
    assert value(words, "-netdev") == {"": "vhost-user", "id": f"net-{name}", "chardev": f"vhost-{name}"}
    assert value(words, "-device") == {"": "virtio-net-pci", "netdev": f"net-{name}", "mac": "02:00:00:00:00:01"}
    assert shlex.split(shlex.join(words)) == words


def test_arguments_for_several_pairs(registry, create, loopback):
    registry.cards.make = lambda: loopback(pairs=4)
    endpoint = create().endpoint
    words = endpoint.attach("qemu")
    assert value(words, "-netdev")["queues"] == "4"
    assert {**value(words, "-device"), "mq": "on", "vectors": "10"} == value(words, "-device")
    assert value(endpoint.attach("dpdk"), "--vdev")["queues"] == "4"
    assert "  <driver queues='4'/>" in endpoint.attach("libvirt")


def test_arguments_for_dpdk(create):
    mdev = create()
    expected = {"": "net_virtio_user0", "path": mdev.endpoint_path, "queues": "1", "queue_size": "256", "mac": "02:00:00:00:00:01"}
    assert value(mdev.endpoint.attach("dpdk"), "--vdev") == expected


def test_arguments_for_libvirt(create):
    mdev = create("ca'&<rd.sock")
    memory, *interface = mdev.endpoint.attach("libvirt")
    assert ET.fromstring(memory).find("access").get("mode") == "shared"
    element = ET.fromstring("\n".join(interface))
    assert element.get("type") == "vhostuser"
    assert element.find("source").attrib == {"type": "unix", "path": mdev.endpoint_path, "mode": "client"}
    assert element.find("source/reconnect").attrib == {"enabled": "yes", "timeout": "1"}
    assert element.find("mac").get("address") == "02:00:00:00:00:01"


def test_a_path_with_a_comma(create):
    words = create("a,b.sock").endpoint.attach("qemu")
    assert "a,,b.sock" in words[words.index("-chardev") + 1]


def test_arguments_of_a_device_without_an_address(registry, create, loopback):
    registry.cards.make = lambda: loopback(features=1 << 32)
    endpoint = create().endpoint
    assert "mac" not in value(endpoint.attach("qemu"), "-device")
    assert "mac" not in value(endpoint.attach("dpdk"), "--vdev")
    assert not [line for line in endpoint.attach("libvirt") if "mac" in line]


def test_arguments_for_clients_that_serve_the_socket(registry, tmp_path):
    path = str(tmp_path / "theirs.sock")
    endpoint = registry.create("cards-vhost", endpoint_path=f"connect:{path}").endpoint
    assert endpoint.describe()["mode"] == "client"
    words = endpoint.attach("qemu")
    assert {"": "socket", "path": path, "server": "on", "wait": "off"}.items() <= value(words, "-chardev").items()
    assert value(endpoint.attach("dpdk"), "--vdev")["server"] == "1"
    source = ET.fromstring("\n".join(endpoint.attach("libvirt")[1:])).find("source")
    assert (source.get("mode"), list(source)) == ("server", [])


def test_clients_that_cannot_use_it(create):
    with pytest.raises(MdevError, match="bhyve cannot use a vhost-user device") as caught:
        create().endpoint.attach("bhyve")
    assert caught.value.errno == errno.EOPNOTSUPP
