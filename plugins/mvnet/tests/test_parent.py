"""The parent in a registry: types, attributes, and what cannot be."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit_mvnet.attributes import STATISTICS
from mdevkit_mvnet.model import MvnetDevice, SampleDevice
from mdevkit_mvnet.parent import MvnetParent
from mdevkit_virtio.bus import ClassId, VirtioMdev, VirtioMdevBus
from mdevkit_virtio.engine import load

UUID = "00000000-0000-4000-8000-00000000000a"


@pytest.fixture
def registry(no_leaks: None) -> Iterator[Registry]:
    with Registry() as registry:
        registry.register_bus(VirtioMdevBus())
        registry.register_parent(MvnetParent())
        yield registry


def create(registry: Registry, type_id: str = "mvnet_loopback-vhost", **params: Any) -> Mdev:
    return registry.create(type_id, params=params, bind=False)


def test_types_are_the_series(registry: Registry):
    shown = [(type_.id, type_.name, type_.device_api, type_.available_instances) for type_ in registry.types]
    assert shown == [
        ("mvnet_loopback-virtio", "virtio-net", "virtio_mdev", 2147483647),
        ("mvnet_loopback-vhost", "vhost-net", "vhost_mdev", 2147483647),
    ]
    assert registry.parent("mvnet_loopback").get_attribute("mvnet_dev/sample_mvnet_dev") == ""


@pytest.mark.parametrize(("group", "class_id", "size"), [("virtio", ClassId.VIRTIO, 256), ("vhost", ClassId.VHOST, 1024)])
def test_each_type_has_its_class(registry: Registry, group, class_id, size):
    mdev = create(registry, f"mvnet_loopback-{group}")
    ops = VirtioMdev.from_device(mdev).get_ops()
    assert mdev.class_id == class_id
    assert (ops.get_device_id(), ops.get_vendor_id(), ops.get_vq_align()) == (1, 0, 4096)
    assert [ops.get_vq_num_max(index) for index in range(3)] == [size, size, 0]


def test_attributes_of_a_device(registry: Registry):
    mdev = registry.create("mvnet_loopback-virtio", uuid=UUID, bind=False)
    counters = [*STATISTICS]
    assert mdev.type.device_table.read_all(mdev) == {
        "compat": "none",
        "mac": "02:97:7c:02:2a:24",
        "mtu": "1500",
        "features": "0x1f38018028",
        "queues": "1",
        "queue_size": "256",
        "spin_us": "50",
        "engine": load().name,
        "error": "",
        "policy": "lossless",
        "link": "up",
        **dict.fromkeys(counters, "0"),
        "vendor/sample_mdev_dev": f"This is MDEV {UUID}",
    }


def test_parameters_reach_the_device(registry: Registry):
    mdev = create(
        registry,
        mac="02:00:00:00:00:AB",
        mtu="9000",
        queues="4",
        queue_size="512",
        features="0x100000002",
        link="down",
        policy="drop",
    )
    ops = VirtioMdev.from_device(mdev).get_ops()
    assert isinstance(ops, MvnetDevice)
    assert ops.get_config(0, 12).hex(" ") == "02 00 00 00 00 ab 00 00 04 00 28 23"
    assert ops.get_features() == 0x100000002
    assert [ops.get_vq_num_max(index) for index in (0, 7, 8)] == [512, 512, 0]
    table = mdev.type.device_table.read_all(mdev)
    assert (table["mac"], table["rx_packets"], table["policy"], table["link"]) == ("02:00:00:00:00:ab", "0 0 0 0", "drop", "down")


def test_switches_of_a_device(registry: Registry):
    mdev = create(registry)
    for name, value in (("policy", "drop"), ("policy", "lossless"), ("link", "down"), ("link", "up")):
        mdev.set_attribute(name, value)
        assert mdev.get_attribute(name) == value


def test_a_defined_device_keeps_its_address(registry: Registry):
    first = registry.create("mvnet_loopback-vhost", uuid=UUID, bind=False).get_attribute("mac")
    registry.remove(UUID)
    assert registry.create("mvnet_loopback-virtio", uuid=UUID, bind=False).get_attribute("mac") == first
    assert create(registry).get_attribute("mac") != first


def test_compat_selects_the_model(registry: Registry):
    mdev = create(registry, compat="linux", features="0x100000000")
    assert isinstance(mdev.drvdata, SampleDevice)
    assert (mdev.get_attribute("compat"), mdev.get_attribute("features")) == ("linux", 0x308000000)


BAD = [
    ({"mac": "02:00"}, "attribute mac: an address such as 02:00:00:00:00:01 is wanted, not '02:00'"),
    ({"mac": "01:00:5e:00:00:01"}, "attribute mac: the address of one card is wanted, not '01:00:5e:00:00:01'"),
    ({"mac": "00:00:00:00:00:00"}, "attribute mac: the address of one card is wanted, not '00:00:00:00:00:00'"),
    ({"mtu": "67"}, "attribute mtu: 67 is not between 68 and 65535"),
    ({"queues": "9"}, "attribute queues: 9 is not between 1 and 8"),
    ({"queue_size": "100"}, "attribute queue_size: a power of two is wanted, not 100"),
    ({"queue_size": "65536"}, "attribute queue_size: 65536 is not between 1 and 32768"),
    ({"features": "0x400000"}, "attribute features: bits 0x400000 are not among 0x1f380181aa"),
    ({"spin_us": "-1"}, "attribute spin_us: -1 is not between 0 and 1000000"),
    ({"policy": "maybe"}, "attribute policy: one of lossless, drop is wanted, not 'maybe'"),
    ({"link": "sideways"}, "attribute link: one of up, down is wanted, not 'sideways'"),
    ({"compat": "windows"}, "attribute compat: one of none, linux is wanted, not 'windows'"),
]


@pytest.mark.parametrize(("params", "text"), BAD)
def test_parameters_that_cannot_be(registry: Registry, params, text):
    with pytest.raises(MdevError) as caught:
        create(registry, **params)
    assert (caught.value.errno, str(caught.value)) == (errno.EINVAL, text)
    assert registry.mdevs == []


def test_a_virtio_type_has_one_pair(registry: Registry):
    with pytest.raises(MdevError, match="attribute queues: 2 is not between 1 and 1"):
        create(registry, "mvnet_loopback-virtio", queues="2")


def test_listing_types_loads_no_model():
    code = (
        "import sys; from mdevkit_mvnet.parent import MvnetParent; MvnetParent();"
        "print([m for m in ('mdevkit_mvnet.model', 'mdevkit_virtio.engine', 'mdevkit_virtio.model') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
