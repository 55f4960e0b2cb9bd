"""The conformance suite of mdevkit: what a vendor runs on its own plugin.

Subclass `ParentSuite`, and `VfioSuite` or `VirtioSuite` for devices of that class, in a test module and name the parent's factory;
``mdevkit plugin check DIST`` does it for an installed distribution. Names are imported when first used: pytest imports this
package before the tests, and with it coverage, have begun.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdevkit_testkit.leaks import Snapshot
    from mdevkit_testkit.suites.parent import ParentSuite
    from mdevkit_testkit.suites.vfio import VfioSuite
    from mdevkit_testkit.suites.virtio import VirtioSuite

_HOME = {
    "ParentSuite": "mdevkit_testkit.suites.parent",
    "Snapshot": "mdevkit_testkit.leaks",
    "VfioSuite": "mdevkit_testkit.suites.vfio",
    "VirtioSuite": "mdevkit_testkit.suites.virtio",
}

__all__ = ["ParentSuite", "Snapshot", "VfioSuite", "VirtioSuite"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mdevkit_testkit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
