"""Finds out which parents a plugin brings, in a child process of its own: the service imports no plugin.

The child loads one entry point of ``mdevkit.parents`` and answers with the name and host key of each parent. One that hangs or
crashes harms nobody: the service limits the time, and sees the child end. What was installed after the zygote began is found by
`refresh`, which hosts use too.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import site
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError
from mdevkit.parent import ParentOps
from mdevkit.plugins import PARENTS, Catalog, Plugin, installed

from mdevkit_service.wire import send

if TYPE_CHECKING:
    import socket


#: Nanoseconds after which an installation is over.
_SETTLING: Final = 2 * 10**9


def run(sock: socket.socket, catalog: Catalog, arguments: dict[str, Any]) -> None:
    """Answer for the plugin `arguments` names; without a name, tell the plugins there are. `fresh` looks again what there is."""
    if arguments.get("fresh"):
        _read_paths()
        catalog = Catalog(installed())
    if "plugin" not in arguments:
        send(sock, {"plugins": {plugin.name: _edition(plugin) for plugin in catalog.find(PARENTS)}})
        return
    parents = load_parents(catalog, arguments["plugin"])
    send(sock, {"parents": [{"name": parent.name, "host": host_key(parent)} for parent in parents]})


def _edition(plugin: Plugin) -> str:
    """Return what changes when another version or distribution takes the plugin's place."""
    return f"{plugin.distribution} {plugin.version} {plugin.entry.value}"


def load_parents(catalog: Catalog, name: str) -> list[ParentOps]:
    """Return the parents the plugin `name` brings: ENODEV when it is not there, ENOEXEC when it cannot be used."""
    if not catalog.find(PARENTS, name):
        refresh(catalog)
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


def refresh(catalog: Catalog) -> None:
    """Add the plugins that were installed since the catalog was made. What it has stays: it may be in use. Any thread."""
    _read_paths()
    with catalog.lock:
        known = {(plugin.group, plugin.name, plugin.distribution) for plugin in catalog.plugins}
        for plugin in Catalog(installed()).plugins:
            if plugin.usable and (plugin.group, plugin.name, plugin.distribution) not in known:
                catalog.plugins.append(plugin)


def _read_paths() -> None:
    """Have the import system look again, and at folders that were added since: an editable install is a .pth file."""
    for folder in {*site.getsitepackages(), site.getusersitepackages()} & set(sys.path):
        site.addsitedir(folder)
    importlib.invalidate_caches()


class Watch:
    """Tells whether anything was installed or removed since the last question. For one thread.

    Costs one system call for each folder on the path as long as nothing changes in it.
    """

    def __init__(self) -> None:
        self._times: dict[str, int] = {}
        self._distributions = self._look()

    def changed(self) -> bool:
        """Look again."""
        times = {path: at for path in sys.path if (at := _changed_at(path))}
        if times == self._times:
            return False
        # What changes at this moment may go on to change within what the clock can tell: then it is looked at again.
        settled = all(abs(time.time_ns() - at) > _SETTLING for at in times.values())
        self._times = times if settled else {}
        before, self._distributions = self._distributions, self._look()
        return self._distributions != before

    @staticmethod
    def _look() -> dict[str, int]:
        """Return what says that something is installed, with the time of its last change."""
        found = {}
        for path in sys.path:
            with contextlib.suppress(OSError):
                for name in os.listdir(path):  # noqa: PTH208
                    if name.endswith((".dist-info", ".egg-info", ".pth")):
                        found[f"{path}/{name}"] = _changed_at(f"{path}/{name}")
        return found


def _changed_at(path: str) -> int:
    """Return when a file has changed last, in nanoseconds; 0 for one that is not there."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116  (often: a path object costs as much as the call)
    except OSError:
        return 0
