"""Which suites an installed distribution has to pass."""

from __future__ import annotations

from mdevkit.plugins import Plugin, installed

import mdevkit_testkit
from mdevkit_testkit.suites.base import Suite
from mdevkit_testkit.suites.parent import ParentSuite

#: Name of the distribution.
VARIABLE = "MDEVKIT_TESTKIT_DISTRIBUTION"

#: Class bus to the suite for its devices; imported when there are such devices, since their class is a package of its own.
_SUITES = {"mdev": "VfioSuite", "mdev_virtio": "VirtioSuite"}


def plugins_of(distribution: str, group: str | None = None) -> list[Plugin]:
    """Return the entry points of a distribution, all or those of a group."""
    return [plugin for plugin in installed() if plugin.distribution == distribution and group in {None, plugin.group}]


def suites(plugin: Plugin) -> list[type[Suite]]:
    """Return a suite for a parent's life cycle, and one for each class of its devices."""
    factory = staticmethod(plugin.entry.load())
    life_cycle: type[ParentSuite] = type(plugin.name, (ParentSuite,), {"factory": factory})
    with life_cycle.make_registry() as registry:
        buses = dict.fromkeys(type_.bus for type_ in registry.types)
    classes = [getattr(mdevkit_testkit, _SUITES[bus]) for bus in buses if bus in _SUITES]
    return [life_cycle, *(type(plugin.name, (cls,), {"factory": factory}) for cls in classes)]
