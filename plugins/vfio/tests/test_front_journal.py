"""What a front remembers of a client, and what it tells a new process of the device."""

import os

import pytest
from mdevkit_vfio import proto
from mdevkit_vfio.front.journal import Journal
from mdevkit_vfio.proto import HEADER, HEADER_SIZE, Command
from mdevkit_vfio.uapi import Irq, IrqSet

ARM = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
OFF = IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER


@pytest.fixture
def journal(no_leaks):
    journal = Journal()
    yield journal
    journal.close()
    assert list(journal.entries()) == []


@pytest.fixture
def arm(journal, eventfd):
    """Arms vectors, and returns the identity of each eventfd by vector."""

    def arm(index, start, count):
        fds = [os.dup(eventfd()) for _ in range(count)]
        journal.enter(Command.DEVICE_SET_IRQS, proto.SetIrqs(ARM, index, start, count).pack(), fds)
        return dict(zip(range(start, start + count), fds, strict=True))

    return arm


def set_irqs(journal, flags, index, start, count):
    journal.enter(Command.DEVICE_SET_IRQS, proto.SetIrqs(flags, index, start, count).pack(), [])


def entries(journal):
    """Command, payload and descriptors of each entry; none is a turn, and none is posted."""
    found = []
    for message, fds in journal.entries():
        _, command, size, flags, turn = HEADER.unpack_from(message)
        assert (size, flags, turn) == (len(message), 0, 0)
        found.append((command, message[HEADER_SIZE:], list(fds)))
    return found


def armed(journal):
    """Index, start and descriptors of each SET_IRQS."""
    found = []
    for command, payload, fds in entries(journal):
        assert command == Command.DEVICE_SET_IRQS
        request = proto.SetIrqs.parse(payload, len(fds), (1, 32, 300, 1, 1))
        assert request.flags == ARM
        found.append((request.index, request.start, fds))
    return found


def test_maps_are_told_again_until_they_are_unmapped(journal, memfd):
    shared, message_only = proto.DmaMap(3, 0, 0x1000, 0x1000).pack(), proto.DmaMap(1, 0, 0x8000, 0x2000).pack()
    fd = os.dup(memfd(0x1000))
    journal.enter(Command.DMA_MAP, shared, [fd])
    journal.enter(Command.DMA_MAP, message_only, [])
    assert entries(journal) == [(Command.DMA_MAP, shared, [fd]), (Command.DMA_MAP, message_only, [])]
    journal.enter(Command.DMA_UNMAP, proto.DmaUnmap(0, 0x1000, 0x1000).pack(), [])
    assert entries(journal) == [(Command.DMA_MAP, message_only, [])]
    journal.enter(Command.DMA_UNMAP, proto.DmaUnmap(proto.UNMAP_ALL, 0, 0).pack(), [])
    assert entries(journal) == []


def test_an_eventfd_is_told_again_until_it_is_replaced_or_taken_away(journal, arm):
    arm(Irq.INTX, 0, 1)
    second = arm(Irq.INTX, 0, 1)
    assert armed(journal) == [(Irq.INTX, 0, [second[0]])]
    set_irqs(journal, IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK, Irq.INTX, 0, 1)
    assert armed(journal) == [(Irq.INTX, 0, [second[0]])]
    set_irqs(journal, ARM, Irq.INTX, 0, 1)
    assert armed(journal) == []


def test_a_whole_index_switched_off_leaves_the_others(journal, arm):
    arm(Irq.MSI, 0, 4)
    request = arm(Irq.REQ, 0, 1)
    set_irqs(journal, OFF, Irq.MSI, 0, 0)
    assert armed(journal) == [(Irq.REQ, 0, [request[0]])]


def test_gaps_and_long_runs_become_messages_from_the_last_vector_down(journal, arm):
    """MSI takes no vector beyond those it was enabled with, so the highest ones have to come first."""
    fds = arm(Irq.MSI, 0, 16) | arm(Irq.MSI, 16, 16)
    set_irqs(journal, ARM, Irq.MSI, 2, 1)
    runs = [(start, numbers) for index, start, numbers in armed(journal) if index == Irq.MSI]
    assert runs == [
        (19, [fds[n] for n in range(19, 32)]),
        (3, [fds[n] for n in range(3, 19)]),
        (0, [fds[0], fds[1]]),
    ]


def test_descriptors_of_other_commands_are_closed(journal, eventfd):
    fd = os.dup(eventfd())
    journal.enter(Command.DEVICE_RESET, b"", [fd])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
