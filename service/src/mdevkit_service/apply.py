"""``apply``: a list of definitions that shall be, and the fewest changes that make it so.

What has a label (`owner`) of somebody else's is left alone. A device whose attributes can be changed while it runs is changed; one
that would have to be made again is, only if that is allowed: somebody may be using it. Runs on the event loop's thread.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec
from mdevkit.errors import MdevError

from mdevkit_service.attrs import compare
from mdevkit_service.defined import Defined, by_place
from mdevkit_service.definitions import Definition, check_attributes, check_parent, uuid_of

if TYPE_CHECKING:
    from mdevkit_service.definitions import Entry
    from mdevkit_service.records import Peer
    from mdevkit_service.schema import Device, DeviceDetail


class Wanted(msgspec.Struct, forbid_unknown_fields=True):
    """A definition that shall be."""

    uuid: str
    parent: str
    mdev_type: str
    #: ``auto`` also means that it shall run now.
    start: str = "manual"
    attrs: list[dict[str, str]] = []


class Apply(msgspec.Struct, forbid_unknown_fields=True):
    """What shall be."""

    definitions: list[Wanted]
    #: The label of what is stored; what has another is left alone.
    owner: str | None = None
    #: Stop and remove what has this label and is not in the list.
    prune: bool = False
    #: Stop and start devices that cannot be changed while they run.
    restart: bool = False
    #: Only tell what would be done.
    dry_run: bool = False


class Change(msgspec.Struct):
    """One change."""

    #: stop, undefine, define, modify, set, restart, start; restart-needed for what was not allowed.
    action: str
    uuid: str
    parent: str
    #: What changes, in words.
    detail: str = ""
    error: str | None = None


class Changes(msgspec.Struct):
    """The changes, in the order they were made."""

    changes: list[Change]


_ORDER: Final = ("stop", "undefine", "define", "modify", "set", "restart-needed", "restart", "start")

Work = Callable[[], Awaitable[Any]]


class _Plan:
    """Finds the changes."""

    def __init__(self, defined: Defined, wish: Apply, peer: Peer | None) -> None:
        self.steps: Final[list[tuple[Change, Work]]] = []
        self._defined: Final = defined
        self._wish: Final = wish
        self._peer: Final = peer
        self._stopped: Final[set[str]] = set()

    async def make(self) -> None:
        """Compare what shall be with what is; EINVAL for a list that makes no sense, EPERM for what is somebody else's."""
        wanted = [_definition(item, self._wish.owner) for item in self._wish.definitions]
        _check_unique(wanted)
        stored = by_place(await self._defined.off_loop(self._defined.store.entries))
        devices = {device.uuid: device for device in await self._defined.devices.every()}
        places = {(definition.parent, definition.uuid) for definition in wanted}
        for definition in wanted:
            self._check_owner(definition, stored.get((definition.parent, definition.uuid)))
        if self._wish.prune:
            for place, entry in stored.items():
                if place not in places and isinstance(entry, Definition) and entry.owner == self._wish.owner:
                    self._prune(entry, devices.get(entry.uuid))
        for definition in wanted:
            self._store(definition, stored.get((definition.parent, definition.uuid)))
            await self._run(definition, devices.get(definition.uuid))
        self.steps.sort(key=lambda step: _ORDER.index(step[0].action))

    def _add(self, action: str, definition: Definition, detail: str, work: Work) -> None:
        self.steps.append((Change(action, definition.uuid, definition.parent, detail), work))

    def _check_owner(self, definition: Definition, entry: Entry | None) -> None:
        owner = entry.owner if isinstance(entry, Definition) else None
        if owner not in {None, self._wish.owner}:
            place = f"{definition.parent}/{definition.uuid}"
            raise MdevError(errno.EPERM, f"definition {place} belongs to {owner!r}: it is left alone", definition.uuid)

    def _ours(self, device: Device) -> bool:
        return device.owner in {None, self._wish.owner}

    def _prune(self, entry: Definition, device: Device | None) -> None:
        if device is not None and device.parent == entry.parent and self._ours(device):
            self._stopped.add(entry.uuid)
            self._add("stop", entry, "", lambda: self._defined.devices.remove(entry.uuid))
        self._add("undefine", entry, "", lambda: self._undefine(entry))

    async def _undefine(self, entry: Definition) -> None:
        """Remove a definition whose device has been stopped; while that still runs, it stays."""
        device = await self._defined.running(entry.uuid)
        if device is not None and device.parent == entry.parent and self._ours(device):
            raise MdevError(errno.EBUSY, "the device still runs", entry.uuid)
        await self._defined.remove(entry.parent, entry.uuid)

    def _store(self, definition: Definition, entry: Entry | None) -> None:
        if isinstance(entry, Definition):
            wanted = definition.changed(extra={**entry.extra, **definition.extra})
            changed = [name for name, value in wanted.config.items() if entry.config[name] != value]
            changed += ["owner"] if wanted.owner != entry.owner else []
            if not changed:
                return
            action, detail = "modify", ", ".join(changed)
        else:
            wanted, action, detail = definition, "modify" if entry else "define", "the file cannot be used" if entry else ""
        self._add(action, definition, detail, lambda: self._defined.put(wanted.parent, wanted.uuid, lambda _: wanted))

    async def _run(self, definition: Definition, device: Device | None) -> None:
        """Plan what becomes of the device."""
        if device is None or (device.uuid in self._stopped and device.parent != definition.parent):
            if definition.auto:
                self._add("start", definition, "", lambda: self._start(definition))
            return
        if not self._ours(device):
            return
        detail = await self._defined.running(device.uuid)
        if detail is None:
            return
        live, again = self._differences(definition, detail)
        if again:
            self._restart(definition, again)
        elif live:
            words = ", ".join(f"{name}={value}" for name, value in live.items())
            self._add("set", definition, words, lambda: self._defined.devices.set_attributes(device.uuid, live, self._peer))

    def _differences(self, definition: Definition, device: DeviceDetail) -> tuple[dict[str, str], str]:
        """Return the attributes that can be changed while the device runs, and why it must be made again, if it must."""
        for name, one, other in (("parent", device.parent, definition.parent), ("type", device.type, definition.mdev_type)):
            if one != other:
                return {}, f"{name} {one} becomes {other}"
        facts = self._defined.attribute_facts(definition)
        differing = compare(definition.attrs, device.attributes, facts)
        fixed = [name for name in differing if "w" not in facts[name]["mode"]]
        return {name: values["defined"] for name, values in differing.items()}, ", ".join(fixed)

    def _restart(self, definition: Definition, why: str) -> None:
        async def restart() -> None:
            await self._defined.devices.remove(definition.uuid)
            await self._start(definition)

        async def nothing() -> None:
            """Leave it as it is."""

        allowed = self._wish.restart
        self._add("restart" if allowed else "restart-needed", definition, why, restart if allowed else nothing)

    async def _start(self, definition: Definition) -> None:
        await self._defined.start_stored(definition.parent, definition.uuid, self._peer, ensure=True)


async def apply(defined: Defined, wish: Apply, peer: Peer | None) -> Changes:
    """Find the changes and make them, unless it is a dry run. One that fails says so, and the others are made."""
    async with defined.applying:
        plan = _Plan(defined, wish, peer)
        await plan.make()
        for change, work in [] if wish.dry_run else plan.steps:
            try:
                await work()
            except MdevError as error:
                change.error = str(error)
        return Changes([change for change, _ in plan.steps])


def _definition(item: Wanted, owner: str | None) -> Definition:
    uuid = uuid_of(item.uuid)
    if not uuid:
        raise MdevError(errno.EINVAL, f"{item.uuid!r} is not a UUID (8-4-4-4-12 hex digits)", item.uuid)
    extra = {} if owner is None else {"owner": owner}
    return Definition(check_parent(item.parent), uuid, item.mdev_type, item.start, check_attributes(item.attrs), extra)


def _check_unique(wanted: list[Definition]) -> None:
    seen: set[str] = set()
    for definition in wanted:
        if definition.uuid in seen:
            raise MdevError(errno.EINVAL, f"{definition.uuid} is in the list twice: a device runs once", definition.uuid)
        seen.add(definition.uuid)
