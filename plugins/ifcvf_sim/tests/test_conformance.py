"""The conformance suites on a card of two functions, with room for one device each."""

from __future__ import annotations

from mdevkit_ifcvf_sim.parent import functions
from mdevkit_testkit import ParentSuite, VfioSuite, VirtioSuite


def two_functions():
    """Make a card."""
    return functions({"MDEVKIT_IFCVF_FUNCTIONS": "2"})


class TestIfcvf(ParentSuite):
    factory = staticmethod(two_functions)


class TestIfcvfVirtio(VirtioSuite):
    factory = staticmethod(two_functions)
    types = ("ifcvf-virtio_mdev", "ifcvf-vhost_mdev")
    expected = ("config", "log", "traffic")


class TestIfcvfVfio(VfioSuite):
    factory = staticmethod(two_functions)
    types = ("ifcvf-vfio_pci",)
    expected = ("intx", "msix", "reset")
