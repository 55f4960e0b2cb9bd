"""The card with a driver: frames come back, whole and in order, whatever happens around them."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_mvnet.regs import LINUX_FEATURES
from mdevkit_virtio.memory import DirtyLog, MemoryTable
from mdevkit_virtio.netspec import NetFeature
from mdevkit_virtio.ops import Callback, Status

FORMATS = {
    "split": 0,
    "packed": NetFeature.RING_PACKED,
    "split-event": NetFeature.EVENT_IDX | NetFeature.INDIRECT_DESC,
    "packed-event": NetFeature.RING_PACKED | NetFeature.EVENT_IDX | NetFeature.INDIRECT_DESC,
    "packed-in-order": NetFeature.RING_PACKED | NetFeature.IN_ORDER,
    "split-in-order": NetFeature.IN_ORDER,
}
BASE = NetFeature.VERSION_1 | NetFeature.MRG_RXBUF


def frames(count, size=60, start=0):
    return [(start + number).to_bytes(4, "big") + bytes(size - 4) for number in range(count)]


@pytest.mark.parametrize("ring", FORMATS)
def test_frames_come_back_whole_and_in_order(make_card, drive, expect, ring):
    port = drive(make_card(), int(BASE | FORMATS[ring])).run()
    port.post(32)
    for start in range(0, 2000, 50):
        sent = frames(50, 1500, start)
        port.send(*sent)
        assert expect(port, 50) == sent


def test_kicks_by_call_alone(make_card, drive, expect):
    port = drive(make_card()).run(kick=False)
    port.post(4)
    for number in range(10):
        port.send(*frames(1, start=number))
        assert expect(port, 1) == frames(1, start=number)


def test_a_frame_larger_than_a_buffer_takes_several(make_card, drive, expect):
    card = make_card()
    port = drive(card).run()
    port.post(8, size=1024)
    port.send(frames(1, 4000)[0])
    assert port.guest.wait(lambda: card.statistic("rx_packets") == [1])
    port.collect()
    assert [len(part) for part in port.received] == [1024, 1024, 1024, 4012 - 3 * 1024]
    assert int.from_bytes(port.received[0][10:12], "little") == 4


def test_the_header_is_not_handed_on(make_card, drive, expect):
    port = drive(make_card()).run()
    port.post(1)
    port.send(b"x" * 60, header=b"\xff" * 12)
    assert port.until(lambda: port.received)
    assert port.received[0][:12] == bytes(10) + b"\1\0"


def test_lossless_waits_for_buffers(make_card, drive, expect):
    card = make_card()
    port = drive(card).run()
    port.send(*frames(40))
    assert card.statistic("tx_packets") == [0]
    port.post(16)
    assert expect(port, 40) == frames(40)
    assert card.statistic("tx_dropped") == [0]


def test_drop_policy_drops_and_counts(make_card, drive, expect):
    card = make_card(policy="drop")
    port = drive(card).run()
    port.send(*frames(40))
    assert port.until(lambda: port.sent == 40)
    assert card.statistic("tx_dropped") == [40]
    assert card.statistic("rx_packets") == [0]


def test_policy_changes_while_frames_wait(make_card, drive, expect):
    card = make_card()
    port = drive(card).run()
    port.post(4)
    port.send(*frames(4))
    expect(port, 4)
    port.guest.ops.set_vq_ready(0, False)
    port.send(*frames(10))
    card.set_policy("drop")
    assert port.until(lambda: port.sent == 14)
    card.set_policy("lossless")
    assert card.policy == "lossless"
    assert card.statistic("tx_dropped") == [10]
    assert card.statistic("tx_packets") == [14]


def test_receive_queue_that_is_not_ready_holds_frames_back(make_card, drive, expect):
    card = make_card()
    guest = drive(card)
    port = guest.run(queues=[1])
    port.send(*frames(5))
    guest.set_up(0)
    guest.ops.set_vq_ready(0, True)
    port.post(5)
    assert expect(port, 5) == frames(5)


def test_link_down_drops_and_tells_the_driver(make_card, drive, expect):
    card = make_card()
    guest = drive(card)
    port = guest.run()
    port.post(8)
    generation = card.get_generation()
    card.set_link("down")
    assert guest.signalled(guest.config_call)
    assert card.get_generation() != generation
    assert card.get_config(6, 2) == b"\0\0"
    port.send(*frames(5))
    assert port.until(lambda: port.sent == 5)
    card.set_link("up")
    assert guest.signalled(guest.config_call)
    assert card.get_config(6, 2) == b"\1\0"
    port.send(*frames(5, start=5))
    assert expect(port, 5) == frames(5, start=5)
    assert card.statistic("tx_dropped") == [5]


def test_pairs_are_apart(make_card, drive, expect):
    card = make_card(pairs=3)
    guest = drive(card)
    guest.run()
    for number, port in enumerate(guest.ports):
        port.post(8)
        port.send(*frames(5 + number, start=100 * number))
    for number, port in enumerate(guest.ports):
        assert expect(port, 5 + number) == frames(5 + number, start=100 * number)
    assert guest.wait(lambda: card.statistic("rx_packets") == [5, 6, 7])
    names = {thread.name for thread in threading.enumerate()}
    assert {f"card pair {pair}" for pair in range(3)} <= names


def test_a_broken_ring_needs_a_reset_and_leaves_the_other_pair_alone(make_card, drive, expect):
    card = make_card(pairs=2)
    guest = drive(card)
    port = guest.run()
    for each in guest.ports:
        each.post(8)
    ring = guest.rings[1]
    guest.memory.map[ring.driver + 2 : ring.driver + 4] = (1000).to_bytes(2, "little")
    guest.kick(1, always=True)
    assert guest.signalled(guest.config_call)
    assert card.get_status() == 15 | Status.NEEDS_RESET
    assert "card queue 1 is broken by its driver: more buffers are available than the ring has" in str(card.error)
    guest.ports[1].send(*frames(5))
    assert expect(guest.ports[1], 5) == frames(5)
    assert card.get_vq_ready(1)
    card.set_status(0)
    assert card.get_status() == 0
    assert card.error is None
    again = drive(card)
    port = again.run()
    port.post(4)
    port.send(*frames(4))
    assert expect(port, 4) == frames(4)


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_stopped_queue_goes_on_where_it_was(make_card, drive, expect, ring):
    """No frame is lost and none comes twice, on another card than the one it was stopped on."""
    first, second = make_card(), make_card()
    guest = drive(first, int(BASE | FORMATS[ring]))
    port = guest.run()
    port.post(20)
    port.send(*frames(30))
    expected = expect(port, 20)
    port.until(lambda: port.sent >= 30, 0.2)
    port.send(*frames(20, start=30))
    first.set_vq_ready(1, False)
    first.set_vq_ready(0, False)
    states = [first.get_vq_state(index) for index in range(2)]
    for status in (0, 1, 3):
        second.set_status(status)
    second.set_features(guest.features)
    second.set_status(11)
    second.set_map(guest.table())
    for index, state in enumerate(states):
        place = guest.rings[index]
        second.set_vq_num(index, place.num)
        second.set_vq_address(index, place.desc, place.driver, place.device)
        second.set_vq_state(index, state)
        assert second.get_vq_state(index) == state
        second.set_vq_ready(index, True)
    second.set_status(15)
    expected += expect(port, 30)
    assert expected == frames(50)
    second.set_status(0)
    second.set_map(MemoryTable())


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_live_changes_lose_nothing(make_card, drive, expect, log, ring):
    """Memory table, log, descriptors, callbacks and policy change, again and again, while frames run."""
    card = make_card()
    guest = drive(card, int(BASE | FORMATS[ring]))
    port = guest.run()
    port.post(32)
    changes = [
        lambda: card.set_map(guest.table()),
        lambda: card.set_log(log[0](), [0, 1]),
        lambda: guest.set_kick(1, guest.eventfd()),
        lambda: card.set_log(None),
        lambda: card.set_vq_cb(0, Callback(trigger=guest.eventfd())),
        lambda: card.set_policy("lossless"),
        lambda: card.set_vq_cb(0, None),
    ]
    for round_ in range(60):
        sent = frames(30, 200, start=30 * round_)
        port.send(*sent)
        changes[round_ % len(changes)]()
        assert expect(port, 30) == sent
    assert guest.wait(lambda: card.statistic("rx_packets") == [1800])


@pytest.fixture
def log(no_leaks):
    """Functions: one makes a dirty log of the driver's memory, the other returns the numbers of the pages in it."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)

    def pages():
        bits = os.pread(fd, 4096, 0)
        return {8 * byte + bit for byte, value in enumerate(bits) for bit in range(8) if value >> bit & 1}

    yield lambda: DirtyLog(fd, 4096), pages
    os.close(fd)


@pytest.mark.parametrize("rings", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_what_the_device_changes_is_logged(make_card, drive, log, ring, rings):
    card = make_card()
    guest = drive(card, int(BASE | FORMATS[ring]))
    port = guest.run()
    card.set_vq_ready(1, False)
    guest.memory.allocate(0, 4096)  # buffers share no page with a ring
    port.post(4, size=4096)
    port.send(*frames(4))
    assert card.set_log(log[0](), rings)
    before = bytes(guest.memory.map)
    card.set_vq_ready(1, True)
    assert guest.wait(lambda: card.statistic("rx_packets") == [4])
    card.set_status(0)
    after = bytes(guest.memory.map)
    pages = range(0, guest.memory.size, 4096)
    changed = {at >> 12 for at in pages if before[at : at + 4096] != after[at : at + 4096]}
    # A packed ring's used descriptors are written where the driver has put them.
    used = {index: (each.desc if ring == "packed" else each.device) >> 12 for index, each in guest.rings.items()}
    events = {each.device >> 12 for each in guest.rings.values()}
    unlogged = {used[index] for index in range(2) if index not in rings}
    assert changed - log[1]() <= unlogged | events
    assert unlogged.isdisjoint(log[1]())
    assert {used[index] for index in rings} <= log[1]()
    assert len(changed - events - set(used.values())) in {1, 2, 3, 4, 5}


def test_memory_taken_away_breaks_the_queues(make_card, drive):
    card = make_card()
    guest = drive(card)
    guest.run()
    with pytest.raises(MdevError, match="are not in one shared region") as caught:
        card.set_map(MemoryTable())
    assert caught.value.errno == errno.EFAULT
    assert card.get_status() & Status.NEEDS_RESET
    assert guest.signalled(guest.config_call)


def test_callbacks_that_are_functions(make_card, drive, expect):
    card = make_card()
    guest = drive(card)
    called = [threading.Event(), threading.Event(), threading.Event()]
    port = guest.run()
    card.set_config_cb(Callback(function=called[2].set))
    for index in range(2):
        card.set_vq_cb(index, Callback(function=called[index].set))
    for event in called[:2]:
        event.clear()
    port.post(4)
    port.send(*frames(2))
    assert called[0].wait(20)
    assert called[1].wait(20)
    card.set_link("down")
    assert called[2].wait(20)
    card.set_vq_cb(0, None)
    called[0].clear()
    card.set_link("up")
    port.send(*frames(2))
    expect(port, 4)
    assert not called[0].is_set()


def test_idle_costs_nothing(make_card, drive, expect):
    card = make_card(pairs=2)
    guest = drive(card)
    port = guest.run()
    port.post(8)
    port.send(*frames(8))
    expect(port, 8)
    threads = [thread.native_id for thread in threading.enumerate() if thread.name.startswith("card")]
    assert len(threads) == 2

    def wakeups():
        texts = [Path(f"/proc/self/task/{thread}/status").read_text() for thread in threads]
        return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if "ctxt_switches" in line)

    def sleeps():
        before = wakeups()
        time.sleep(0.2)  # a time in which nothing may happen
        return wakeups() == before

    assert guest.wait(sleeps, 20)


def test_statistics_count_kicks_and_signals(make_card, drive, expect):
    card = make_card(spin_us=0)
    port = drive(card).run()
    port.post(8)
    sent = 0

    def counted():
        # A card that is still awake needs no kick, and a driver that looks by itself gets no signal.
        nonlocal sent
        port.send(*frames(1, start=sent))
        assert expect(port, 1) == frames(1, start=sent)
        sent += 1
        return card.statistic("tx_kicks")[0] and card.statistic("rx_signals")[0]

    assert port.guest.wait(counted, 20)
    card.set_status(0)
    assert card.statistic("rx_packets") == [sent]
    assert card.statistic("rx_bytes") == [60 * sent]
    assert card.statistic("rx_signals")[0] >= 1


def test_short_header_without_version_1(make_card, drive):
    card = make_card()
    port = drive(card, 0).run()
    port.post(1)
    port.send(b"x" * 60, header=bytes(10))
    assert port.until(lambda: port.received)
    assert port.received == [bytes(10) + b"x" * 60]


class TestLinux:
    """``compat=linux``: what a guest, or a tool, can tell."""

    def test_features(self, make_card):
        card = make_card("linux")
        assert card.get_features() == 0x308000000 == LINUX_FEATURES
        card.set_status(3)
        with pytest.raises(MdevError, match=r"features 0x100000000 lack ACCESS_PLATFORM \(bit 33\)"):
            card.set_features(1 << 32 | 1 << 15)
        card.set_features(1 << 33 | 1 << 15)
        assert card.accepted == 1 << 33

    def test_configuration(self, make_card):
        card = make_card("linux")
        assert card.get_config(0, 6) == b"\2\0\0\0\0\1"
        assert card.get_config(0, 17) == bytes(17)
        card.set_config(0, b"\xff")
        assert card.get_config(0, 1) == b"\2"

    def test_the_header_is_handed_on(self, make_card, drive):
        port = drive(make_card("linux"), int(LINUX_FEATURES)).run()
        port.post(1)
        port.send(b"x" * 60, header=b"\xab" * 10 + b"\0\0")
        assert port.until(lambda: port.received)
        assert port.received[0][:10] == b"\xab" * 10
