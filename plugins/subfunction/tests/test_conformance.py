"""The conformance suites on the card: its life cycle with every flavour, and the classes of those that have one."""

from __future__ import annotations

from mdevkit_subfunction.parent import SubfunctionParent
from mdevkit_testkit import ParentSuite, VfioSuite, VirtioSuite


class TestSubfunction(ParentSuite):
    factory = SubfunctionParent
    most = 8


class TestSubfunctionVirtio(VirtioSuite):
    factory = SubfunctionParent
    types = ("subfunction-virtio",)
    expected = ("config", "kick", "log", "packed", "traffic")


class TestSubfunctionMdev(VfioSuite):
    factory = SubfunctionParent
    types = ("subfunction-mdev",)
    expected = ("intx", "migration", "reset")
