"""All hosts: which there should be, and questions to them. On the event loop's thread."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
from mdevkit.errors import MdevError
from mdevkit.hints import no_parents

from mdevkit_service.schema import Driver, HostInfo, Parent
from mdevkit_service.scout import Watch
from mdevkit_service.supervisor import HostProcess, Keeper, living

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mdevkit_service.forker import Forker
    from mdevkit_service.journal import Journal
    from mdevkit_service.records import Peer
    from mdevkit_service.settings import Settings

log = logging.getLogger("mdevkit.service")

#: Seconds a plugin gets to say which parents it brings.
SCOUT_LIMIT: Final = 10.0
#: Seconds a host gets to answer a question that goes to all.
ASK_LIMIT: Final = 5.0
_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGESIZE")


class Owner(Keeper, Protocol):
    """Who keeps the devices, and can tell which hosts have some."""

    def in_use(self, host: HostProcess) -> bool:
        """Whether a host has devices, or is to have some."""


class Hosts:
    """The hosts of one service."""

    def __init__(self, settings: Settings, forker: Forker, journal: Journal) -> None:
        self._settings: Final = settings
        self._forker: Final = forker
        self._journal: Final = journal
        self._hosts: Final[dict[str, HostProcess]] = {}
        #: Parent's name to its host, for every parent that is known.
        self._parents: Final[dict[str, HostProcess]] = {}
        #: Those that are to be started.
        self._new: list[HostProcess] = []
        #: Those whose plugins are gone or exchanged, while they have devices.
        self._outdated: Final[set[HostProcess]] = set()
        #: Plugin to its distribution and version, as last seen.
        self._plugins: Final[dict[str, str]] = {}
        #: Parent to the plugin that brings it.
        self._brought: Final[dict[str, str]] = {}
        #: Plugin to why it cannot be used.
        self._broken: Final[dict[str, str]] = {}
        #: Tells when something was installed or removed.
        self._watch: Final = Watch()
        self._rescans: Final[set[asyncio.Task[None]]] = set()
        #: One at a time finds out what is installed.
        self._scanning: Final = asyncio.Lock()
        self._owner: Owner | None = None

    # -- coming and going ----------------------------------------------------------------------------------------------

    async def start(self, owner: Owner) -> None:
        """Find the hosts that live and start those that are missing; returns when all run or have failed."""
        self._owner = owner
        for key in living(self._settings.hosts):
            self._add(key)
        with suppress(MdevError):
            await self._scout(fresh=False)
        await self._start_new()

    def _add(self, key: str) -> HostProcess:
        assert self._owner is not None
        host = self._hosts[key] = HostProcess(key, self._settings, self._forker, self._journal, self._owner)
        self._new.append(host)
        return host

    async def _start_new(self) -> None:
        new, self._new = self._new, []
        for host in new:
            host.start()
        await asyncio.gather(*(host.settled() for host in new))

    async def keep_up(self) -> None:
        """Find out what is installed if that has changed since the last look; else cost next to nothing.

        What takes long, as a plugin that hangs does, goes on without whoever waits.
        """
        if self._owner is not None and self._watch.changed():
            log.info("what is installed has changed")
            task = asyncio.create_task(self._rescan_quietly())
            self._rescans.add(task)
            task.add_done_callback(self._rescans.discard)
        if self._rescans:
            await asyncio.wait(self._rescans, timeout=ASK_LIMIT)

    async def _rescan_quietly(self) -> None:
        try:
            await self.rescan()
        except MdevError as error:
            log.error("what is installed cannot be told: %s", error)

    async def rescan(self) -> None:
        """Start hosts for plugins that were installed since, end those of plugins that are gone and have no devices.

        Returns when the new ones run or have failed. Plugins that could not be used are tried again, and hosts that run learn of
        new drivers.
        """
        await self._scout(fresh=True)
        await self.ask_all("refresh")
        await self._start_new()

    async def _scout(self, *, fresh: bool) -> None:
        """Ask each plugin we do not know, in a process of its own, which parents it brings and in which host they belong."""
        async with self._scanning:
            answer, _ = await self._forker.ask("scout", {"fresh": fresh}, SCOUT_LIMIT)
            found: dict[str, str] = answer["plugins"]
            for name in [name for name, edition in self._plugins.items() if found.get(name) != edition]:
                self._withdraw(name)
            if fresh:
                await self.drop_outdated()
            unknown = [name for name in found if name not in self._plugins or name in self._broken]
            asked = (self._forker.ask("scout", {"plugin": name, "fresh": fresh}, SCOUT_LIMIT) for name in unknown)
            answers = await asyncio.gather(*asked, return_exceptions=True)
            # In turn: of two that bring the same parent it is always the same one that may.
            for name, told in zip(unknown, answers, strict=True):
                await self._take_plugin(name, told)
            self._plugins.update(found)

    async def _take_plugin(self, name: str, told: tuple[dict[str, Any], list[int]] | BaseException) -> None:
        """Give the parents a plugin has told of their hosts."""
        self._broken.pop(name, None)
        try:
            if isinstance(told, BaseException):
                raise told
            parents = told[0]["parents"]
            self._check_names(name, [parent["name"] for parent in parents])
            for parent in parents:
                host = await self._host_for(parent["name"], parent["host"])
                if name not in host.plugins:
                    host.plugins.append(name)
                self._parents[parent["name"]] = host
        except MdevError as error:
            log.error("plugin %s: %s", name, error)
            self._broken[name] = str(error)

    def _check_names(self, plugin: str, parents: list[str]) -> None:
        """Note which parents a plugin brings: EEXIST for one that has the name of another plugin's, which goes on."""
        for parent in parents:
            other = self._brought.get(parent, plugin)
            if other != plugin:
                raise MdevError(errno.EEXIST, f"parent {parent} is plugin {other}'s: remove one of the two", parent)
        self._brought.update(dict.fromkeys(parents, plugin))

    async def _host_for(self, parent: str, key: str) -> HostProcess:
        """Return the host a parent is to live in: EBUSY when it runs already, without that parent and with devices."""
        assert self._owner is not None
        host = self._hosts.get(key)
        if host is None:
            return self._add(key)
        if host not in self._new and parent not in host.parents:
            if self._owner.in_use(host):
                message = f"parent {parent} belongs into host {key}, which has devices; remove them, then: mdevkit service rescan"
                raise MdevError(errno.EBUSY, message, parent)
            host = await self._exchange(host)
        return host

    def _withdraw(self, name: str) -> None:
        """Forget a plugin that was removed, or is there in another version."""
        del self._plugins[name]
        self._broken.pop(name, None)
        for parent in [parent for parent, plugin in self._brought.items() if plugin == name]:
            del self._brought[parent]
        for host in self._hosts.values():
            if name in host.plugins:
                host.plugins.remove(name)
                self._outdated.add(host)

    def is_outdated(self, host: HostProcess) -> bool:
        """Whether a host is to end when it has no devices: until then it goes on with the code it has."""
        return host in self._outdated or not host.plugins

    async def drop_outdated(self) -> None:
        """End hosts whose plugins are gone, or start them anew where there is another version; but none that has devices."""
        assert self._owner is not None
        for host in list(self._hosts.values()):
            # Meanwhile somebody else may have done it.
            if self._hosts.get(host.key) is host and self.is_outdated(host) and not self._owner.in_use(host):
                await self._exchange(host)
        await self._start_new()

    async def _exchange(self, host: HostProcess) -> HostProcess:
        """End a host; return the one that is to take its place, if it still has plugins."""
        del self._hosts[host.key]
        self._outdated.discard(host)
        new = self._add(host.key) if host.plugins else host
        # Who asks for one of its parents meanwhile waits for it.
        new.plugins, new.parents, new.suspended = host.plugins, host.parents, host.suspended
        for parent in [parent for parent, its in self._parents.items() if its is host]:
            del self._parents[parent]
            if host.plugins:
                self._parents[parent] = new
        await host.close(stop=True)
        for parent in host.parents:
            self._journal.emit("change", parent, {"MDEV_STATE": "unregistered"})
        return new

    async def close(self, busy: Iterable[str]) -> None:
        """Leave the hosts of the parents `busy` alone, and end the others."""
        for task in self._rescans:
            task.cancel()
        await asyncio.gather(*self._rescans, return_exceptions=True)
        kept = {self._parents.get(parent) for parent in busy}
        await asyncio.gather(*(host.close(stop=host not in kept) for host in self._hosts.values()))

    # -- looking -------------------------------------------------------------------------------------------------------

    def of_parent(self, name: str) -> HostProcess | None:
        """Return the host a parent lives in."""
        known = self._parents.get(name)
        return known or next((host for host in self._hosts.values() if name in host.parents), None)

    def type_facts(self, parent: str, type_id: str) -> dict[str, Any]:
        """Return what does not change about a type; empty when it is not known."""
        host = self.of_parent(parent)
        types = host.parents.get(parent, {}).get("types", []) if host else []
        return next((type_ for type_ in types if type_["id"] == type_id), {})

    def places(self, type_id: str, parent: str | None) -> list[tuple[str, HostProcess]]:
        """Return the parents that have a type, with their hosts; ENODEV with what there is instead."""
        known = {name: host for host in self._hosts.values() for name in host.parents}
        if parent is not None and parent not in known:
            raise self._no_parent(parent, known)
        chosen = known if parent is None else {parent: known[parent]}
        found = [(name, host) for name, host in chosen.items() if self.type_facts(name, type_id)]
        if not found:
            raise self._no_type(type_id, parent, chosen)
        return found

    def _no_parent(self, parent: str, known: Iterable[str]) -> MdevError:
        host = self._parents.get(parent)
        if host is not None:
            return MdevError(errno.EIO, f"parent {parent} cannot be used: {host.error}", parent)
        names = ", ".join(known) or "none"
        return MdevError(errno.ENODEV, f"there is no parent {parent!r} (there are: {names})", parent)

    def _no_type(self, type_id: str, parent: str | None, chosen: dict[str, HostProcess]) -> MdevError:
        ids = sorted({type_["id"] for name, host in chosen.items() for type_ in host.parents[name]["types"]})
        where = f" of parent {parent}" if parent else ""
        broken = "; ".join(f"plugin {name}: {reason}" for name, reason in self._broken.items())
        hint = f" (there are: {', '.join(ids)})" if ids else f"; {broken or no_parents()}"
        return MdevError(errno.ENODEV, f"there is no type {type_id!r}{where}{hint}", type_id)

    async def parents(self, name: str | None = None) -> list[Parent]:
        """Return the parents with their types; one whose host does not run as it was, with nothing available. ENODEV for a name."""
        await self.keep_up()
        told = await self.ask_all("parents", [self.known(name)] if name else None)
        found = []
        for host in self._hosts.values():
            fresh = {facts["name"]: facts for facts in told.get(host.key, [])}
            for parent, facts in host.parents.items():
                if name in {None, parent}:
                    found.append(_parent(fresh[parent]) if parent in fresh else _unavailable(facts, host.error))
        return found

    def known(self, name: str) -> HostProcess:
        """Return the host of a parent; ENODEV."""
        host = self.of_parent(name)
        if host is None:
            raise self._no_parent(name, self._parents)
        return host

    async def call_parent(self, parent: str, op: str, **arguments: Any) -> Any:
        """Have a parent's host carry out an operation on it; ENODEV."""
        return await self.known(parent).call(op, parent=parent, **arguments)

    def running(self) -> list[HostProcess]:
        """Return the hosts that take requests."""
        return [host for host in self._hosts.values() if host.state == "running"]

    async def drivers(self) -> list[Driver]:
        """Return the drivers loaded in any host, with what they have bound in all of them."""
        merged: dict[tuple[str, str], Driver] = {}
        for drivers in (await self.ask_all("drivers")).values():
            for facts in drivers:
                known = merged.setdefault((facts["bus"], facts["name"]), Driver(facts["name"], facts["bus"], []))
                known.bound += facts["bound"]
        return list(merged.values())

    async def counters(self) -> dict[str, dict[str, list[int]]]:
        """Return the counters of all devices that have some, by UUID and name."""
        return {uuid: found for told in (await self.ask_all("counters")).values() for uuid, found in told.items()}

    async def ask_all(self, op: str, hosts: list[HostProcess] | None = None) -> dict[str, Any]:
        """Ask every host that runs; those that die or take too long are left out."""
        asked = self.running() if hosts is None else [host for host in hosts if host.state == "running"]
        answers = await asyncio.gather(*(asyncio.wait_for(host.call(op), ASK_LIMIT) for host in asked), return_exceptions=True)
        told = {}
        for host, answer in zip(asked, answers, strict=True):
            if isinstance(answer, MdevError | TimeoutError):
                log.warning("host %s: %s: %s", host.key, op, answer or "no answer")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                told[host.key] = answer
        return told

    def infos(self) -> list[HostInfo]:
        """Return the host processes, and the plugins there could be no host for."""
        infos = [_info(host) for host in self._hosts.values()]
        return infos + [HostInfo(name, None, "failed", 0, [], reason) for name, reason in self._broken.items()]

    async def open_own(self, path: str) -> int:
        """Return a descriptor that listens at `path` in our own folder, for whoever may attach to devices."""
        return await self._open(path, mode=self._settings.endpoint_mode, owner=self._settings.endpoint_owner)

    async def open(self, path: str, peer: Peer) -> int:
        """Return a descriptor that listens at `path`, made with the rights of `peer`."""
        return await self._open(path, uid=peer.uid, gid=peer.gid, groups=peer.groups)

    async def _open(self, path: str, **how: Any) -> int:
        _, fds = await self._forker.ask("listen", {"path": path, **how}, SCOUT_LIMIT)
        return fds[0]

    async def tidy(self, path: str, peer: Peer) -> None:
        """Remove a socket nobody listens on any more, with the rights of whoever had it made."""
        arguments = {"path": path, "unlink": True, "uid": peer.uid, "gid": peer.gid, "groups": peer.groups}
        try:
            await self._forker.ask("listen", arguments, SCOUT_LIMIT)
        except MdevError as error:
            log.warning("%s stays: %s", path, error)


def _parent(facts: dict[str, Any]) -> Parent:
    return msgspec.convert(facts, Parent)


def _unavailable(facts: dict[str, Any], error: str | None) -> Parent:
    """Return a parent as it was, with nothing to be had."""
    parent = _parent({**facts, "error": error or "its host does not answer"})
    for type_ in parent.types:
        type_.available_instances = 0
    return parent


def _info(host: HostProcess) -> HostInfo:
    info = HostInfo(host.key, host.pid, host.state, host.restarts, list(host.parents), host.error)
    if host.pid is not None:
        with suppress(OSError):
            # proc(5): fields 14, 15 and 24; the second, the name in parentheses, may contain anything.
            fields = Path(f"/proc/{host.pid}/stat").read_text().rpartition(")")[2].split()
            info.cpu = (int(fields[11]) + int(fields[12])) / _TICK
            info.memory = int(fields[21]) * _PAGE
    return info
