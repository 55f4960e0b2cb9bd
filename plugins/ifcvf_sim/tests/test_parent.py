"""The parents as users see them: functions of one card, one device each, given away by three classes."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from mdevkit import Registry
from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.parent import functions
from mdevkit_vfio.bus import VfioBus
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.driver import VfioMdevDriver
from mdevkit_vfio.uapi import Irq
from mdevkit_virtio.bus import VirtioMdevBus
from mdevkit_virtio.transport import VirtioMdevDriver
from mdevkit_virtio.virtio.bus import VirtioBus
from mdevkit_virtio.virtio.net import VirtioNetDriver

SECOND = 10.0


@pytest.fixture
def registry():
    drivers = [VfioMdevDriver(), VirtioMdevDriver(), VirtioNetDriver()]
    with Registry([VfioBus(), VirtioMdevBus(), VirtioBus(), *drivers, *functions({"MDEVKIT_IFCVF_FUNCTIONS": "2"})]) as registry:
        yield registry


def test_the_number_of_functions_is_configuration(registry, fails):
    assert [parent.name for parent in registry.parents] == ["0000:1a:00.0", "0000:1a:00.1"]
    assert {parent.host_key for parent in registry.parents} == {"ifcvf"}
    assert functions({"MDEVKIT_IFCVF_FUNCTIONS": "9"})[8].name == "0000:1a:01.0"
    for wrong in ("0", "65", "x", "-1", "", "²"):
        text = fails(errno.EINVAL, functions, {"MDEVKIT_IFCVF_FUNCTIONS": wrong})
        assert text == f"MDEVKIT_IFCVF_FUNCTIONS={wrong}: a card has 1 to 64 functions"


def test_all_types_share_the_functions_one_slot(registry, fails):
    parent = registry.parents[0]
    mdev = registry.create("ifcvf-vhost_mdev", parent=parent.name, bind=False)
    assert {type_.available_instances for type_ in parent.types.values()} == {0}
    text = fails(errno.ENOSPC, registry.create, "ifcvf-vfio_pci", parent=parent.name, bind=False)
    assert f"({mdev.name} holds 1)" in text
    assert registry.create("ifcvf-virtio_mdev", bind=False).parent is registry.parents[1]
    assert parent.types["ifcvf-virtio_mdev"].table.read("type", parent.types["ifcvf-virtio_mdev"]) == "net"


@pytest.mark.parametrize("mac", ["ff:ff:ff:ff:ff:ff", "01:00:00:00:00:01", "00:00:00:00:00:00"])
def test_an_address_is_that_of_one_interface(registry, fails, mac):
    text = fails(errno.EINVAL, registry.create, "ifcvf-virtio_mdev", params={"mac": mac}, bind=False)
    assert text.endswith(f"attribute mac: the address of one card is wanted, not {mac!r}")
    assert [parent.types["ifcvf-virtio_mdev"].available_instances for parent in registry.parents] == [1, 1]


def test_forwarding_stays_while_a_function_is_in_use(registry, fails):
    first, second = registry.parents
    mdev = registry.create("ifcvf-vfio_pci", bind=False)
    assert "forwarding stays loopback while functions are in use" in fails(
        errno.EBUSY, second.set_attribute, "forwarding", "switch"
    )
    registry.remove(mdev.uuid)
    second.set_attribute("forwarding", "switch")
    assert first.get_attribute("forwarding") == "switch"


def test_a_driver_of_this_process_uses_a_function(registry, tmp_path):
    mdev = registry.create("ifcvf-virtio_mdev", endpoint_path=str(tmp_path / "a"), params={"mac": "02:00:00:00:00:aa"})
    (child,) = mdev.children.values()
    netdev = child.endpoint.netdev
    assert netdev.mac.hex(":") == "02:00:00:00:00:aa" == mdev.get_attribute("mac")
    sent = [netdev.mac * 2 + number.to_bytes(2, "big") + bytes(100) for number in range(300)]
    with netdev.frames() as frames:
        for frame in sent:
            netdev.send(frame, timeout=SECOND)
        assert [frames.get(SECOND) for _ in sent] == sent


# -- the whole function over VFIO ----------------------------------------------------------------------------------------

MEMORY = 0x40000
RX, TX = 0, 1


class VirtioPci:
    """What a virtio-pci driver does, over vfio-user."""

    def __init__(self, path):
        self.client = VfioUserClient.connect(path)
        self.bar = self.client.region(regs.BAR)
        self.memory = self.client.dma_map(MEMORY, 1 << 20)
        self.vectors = self.client.arm(Irq.MSIX, regs.VECTORS)

    def get(self, name):
        offset, size = regs.OFFSETS[name]
        return self.bar.read_int(regs.COMMON_OFFSET + offset, size)

    def set(self, name, value):
        offset, size = regs.OFFSETS[name]
        self.bar.write_int(regs.COMMON_OFFSET + offset, size, value)

    def start(self):
        for status in (0, 1, 3):
            self.set("device_status", status)
        for half, bits in ((0, 0), (1, 1)):
            self.set("driver_feature_select", half)
            self.set("driver_feature", bits)
        self.set("device_status", 11)
        assert self.get("device_status") == 11
        for index in (RX, TX):
            self.set("queue_select", index)
            self.set("queue_size", 16)
            for number, name in enumerate(("desc", "driver", "device")):
                self.set(f"queue_{name}_lo", self.area(index) + number * 4096)
            self.set("queue_msix_vector", 1 + index)
            self.set("queue_enable", 1)
            assert (self.get("queue_enable"), self.get("queue_msix_vector")) == (1, 1 + index)
        self.set("device_status", 15)

    @staticmethod
    def area(index):
        return MEMORY + index * 0x4000

    def offer(self, index, address, length, flags):
        """Put the one buffer of a ring into descriptor 0."""
        base = self.area(index) - MEMORY
        descriptor = address.to_bytes(8, "little") + length.to_bytes(4, "little") + flags.to_bytes(2, "little") + bytes(2)
        self.memory.data[base : base + 16] = descriptor
        self.memory.data[base + 4096 : base + 4102] = bytes(2) + (1).to_bytes(2, "little") + bytes(2)
        self.bar.write_int(regs.NOTIFY_OFFSET + index * regs.NOTIFY_MULTIPLIER, 2, index)


@pytest.fixture
def driver(registry, tmp_path):
    registry.create("ifcvf-vfio_pci", endpoint_path=str(tmp_path / "f"))
    driver = VirtioPci(str(tmp_path / "f"))
    yield driver
    driver.client.close()


def test_a_guests_driver_finds_the_function(driver):
    config = driver.client.config
    assert [config.read_int(offset, 2) for offset in (0, 2, 0x2C, 0x2E)] == [0x1AF4, 0x1041, 0x8086, 0x001A]
    assert config.read_int(8, 1) == 1
    assert driver.get("num_queues") == 2
    driver.set("queue_select", 2)
    assert (driver.get("queue_size"), driver.get("queue_enable")) == (0, 0)


def test_a_guests_driver_moves_a_frame(driver):
    driver.start()
    frame = bytes(12) + b"\x02\0\0\0\0\x01" * 2 + b"\x88\xb5" + b"frame" * 20
    driver.memory.data[0x80000 : 0x80000 + len(frame)] = frame
    driver.offer(RX, MEMORY + 0x90000, 2048, 2)
    driver.offer(TX, MEMORY + 0x80000, len(frame), 0)
    assert driver.vectors[1 + RX].wait(SECOND)
    assert driver.vectors[1 + TX].wait(SECOND)
    used = driver.area(RX) - MEMORY + 8192
    assert int.from_bytes(driver.memory.data[used + 8 : used + 12], "little") == len(frame)
    assert driver.memory.data[0x90000 + 12 : 0x90000 + len(frame)] == frame[12:]
    # Where the rings stand is in the block of BAR 4.
    for index in (RX, TX):
        assert driver.client.region(regs.LM_BAR).read_int(regs.lm_offset(index), 4) == 0x00010001


def test_a_new_client_finds_a_function_that_was_reset(registry, driver, tmp_path):
    driver.start()
    driver.client.close()
    again = VirtioPci(str(tmp_path / "f"))
    try:
        assert (again.get("device_status"), again.get("msix_config")) == (0, regs.NO_VECTOR)
        again.start()
    finally:
        again.client.close()


@pytest.mark.parametrize("bar", [regs.BAR, regs.LM_BAR])
def test_no_register_minds_any_value(driver, bar):
    region = driver.client.region(bar)
    for size in (1, 2, 4):
        for offset in range(0, 0x44, size):
            region.write_int(offset, size, (1 << 8 * size) - 1)
            region.read_int(offset, size)
    driver.set("device_status", 0)
    driver.start()


def test_whole_functions_reach_one_another_through_the_switch(registry, tmp_path):
    registry.parents[0].set_attribute("forwarding", "switch")
    for name in "ab":
        registry.create("ifcvf-vfio_pci", endpoint_path=str(tmp_path / name))
    first, second = (VirtioPci(str(tmp_path / name)) for name in "ab")
    try:
        first.start()
        second.start()
        frame = bytes(12) + b"\xff" * 6 + b"\x02\0\0\0\0\x01" + b"\x08\x06" + b"who has" * 10
        first.memory.data[0x80000 : 0x80000 + len(frame)] = frame
        second.offer(RX, MEMORY + 0x90000, 2048, 2)
        first.offer(TX, MEMORY + 0x80000, len(frame), 0)
        assert second.vectors[1 + RX].wait(SECOND)
        assert second.memory.data[0x90000 + 12 : 0x90000 + len(frame)] == frame[12:]
    finally:
        first.client.close()
        second.client.close()


def test_a_suspended_function_stands_still_and_loses_nothing(registry, driver):
    driver.start()
    mdev = registry.mdevs[0]
    registry.suspend(mdev.uuid)
    frame = bytes(12) + b"\x02\0\0\0\0\x01" * 2 + b"\x88\xb5" + b"frame" * 20
    driver.memory.data[0x80000 : 0x80000 + len(frame)] = frame
    driver.offer(RX, MEMORY + 0x90000, 2048, 2)
    driver.offer(TX, MEMORY + 0x80000, len(frame), 0)
    assert driver.vectors[1 + RX].wait(0.2) == 0
    assert (driver.get("device_status"), driver.get("queue_enable")) == (15, 1)
    registry.resume(mdev.uuid)
    assert driver.vectors[1 + RX].wait(SECOND)
    assert driver.memory.data[0x90000 + 12 : 0x90000 + len(frame)] == frame[12:]


def test_listing_types_loads_no_model():
    code = (
        "import sys; from mdevkit_ifcvf_sim.parent import functions; functions({});"
        "print(sys.modules.keys() & {'mdevkit_ifcvf_sim.rings', 'mdevkit_virtio.engine', 'mdevkit_vfio.pci', 'ctypes'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
