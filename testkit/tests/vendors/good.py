"""Vendors that pass."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_testkit import ParentSuite, VfioSuite
from simple import SimpleParent


class TestSimple(ParentSuite):
    factory = SimpleParent


class TestSimpleVfio(VfioSuite):
    factory = SimpleParent


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
