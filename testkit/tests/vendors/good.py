"""Vendors that pass."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_testkit import ParentSuite, VfioSuite, VirtioSuite
from simple import SimpleParent
from simple_virtio import EchoParent, exchange


class TestSimple(ParentSuite):
    factory = SimpleParent


class TestRegisters(VfioSuite):
    factory = SimpleParent
    types = ("simple-regs",)
    expected = ("reset", "intx", "msi", "migration", "precopy")


class TestMapped(VfioSuite):
    factory = SimpleParent
    types = ("simple-mapped",)
    expected = ("reset", "msix", "mapped")


class TestEcho(VirtioSuite):
    factory = EchoParent
    exchange = exchange
    expected = ("traffic", "config", "writable", "packed", "kick", "log")


class TestSeveralParents(ParentSuite):
    """A factory that returns several parents, which share one driver's name."""

    params: ClassVar = {"level": "7"}

    @staticmethod
    def factory() -> list[SimpleParent]:
        parents = []
        for number in range(2):
            parent = SimpleParent()
            parent.name, parent.driver_name = f"simple{number}", f"driver{number}"
            parents.append(parent)
        return parents
