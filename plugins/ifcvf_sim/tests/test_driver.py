"""The parent driver's half: what it makes of a function's registers, and of a function that lacks some."""

from __future__ import annotations

import errno
import random
import threading
import time

import pytest
from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.driver import FEATURES, IfcvfOps, find_areas
from mdevkit_ifcvf_sim.pci import HostAccess
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, FEATURES_OK, NetPort
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.ops import Callback, Status

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
        (errno.EINVAL, lambda ops: ops.set_status(7), "status 0x7 has DRIVER_OK without FEATURES_OK"),
    ],
)
def test_what_it_refuses(machine, fails, number, call, text):
    assert fails(number, call, machine.ops()) == text


def test_order_of_the_status(machine, fails):
    guest = machine.guest()
    guest.start()
    assert guest.ops.get_status() == DRIVER_OK
    assert "only a reset clears bits" in fails(errno.EINVAL, guest.ops.set_status, FEATURES_OK)
    assert "features are settled" in fails(errno.EBUSY, guest.ops.set_features, 0)
    assert "is ready" in fails(errno.EBUSY, guest.ops.set_vq_num, 0, 64)
    guest.ops.set_status(0)
    assert guest.ops.get_status() == 0
    assert [guest.ops.get_vq_ready(index) for index in (0, 1)] == [False, False]


def test_a_queue_the_function_refuses_fails_the_start(machine, fails):
    """The ring's memory goes away between the queue's readiness and the function's start."""
    guest = machine.guest()
    guest.negotiate()
    guest.ops.set_map(guest.table())
    guest.set_up(0)
    guest.ops.set_vq_ready(0, True)
    guest.ops.set_map(MemoryTable())
    assert "refuses queue 0" in fails(errno.EINVAL, guest.ops.set_status, DRIVER_OK)
    assert guest.ops.get_status() == FEATURES_OK | Status.FAILED
    guest.start()
    assert guest.ops.get_status() == DRIVER_OK


def test_a_function_that_refuses_the_features_fails_the_start(machine, fails):
    class Strict(HostAccess):
        """A function that offers what it then refuses."""

        def write(self, bar, offset, size, value):
            if (bar, offset) == (regs.BAR, regs.COMMON_OFFSET + regs.OFFSETS["device_status"][0]):
                value &= ~Status.FEATURES_OK
            super().write(bar, offset, size, value)

    guest = machine.guest(IfcvfOps(Strict(machine.function())))
    guest.negotiate()
    assert fails(errno.EIO, guest.ops.set_status, DRIVER_OK) == "ifcvf: the function refuses the features 0x100008000"
    assert guest.ops.get_status() & Status.FAILED


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_queues_start_in_any_order_after_driver_ok(machine, order):
    guest = machine.guest()
    guest.start(queues=())
    for index in order:
        guest.set_up(index, 64)
        guest.ops.set_vq_ready(index, True)
    port = NetPort(guest)
    port.post(8)
    port.send(b"x" * 60)
    assert port.expect(1, PATIENCE) == [b"x" * 60]


def test_a_later_queue_starts_without_the_first(machine):
    """Linux stops at the first queue that is not ready: a queue behind it would never run."""
    guest = machine.guest()
    guest.start(queues=(1,), num=64)
    guest.set_up(0, 64)
    guest.ops.set_vq_ready(0, True)
    port = NetPort(guest)
    port.post(8)
    port.send(b"x" * 60)
    assert port.expect(1, PATIENCE) == [b"x" * 60]


def test_the_state_of_a_stopped_queue_can_be_set_while_the_function_runs(machine):
    guest = machine.guest()
    guest.start(num=64)
    guest.ops.set_vq_ready(1, False)
    guest.ops.set_vq_state(1, 7)
    assert guest.ops.get_vq_state(1) == 7


def test_a_callback_may_look_at_the_function_while_the_driver_waits(machine):
    """A callback runs while the driver's thread resets the device, which waits for it, and asks and kicks nevertheless."""
    guest = machine.guest()
    guest.start(num=64)
    entered, leave, seen = threading.Event(), threading.Event(), []

    def callback():
        entered.set()
        leave.wait(PATIENCE)
        guest.ops.kick_vq(0)
        seen.append((guest.ops.get_status(), guest.ops.get_vq_ready(0), guest.ops.get_generation()))

    guest.ops.set_vq_cb(1, Callback(function=callback))
    port = NetPort(guest)
    port.post(8)
    port.send(b"x" * 60)
    assert entered.wait(PATIENCE)
    resetting = threading.Thread(target=guest.ops.set_status, args=(0,))
    resetting.start()
    time.sleep(0.1)  # in which the reset comes to where it waits for the callback
    leave.set()
    resetting.join(PATIENCE)
    assert not resetting.is_alive()
    assert len(seen) == 1


class Watched(HostAccess):
    """A function whose registers' writes are noted: name or place, and value."""

    def __init__(self, function):
        super().__init__(function)
        self.writes = []

    def write(self, bar, offset, size, value):
        name, _ = regs.FIELDS.get(offset, ("", 0)) if bar == regs.BAR else ("", 0)
        self.writes.append((name or (bar, offset), value))
        super().write(bar, offset, size, value)


def queue_starts(guest, index, state):
    """What is written for one queue, in order (ifcvf_hw_enable)."""
    ring = guest.rings[index]
    areas = [("desc", ring.desc), ("driver", ring.driver), ("device", ring.device)]
    return [
        ("queue_select", index),
        *((f"queue_{name}_{half}", address) for name, at in areas for half, address in (("lo", at), ("hi", 0))),
        ("queue_size", ring.num),
        ((regs.LM_BAR, 0x20 + 4 * index), state | state << 16),
        ("queue_msix_vector", 1 + index),
        ("queue_enable", 1),
    ]


def test_the_function_is_started_and_stopped_as_linux_does(machine):
    """ifcvf_start_hw: reset, features, the configuration's vector, queues, DRIVER_OK; ifcvf_stop_hw: vectors away, reset."""
    hardware = Watched(machine.function())
    guest = machine.guest(IfcvfOps(hardware))
    guest.negotiate()
    guest.ops.set_map(guest.table())
    for index, state in ((0, 5), (1, 0xFFFF)):
        guest.set_up(index, 64)
        guest.ops.set_vq_state(index, state)
        guest.ops.set_vq_ready(index, True)
    hardware.writes.clear()
    guest.ops.set_status(DRIVER_OK)
    assert hardware.writes == [
        *(("device_status", status) for status in (0, 1, 3)),
        *(("driver_feature_select", 0), ("driver_feature", 0x8000), ("driver_feature_select", 1), ("driver_feature", 1)),
        ("device_status", 11),
        ("msix_config", 0),
        *queue_starts(guest, 0, 5),
        *queue_starts(guest, 1, 0xFFFF),
        ("device_status", 15),
    ]
    hardware.writes.clear()
    guest.ops.kick_vq(1)
    assert hardware.writes == [((regs.BAR, regs.NOTIFY_OFFSET + regs.NOTIFY_MULTIPLIER), 1)]
    hardware.writes.clear()
    guest.ops.set_status(0)
    vectors = [line for index in (0, 1) for line in (("queue_select", index), ("queue_msix_vector", 0xFFFF))]
    assert hardware.writes == [("msix_config", 0xFFFF), *vectors, ("device_status", 0)]


def test_where_a_live_queue_stands_is_read_from_the_block(machine):
    port = machine.running()
    port.send(*[b"x" * 60] * 20)
    assert len(port.expect(20, PATIENCE)) == 20
    assert [port.guest.ops.get_vq_state(index) for index in (0, 1)] == [20, 20]


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
            # All that was taken has been given back, and that is what the block says.
            used = guest.rings[index].device + 2
            assert states[-1][1] == int.from_bytes(guest.memory.map[used : used + 2], "little")
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
