"""What a PCI device hands to its successor: everything a client could tell, and signals that are under way."""

import errno
import os
import select
from functools import partial

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio.memory import sealed_memfd
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.ops import IrqRequest
from mdevkit_vfio.pci import Bar, PciDevice, PciIds
from mdevkit_vfio.transport import can_be_parked
from mdevkit_vfio.uapi import Irq, IrqSet, MigrationFlag, MigrationState, Region

ARM = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
MASK = IrqSet.DATA_NONE | IrqSet.ACTION_MASK
UNMASK = IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK


class NoDma:
    def dma_read(self, iova, count):
        raise MdevError(errno.ENOTCONN, "nobody is there")

    dma_write = dma_read


@pytest.fixture
def attached(make_card):
    """Makes cards that have a client, and lets it go at the end."""
    cards = []

    def make(**options):
        card = make_card(**options)
        card.open(NoDma())
        cards.append(card)
        return card

    yield make
    for card in cards:
        card.release()


def arm(card, fds, index=Irq.INTX, start=0):
    card.set_irqs(IrqRequest(ARM, index, start, len(fds), fds=[os.dup(fd) for fd in fds]))


def signals(fd):
    return os.eventfd_read(fd) if select.select([fd], [], [], 0)[0] else 0


def successor(card, make, arming=lambda card: None, **options):
    """A new device that takes over, given its eventfds as a journal would."""
    with card.lock:
        state = card.checkpoint()
    other = make(**options)
    arming(other)
    other.restore(state)
    with other.lock:
        assert other.checkpoint() == state
    return other


def test_registers_and_configuration_space(attached):
    card = attached()
    card.write(0, 0x40, b"\x12\x34\x56\x78")
    card.write(Region.CONFIG, 4, b"\x06\x04")
    card.write(Region.CONFIG, 0x10, b"\x00\x00\xbf\xfe")
    other = successor(card, attached)
    assert other.read(0, 0x40, 4) == b"\x12\x34\x56\x78"
    assert other.read(Region.CONFIG, 0, 256) == card.read(Region.CONFIG, 0, 256)
    other.write(0, 0, b"\1\0\0\0")
    assert other.config.intx_disabled


def test_the_table_of_msix_and_its_masks(attached, eventfd):
    card, fd = attached(), eventfd()
    arm(card, [fd], Irq.MSIX, 7)
    table = card.read(5, 0, 16 * 300)
    card.write(5, 16 * 7, bytes(range(1, 13)) + b"\1\0\0\0")
    card.write(5, 16 * 8, bytes(16))
    assert card.read(5, 0, 16 * 300) != table
    other = successor(card, attached, lambda card: arm(card, [fd], Irq.MSIX, 7))
    assert other.read(5, 0, 0x2000) == card.read(5, 0, 0x2000)
    other.trigger_msi(7)
    assert signals(fd) == 0  # masked, so pending
    other.write(5, 16 * 7 + 12, bytes(4))
    assert signals(fd) == 1


def test_a_level_that_was_signalled_is_not_signalled_again(attached, eventfd):
    card, fd = attached(), eventfd()
    arm(card, [fd])
    card.set_intx(True)
    assert signals(fd) == 1
    other = successor(card, attached, lambda card: arm(card, [fd]))
    assert signals(fd) == 0
    other.set_irqs(IrqRequest(UNMASK, Irq.INTX, 0, 1))
    assert signals(fd) == 1


def test_a_mask_of_the_clients_stays(attached, eventfd):
    card, fd = attached(), eventfd()
    arm(card, [fd])
    card.set_irqs(IrqRequest(MASK, Irq.INTX, 0, 1))
    card.set_intx(True)
    other = successor(card, attached, lambda card: arm(card, [fd]))
    assert signals(fd) == 0
    other.set_irqs(IrqRequest(UNMASK, Irq.INTX, 0, 1))
    assert signals(fd) == 1


@pytest.mark.parametrize(("index", "number"), [(Irq.INTX, 0), (Irq.MSI, 2), (Irq.MSIX, 299), (Irq.REQ, 0), (Irq.ERR, 0)])
def test_a_signal_that_was_decided_and_not_sent_is_sent_by_the_successor(attached, eventfd, index, number):
    """The process dies after the commit, which is made as the lock is left, and before the eventfd is written."""
    card, fd = attached(), eventfd()
    arm(card, [fd], index, number)
    raised = {Irq.INTX: lambda: card.set_intx(True), Irq.REQ: lambda: card.request(0), Irq.ERR: card.report_error}
    with card.lock:
        raised.get(index, lambda: card.trigger_msi(number))()
        state = card.checkpoint()
    assert signals(fd) == 1
    with card.lock:
        later = card.checkpoint()
    for taken_over, expected in ((state, 1), (later, 0)):
        other = attached()
        arm(other, [fd], index, number)
        other.restore(taken_over)
        assert signals(fd) == expected


def test_what_was_owed_to_an_eventfd_that_is_gone_is_dropped(attached, eventfd):
    card, fd = attached(), eventfd()
    arm(card, [fd], Irq.MSI, 1)
    with card.lock:
        card.trigger_msi(1)
        state = card.checkpoint()
    other = attached()
    other.restore(state)
    with other.lock:
        assert not other.interrupts.save().endswith(b"\1\0\1\0")


def test_the_memory_of_a_mapped_bar_is_the_same_file(attached, make_card, no_leaks):
    card = attached(mapped=True)
    card.bar_memory(1)[0x4000:0x4005] = b"image"
    files = {name: os.dup(fd) for name, fd in card.files().items()}
    assert list(files) == ["bar1"]
    other = make_card(mapped=True)
    other.adopt(files)
    other.open(NoDma())
    assert other.read(1, 0x4000, 5) == b"image"
    other.write(1, 0x4000, b"I")
    assert card.bar_memory(1)[0x4000:0x4005] == b"Image"
    other.release()


def test_a_file_of_another_size_is_refused(make_card, no_leaks):
    with pytest.raises(MdevError, match="a file of 4096 bytes cannot be the memory of 65536 bytes") as caught:
        make_card(mapped=True).adopt({"bar1": sealed_memfd("small", 4096)})
    assert caught.value.errno == errno.EINVAL


def test_a_migration_under_way_goes_on(attached):
    card = attached()
    card.write(0, 0x40, b"word")
    card.migration.set_state(MigrationState.STOP_COPY)
    start = card.migration.read(30)
    other = successor(card, attached)
    assert other.migration.state is MigrationState.STOP_COPY
    rest = other.migration.read(1 << 16)
    assert start + rest == b"card" + card.registers
    assert other.migration.read(10) == b""
    third = successor(other, attached)
    third.migration.set_state(MigrationState.STOP)
    with pytest.raises(MdevError, match="the outgoing migration stream is closed"):
        third.migration.read(1)


def test_a_migration_into_the_device_goes_on(attached):
    card = attached()
    stream = b"card" + bytes(0x40) + b"word" + bytes(256 - 0x44)
    card.migration.set_state(MigrationState.RESUMING)
    card.migration.write(stream[:100])
    other = successor(card, attached)
    other.migration.write(stream[100:])
    other.migration.set_state(MigrationState.RUNNING)
    assert other.read(0, 0x40, 4) == b"word"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (MigrationState.STOP, ["stop"]),
        (MigrationState.RUNNING, ["resume"]),
        (MigrationState.RUNNING_P2P, ["quiesce", "resume"]),
    ],
)
def test_a_device_is_told_whether_it_goes_on(state, told):
    def make(heard):
        return Migration(
            MigrationFlag.STOP_COPY | MigrationFlag.P2P,
            save=lambda: b"state",
            load=lambda _: None,
            **{name: partial(heard.append, name) for name in ("stop", "resume", "quiesce", "unquiesce")},
        )

    first, heard = make([]), []
    first.set_state(state)
    make(heard).restore(first.checkpoint())
    assert heard == told


def test_a_device_without_a_checkpoint_cannot_be_parked():
    device = PciDevice(PciIds(1, 2), {0: Bar(16)})
    assert not can_be_parked(device)
    assert not can_be_parked(object())


def test_a_device_that_can_migrate_can_be_parked(make_card):
    assert can_be_parked(make_card())


def test_every_change_is_stored_before_others_see_it(attached):
    card, stored = attached(), []
    card.park(stored.append)
    with card.lock:
        card.set_intx(True)
        card.write(0, 0x40, b"\1\0\0\0")
        before = len(stored)
    assert len(stored) == before + 1
    card.park(None)
    card.set_intx(False)
    assert len(stored) == before + 1


def test_a_checkpoint_that_fails_is_logged_and_the_device_goes_on(attached, caplog):
    card = attached()

    def full(state):
        raise MdevError(errno.EFBIG, f"{len(state)} bytes are too many")

    card.park(full)
    card.write(0, 0x40, b"\1\0\0\0")
    assert card.read(0, 0x40, 4) == b"\1\0\0\0"
    card.park(None)
    assert "card: its state cannot be kept; it will not survive its process" in caplog.text
    assert "bytes are too many" in caplog.text
