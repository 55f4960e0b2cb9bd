"""The card's switch by itself: modes, ports and their order of steps, and where frames go."""

from __future__ import annotations

import errno
import sys
import threading
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from mdevkit import Pool
from mdevkit_subfunction.eswitch import LEGACY, SWITCHDEV, Eswitch

UUIDS = [str(UUID(int=number)) for number in range(1, 9)]


@pytest.fixture
def switch():
    return Eswitch("card", Pool("sub-functions", 4))


def a_device(uuid, driver=None):
    return SimpleNamespace(uuid=UUID(uuid), driver=driver)


class Sink:
    """Takes frames, as many as there is room for."""

    def __init__(self, room=100):
        self.frames, self.room = [], room

    def deliver(self, frame):
        if len(self.frames) == self.room:
            return False
        self.frames.append(frame)
        return True


def plug(switch, uuid, address, room=100):
    port = switch.activate("virtio", a_device(uuid), address)
    port.function = Sink(room)
    return port


# -- modes and ports ---------------------------------------------------------------------------------------------------


def test_legacy_mode_has_no_sub_functions(switch, fails):
    switch.set_mode(LEGACY)
    text = fails(errno.EOPNOTSUPP, switch.add, "virtio", UUIDS[0], 88)
    assert text == "the eswitch of card is in legacy mode; `mdevkit dev eswitch set card mode switchdev` comes first"
    fails(errno.EOPNOTSUPP, switch.activate, "virtio", a_device(UUIDS[0]))
    assert (switch.ports(), switch.slots.free) == ([], 4)
    switch.set_mode(SWITCHDEV)
    assert switch.add("virtio", UUIDS[0], 88).index == 32768 + 88


def test_the_mode_stays_while_there_are_ports(switch, fails):
    port = switch.add("mlx5", UUIDS[0], 1)
    assert "stays in switchdev mode while it has sub-functions (1: pf0sf1)" in fails(errno.EBUSY, switch.set_mode, LEGACY)
    switch.set_mode(SWITCHDEV)
    switch.delete(port.index)
    switch.set_mode(LEGACY)
    assert switch.mode == LEGACY


def test_a_port_goes_through_its_states_in_order(switch, fails):
    port = switch.add("virtio", UUIDS[0], 88)
    assert (port.state, port.opstate, switch.slots.free) == ("inactive", "detached", 3)
    switch.configure(port.index, bytes.fromhex("020000000088"))
    device = a_device(UUIDS[0])
    assert switch.activate("virtio", device) is port
    assert (port.state, port.opstate, port.hw_addr.hex()) == ("active", "detached", "020000000088")
    device.driver = "virtio_mdev"
    assert port.opstate == "attached"
    text = fails(errno.EBUSY, switch.configure, port.index, bytes.fromhex("020000000099"))
    assert text == f"port card/32856 is active (device {UUIDS[0]}); set its state to inactive, then its address can be set"
    assert "then the port can be deleted" in fails(errno.EBUSY, switch.delete, port.index)
    switch.deactivate(port)
    assert (port.state, port.opstate, switch.slots.free) == ("inactive", "detached", 3)
    switch.delete(port.index)
    assert (switch.ports(), switch.slots.free) == ([], 4)
    assert fails(errno.ENODEV, switch.delete, port.index) == "card has no port 32856"


def test_a_device_without_a_port_brings_one_and_takes_it_along(switch):
    port = switch.activate("mlx5", a_device(UUIDS[3]))
    assert (port.sfnum, port.netdev, port.hw_addr.hex(":")) == (0, "pf0sf0", "02:00:00:00:00:04")
    assert switch.activate("mlx5", a_device(UUIDS[4])).sfnum == 1
    switch.deactivate(port)
    assert [left.sfnum for left in switch.ports()] == [1]


def test_a_port_waits_for_a_device_of_its_flavour(switch, fails):
    switch.add("mdev", UUIDS[0], 5)
    text = fails(errno.EINVAL, switch.activate, "virtio", a_device(UUIDS[0]))
    assert text == f"port card/32773 has flavour mdev, the device {UUIDS[0]} would have virtio"


@pytest.mark.parametrize(
    ("second", "what"),
    [
        ({"uuid": UUIDS[1], "sfnum": 7}, "sfnum 7 is that of port card/32775 already"),
        ({"uuid": UUIDS[1], "sfnum": 8, "name": "pf0sf7"}, "netdev pf0sf7 is that of port card/32775 already"),
        ({"uuid": UUIDS[0], "sfnum": 8}, f"uuid {UUIDS[0]} is that of port card/32775 already"),
    ],
)
def test_numbers_names_and_uuids_are_unique(switch, fails, second, what):
    switch.add("virtio", UUIDS[0], 7)
    assert fails(errno.EEXIST, switch.add, "virtio", **second) == what
    assert switch.slots.free == 3


@pytest.mark.parametrize("number", [-1, 4096])
def test_a_number_has_12_bits(switch, fails, number):
    assert fails(errno.EINVAL, switch.add, "virtio", UUIDS[0], number) == f"sfnum {number} is not between 0 and 4095"


def test_slots_run_out_and_the_holders_are_named(switch, fails):
    for number in range(4):
        switch.add("virtio", UUIDS[number], number)
    text = fails(errno.ENOSPC, switch.add, "virtio", UUIDS[5])
    assert text.startswith("port card/32772: no instance available: 1 of 4 sub-functions wanted, 0 free")
    assert UUIDS[0] in text
    assert len(switch.ports()) == 4


@pytest.mark.parametrize("address", ["010000000001", "ffffffffffff", "000000000000"])
def test_an_address_is_that_of_one_interface(switch, fails, address):
    port = switch.add("virtio", UUIDS[0])
    assert "is not the address of one interface" in fails(errno.EINVAL, switch.configure, port.index, bytes.fromhex(address))


# -- frames ------------------------------------------------------------------------------------------------------------

A, B, C = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))


def test_frames_go_to_whom_they_are_for(switch):
    first, second, third = (plug(switch, uuid, address) for uuid, address in zip(UUIDS, (A, B, C), strict=False))
    unicast, broadcast, lost = B + A + b"one", b"\xff" * 6 + A + b"all", bytes([2, 9, 9, 9, 9, 9]) + A
    assert [switch.forward(first, frame) for frame in (unicast, broadcast, lost)] == [True, True, False]
    assert (first.function.frames, second.function.frames, third.function.frames) == ([], [unicast, broadcast], [broadcast])
    sent, got = first.representor, second.representor
    assert (sent.rx_packets, sent.rx_bytes, sent.rx_dropped) == (3, len(unicast + broadcast + lost), 1)
    assert (got.tx_packets, got.tx_bytes, got.tx_dropped) == (2, len(unicast + broadcast), 0)


def test_a_frame_nobody_has_room_for_is_counted(switch):
    first, second = plug(switch, UUIDS[0], A), plug(switch, UUIDS[1], B, room=1)
    frame = B + A + b"x"
    assert [switch.forward(first, frame), switch.forward(first, frame)] == [True, False]
    assert (second.representor.tx_packets, second.representor.tx_dropped, first.representor.rx_dropped) == (1, 1, 1)


def test_short_frames_and_inactive_ports_do_no_harm(switch):
    first, second = plug(switch, UUIDS[0], A), plug(switch, UUIDS[1], B)
    switch.deactivate(second)
    assert not any(switch.forward(first, frame) for frame in (b"", b"\xff", B + A))


def test_a_port_tells_what_devlink_tells(switch):
    port = switch.add("virtio", str(uuid4()), 88, "sf88")
    facts = port.describe()
    assert facts["function"] == {"hw_addr": "00:00:00:00:00:00", "state": "inactive", "opstate": "detached"}
    assert (facts["netdev"], facts["flavour"], facts["sfnum"], facts["controller"]) == ("sf88", "virtio", 88, 0)


def test_a_device_cannot_have_what_its_port_has_not(switch, fails):
    switch.add("virtio", UUIDS[0], 7, "sf7")
    for wanted, text in (({"sfnum": 8}, "sfnum 7"), ({"name": "sf8"}, "netdev sf7")):
        assert f"port card/32775 has {text}, the device" in fails(
            errno.EINVAL, switch.activate, "virtio", a_device(UUIDS[0]), **wanted
        )
    port = switch.activate("virtio", a_device(UUIDS[0]), sfnum=7, name="sf7")
    assert port.state == "active"


@pytest.mark.parametrize("address", ["010000000001", "ffffffffffff", "000000000000"])
def test_a_device_has_the_address_of_one_interface_too(switch, fails, address):
    text = fails(errno.EINVAL, switch.activate, "mlx5", a_device(UUIDS[0]), bytes.fromhex(address))
    assert "is not the address of one interface" in text
    assert switch.ports() == []


def test_an_inactive_port_has_the_address_that_was_configured(switch):
    port = switch.add("virtio", UUIDS[0])
    switch.activate("virtio", a_device(UUIDS[0]), A)
    switch.deactivate(port)
    assert port.hw_addr == bytes(6)
    switch.configure(port.index, B)
    switch.activate("virtio", a_device(UUIDS[0]), A)
    assert port.hw_addr == A
    switch.deactivate(port)
    assert port.hw_addr == B


def test_counts_are_exact_when_many_send_to_one(switch):
    """Each sender has a thread of its own, as devices do."""
    receiver = plug(switch, UUIDS[0], A, room=10**9)
    senders = [plug(switch, uuid, bytes([2, 0, 0, 0, 1, number])) for number, uuid in enumerate(UUIDS[1:3])]
    frame, count = A + B + bytes(50), 3000
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        crowd = [threading.Thread(target=lambda port=port: [switch.forward(port, frame) for _ in range(count)]) for port in senders]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert (receiver.representor.tx_packets, receiver.representor.tx_bytes) == (2 * count, 2 * count * len(frame))
    assert [port.representor.rx_packets for port in senders] == [count, count]
