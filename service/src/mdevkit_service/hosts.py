"""All hosts: which there should be, and questions to them. On the event loop's thread."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from mdevkit.errors import MdevError
from mdevkit.hints import no_parents

from mdevkit_service.schema import Driver, HostInfo, Parent
from mdevkit_service.supervisor import HostProcess, living

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mdevkit_service.forker import Forker
    from mdevkit_service.journal import Journal
    from mdevkit_service.settings import Settings
    from mdevkit_service.supervisor import Keeper

log = logging.getLogger("mdevkit.service")

#: Seconds a plugin gets to say which parents it brings.
SCOUT_LIMIT: Final = 10.0
#: Seconds a host gets to answer a question that goes to all.
ASK_LIMIT: Final = 5.0
_TICK: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGESIZE")


class Hosts:
    """The hosts of one service."""

    def __init__(self, settings: Settings, forker: Forker, journal: Journal) -> None:
        self._settings: Final = settings
        self._forker: Final = forker
        self._journal: Final = journal
        self._hosts: Final[dict[str, HostProcess]] = {}
        #: Parent's name to its host, for every parent that is known.
        self._parents: Final[dict[str, HostProcess]] = {}
        #: Plugin to why it cannot be used.
        self._broken: Final[dict[str, str]] = {}

    # -- coming and going ----------------------------------------------------------------------------------------------

    async def start(self, keeper: Keeper) -> None:
        """Find the hosts that live and start those that are missing; returns when all run or have failed."""
        for key in living(self._settings.hosts):
            self._hosts[key] = HostProcess(key, self._settings, self._forker, self._journal, keeper)
        with suppress(MdevError):
            await self._scout(keeper)
        for host in self._hosts.values():
            host.start()
        await asyncio.gather(*(host.settled() for host in self._hosts.values()))

    async def _scout(self, keeper: Keeper) -> None:
        """Ask each plugin, in a process of its own, which parents it brings and in which host they belong."""
        answer, _ = await self._forker.ask("scout", {}, SCOUT_LIMIT)
        await asyncio.gather(*(self._scout_plugin(name, keeper) for name in answer["plugins"]))

    async def _scout_plugin(self, name: str, keeper: Keeper) -> None:
        try:
            answer, _ = await self._forker.ask("scout", {"plugin": name}, SCOUT_LIMIT)
        except MdevError as error:
            log.error("plugin %s: %s", name, error)
            self._broken[name] = str(error)
            return
        for parent in answer["parents"]:
            host = self._hosts.get(parent["host"])
            if host is None:
                host = HostProcess(parent["host"], self._settings, self._forker, self._journal, keeper)
                self._hosts[parent["host"]] = host
            if name not in host.plugins:
                host.plugins.append(name)
            self._parents[parent["name"]] = host

    async def close(self, busy: Iterable[str]) -> None:
        """Leave the hosts of the parents `busy` alone, and end the others."""
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
        told = await self.ask_all("parents", [self._known(name)] if name else None)
        found = []
        for host in self._hosts.values():
            fresh = {facts["name"]: facts for facts in told.get(host.key, [])}
            for parent, facts in host.parents.items():
                if name in {None, parent}:
                    found.append(_parent(fresh[parent]) if parent in fresh else _unavailable(facts, host.error))
        return found

    def _known(self, name: str) -> HostProcess:
        host = self.of_parent(name)
        if host is None:
            raise self._no_parent(name, self._parents)
        return host

    async def call_parent(self, parent: str, op: str, peer: Any = None, **arguments: Any) -> Any:
        """Have a parent's host carry out an operation on it; ENODEV."""
        return await self._known(parent).call(op, peer=peer, parent=parent, **arguments)

    async def drivers(self) -> list[Driver]:
        """Return the drivers loaded in any host, with what they have bound in all of them."""
        merged: dict[tuple[str, str], Driver] = {}
        for drivers in (await self.ask_all("drivers")).values():
            for facts in drivers:
                known = merged.setdefault((facts["bus"], facts["name"]), Driver(facts["name"], facts["bus"], []))
                known.bound += facts["bound"]
        return list(merged.values())

    async def ask_all(self, op: str, hosts: list[HostProcess] | None = None) -> dict[str, Any]:
        """Ask every host that runs; those that die or take too long are left out."""
        asked = [host for host in hosts or self._hosts.values() if host.state == "running"]
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

    async def open(self, path: str, peer: Any, *, ours: bool) -> int:
        """Return a descriptor that listens at `path`: with the rights of `peer`, or as our own endpoint socket."""
        settings = self._settings
        if ours:
            arguments = {"path": path, "mode": settings.endpoint_mode, "owner": settings.endpoint_owner}
        elif peer is None:
            raise MdevError(errno.EPERM, f"cannot listen at {path}: nobody asked for it", path)
        else:
            arguments = {"path": path, "uid": peer["uid"], "gid": peer["gid"], "groups": peer["groups"]}
        _, fds = await self._forker.ask("listen", arguments, SCOUT_LIMIT)
        return fds[0]

    async def tidy(self, path: str, peer: Any) -> None:
        """Remove a socket nobody listens on any more, with the rights of whoever had it made."""
        if peer is not None:
            arguments = {"path": path, "unlink": True, "uid": peer["uid"], "gid": peer["gid"], "groups": peer["groups"]}
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
