"""mdevkit: Linux's mediated-device framework as a Python system.

The public API is what this module exports; names are imported when first used, so that `import mdevkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from typing import Any

    from mdevkit.attributes import Attribute, Bool, Choice, Int, Text
    from mdevkit.bus import Bus
    from mdevkit.device import Device, Mdev, State
    from mdevkit.driver import Driver, Endpoint
    from mdevkit.errors import EPROBE_DEFER, MdevError, ProbeDeferredError
    from mdevkit.events import Action, Event, EventLog, LaggedError, Subscription
    from mdevkit.hookspecs import hookimpl
    from mdevkit.parent import MdevType, Parent, ParentOps, Pool
    from mdevkit.registry import Registry

_HOME = {
    "attributes": ("Attribute", "Bool", "Choice", "Int", "Text"),
    "bus": ("Bus",),
    "device": ("Device", "Mdev", "State"),
    "driver": ("Driver", "Endpoint"),
    "errors": ("EPROBE_DEFER", "MdevError", "ProbeDeferredError"),
    "events": ("Action", "Event", "EventLog", "LaggedError", "Subscription"),
    "hookspecs": ("hookimpl",),
    "parent": ("MdevType", "Parent", "ParentOps", "Pool"),
    "registry": ("Registry",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "EPROBE_DEFER", "Action", "Attribute", "Bool", "Bus", "Choice", "Device", "Driver", "Endpoint", "Event", "EventLog",
    "Int", "LaggedError", "Mdev", "MdevError", "MdevType", "Parent", "ParentOps", "Pool", "ProbeDeferredError",
    "Registry", "State", "Subscription", "Text", "hookimpl",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mdevkit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"mdevkit.{_MODULE_OF[name]}"), name)
    return value
