"""The service's devices: records, hosts and what clients ask for, held together. Everything runs on the event loop's thread.

An operation reserves or claims the device's entry before its first await, so no two operations on one device run at once where
that could do harm; and it goes on to its end even when the client that asked has gone (`Devices.run`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

import msgspec
from mdevkit.errors import MdevError
from mdevkit.names import parse_uuid

from mdevkit_service.link import HostDiedError, Link
from mdevkit_service.records import Life, Peer, Record, Records
from mdevkit_service.schema import Create, Device, DeviceDetail
from mdevkit_service.settings import OWN_SOCKETS, endpoint_in, own_sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mdevkit_service.hosts import Hosts
    from mdevkit_service.journal import Journal
    from mdevkit_service.settings import Settings
    from mdevkit_service.supervisor import HostProcess
    from mdevkit_service.wire import Message

log = logging.getLogger("mdevkit.service")

T = TypeVar("T")

#: What may stand before an endpoint's path, as in ``connect:PATH``: the driver's to understand.
_WORD: Final = re.compile("[a-z]+:")
#: Fields of a record that a host may have changed while there was no service.
_CHANGED_BY_HOSTS: Final = ("configured", "settings", "bind", "driver", "driver_override")
#: So many deaths of its host in a row during requests about a device, and the device is not made again.
FATAL: Final = 2


class Entry:
    """A device the service knows."""

    def __init__(self, record: Record, life: Life) -> None:
        self.record = record
        self.life = life
        #: Why it is not there though it should be.
        self.error: str | None = None
        #: An operation that creates or removes it runs.
        self.busy = False
        #: Deaths of its host during requests about it, since the last one that went well.
        self.deaths = 0


class Devices:
    """All devices. Implements `mdevkit_service.hosts.Owner`."""

    def __init__(self, settings: Settings, journal: Journal, hosts: Hosts) -> None:
        self._settings: Final = settings
        self._journal: Final = journal
        self._hosts: Final = hosts
        self._records: Final = Records(settings.devices)
        self._folder: Final = str(settings.devices)
        self._entries: Final[dict[str, Entry]] = {}
        self._tasks: Final[set[asyncio.Task[Any]]] = set()
        #: Called with the names of parents that can be used from now on.
        self.parents_came: Final[list[Callable[[list[str]], None]]] = []

    def load(self) -> None:
        """Read the records an earlier service has left."""
        self._entries.update({uuid: Entry(record, life) for uuid, (record, life) in self._records.load().items()})

    def sweep(self) -> None:
        """Remove sockets that belong to no device; when all hosts have been found."""
        for suffix in OWN_SOCKETS:
            for socket in self._settings.devices.glob(f"*{suffix}"):
                if socket.stem not in self._entries:
                    socket.unlink(missing_ok=True)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work to its end, whatever becomes of who waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def finish(self) -> None:
        """Wait for operations under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # -- looking -------------------------------------------------------------------------------------------------------

    @property
    def uuids(self) -> list[str]:
        """Every device that is there or should be."""
        return [uuid for uuid, entry in self._entries.items() if entry.life is not Life.NEW]

    async def every(self, parent: str | None = None) -> list[Device]:
        """Return every device (of a parent), in the order they were created."""
        told = await self._hosts.ask_all("devices")
        facts = {device["uuid"]: device for devices in told.values() for device in devices}
        return [
            self._device(entry, facts.get(uuid))
            for uuid, entry in list(self._entries.items())
            if entry.life is not Life.NEW and parent in {None, entry.record.parent}
        ]

    async def get(self, uuid: str, *, attributes: bool = True) -> DeviceDetail:
        """Return one device with its attributes, or without; ENODEV."""
        entry = self._entry(uuid)
        host = await self._settled_host(entry)
        if entry.error or host is None or host.state == "failed":
            return DeviceDetail(**msgspec.structs.asdict(self._device(entry, None)))
        facts = await self.read(uuid, "show", attributes=attributes)
        return msgspec.convert({**facts, "owner": entry.record.owner}, DeviceDetail)

    def _device(self, entry: Entry, facts: dict[str, Any] | None) -> Device:
        """Return a device as its host describes it, or as far as it is known here."""
        if facts is not None:
            return msgspec.convert({**facts, "owner": entry.record.owner}, Device)
        record, host = entry.record, self._host(entry)
        static = self._hosts.type_facts(record.parent, record.type)
        state, error = "failed", entry.error or (host.error if host else f"there is no parent {record.parent!r}")
        if entry.error is None and host is not None and host.state != "failed":
            state, error = ("removing" if entry.life is Life.GONE else "creating"), None
        return Device(
            uuid=record.uuid,
            parent=record.parent,
            type=record.type,
            bus=static.get("bus", ""),
            device_api=static.get("device_api", ""),
            state=state,
            driver_override=record.driver_override,
            error=error,
            owner=record.owner,
        )

    def _entry(self, uuid: str) -> Entry:
        """Return a device's entry; ENODEV, also while it is being created."""
        wanted = str(parse_uuid(uuid))
        entry = self._entries.get(wanted)
        if entry is None or entry.life is Life.NEW:
            raise MdevError(errno.ENODEV, f"there is no device {wanted}", wanted)
        return entry

    def _host(self, entry: Entry) -> HostProcess | None:
        return self._hosts.of_parent(entry.record.parent)

    async def _settled_host(self, entry: Entry) -> HostProcess | None:
        """Return a device's host when it is not just being started: what a device is cannot be told meanwhile."""
        host = self._host(entry)
        if host is not None:
            await host.settled()
        return host

    # -- creating ------------------------------------------------------------------------------------------------------

    async def create(self, wish: Create, peer: Peer | None) -> Device:
        """Create a device, on the first parent that has room; all or nothing.

        EINVAL, EEXIST, ENODEV (type, parent, driver), ENOENT (parameter), ENOSPC, or what vendor and driver raise.
        """
        uuid = str(parse_uuid(wish.uuid)) if wish.uuid else str(uuid4())
        _check_socket(wish.socket, peer)
        await self._hosts.keep_up()
        self.check_free(uuid)
        places = self._hosts.places(wish.type, wish.parent)
        record = Record(
            uuid=uuid,
            type=wish.type,
            parent=places[0][0],
            attributes=wish.attributes,
            bind=wish.bind,
            driver_override=wish.driver_override,
            endpoint=wish.socket,
            owner=wish.owner,
            peer=peer,
        )
        if wish.dry_run:
            return await self._try(record, places)
        entry = self._entries[uuid] = Entry(record, Life.NEW)
        entry.busy = True
        try:
            facts = await self._create_somewhere(entry, places)
        except BaseException:
            self._forget(entry)
            raise
        entry.busy = False
        return self._device(entry, facts)

    def check_free(self, uuid: str) -> None:
        """Raise EEXIST for the UUID of a device that is there, is about to be, or is not gone yet."""
        holder = self._entries.get(uuid)
        if holder is not None:
            message = f"UUID {uuid} is in use by a device of type {holder.record.type} on parent {holder.record.parent}"
            raise MdevError(errno.EEXIST, message, uuid)

    async def _create_somewhere(self, entry: Entry, places: list[tuple[str, HostProcess]]) -> dict[str, Any]:
        """Create a device on the first parent that has room, and make its record last."""

        async def create(parent: str, host: HostProcess) -> dict[str, Any]:
            entry.record.parent = parent
            self._records.begin(entry.record)
            return await self._make(host.call, entry.record, entry.record.peer)

        try:
            facts, host = await _first_with_room(places, create)
        except HostDiedError:
            raise MdevError(errno.EIO, f"device {entry.record.uuid}: its host died while it was created") from None
        try:
            self._records.turn(entry.record.uuid, Life.NEW, Life.THERE)
        except MdevError:
            await host.call("remove", uuid=entry.record.uuid, force=True, timeout=0.0)
            raise
        entry.life = Life.THERE
        return facts

    async def _try(self, record: Record, places: list[tuple[str, HostProcess]]) -> Device:
        """Return the device as it would be."""

        async def check(parent: str, host: HostProcess) -> None:
            record.parent = parent
            await host.call("check", type=record.type, parent=parent, attributes=record.attributes)

        await _first_with_room(places, check)
        device = self._device(Entry(record, Life.NEW), None)
        return msgspec.structs.replace(device, state="planned")

    def _make(
        self, call: Callable[..., Awaitable[dict[str, Any]]], record: Record, peer: Peer | None = None
    ) -> Awaitable[dict[str, Any]]:
        """Have a host make the device of a record, the first time on behalf of `peer`."""
        return call(
            "create",
            about=record.uuid,
            peer=peer,
            uuid=record.uuid,
            type=record.type,
            parent=record.parent,
            attributes=record.attributes,
            settings=[*record.configured, *record.settings.items()],
            bind=record.bind,
            driver=record.driver,
            driver_override=record.driver_override,
            endpoint=record.endpoint or endpoint_in(self._folder, record.uuid),
            note=msgspec.to_builtins(record),
        )

    def _forget(self, entry: Entry) -> None:
        """Drop a device that is not there."""
        uuid = entry.record.uuid
        host = self._host(entry)
        if self._entries.get(uuid) is entry:
            del self._entries[uuid]
        if host is not None:
            host.suspended.discard(uuid)
            if self._hosts.is_outdated(host):
                self._background(self._hosts.drop_outdated())
        try:
            self._records.drop(uuid, entry.life)
        except MdevError as error:
            log.error("%s", error)
        for path in own_sockets(endpoint_in(self._folder, uuid)):
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
        for path, peer in entry.record.sockets.items():
            self._background(self._hosts.tidy(path, peer))

    # -- removing ------------------------------------------------------------------------------------------------------

    async def remove(self, uuid: str, *, force: bool = False, timeout: float | None = None) -> None:
        """Remove a device: ENODEV, EAGAIN while it is being removed, EBUSY when its user does not let go."""
        entry = self._entry(uuid)
        with self._claimed(entry):
            self._records.turn(entry.record.uuid, Life.THERE, Life.GONE)
            entry.life = Life.GONE
            try:
                await self._remove_there(entry, force, timeout)
            except BaseException:
                self._records.turn(entry.record.uuid, Life.GONE, Life.THERE)
                entry.life = Life.THERE
                raise
            self._forget(entry)

    async def _remove_there(self, entry: Entry, force: bool, timeout: float | None) -> None:
        """Have the host remove a device. With a host that is dead, so is the device."""
        host = await self._settled_host(entry)
        if host is None or entry.error or host.state == "failed":
            return
        try:
            await host.call("remove", about=entry.record.uuid, uuid=entry.record.uuid, force=force, timeout=timeout)
        except HostDiedError:
            return
        except MdevError as error:
            if error.errno != errno.ENODEV:
                raise

    @contextmanager
    def _claimed(self, entry: Entry) -> Iterator[None]:
        """Be the only one that creates or removes a device; EAGAIN when somebody else does."""
        if entry.busy:
            raise MdevError(errno.EAGAIN, f"device {entry.record.uuid} is being removed; try again", entry.record.uuid)
        entry.busy = True
        try:
            yield
        finally:
            entry.busy = False

    # -- attributes, power and drivers ---------------------------------------------------------------------------------

    async def call(self, uuid: str, op: str, peer: Peer | None = None, **arguments: Any) -> Any:
        """Have a device's host carry out an operation on it; EIO with the reason when the device has failed."""
        try:
            return await self._call(uuid, op, peer, arguments)
        except HostDiedError:
            raise MdevError(errno.EIO, f"device {uuid}: its host died during this request") from None

    async def read(self, uuid: str, op: str, **arguments: Any) -> Any:
        """Do the same for an operation that changes nothing: asks once more when the host dies meanwhile."""
        try:
            return await self._call(uuid, op, None, arguments)
        except HostDiedError:
            return await self.call(uuid, op, **arguments)

    async def _call(self, uuid: str, op: str, peer: Peer | None, arguments: dict[str, Any]) -> Any:
        entry = self._entry(uuid)
        host = await self._settled_host(entry)
        if host is None or entry.error:
            raise MdevError(errno.EIO, f"device {entry.record.uuid} has failed: {entry.error or 'its parent is gone'}")
        result = await host.call(op, about=entry.record.uuid, peer=peer, uuid=entry.record.uuid, **arguments)
        entry.deaths = 0
        return result

    async def power(self, uuid: str, op: str) -> None:
        """Suspend or resume a device, and remember it."""
        host = self._host(self._entry(uuid))
        try:
            await self.call(uuid, op)
        finally:
            if host is not None:
                await host.note_suspended()

    async def set_attributes(self, uuid: str, values: dict[str, str], peer: Peer | None) -> None:
        """Store attributes, all or none, and remember those a new device must be given again."""
        entry = self._entry(uuid)
        kept = await self.call(uuid, "set", peer, values=values)
        if any(entry.record.settings.get(name) != value for name, value in kept.items()):
            entry.record.settings |= kept
            self._remember(entry)

    async def configure(self, uuid: str, name: str, value: str, peer: Peer | None) -> None:
        """Store an attribute on behalf of the device's definition: a new device must be given it again in any case."""
        entry = self._entry(uuid)
        await self.call(uuid, "configure", peer, name=name, value=value)
        entry.record.configured.append((name, value))
        self._remember(entry)

    async def bind(self, uuid: str, driver: str | None, override: bool) -> Device:
        """Bind a device, by hand to `driver` or to whichever will have it. That names no path, so it needs nobody's rights."""
        await self._hosts.keep_up()
        facts = await self.call(uuid, "bind", driver=driver, override=override)
        return self._bound(uuid, facts, driver)

    async def unbind(self, uuid: str, force: bool, timeout: float | None) -> Device:
        """Unbind a device."""
        return self._bound(uuid, await self.call(uuid, "unbind", force=force, timeout=timeout), None)

    async def override(self, uuid: str, driver: str | None) -> Device:
        """Set or clear driver_override."""
        facts = await self.call(uuid, "override", driver=driver)
        entry = self._entry(uuid)
        entry.record.driver_override = driver or None
        self._remember(entry)
        return self._device(entry, facts)

    def _bound(self, uuid: str, facts: dict[str, Any], driver: str | None) -> Device:
        entry = self._entry(uuid)
        record, host = entry.record, self._host(entry)
        if host is not None and not facts["suspended"]:
            host.suspended.discard(record.uuid)
        record.bind, record.driver, record.driver_override = facts["driver"] is not None, driver, facts["driver_override"]
        self._remember(entry)
        return self._device(entry, facts)

    def _remember(self, entry: Entry) -> None:
        """Store what has changed about a device, unless it was removed while its host made the change."""
        if self._entries.get(entry.record.uuid) is entry:
            self._records.update(entry.record, entry.life)

    # -- what becomes of hosts (Owner) ---------------------------------------------------------------------------------

    def in_use(self, host: HostProcess) -> bool:
        """See `Owner`."""
        return any(self._host(entry) is host for entry in self._entries.values())

    async def connected(self, host: HostProcess, link: Link) -> None:
        """Make a host's devices and the records agree, for a host that has just been connected or started."""
        listed = {facts["uuid"]: facts for facts in await link.call("devices")}
        for uuid, facts in listed.items():
            self._found(host, uuid, facts)
        for entry in [entry for entry in self._entries.values() if self._host(entry) is host]:
            if entry.record.uuid in listed or entry.busy:
                continue
            if entry.life is Life.THERE:
                await self._remake(entry, link)
            else:
                self._forget(entry)
        await self._suspend_again(host, link, listed)

    async def _suspend_again(self, host: HostProcess, link: Link, listed: dict[str, dict[str, Any]]) -> None:
        """Suspend what was suspended in the host before this one; devices, which run for a moment, before their parents."""
        found = {name for name, facts in (listed | host.parents).items() if facts.get("suspended")}
        for name in sorted(host.suspended - found, key=host.parents.__contains__):
            try:
                whom: dict[str, Any] = {"parent": name} if name in host.parents else {"uuid": name}
                await link.call("suspend", **whom)
                found.add(name)
            except HostDiedError:
                raise
            except MdevError as error:
                log.error("%s is not suspended any more: %s", name, error)
        host.suspended = found

    def _found(self, host: HostProcess, uuid: str, facts: dict[str, Any]) -> None:
        """Take note that a host has this device: it gets a record if it has none, and one that was half-way is put right.

        What cannot be written is so in memory: no full disk makes a device fail that runs.
        """
        entry = self._entries.get(uuid)
        try:
            if entry is None:
                log.warning("device %s had no record; it gets one", uuid)
                entry = self._entries[uuid] = Entry(self._adopted(host, uuid, facts), Life.THERE)
                self._remember(entry)
            elif self._host(entry) is not host:
                log.error("host %s has a device %s, which is another host's", host.key, uuid)
            elif not entry.busy:
                self._put_right(entry, facts)
        except MdevError as error:
            log.error("%s", error)

    def _adopted(self, host: HostProcess, uuid: str, facts: dict[str, Any]) -> Record:
        """Return a record for a device without one; EINVAL for what cannot be the host's. Another user's gives no rights."""
        record = _record_of(facts)
        if record.uuid != str(parse_uuid(uuid)) or record.parent not in host.parents:
            raise MdevError(errno.EINVAL, f"host {host.key} has no device {uuid} on parent {record.parent}", uuid)
        if self._settings.host_user is not None:
            record.peer, record.sockets = None, {}
        return record

    def _put_right(self, entry: Entry, facts: dict[str, Any]) -> None:
        before, entry.life, entry.error = entry.life, Life.THERE, None
        record = _as_in_host(entry.record, facts.get("note"))
        changed = record != entry.record
        if changed:
            entry.record = record
        if before is not Life.THERE:
            self._records.turn(record.uuid, before, Life.THERE)
        if changed:
            self._remember(entry)

    async def _remake(self, entry: Entry, link: Link) -> None:
        """Make a device again in a new host. One that cannot be made stays, failed, and so does one that is fatal."""
        if entry.deaths >= FATAL:
            self._fail(entry, f"its host died {entry.deaths} times in a row of requests about it; remove it")
            return
        try:
            await self._make(link.call, entry.record)
        except HostDiedError:
            raise
        except MdevError as error:
            self._fail(entry, str(error))
        else:
            entry.error = None

    def _fail(self, entry: Entry, reason: str) -> None:
        if entry.error == reason:
            return
        entry.error, record = reason, entry.record
        env = {"MDEV_TYPE": record.type, "MDEV_PARENT": record.parent, "MDEV_STATE": "failed", "ERROR": reason}
        self._journal.emit("change", record.uuid, env)

    def running(self, host: HostProcess) -> None:
        """See `Keeper.running`."""
        for listener in self.parents_came:
            listener(list(host.parents))

    def died(self, host: HostProcess, reason: str, about: list[str]) -> None:
        """Report a host's death on its parents and devices."""
        for parent in host.parents:
            self._journal.emit("change", parent, {"MDEV_STATE": "failed", "ERROR": reason})
        for entry in self._entries.values():
            if self._host(entry) is host and not entry.busy:
                entry.deaths += entry.record.uuid in about
                self._fail(entry, reason)

    def happened(self, host: HostProcess, message: Message) -> None:
        """Take over a host's events."""
        for event in message["events"]:
            if "lagged" in event:
                log.error("host %s: %d events were lost", host.key, event["lagged"])
            elif self._journal.take(host.epoch, event):
                self._consider(host, event)

    def _consider(self, host: HostProcess, event: dict[str, Any]) -> None:
        """Look at a device that came or went without our doing."""
        entry = self._entries.get(event["subject"])
        came = event["action"] == "add" and entry is None and "MDEV_TYPE" in event["env"]
        went = event["action"] == "remove" and entry is not None and not entry.busy
        if came or went:
            self._background(self._look(host, event["subject"]))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look(self, host: HostProcess, uuid: str) -> None:
        """Make one device and its record agree."""
        try:
            listed = {facts["uuid"]: facts for facts in await host.call("devices")}
        except MdevError as error:
            log.info("device %s: %s", uuid, error)
            return
        entry = self._entries.get(uuid)
        if uuid in listed:
            self._found(host, uuid, listed[uuid])
        elif entry is not None and not entry.busy and host is self._host(entry) and not entry.error:
            self._forget(entry)

    async def opened(self, host: HostProcess, uuid: str, path: str, peer: Peer | None) -> int:
        """See `Keeper.opened`."""
        entry = self._entries.get(uuid)
        if entry is None or self._host(entry) is not host:
            raise MdevError(errno.EPERM, f"cannot listen at {path}: this host has no device {uuid}", path)
        if str(Path(path)) in own_sockets(endpoint_in(self._folder, uuid)):
            return await self._hosts.open_own(path)
        before = entry.record.sockets.get(path)
        asker = _asker(entry.record, path, peer)
        # Noted before it is made: whoever removes the device, a later service too, removes it.
        self._note_socket(entry, path, asker)
        try:
            return await self._hosts.open(path, asker)
        except MdevError:
            self._note_socket(entry, path, before)
            raise

    def _note_socket(self, entry: Entry, path: str, peer: Peer | None) -> None:
        """Remember with whose rights a path is opened, or that it is not."""
        sockets = entry.record.sockets
        if peer == sockets.get(path):
            return
        if peer is None:
            del sockets[path]
        else:
            sockets[path] = peer
        self._remember(entry)


async def _first_with_room(
    places: list[tuple[str, HostProcess]], attempt: Callable[[str, HostProcess], Awaitable[T]]
) -> tuple[T, HostProcess]:
    """Return what the first parent gives that has an instance left; the first parent's error when none has."""
    full: MdevError | None = None
    for parent, host in places:
        try:
            return await attempt(parent, host), host
        except MdevError as error:
            if error.errno != errno.ENOSPC:
                raise
            full = full or error
    assert full is not None
    raise full


def _asker(record: Record, path: str, peer: Peer | None) -> Peer:
    """Return whose rights a device's path is opened with: those of whoever has named it, now or before; EPERM for nobody.

    Nobody else gets it opened by naming it again, nor by setting or binding what makes the device open it.
    """
    endpoint = record.endpoint is not None and str(Path(path)) in own_sockets(record.endpoint)
    before = record.peer if endpoint else record.sockets.get(path)
    asker = peer or before
    if asker is None:
        raise MdevError(errno.EPERM, f"cannot listen at {path}: nobody asked for it", path)
    if before is not None and before.uid != asker.uid:
        raise MdevError(errno.EPERM, f"cannot listen at {path}: user {before.uid} has named it, not user {asker.uid}", path)
    return asker


def _check_socket(text: str | None, peer: Peer | None) -> None:
    """Refuse what is no place for an endpoint: an absolute path, with a word before it for one that is made by the client."""
    if text is None:
        return
    _, colon, path = text.partition(":") if _WORD.match(text) else ("", "", text)
    if not Path(path).is_absolute():
        raise MdevError(errno.EINVAL, f"{path!r} is not an absolute path", path)
    if colon and peer is not None and peer.uid not in {0, os.getuid()}:
        message = f"{text!r}: devices of others listen and connect nowhere, since that would be with the rights of their host"
        raise MdevError(errno.EPERM, message, text)


def _as_in_host(record: Record, note: Any) -> Record:
    """Return a record with what its host has changed; who asked for the device, and where it is, no host can change."""
    try:
        told = msgspec.convert(note, Record)
    except msgspec.ValidationError:
        return record
    return msgspec.structs.replace(record, **{name: getattr(told, name) for name in _CHANGED_BY_HOSTS})


def _record_of(facts: dict[str, Any]) -> Record:
    """Return a record for a device whose own has been lost: as the host was told, or from what can be seen."""
    try:
        return msgspec.convert(facts.get("note"), Record)
    except msgspec.ValidationError:
        return Record(
            uuid=facts["uuid"],
            type=facts["type"],
            parent=facts["parent"],
            bind=facts["driver"] is not None,
            driver_override=facts["driver_override"],
        )
