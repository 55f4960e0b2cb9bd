"""Definitions as the service uses them: started by hand and with their parents, compared with what runs, made so by `apply`.

A parent that registers starts its definitions once: which run of its host that was is noted, so a service that is killed meanwhile
goes on, and one that merely finds the host again starts nothing that was stopped. What went wrong last is noted with it. On the
event loop's thread; files are read and written on others.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import msgspec
from mdevkit.errors import MdevError

from mdevkit_service.attrs import compare, split
from mdevkit_service.definitions import BadDefinition, Definition, Definitions, Entry, usable
from mdevkit_service.records import Peer
from mdevkit_service.schema import Create, Device, DeviceDetail

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator
    from pathlib import Path

    from mdevkit_service.devices import Devices
    from mdevkit_service.hosts import Hosts
    from mdevkit_service.journal import Journal
    from mdevkit_service.settings import Settings

log = logging.getLogger("mdevkit.service")

P = ParamSpec("P")
T = TypeVar("T")


class DefinitionInfo(msgspec.Struct):
    """A definition, and how it fares."""

    uuid: str
    parent: str
    #: Empty for a file that cannot be used.
    mdev_type: str
    start: str
    attrs: list[dict[str, str]]
    path: str
    #: Names this content of the file.
    tag: str
    #: A label: whose it is.
    owner: str | None = None
    #: Whether the device runs on this parent.
    active: bool = False
    #: Where the device that runs differs: parent, mdev_type, attrs, each with ``defined`` and ``running``.
    drift: dict[str, Any] = {}
    #: Why the file cannot be used, or why the device could not be started last.
    error: str | None = None


class _Notes(msgspec.Struct):
    """What outlives the service."""

    #: Parent to the run of its host for which definitions have been started.
    started: dict[str, str] = {}
    #: ``parent/uuid`` to the last error.
    errors: dict[str, str] = {}
    #: Devices that are being configured, and nobody was told of.
    unfinished: list[str] = []


class Defined:
    """The service's definitions."""

    def __init__(self, settings: Settings, journal: Journal, hosts: Hosts, devices: Devices) -> None:
        self.store: Final = Definitions(settings.definitions)
        self.devices: Final = devices
        #: One at a time compares everything with everything.
        self.applying: Final = asyncio.Lock()
        self._hosts: Final = hosts
        self._journal: Final = journal
        self._path: Final = settings.runtime / "definitions.json"
        self._notes: Final = _read(self._path)
        #: Devices that an earlier service has left unfinished.
        self._left: Final = set(self._notes.unfinished)
        self._tasks: Final[set[asyncio.Task[None]]] = set()
        #: Whose rights definitions get that start with their parent: ours, unless others may have stored them.
        self._self: Final = None if settings.group else Peer.ours()
        devices.parents_came.append(self._parents_came)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def every(self, uuid: str | None = None, parent: str | None = None, *, drift: bool = True) -> list[DefinitionInfo]:
        """Return the definitions (of a device, of a parent), those that cannot be used among them."""
        if uuid is None:
            entries = await self.off_loop(self.store.entries, parent)
            running = {device.uuid: device for device in await self.devices.every()}
        else:
            entries = await self.off_loop(self.store.find, uuid, parent)
            found = await self.running(uuid)
            running = {uuid: found} if found else {}
        return list(await asyncio.gather(*(self._info(entry, running.get(entry.uuid), drift) for entry in entries)))

    async def running(self, uuid: str) -> DeviceDetail | None:
        """Return a device that runs, with its attributes."""
        try:
            return await self.devices.get(uuid)
        except MdevError as error:
            if error.errno != errno.ENODEV:
                raise
        return None

    async def _info(self, entry: Entry, device: Device | None, drift: bool) -> DefinitionInfo:
        if isinstance(entry, BadDefinition):
            return DefinitionInfo(entry.uuid, entry.parent, "", "", [], entry.path, entry.tag, error=entry.error)
        info = DefinitionInfo(
            entry.uuid, entry.parent, entry.mdev_type, entry.start, entry.attrs, entry.path, entry.tag, entry.owner
        )
        info.active = device is not None and device.parent == entry.parent
        info.error = self._notes.errors.get(_key(entry))
        if device is not None and drift:
            info.drift = await self._drift(entry, device)
        return info

    async def _drift(self, definition: Definition, device: Device) -> dict[str, Any]:
        """Return how a device that runs differs from its definition."""
        if device.parent != definition.parent:
            return {"parent": {"defined": definition.parent, "running": device.parent}}
        drift: dict[str, Any] = {}
        if device.type != definition.mdev_type:
            drift["mdev_type"] = {"defined": definition.mdev_type, "running": device.type}
        if definition.attrs and device.state != "failed":
            detail = device if isinstance(device, DeviceDetail) else await self.running(device.uuid)
            attrs = compare(definition.attrs, detail.attributes, self.attribute_facts(definition)) if detail else {}
            drift |= {"attrs": attrs} if attrs else {}
        return drift

    def attribute_facts(self, definition: Definition) -> dict[str, dict[str, Any]]:
        """Return the attributes of a definition's type by name; empty when the type is not known."""
        facts = self._hosts.type_facts(definition.parent, definition.mdev_type)
        return {attribute["name"]: attribute for attribute in facts.get("device_attributes", [])}

    async def one(self, parent: str, uuid: str) -> DefinitionInfo:
        """Return one definition; ENODEV."""
        found = await self.every(uuid, parent)
        if not found:
            raise MdevError(errno.ENODEV, f"Mediated device {parent}/{uuid} is not defined", uuid)
        return found[0]

    # -- storing -------------------------------------------------------------------------------------------------------

    async def put(self, parent: str, uuid: str, change: Callable[[Entry | None], Definition]) -> Definition:
        """Store a definition; see `Definitions.update`."""
        stored = await self.off_loop(self.store.update, parent, uuid, change)
        self._turned(stored, "stored")
        return stored

    async def remove(self, parent: str, uuid: str, tag: str | None = None) -> None:
        """Remove a definition; see `Definitions.remove`."""
        await self.off_loop(self.store.remove, parent, uuid, tag=tag)
        self._turned(Definition(parent, uuid, ""), "removed")

    def _turned(self, definition: Definition, how: str) -> None:
        """Tell that a definition has changed. What was wrong with it need not be wrong any more."""
        self._clear(definition)
        env = {"MDEV_PARENT": definition.parent, "MDEV_TYPE": definition.mdev_type, "DEFINITION": how}
        self._journal.emit("change", definition.uuid, {name: value for name, value in env.items() if value})

    @staticmethod
    async def off_loop(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Do what may wait for a disk."""
        return await asyncio.to_thread(call, *arguments, **options)

    # -- starting ------------------------------------------------------------------------------------------------------

    async def start_stored(self, parent: str, uuid: str, peer: Peer | None, *, ensure: bool = False) -> Device:
        """Start a definition that is stored, and note what goes wrong; see `start`."""
        definition = await self.off_loop(self.store.get, parent, uuid)
        try:
            device = await self.start(definition, peer, ensure=ensure)
        except MdevError as error:
            self._notes.errors[_key(definition)] = str(error)
            self._save()
            raise
        self._clear(definition)
        return device

    async def start(self, definition: Definition, peer: Peer | None, *, ensure: bool = False, dry_run: bool = False) -> Device:
        """Make the device of a definition, with its attributes in order; all or nothing.

        A device that is there already is EEXIST, unless `ensure` is set and it is of this parent and type.
        """
        first, later = split(definition.attrs, self.attribute_facts(definition))
        wish = Create(
            type=definition.mdev_type,
            parent=definition.parent,
            uuid=definition.uuid,
            attributes=first,
            bind=not later,
            owner=definition.owner,
            dry_run=dry_run,
        )
        try:
            if dry_run or not later:
                return await self.devices.create(wish, peer)
            with self._unfinished(definition.uuid):
                await self.devices.create(wish, peer)
                return await self._configure(definition.uuid, later, peer)
        except MdevError as error:
            if not ensure or error.errno != errno.EEXIST:
                raise
            return await self._same(definition, error)

    @contextmanager
    def _unfinished(self, uuid: str) -> Iterator[None]:
        """Have a later service remove the device if this one is killed meanwhile; EEXIST for one that is there already."""
        self.devices.check_free(uuid)
        self._notes.unfinished.append(uuid)
        self._save()
        try:
            yield
        finally:
            self._notes.unfinished.remove(uuid)
            self._save()

    async def _configure(self, uuid: str, attrs: list[tuple[str, str]], peer: Peer | None) -> Device:
        """Store attributes in a device nobody uses yet, then let a driver have it; on failure the device is removed."""
        try:
            for name, value in attrs:
                await self._store_attribute(uuid, name, value, peer)
            return await self.devices.bind(uuid, None, False)
        except MdevError:
            await self.devices.remove(uuid, force=True)
            raise

    async def _store_attribute(self, uuid: str, name: str, value: str, peer: Peer | None) -> None:
        try:
            await self.devices.configure(uuid, name, value, peer)
        except MdevError as error:
            what = f"Invalid attribute '{name}'" if error.errno == errno.ENOENT else f"Failed to write {value} to attribute {name}"
            raise MdevError(error.errno or errno.EIO, f"{what}: {error}", uuid) from error

    async def _same(self, definition: Definition, refusal: MdevError) -> Device:
        """Return the device that is there, if it is the one that is wanted."""
        device = await self.running(definition.uuid)
        if device is None or (device.parent, device.type) != (definition.parent, definition.mdev_type):
            raise refusal
        return device

    # -- with the parent -----------------------------------------------------------------------------------------------

    def _parents_came(self, parents: list[str]) -> None:
        """Start what is to start with these parents, in the background."""
        for parent in parents:
            host = self._hosts.of_parent(parent)
            if host is not None:
                self._background(self._settle(parent, host.epoch))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self.devices.run(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, parent: str, epoch: str) -> None:
        """Put right what an earlier service has left of a parent's devices, and start its definitions unless that is done."""
        try:
            await self._drop_unfinished(parent)
            if self._notes.started.get(parent) != epoch:
                await self._autostart(parent, epoch)
        except Exception:
            log.exception("definitions of %s", parent)

    async def _autostart(self, parent: str, epoch: str) -> None:
        """Start a parent's definitions. What cannot be started or read keeps nothing else from it."""
        try:
            entries = await self.off_loop(self.store.entries, parent)
        except MdevError as error:
            log.error("definitions of %s: %s", parent, error)
            return
        for entry in entries:
            try:
                if usable(entry).auto:
                    await self.start_stored(parent, entry.uuid, self._self, ensure=True)
            except MdevError as error:
                log.error("definition %s/%s: %s", parent, entry.uuid, error)
                env = {"MDEV_PARENT": parent, "DEFINITION": "failed", "ERROR": str(error)}
                self._journal.emit("change", entry.uuid or parent, env)
        self._notes.started[parent] = epoch
        self._save()

    async def _drop_unfinished(self, parent: str) -> None:
        """Remove devices that a service which was killed has left half configured."""
        for uuid in sorted(self._left):
            device = await self.running(uuid)
            if device is not None and device.parent != parent:
                continue
            if device is not None:
                log.warning("device %s was not finished; it is removed", uuid)
                with suppress(MdevError):
                    await self.devices.remove(uuid, force=True)
            if uuid in self._left:  # or another parent's turn came meanwhile
                self._left.remove(uuid)
                self._notes.unfinished.remove(uuid)
            self._save()

    # -- notes ---------------------------------------------------------------------------------------------------------

    def _clear(self, definition: Definition) -> None:
        if self._notes.errors.pop(_key(definition), None) is not None:
            self._save()

    def _save(self) -> None:
        """Keep the notes; where that cannot be, they are good for as long as the service lives."""
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self._notes))
            temporary.chmod(0o600)
            temporary.rename(self._path)
        except OSError as error:
            log.error("%s cannot be written: %s", self._path, error.strerror)


def _key(definition: Definition) -> str:
    return f"{definition.parent}{os.sep}{definition.uuid}"


def _read(path: Path) -> _Notes:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Notes)
    except FileNotFoundError:
        return _Notes()
    except (OSError, msgspec.MsgspecError) as error:
        log.error("%s cannot be read: %s", path, error)
        return _Notes()


def by_place(entries: Iterable[Entry]) -> dict[tuple[str, str], Entry]:
    """Return entries by parent and UUID."""
    return {(entry.parent, entry.uuid): entry for entry in entries}
