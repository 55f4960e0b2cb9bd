"""Finding and loading plugins: the only module that knows entry points and stevedore.

A plugin distribution registers in these groups; the object named there is a factory that core calls without arguments:

* ``mdevkit.parents``: name = the parent driver; the factory returns one `ParentOps`, or several.
* ``mdevkit.buses``: name = the bus; the factory returns a `Bus`.
* ``mdevkit.drivers``: name = ``<driver>.<bus>.<match>``, one line per entry of the id table; the factory returns a `Driver`.
  The package is imported when a device with that MODALIAS appears.
* ``mdevkit.wrappers``: the factory returns an object whose hooks all wrap.
* ``mdevkit.cli``: name = the subcommand; the object is a `typer.Typer`.

stevedore does the loading, without its cache (which loses the distribution, and misses changes within two minutes) and with
a check for duplicates of our own (stevedore sees adjacent ones only). A plugin that cannot be used is recorded with its
distribution, version and reason, and everybody else works. ``MDEVKIT_PLUGINS`` (an allow-list; empty allows none) and
``MDEVKIT_PLUGINS_BLOCK`` take distribution names separated by commas. Loading may run on any thread, one at a time.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

GROUPS: Final = ("mdevkit.parents", "mdevkit.buses", "mdevkit.drivers", "mdevkit.wrappers", "mdevkit.cli")
PARENTS, BUSES, DRIVERS, WRAPPERS, CLI = GROUPS

_DRIVER_LINE = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)")


class Status(StrEnum):
    """What became of a plugin."""

    #: Not imported (yet).
    INSTALLED = "installed"
    LOADED = "loaded"
    FAILED = "failed"
    BLOCKED = "blocked"


@dataclass
class Plugin:
    """One entry point of an installed distribution."""

    entry: EntryPoint
    status: Status = Status.INSTALLED
    #: Why it cannot be used.
    reason: str = ""
    #: What the factory returned.
    product: Any = None

    @property
    def group(self) -> str:
        """The entry point's group, one of `GROUPS`."""
        return self.entry.group

    @property
    def name(self) -> str:
        """The entry point's name."""
        return self.entry.name

    @property
    def distribution(self) -> str:
        """Name of the distribution that brought it."""
        return self.entry.dist.name if self.entry.dist else "?"

    @property
    def version(self) -> str:
        """Version of that distribution."""
        return self.entry.dist.version if self.entry.dist else "?"

    def __str__(self) -> str:
        return f"plugin {self.name} of {self.distribution} {self.version}"

    def fail(self, reason: str) -> MdevError:
        """Record why the plugin cannot be used, and return the error that says so."""
        self.status, self.reason = Status.FAILED, reason
        return MdevError(errno.ENOEXEC, f"{self} cannot be used: {reason}", self)


def installed() -> list[Plugin]:
    """Return every mdevkit entry point there is, by group and name. Reads metadata only, imports nothing of them."""
    from importlib.metadata import entry_points

    everything = entry_points()
    return [Plugin(entry) for group in GROUPS for entry in sorted(everything.select(group=group), key=_order)]


def _order(entry: EntryPoint) -> tuple[str, str]:
    return entry.name, entry.dist.name if entry.dist else ""


class Catalog:
    """The plugins of one registry: found once, loaded when wanted, each at most once."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        #: All of them, also those that failed or are blocked.
        self.plugins: Final = list(plugins)
        self._lock: Final = threading.RLock()
        _block(self.plugins)
        _refuse_duplicates(self.plugins)
        _refuse_bad_driver_lines(self.plugins)

    def find(self, group: str, name: str | None = None) -> list[Plugin]:
        """Return the plugins of a group that are not refused or blocked."""
        return [
            plugin
            for plugin in self.plugins
            if plugin.group == group and name in {None, plugin.name} and plugin.status in {Status.INSTALLED, Status.LOADED}
        ]

    def load(self, plugin: Plugin) -> Any:
        """Import a plugin, call its factory and return the product; ENOEXEC with distribution, version and reason."""
        with self._lock:
            if plugin.status is Status.LOADED:
                return plugin.product
            if plugin.status is not Status.INSTALLED:
                raise MdevError(errno.ENOEXEC, f"{plugin} cannot be used: {plugin.reason}", plugin)
            factory = _import(plugin)
            plugin.product = factory if plugin.group == CLI else _make(plugin, factory)
            plugin.status = Status.LOADED
            return plugin.product

    def drivers(self, bus: str, wanted: str) -> list[list[Plugin]]:
        """Return the drivers of `bus` for a device's match, or of that driver name; each as the list of its lines.

        A line's match matches every longer one too: the trailing wildcard of a Linux module alias is implied.
        """
        named: dict[str, list[Plugin]] = {}
        for plugin in self.find(DRIVERS):
            driver, on, _ = driver_line(plugin.name)
            if on == bus:
                named.setdefault(driver, []).append(plugin)
        return [
            lines
            for driver, lines in named.items()
            if driver == wanted or any(wanted.startswith(driver_line(line.name)[2]) for line in lines)
        ]


def driver_line(name: str) -> tuple[str, str, str]:
    """Split a driver's entry-point name into driver, bus and match; ValueError for another form."""
    parts = _DRIVER_LINE.fullmatch(name)
    if not parts:
        raise ValueError(f"{name!r} is not of the form <driver>.<bus>.<match>")
    return parts[1], parts[2], parts[3]


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _listed(variable: str) -> set[str] | None:
    text = os.environ.get(variable)
    return None if text is None else {_normal(word.strip()) for word in text.split(",") if word.strip()}


def _block(plugins: Iterable[Plugin]) -> None:
    allowed, blocked = _listed("MDEVKIT_PLUGINS"), _listed("MDEVKIT_PLUGINS_BLOCK") or set()
    for plugin in plugins:
        name = _normal(plugin.distribution)
        if name in blocked:
            plugin.status, plugin.reason = Status.BLOCKED, "blocked by MDEVKIT_PLUGINS_BLOCK"
        elif allowed is not None and name not in allowed:
            plugin.status, plugin.reason = Status.BLOCKED, "not in MDEVKIT_PLUGINS"


def _refuse_duplicates(plugins: Iterable[Plugin]) -> None:
    """Refuse names that two distributions claim: neither is used, so that installing one cannot replace another silently."""
    claims: dict[tuple[str, str], list[Plugin]] = {}
    for plugin in plugins:
        if plugin.status is not Status.BLOCKED:
            claims.setdefault((plugin.group, plugin.name), []).append(plugin)
    for claimants in claims.values():
        for plugin in claimants if len(claimants) > 1 else ():
            others = ", ".join(f"{other.distribution} {other.version}" for other in claimants if other is not plugin)
            plugin.fail(f"{others} brings a {plugin.name} too; remove one, or block it with MDEVKIT_PLUGINS_BLOCK")


def _refuse_bad_driver_lines(plugins: Iterable[Plugin]) -> None:
    for plugin in plugins:
        if plugin.group == DRIVERS and plugin.status is Status.INSTALLED:
            try:
                driver_line(plugin.name)
            except ValueError as error:
                plugin.fail(str(error))


def _import(plugin: Plugin) -> Callable[[], Any]:
    """Import what the entry point names, through stevedore."""
    from stevedore import ExtensionManager

    errors: list[BaseException] = []

    class Loader(ExtensionManager[Any]):
        """Loads this one entry point, as found by us: with its distribution, and past stevedore's cache."""

        def list_entry_points(self) -> list[EntryPoint]:
            return [plugin.entry]

    try:
        loader = Loader(plugin.group, on_load_failure_callback=lambda _manager, _entry, error: errors.append(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001  (a plugin's bug; stevedore lets an AssertionError through)
        errors.append(error)
    if errors:
        raise plugin.fail(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
    factory: Callable[[], Any] = loader.extensions[0].plugin
    return factory


def _make(plugin: Plugin, factory: Any) -> Any:
    if not callable(factory):
        raise plugin.fail(f"{plugin.entry.value} is not callable; a factory is wanted")
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise plugin.fail(f"{plugin.entry.value}() failed: {type(error).__name__}: {error}") from error
