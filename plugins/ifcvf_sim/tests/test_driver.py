"""The parent driver's half: what it makes of a function's registers, and of a function that lacks some."""

from __future__ import annotations

import errno
import random

import pytest
from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.driver import FEATURES, IfcvfOps, find_areas
from mdevkit_ifcvf_sim.pci import HostAccess
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, FEATURES_OK, NetPort
from mdevkit_virtio.ops import Status

PATIENCE = 20


class Damaged(HostAccess):
    """A function whose configuration space reads differently at some places."""

    def __init__(self, function, changes):
        super().__init__(function)
        self.changes = changes

    def config_read(self, offset, size):
        return self.changes.get((offset, size), super().config_read(offset, size))


def place_of(function, cfg):
    """Where a capability is in configuration space."""
    access = HostAccess(function)
    position = access.config_read(0x34, 1)
    while not (access.config_read(position, 1) == 9 and access.config_read(position + 3, 1) == cfg):
        position = access.config_read(position + 1, 1)
    return position


# -- finding the function ----------------------------------------------------------------------------------------------


def test_the_areas_are_found_through_the_capabilities(machine):
    areas = find_areas(HostAccess(machine.function()))
    assert {cfg: (area.bar, area.offset, area.length) for cfg, area in areas.items()} == {
        cfg: (regs.BAR, *where) for cfg, where in regs.AREAS.items()
    }
    assert areas[regs.Cfg.NOTIFY].multiplier == regs.NOTIFY_MULTIPLIER


@pytest.mark.parametrize("cfg", list(regs.Cfg))
@pytest.mark.parametrize("damage", [(3, 1, 0), (4, 1, 6), (8, 4, 0x8000), (12, 4, 0x10000)])
def test_a_function_without_an_area_cannot_be_used(machine, fails, cfg, damage):
    function = machine.function()
    at, size, value = damage
    access = Damaged(function, {(place_of(function, cfg) + at, size): value})
    text = fails(errno.EIO, IfcvfOps, access)
    assert text == f"incomplete PCI capabilities: {cfg.name.lower()} not found"


def test_a_capability_list_that_is_a_loop_ends(machine):
    function = machine.function()
    first = place_of(function, regs.Cfg.COMMON)
    access = Damaged(function, {(place_of(function, regs.Cfg.DEVICE) + 1, 1): first})
    assert len(find_areas(access)) == 4


# -- what it offers ----------------------------------------------------------------------------------------------------


def test_it_passes_on_what_it_knows_of_the_hardwares_features(machine):
    ops = machine.ops()
    assert ops.get_features() & ~FEATURES == 0
    assert ops.get_features() & (1 << 5 | 1 << 15 | 1 << 32)
    assert (ops.get_device_id(), ops.get_vendor_id(), ops.get_vq_align()) == (1, 0x8086, 4096)
    assert [ops.get_vq_num_max(index) for index in range(3)] == [32768, 32768, 0]
    assert ops.get_config(0, 6) == bytes([2, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("number", "call", "text"),
    [
        (errno.EINVAL, lambda ops: ops.set_vq_num(0, 48), "a ring of 48 buffers is no power of two up to 32768"),
        (errno.EINVAL, lambda ops: ops.set_vq_num(2, 64), "ifcvf has no queue 2"),
        (errno.EINVAL, lambda ops: ops.set_features(1 << 40), "ifcvf does not offer features 0x10000000000"),
        (errno.EINVAL, lambda ops: ops.get_config(20, 5), "ifcvf has 24 bytes of configuration, not 5 at 20"),
        (errno.EINVAL, lambda ops: ops.set_status(7), "ifcvf: DRIVER_OK comes after FEATURES_OK"),
    ],
)
def test_what_it_refuses(machine, fails, number, call, text):
    assert fails(number, call, machine.ops()) == text


def test_order_of_the_status(machine, fails):
    guest = machine.guest()
    guest.start()
    assert guest.ops.get_status() == DRIVER_OK
    assert "cleared by a reset only" in fails(errno.EINVAL, guest.ops.set_status, FEATURES_OK)
    assert "features are settled" in fails(errno.EBUSY, guest.ops.set_features, 0)
    assert "is ready" in fails(errno.EBUSY, guest.ops.set_vq_num, 0, 64)
    guest.ops.set_status(0)
    assert guest.ops.get_status() == 0
    assert [guest.ops.get_vq_ready(index) for index in (0, 1)] == [False, False]


def test_a_queue_the_function_refuses_fails_the_start(machine, fails):
    guest = machine.guest()
    guest.negotiate()
    guest.ops.set_map(guest.table())
    guest.ops.set_vq_num(0, 64)
    guest.ops.set_vq_address(0, 1 << 40, 1 << 40, 1 << 40)
    guest.ops.set_vq_ready(0, True)
    assert "refuses queue 0" in fails(errno.EINVAL, guest.ops.set_status, DRIVER_OK)
    assert guest.ops.get_status() & Status.FAILED


# -- frames ------------------------------------------------------------------------------------------------------------


def test_frames_come_back(machine):
    port = machine.running()
    frames = [number.to_bytes(4, "big") * 20 for number in range(200)]
    for start in range(0, 200, 20):
        port.send(*frames[start : start + 20])
        assert port.expect(20, PATIENCE) == frames[start : start + 20]


def test_interrupts_reach_the_driver(machine):
    port = machine.running()
    port.send(b"x" * 60)
    assert port.guest.signalled(port.guest.calls[0], PATIENCE)
    assert port.expect(1, PATIENCE) == [b"x" * 60]


def test_the_switch_carries_frames_between_functions(switched):
    first, second, third = (switched.running() for _ in range(3))
    mac = [port.guest.ops.get_config(0, 6) for port in (first, second, third)]
    unicast, broadcast = mac[1] + mac[0] + b"\x88\xb5" + bytes(50), b"\xff" * 6 + mac[0] + b"\x88\xb5" + bytes(60)
    first.send(unicast, broadcast)
    assert second.expect(2, PATIENCE) == [unicast, broadcast]
    assert third.expect(1, PATIENCE) == [broadcast]
    assert first.expect(1, 0.05) == []


@pytest.mark.parametrize("seed", range(100))
def test_a_stopped_function_goes_on_elsewhere_without_loss(machine, seed):
    """Stop at a random point under load, read the rings' state from the live-migration block, go on on another function."""
    chance = random.Random(seed)
    port = machine.running()
    guest, sent, received = port.guest, 0, []
    for _ in range(4):
        for _ in range(chance.randrange(1, 6)):
            burst = chance.randrange(1, 12)
            port.collect()
            while port.guest.rings[1].free < burst:
                port.collect()
            port.send(*((sent + number).to_bytes(4, "big") * 16 for number in range(burst)))
            sent += burst
        states = []
        for index in chance.sample([0, 1], 2):
            guest.ops.set_vq_ready(index, False)
            states.append((index, guest.ops.get_vq_state(index)))
        guest.ops.set_status(0)
        received += port.received
        port = resume(machine, guest, dict(states), port)
    port.expect(0, 0)
    assert port.guest.wait(lambda: port.collect() or len(received) + len(port.received) >= sent, PATIENCE)
    port.collect()
    frames = [frame[NetPort.HEADER :] for frame in received + port.received]
    assert frames == [number.to_bytes(4, "big") * 16 for number in range(sent)]


def resume(machine, guest, states, port):
    """Have another function go on with a guest's rings."""
    guest.ops = machine.ops()
    guest.negotiate()
    guest.ops.set_map(guest.table())
    for index, ring in guest.rings.items():
        guest.ops.set_vq_num(index, ring.num)
        guest.ops.set_vq_address(index, ring.desc, ring.driver, ring.device)
        guest.ops.set_vq_state(index, states[index])
        guest.ops.set_vq_ready(index, True)
    guest.ops.set_status(DRIVER_OK)
    for index in (0, 1):
        guest.ops.kick_vq(index)
    port.received = []
    return port
