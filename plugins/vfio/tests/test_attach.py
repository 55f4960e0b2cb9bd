"""What a user is told to give a client, for devices of both kinds: those that need the client's memory shared, and the others."""

from __future__ import annotations

import errno
import json
import threading
from xml.etree import ElementTree as ET

import pytest
from mdevkit import MdevError, MdevType, ParentOps, Registry, hookimpl
from mdevkit_vfio.bus import VfioBus, VfioMdev
from mdevkit_vfio.driver import VfioMdevDriver
from mdevkit_vfio.pci import Bar, PciDevice, PciIds


class Mapper(PciDevice):
    """Maps the guest's memory itself."""

    shared_memory = True


class Broken(PciDevice):
    """Cannot say whether it maps the guest's memory."""

    @property
    def shared_memory(self):
        raise RuntimeError("a bug of the vendor's")


KINDS = {"plain": PciDevice, "mapper": Mapper, "broken": Broken}


class Card(ParentOps):
    name = "card"
    types = tuple(MdevType(group, "mdev", "vfio-pci") for group in KINDS)

    @hookimpl
    def parent_create(self, mdev, params):
        make = KINDS[mdev.type.group]
        VfioMdev.from_device(mdev).set_ops(make(PciIds(vendor=1, device=2, class_code=0), {0: Bar(4096)}, interrupt_pin=1))

    @hookimpl
    def parent_remove(self, mdev):
        pass


@pytest.fixture
def registry():
    with Registry([VfioBus(), VfioMdevDriver(), Card()]) as registry:
        yield registry


@pytest.fixture
def attach(registry, tmp_path):
    """What is told for a client, by the type's group."""
    return lambda group, client: registry.create(f"card-{group}", endpoint_path=str(tmp_path / "s")).endpoint.attach(client)


def test_a_device_alone_is_all_most_need(attach, tmp_path):
    option, description = attach("plain", "qemu")
    assert option == "-device"
    assert json.loads(description) == {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(tmp_path / "s")}}


def test_qemu_is_to_share_its_memory_with_a_device_that_maps_it(attach):
    words = attach("mapper", "qemu")
    assert words[:-2] == ["-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-machine", "memory-backend=mem"]
    assert words[-2] == "-device"


@pytest.mark.parametrize(("group", "shared"), [("plain", 0), ("mapper", 1)])
def test_libvirt_is_told_the_same(attach, group, shared):
    lines = attach(group, "libvirt")
    assert [line for line in lines if "access mode='shared'" in line] == lines[:shared]
    assert lines[shared] == "<qemu:commandline>"


def test_a_path_with_signs_that_mean_something_in_xml(registry, tmp_path):
    path = str(tmp_path / 'it\'s <a> & "b"')
    mdev = registry.create("card-plain", endpoint_path=path)
    lines = [line.replace("qemu:", "") for line in mdev.endpoint.attach("libvirt")]
    words = [argument.get("value") for argument in ET.fromstring("\n".join(lines))]
    assert words == mdev.endpoint.attach("qemu")
    assert json.loads(words[1])["socket"]["path"] == path


def test_dpdk_has_no_vfio_user(attach):
    with pytest.raises(MdevError, match="dpdk cannot use a vfio-user device") as caught:
        attach("mapper", "dpdk")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_a_device_that_cannot_say_what_it_needs_is_not_served(registry, tmp_path, no_leaks):
    with pytest.raises(MdevError, match="a bug of the vendor's"):
        registry.create("card-broken", endpoint_path=str(tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []
    assert not [thread.name for thread in threading.enumerate() if thread.name.endswith("accept")]
