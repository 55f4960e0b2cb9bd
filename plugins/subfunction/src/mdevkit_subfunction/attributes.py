"""What a user can see and set of the card and its sub-functions.

The card's attributes are devlink's commands as files: one writes what one would say to ``devlink port add``. `show` and
`store` run on any thread.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from mdevkit.attributes import Attribute, Choice, Int, Text
from mdevkit.errors import MdevError

from mdevkit_subfunction import words
from mdevkit_subfunction.eswitch import LEGACY, MAX_SFNUM, SWITCHDEV

if TYPE_CHECKING:
    from mdevkit.device import Mdev
    from mdevkit.parent import MdevType, Parent

    from mdevkit_subfunction.eswitch import Eswitch, Port


def _switch(parent: Parent) -> Eswitch:
    switch: Eswitch = parent.ops.eswitch  # type: ignore[attr-defined]  # this parent's ops have one
    return switch


def _port(mdev: Mdev) -> Port:
    port: Port = mdev.drvdata
    return port


def _ports(parent: Parent) -> str:
    return json.dumps({str(port.index): port.describe() for port in _switch(parent).ports()})


def _add(parent: Parent, text: str) -> None:
    asked = words.pairs(text.split(), words.PORT)
    if "flavour" not in asked:
        raise MdevError(errno.EINVAL, "flavour virtio, mdev or mlx5 is wanted", parent)
    if words.number("pfnum", asked.get("pfnum", "0")) != 0:
        raise MdevError(errno.EINVAL, f"the card has one PCI function, pfnum 0, and no {asked['pfnum']}", parent)
    _switch(parent).add(
        words.flavour(asked["flavour"]),
        words.uuid(asked["uuid"]) if "uuid" in asked else str(uuid4()),
        words.number("sfnum", asked["sfnum"]) if "sfnum" in asked else None,
        words.netdev(asked["name"]) if "name" in asked else None,
    )


def _delete(parent: Parent, index: int) -> None:
    _switch(parent).delete(index)


def _function(parent: Parent, text: str) -> None:
    index, *rest = text.split() or [""]
    asked = words.pairs(rest, ("hw_addr",))
    if "hw_addr" not in asked:
        raise MdevError(errno.EINVAL, "INDEX hw_addr ADDRESS is wanted", parent)
    _switch(parent).configure(words.number("the port", index), words.address(asked["hw_addr"]))


PARENT_ATTRIBUTES: Final = (
    Attribute(
        "eswitch_mode",
        Choice((LEGACY, SWITCHDEV)),
        "Mode of the card's switch; sub-functions exist in switchdev mode only.",
        show=lambda parent: _switch(parent).mode,
        store=lambda parent, mode: _switch(parent).set_mode(mode),
    ),
    Attribute("ports", Text(), "The ports by index, as JSON.", show=_ports),
    Attribute("port_add", Text(), "Add a port: flavour F [name N] [uuid U] [sfnum N].", store=_add),
    Attribute("port_del", Int(0, 2**32 - 1), "Delete the port of this index.", store=_delete),
    Attribute("port_function", Text(), "Configure a port's function: INDEX hw_addr ADDRESS.", store=_function),
)


def type_attributes() -> tuple[Attribute[Any], ...]:
    """Return the attributes of a type."""

    def capacity(type_: MdevType) -> int:
        return min(pool.capacity for pool in type_.costs)

    return (Attribute("max_mdevs", Int(), "Sub-functions the card can have.", show=capacity),)


DEVICE_ATTRIBUTES: Final = (
    Attribute(
        "hw_addr",
        Text(f"|{words.ADDRESS}", "an address like 02:00:00:00:00:01"),
        "Ethernet address; by default that of the port, else one made from the UUID.",
        show=lambda mdev: _port(mdev).hw_addr.hex(":"),
        create=True,
        default="",
    ),
    Attribute(
        "sfnum",
        Int(0, MAX_SFNUM),
        "Number of the sub-function; by default that of the port, else the lowest free one.",
        show=lambda mdev: _port(mdev).sfnum,
        create=True,
    ),
    Attribute("port", Int(), "Index of the port.", show=lambda mdev: _port(mdev).index),
    Attribute(
        "representor",
        Text(f"|{words.NETDEV}", "the name of a network interface"),
        "Name of the port's representor; by default that of the port, else one made of its number.",
        show=lambda mdev: _port(mdev).netdev,
        create=True,
        default="",
    ),
)
