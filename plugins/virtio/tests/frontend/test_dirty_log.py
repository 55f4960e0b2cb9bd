"""The dirty log, judged by a frontend: whatever page the device changes is a page it has logged, and no other is.

Migration with a real hypervisor does not find missing marks, since guests rewrite most pages themselves. Here the driver stands
still from one look at the whole memory to the next, so every difference is the device's.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.layout import Feature, area_sizes
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend import PageLog
from mdevkit_virtio.vhost.frontend_memory import PAGE, changed_pages, pages_of

MIB = 1 << 20
NUM = 32
PLAIN = Feature.VERSION_1 | proto.F_PROTOCOL_FEATURES | 1 << 22
RINGS = {
    "split": PLAIN,
    "split-event": PLAIN | Feature.EVENT_IDX,
    "packed": PLAIN | Feature.RING_PACKED,
    "packed-event": PLAIN | Feature.RING_PACKED | Feature.EVENT_IDX,
    "mergeable": PLAIN | Feature.NET_MRG_RXBUF,
    "packed-mergeable": PLAIN | Feature.RING_PACKED | Feature.NET_MRG_RXBUF,
}
LAYOUTS = {"one region": None, "three regions": [(0, MIB), (2 * MIB, MIB), (4 * MIB, 4 * MIB)]}


class Seen(NamedTuple):
    """Pages: changed in memory, marked in the log."""

    changed: set[int]
    logged: set[int]


class Rig:
    """A frontend whose rings have pages of their own, and whose buffers lie where the layout has memory."""

    def __init__(self, frontends, path, features, pairs=1, layout=None, room=2048):
        self.frontend = frontends(path)
        self.frontend.negotiate(features)
        self.memory = GuestMemory(8 * MIB)
        self.frontend.share(self.memory, layout)
        starts = [start + (MIB // 2 if not start else 0) for start, _ in layout or [(0, 0)]]

        def allocate(size):
            starts.append(starts.pop(0) + size + 52)  # buffers share pages, and straddle them
            return starts[-1] - size - 52

        self.pairs = [
            frontends.pair(self.memory, self.frontend.features, num=NUM, pair=i, room=room, allocate=allocate, alignment=PAGE)
            for i in range(pairs)
        ]
        self.log = PageLog(self.memory.size)

    def start(self):
        for pair in self.pairs:
            self.frontend.start(*pair.queues)

    def fill(self, chance):
        for pair in self.pairs:
            pair.receive()
            # No more on the way than there are receive buffers, so that all arrive though the driver stands still.
            room = NUM - (pair.sent - pair.received)
            pair.send([chance.randbytes(chance.randint(14, 1514)) for _ in range(min(room, chance.randint(1, NUM)))])

    def settle(self):
        for pair in self.pairs:
            pair.settle()

    def look(self):
        return self.memory.map[:]

    def device_pages(self):
        """Pages the device may write: receive buffers, used rings, and where it says whether it wants kicks."""
        ranges = []
        for pair in self.pairs:
            ranges += [(at, 2048) for at in pair.rx_buffers]
            for queue in pair.queues:
                packed = Feature.RING_PACKED in queue.ring.features
                sizes = area_sizes(NUM, packed=packed)
                ranges += [(queue.ring.device, sizes[2]), *([(queue.ring.desc, sizes[0])] if packed else [])]
        return pages_of(ranges)

    def ring_pages(self):
        """Pages of the used rings: a packed ring's is that of its descriptors."""
        places = [
            (q.ring.desc if Feature.RING_PACKED in q.ring.features else q.ring.device, 8) for p in self.pairs for q in p.queues
        ]
        return pages_of(places)


@pytest.fixture(params=RINGS)
def rings(request):
    return RINGS[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def watched(rig, chance, *, rings=True, logging=True):
    """Let the device move frames, with everything it does between two looks at the memory."""
    if logging:
        rig.frontend.start_log(rig.log, rings=rings)
    rig.fill(chance)
    before = rig.look()
    rig.start()
    rig.settle()
    rig.frontend.stop()
    return Seen(changed_pages(before, rig.look()), rig.log.pages())


@pytest.mark.parametrize("pairs", [1, 2])
def test_every_page_that_changes_is_logged(loopbacks, frontends, rings, layout, pairs):
    rig = Rig(frontends, loopbacks(pairs=pairs).path, rings, pairs, layout)
    chance = random.Random(pairs)
    for _ in range(5):
        seen = watched(rig, chance)
        assert seen.changed - seen.logged == set()
        assert rig.ring_pages() <= seen.changed, "the used rings were not looked at"
        assert seen.logged <= rig.device_pages(), "pages are logged that the device does not write"
        assert len(seen.changed) > len(rig.ring_pages())
        rig.log.take()


def test_the_oracle_finds_a_device_that_does_not_log(loopbacks, frontends, rings, layout):
    rig = Rig(frontends, loopbacks().path, rings, layout=layout)
    seen = watched(rig, random.Random(1), logging=False)
    assert seen.logged == set()
    assert len(seen.changed) > len(rig.ring_pages())


def test_the_oracle_finds_a_device_that_does_not_log_its_rings(loopbacks, frontends, rings):
    rig = Rig(frontends, loopbacks().path, rings)
    # The log comes after the rings' addresses, which said nothing of it.
    rig.fill(random.Random(2))
    before = rig.look()
    rig.frontend.start_log(rig.log)
    rig.frontend.log = None
    rig.start()
    rig.settle()
    rig.frontend.stop()
    missing = changed_pages(before, rig.look()) - rig.log.pages()
    assert rig.ring_pages() <= missing
    assert missing <= rig.device_pages()
    assert not missing & pages_of((at, 2048) for at in rig.pairs[0].rx_buffers)


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_log_that_comes_on_a_live_device(loopbacks, frontends, rings, pairs):
    rig = Rig(frontends, loopbacks(pairs=pairs).path, rings, pairs)
    rig.start()
    chance = random.Random(3)
    for _ in range(10):
        rig.fill(chance)  # frames are under way while the log comes
        rig.frontend.start_log(rig.log)
        before = rig.look()
        rig.settle()
        changed = changed_pages(before, rig.look())
        assert changed - rig.log.pages() == set()
        rig.fill(chance)
        rig.settle()
        assert rig.log.pages() <= rig.device_pages()
        rig.frontend.stop_log()
        rig.log.take()
        rig.fill(chance)
        rig.settle()
        assert rig.log.pages() == set(), "the device logs though the log is off"


def test_what_a_migration_copies_is_complete(loopbacks, frontends, rings):
    """Copy memory, then again and again what the log says, as a hypervisor does: at the end both are equal."""
    rig = Rig(frontends, loopbacks().path, rings)
    rig.start()
    chance = random.Random(4)
    rig.frontend.start_log(rig.log)
    copy = bytearray(rig.look())
    for _ in range(20):
        before = rig.look()
        rig.fill(chance)  # what the driver writes is the hypervisor's to log
        copy_pages(copy, rig, changed_pages(before, rig.look()))
        copy_pages(copy, rig, rig.log.take())
    rig.settle()
    rig.frontend.stop()
    copy_pages(copy, rig, rig.log.pages())
    assert changed_pages(bytes(copy), rig.look()) == set()


def copy_pages(copy, rig, pages):
    for page in pages:
        copy[page * PAGE : (page + 1) * PAGE] = rig.memory.map[page * PAGE : (page + 1) * PAGE]


def test_a_log_too_small_breaks_the_ring_and_nothing_else(loopbacks, frontends, rings):
    served = loopbacks()
    rig = Rig(frontends, served.path, rings)
    rig.log = PageLog(PAGE)
    rig.frontend.start_log(rig.log)
    rig.fill(random.Random(5))
    rig.start()
    served.until(lambda: rig.frontend.get_status() & 0x40)
    rig.frontend.close()
    again = Rig(frontends, served.path, rings)
    again.start()
    assert again.pairs[0].exchange([bytes(60)] * 100) == [bytes(60)] * 100
