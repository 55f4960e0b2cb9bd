"""mvnet_loopback-vhost in a stock Debian guest under QEMU: the kernel's own virtio_net, and its pktgen, over vhost-user.

One guest has a card of each kind: split rings alone, packed rings, split rings with event index and indirect descriptors (the
default, with the arguments just as they are printed), and one with two queue pairs. Whatever is sent comes back.
"""

from __future__ import annotations

import re
import time

import pytest

from tests.guests import Device
from tests.guests.network import Card, arguments, boot

pytestmark = pytest.mark.alone

#: What each card's ``-device`` gets beside what is printed.
OPTIONS = {
    "split": "event_idx=off,indirect_desc=off",
    "packed": "packed=on",
    "events": "",
    "pairs": "",
}
SETTINGS = {"pairs": {"queues": "2"}}
#: Frames through each queue of a card.
COUNT = 100_000
#: How many of them are checked byte by byte.
WATCHED = 500


@pytest.fixture(scope="module")
def devices():
    """A served device for each kind of card."""
    served = {kind: Device("mvnet_loopback-vhost", SETTINGS.get(kind)) for kind in OPTIONS}
    yield served
    for device in served.values():
        assert device.close() == 0, device.output


@pytest.fixture(scope="module")
def guest(kit, devices):
    with boot(kit, arguments(devices, OPTIONS), cpus=2) as guest:
        yield guest


def _cards(guest):
    cards = {kind: Card(guest, f"eth{number}", 2 if kind == "pairs" else 1) for number, kind in enumerate(OPTIONS)}
    for card in cards.values():
        card.bring_up()
    return cards


@pytest.fixture(scope="module")
def cards(guest):
    return _cards(guest)


def _features(guest, card):
    """The feature bits that the guest's driver has accepted."""
    bits = guest.run(f"cat /sys/class/net/{card.name}/device/features").strip()
    return {number for number, bit in enumerate(bits) if bit == "1"}


def test_each_card_has_the_rings_it_is_here_for(guest, cards):
    indirect, events, packed, queues = 28, 29, 34, 22
    wanted = {
        "split": set(),
        "packed": {packed, indirect, events},
        "events": {indirect, events},
        "pairs": {indirect, events, queues},
    }
    for kind, card in cards.items():
        assert _features(guest, card) & {indirect, events, packed, queues} == wanted[kind], kind
    assert guest.run(f"ls /sys/class/net/{cards['pairs'].name}/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]


@pytest.mark.parametrize("size", [60, 1500])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_frame_comes_back(cards, kind, size):
    card = cards[kind]
    queues = 2 if kind == "pairs" else 1
    counted = card.generate(size, COUNT // queues, watched=WATCHED if queues == 1 else 0)
    assert (counted.sent, counted.received) == (COUNT, COUNT)


def test_both_queue_pairs_carry_frames(guest, cards):
    cards["pairs"].generate(60, 1000)
    lines = re.findall(r"^ *\d+: +(\d+) +(\d+) .*-(input|output)\.([01])$", guest.run("cat /proc/interrupts"), re.MULTILINE)
    second = {name: int(one) + int(two) for one, two, name, queue in lines if queue == "1"}
    assert set(second) == {"input", "output"}
    assert min(second.values()) > 0


@pytest.mark.parametrize("kind", OPTIONS)
def test_contents_come_back_byte_for_byte(cards, kind):
    for size in (60, 61, 128, 1500, 1514):
        cards[kind].exchange(size)


def test_no_cpu_is_used_without_traffic(devices, cards):
    before = {kind: device.cpu_time for kind, device in devices.items()}
    time.sleep(2)  # what is shown is that nothing happens
    used = {kind: (device.cpu_time - before[kind]) / 2e9 for kind, device in devices.items()}
    assert max(used.values()) < 0.001, used


def test_the_guest_has_no_complaint(guest, cards):
    """What virtio_net, the rings and the network core say of a device that misbehaves."""
    assert not re.search(r"virtio_net.*(?:error|not a head|bad)|WARNING|BUG:|Oops|NETDEV WATCHDOG", guest.run("dmesg"))


def test_works_again_after_the_guest_rebooted(guest, cards):
    guest.reboot()
    for card in _cards(guest).values():
        card.exchange(1500, 100)


def test_a_second_qemu_attaches_after_the_first_was_killed(kit, guest, devices, cards):
    cards["events"].generate_on(200)
    cards["events"].wait_traffic()
    guest.kill()
    with boot(kit, arguments(devices, OPTIONS), cpus=2) as second:
        for card in _cards(second).values():
            card.exchange(1500, 100)
        counted = _cards(second)["events"].generate(60, 10_000)
        assert (counted.sent, counted.received) == (10_000, 10_000)
