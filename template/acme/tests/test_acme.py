"""The contracts of mdevkit, and what this card does beyond them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
from mdevkit import Registry
from mdevkit_acme.parent import AcmeParent
from mdevkit_acme.regs import Control, Reg, Status
from mdevkit_testkit import ParentSuite, VfioSuite
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.uapi import Irq


class TestAcme(ParentSuite):
    factory = AcmeParent


class TestAcmeVfio(VfioSuite):
    factory = AcmeParent
    expected = ("reset", "msi", "migration")


@pytest.fixture
def card(no_leaks, runtime_folder) -> Iterator[VfioUserClient]:
    """A guest's view of a card: 4 KiB of its memory are at 0x10000."""
    with Registry.discover() as registry:
        mdev = registry.create("acme-1", params={"serial": 7})
        with VfioUserClient.connect(mdev.endpoint.describe()["socket"]) as client:
            yield client


def checksum(card: VfioUserClient, address: int, length: int) -> Status:
    [done], registers = card.arm(Irq.MSI), card.region(0)
    registers.write_int(Reg.ADDRESS_LOW, 4, address)
    registers.write_int(Reg.LENGTH, 4, length)
    registers.write_int(Reg.CONTROL, 4, Control.START)
    assert done.wait(timeout=2)
    return Status(registers.read_int(Reg.STATUS, 4))


def test_checksum_of_guest_memory(card):
    card.dma_map(0x10000, 0x1000).write(0x10010, b"hello")
    assert checksum(card, 0x10010, 5) is Status.DONE
    assert card.region(0).read_int(Reg.RESULT, 4) == zlib.crc32(b"hello")


def test_memory_the_guest_does_not_have(card):
    assert checksum(card, 0x666000, 5) is Status.ERROR


def test_serial_number(card):
    assert card.region(0).read_int(Reg.SERIAL, 4) == 7
