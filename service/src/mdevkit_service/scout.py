"""Finds out which parents a plugin brings, in a child process of its own: the service imports no plugin.

The child loads one entry point of ``mdevkit.parents`` and answers with the name and host key of each parent. One that hangs or
crashes harms nobody: the service limits the time, and sees the child end.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from mdevkit.errors import MdevError
from mdevkit.parent import ParentOps
from mdevkit.plugins import PARENTS

from mdevkit_service.wire import send

if TYPE_CHECKING:
    import socket

    from mdevkit.plugins import Catalog


def run(sock: socket.socket, catalog: Catalog, arguments: dict[str, Any]) -> None:
    """Answer for the plugin `arguments` names; without a name, tell the plugins there are."""
    if "plugin" not in arguments:
        send(sock, {"plugins": [plugin.name for plugin in catalog.find(PARENTS)]})
        return
    parents = load_parents(catalog, arguments["plugin"])
    send(sock, {"parents": [{"name": parent.name, "host": host_key(parent)} for parent in parents]})


def load_parents(catalog: Catalog, name: str) -> list[ParentOps]:
    """Return the parents the plugin `name` brings: ENODEV when it is not there, ENOEXEC when it cannot be used."""
    plugins = catalog.find(PARENTS, name)
    if not plugins:
        raise MdevError(errno.ENODEV, f"there is no parent plugin {name!r}", name)
    product = catalog.load(plugins[0])
    parents = list(product) if isinstance(product, list | tuple) else [product]
    for parent in parents:
        if not isinstance(parent, ParentOps):
            raise plugins[0].fail(f"{type(parent).__name__} is not a ParentOps object")
    return parents


def host_key(parent: ParentOps) -> str:
    """Return the key of the host a parent belongs to."""
    return parent.host_key or parent.name
