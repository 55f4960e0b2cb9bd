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
``MDEVKIT_PLUGINS_BLOCK`` take distribution names separated by commas;
the allow-list leaves subcommands alone. Loading may run on any thread, one at a time:
`Catalog.lock` is the one lock that is held while code of a plugin runs, as Python's own import lock is.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from mdevkit.errors import MdevError, describe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import Distribution, EntryPoint

GROUPS: Final = ("mdevkit.parents", "mdevkit.buses", "mdevkit.drivers", "mdevkit.wrappers", "mdevkit.cli")
PARENTS, BUSES, DRIVERS, WRAPPERS, CLI = GROUPS

#: Stands for what a distribution's metadata does not say.
_UNKNOWN: Final = "?"
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

    @cached_property
    def distribution(self) -> str:
        """Name of the distribution that brought it; ``?`` when its metadata does not say."""
        return self._metadata("Name")

    @cached_property
    def version(self) -> str:
        """Version of that distribution; ``?`` when its metadata does not say."""
        return self._metadata("Version")

    @property
    def usable(self) -> bool:
        """Whether it is neither refused nor blocked, as far as is known."""
        return self.status in {Status.INSTALLED, Status.LOADED}

    def _metadata(self, field: str) -> str:
        return _field(self.entry.dist, field) if self.entry.dist else _UNKNOWN

    def __str__(self) -> str:
        return f"plugin {self.name} of {self.distribution} {self.version}"

    def fail(self, reason: str) -> MdevError:
        """Record why the plugin cannot be used, and return the error that says so."""
        self.status, self.reason = Status.FAILED, reason
        return MdevError(errno.ENOEXEC, f"{self} cannot be used: {reason}", self)


def installed() -> list[Plugin]:
    """Return every mdevkit entry point there is, by group and name. Reads metadata only, imports nothing of them."""
    from importlib.metadata import entry_points

    try:
        everything = entry_points()
    except (TypeError, ValueError, OSError):  # one distribution's file is damaged, and entry_points() gives up on all
        plugins = _one_by_one()
    else:
        plugins = [Plugin(entry) for group in GROUPS for entry in everything.select(group=group)]
    return sorted(plugins, key=lambda plugin: (GROUPS.index(plugin.group), plugin.name, plugin.distribution))


def _one_by_one() -> list[Plugin]:
    """Read the entry points of each distribution apart, so that a damaged file costs its own distribution only."""
    from importlib.metadata import distributions

    plugins: list[Plugin] = []
    seen: set[str] = set()
    for distribution in distributions():
        name = _normal(_field(distribution, "Name"))
        if name not in seen or name == _UNKNOWN:  # the first on the path hides the others
            seen.add(name)
            try:
                plugins.extend(Plugin(entry) for entry in distribution.entry_points if entry.group in GROUPS)
            except (TypeError, ValueError, OSError) as error:
                plugins.extend(_damaged(distribution, error))
    return plugins


def _field(distribution: Distribution, field: str) -> str:
    """Return a field of a distribution's metadata, however damaged the rest is."""
    try:
        return distribution.metadata[field] or _UNKNOWN
    except UnicodeDecodeError as error:  # somebody's name in Latin-1; the fields that are wanted here are ASCII
        from email import message_from_bytes

        return str(message_from_bytes(error.object)[field] or _UNKNOWN)
    except (KeyError, ValueError, OSError):  # what newer Pythons do where 3.11 returns None: an uninstallation that was cut short
        return _UNKNOWN


def _damaged(distribution: Distribution, error: Exception) -> list[Plugin]:
    """Return a failed plugin for each of our groups that the damaged file of a distribution names."""
    from importlib.metadata import EntryPoint

    try:
        text = distribution.read_text("entry_points.txt") or ""
    except ValueError:  # not even text: what it was about cannot be known, so it is shown
        text = f"[{PARENTS}]"
    plugins = []
    for group in GROUPS:
        if f"[{group}]" in text:
            entry = EntryPoint(name="?", value="?", group=group)
            vars(entry).update(dist=distribution)
            plugins.append(Plugin(entry, Status.FAILED, f"its entry_points.txt is damaged: {describe(error)}"))
    return plugins


class Catalog:
    """The plugins of one registry: found once, loaded when wanted, each at most once."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        #: All of them, also those that failed or are blocked.
        self.plugins: Final = list(plugins)
        #: Held while a plugin is loaded and registered, so that two threads that want the same one get it once.
        self.lock: Final = threading.RLock()
        _block(self.plugins)
        _refuse_bad_driver_lines(self.plugins)
        _refuse_duplicates(self.plugins)

    def find(self, group: str, name: str | None = None) -> list[Plugin]:
        """Return the plugins of a group that are not refused or blocked."""
        return [plugin for plugin in self.plugins if plugin.group == group and name in {None, plugin.name} and plugin.usable]

    def unusable(self, group: str, name: str | None = None) -> list[Plugin]:
        """Return the plugins of a group that are refused or blocked."""
        return [plugin for plugin in self.plugins if plugin.group == group and name in {None, plugin.name} and not plugin.usable]

    def load(self, plugin: Plugin) -> Any:
        """Import a plugin, call its factory and return the product.

        ENOEXEC, with distribution, version and reason, for one that does not work; ENODEV for one that is blocked.
        """
        with self.lock:
            if plugin.status is Status.LOADED:
                return plugin.product
            if not plugin.usable:
                number = errno.ENODEV if plugin.status is Status.BLOCKED else errno.ENOEXEC
                raise MdevError(number, f"{plugin} cannot be used: {plugin.reason}", plugin)
            factory = _import(plugin)
            plugin.product = factory if plugin.group == CLI else _make(plugin, factory)
            plugin.status = Status.LOADED
            return plugin.product

    def lines(self, plugin: Plugin) -> list[Plugin]:
        """Return every entry point of the driver one of whose lines `plugin` is."""
        driver, bus, _ = driver_line(plugin.name)
        return next(lines for lines in self.drivers(bus, driver) if any(line is plugin for line in lines))

    def drivers(self, bus: str, wanted: str) -> list[list[Plugin]]:
        """Return the drivers of `bus` for a device's match, or of that driver name; each as the list of its lines.

        A line's match matches every longer one too: the trailing wildcard of a Linux module alias is implied. Drivers that
        are refused or blocked are among them: whoever loads one learns why it is.
        """
        named: dict[tuple[str, str], list[Plugin]] = {}
        for plugin in self.plugins:
            if plugin.group == DRIVERS and (parts := _DRIVER_LINE.fullmatch(plugin.name)) and parts[2] == bus:
                named.setdefault((parts[1], plugin.distribution), []).append(plugin)
        return [
            lines
            for (driver, _), lines in named.items()
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
        elif allowed is not None and name not in allowed and plugin.group != CLI:
            plugin.status, plugin.reason = Status.BLOCKED, "not in MDEVKIT_PLUGINS"


def _refuse_bad_driver_lines(plugins: Iterable[Plugin]) -> None:
    for plugin in plugins:
        if plugin.group == DRIVERS and plugin.usable:
            try:
                driver_line(plugin.name)
            except ValueError as error:
                plugin.fail(str(error))


def _refuse_duplicates(plugins: Iterable[Plugin]) -> None:
    """Refuse names that two distributions claim: neither is used, so that installing one cannot replace another silently."""
    claims: dict[tuple[str, ...], list[Plugin]] = {}
    for plugin in plugins:
        if plugin.usable:
            claims.setdefault(_claim(plugin), []).append(plugin)
    for (_, *_, name), claimants in claims.items():
        for plugin in claimants:
            others = {f"{other.distribution} {other.version}" for other in claimants if other.distribution != plugin.distribution}
            if others:
                reason = f"{', '.join(sorted(others))} brings a {name} too"
                plugin.fail(f"{reason}; remove one, or block it with MDEVKIT_PLUGINS_BLOCK")


def _claim(plugin: Plugin) -> tuple[str, ...]:
    """Return what one distribution alone may have: a name in a group; of drivers, which have many lines, a name on a bus."""
    if plugin.group != DRIVERS:
        return plugin.group, plugin.name
    driver, bus, _ = driver_line(plugin.name)
    return plugin.group, bus, driver


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  (a plugin's bug; stevedore lets some through, an AssertionError for one)
        errors.append(error)
    if errors:
        raise plugin.fail(describe(errors[0])) from errors[0]
    factory: Callable[[], Any] = loader.extensions[0].plugin
    return factory


def _make(plugin: Plugin, factory: Any) -> Any:
    if not callable(factory):
        raise plugin.fail(f"{plugin.entry.value} is not callable; a factory is wanted")
    try:
        return factory()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise plugin.fail(f"{plugin.entry.value}() failed: {describe(error)}") from error
