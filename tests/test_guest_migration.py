"""A guest moves from one QEMU to another while frames go round; each QEMU has a device of its own, in a process of its own.

That a migration completes and the link works shows nothing of the dirty log: drivers write most of what a device writes too,
and so have it sent. So the memory of both sides is compared at rest, with what makes only the device write: big receive buffers
(no mergeable ones, but segmentation offload), and frames so small that the guest's driver copies them out and gives back pages
it has not touched. A device that logs nothing is found by that, and only by that.
"""

from __future__ import annotations

import contextlib

import pytest

from tests.guests import Device
from tests.guests.migration import cancel_migration, differing_pages, migrate
from tests.guests.network import Card, arguments, boot

pytestmark = pytest.mark.alone

TYPE = "mvnet_loopback-vhost"
#: What a card offers in whose receive buffers the guest's driver writes nothing: GUEST_CSUM (1) and GUEST_TSO4 (7), no MRG_RXBUF.
UNTOUCHED = {"features": hex(1 << 1 | 1 << 5 | 1 << 7 | 1 << 16 | 1 << 28 | 1 << 29 | 1 << 32)}
#: Bytes of a frame, which the driver copies whole.
FRAME = 100


#: The kinds of cards that move: attributes, additions to QEMU's ``-device``, queue pairs.
CARDS = {
    "split": (UNTOUCHED, "", 1),
    "packed": (UNTOUCHED, "packed=on", 1),
    "stock-pairs": ({"queues": "2"}, "", 2),
}


@contextlib.contextmanager
def _moved(kit, folder, kind, module="mdevkit"):
    """Boot a guest, have frames go round, move it, the second time to its end; gives both sides, at rest."""
    settings, options, queues = CARDS[kind]
    with Device(TYPE, settings, module=module) as device, Device(TYPE, settings) as other:
        source = boot(kit, arguments({"card": device}, {"card": options}), cpus=queues)
        words = arguments({"card": other}, {"card": options})
        with source, boot(kit, words, cpus=queues, incoming=True) as destination:
            card = Card(source, queues=queues)
            card.bring_up()
            card.generate_on(FRAME)
            card.wait_traffic()
            cancel_migration(source, folder)
            card.wait_traffic(1000)
            migrate(source, destination, folder)
            yield source, destination
        for end in (device, other):
            assert end.close() == 0, end.output


@pytest.mark.parametrize("kind", CARDS)
def test_moves_with_all_its_memory_and_goes_on_without_losing_a_frame(kit, tmp_path, kind):
    with _moved(kit, tmp_path, kind) as (source, destination):
        assert differing_pages(source, destination) == []
        destination.qmp.execute("cont")
        card = Card(destination)
        card.wait_traffic(1000)
        card.stop()
        card.exchange(1500)
        counted = card.counters()
        assert counted.sent == counted.received
        assert "not a head" not in destination.run("dmesg")


def test_a_device_that_logs_nothing_is_found(kit, tmp_path):
    with _moved(kit, tmp_path, "split", "tests.guests.unlogged") as (source, destination):
        assert differing_pages(source, destination) != []
