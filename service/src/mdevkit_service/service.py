"""The service as a whole: its parts, how it begins and how it ends. Everything runs on the event loop's thread."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError
from mdevkit.version import VERSION

from mdevkit_service.defined import Defined
from mdevkit_service.devices import Devices
from mdevkit_service.hosts import Hosts
from mdevkit_service.journal import Journal
from mdevkit_service.schema import Shutdown, Version

if TYPE_CHECKING:
    from mdevkit_service.forker import Forker
    from mdevkit_service.settings import Settings

log = logging.getLogger("mdevkit.service")

#: Version of the control API.
API: Final = 1
#: Seconds requests wait, after the start, for hosts that take long.
START_LIMIT: Final = 5.0
#: Seconds between two looks at what is installed.
LOOK: Final = 5.0


class Service:
    """One service. `stop` ends the process that serves it."""

    def __init__(self, settings: Settings, forker: Forker, stop: Callable[[], None]) -> None:
        self.settings: Final = settings
        self.journal: Final = Journal(settings.runtime / "events.ndjson")
        self.hosts: Final = Hosts(settings, forker, self.journal)
        self.devices: Final = Devices(settings, self.journal, self.hosts)
        self.defined: Final = Defined(settings, self.journal, self.hosts, self.devices)
        self._forker: Final = forker
        self._stop: Final = stop
        self._started: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to find and start hosts; requests may come already, and wait in `ready`."""
        self.devices.load()
        self._started = asyncio.create_task(self._start())

    async def _start(self) -> None:
        await self.hosts.start(self.devices)
        self.devices.sweep()
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Find what is installed or removed though nobody asks: a definition may wait for its parent, a tree show none."""
        while True:
            await asyncio.sleep(LOOK)  # a path may be any folder of any file system: not all of them tell of changes
            await self.hosts.keep_up()

    async def ready(self) -> None:
        """Wait until every host runs or has failed, or has had its time."""
        if self._started is not None and not self._started.done():
            await asyncio.wait([self._started], timeout=START_LIMIT)

    def version(self) -> Version:
        """Return who we are."""
        return Version(VERSION, API, os.getpid(), str(self.settings.runtime), str(self.settings.definitions))

    async def shut_down(self, wish: Shutdown) -> None:
        """End the service, its devices first if that is wished; EBUSY and the like when one cannot be removed: then all goes on."""
        if wish.remove_devices:
            await self.remove_all(force=wish.force)
        self._stop()

    async def remove_all(self, *, force: bool) -> None:
        """Remove every device; the first error after all have been tried."""
        removals = (self.devices.remove(uuid, force=force) for uuid in self.devices.uuids)
        errors = [error for error in await asyncio.gather(*removals, return_exceptions=True) if isinstance(error, BaseException)]
        for error in errors:
            log.error("%s", error)
        if errors:
            raise errors[0]

    async def close(self) -> None:
        """End in order: operations are finished, hosts without devices end, those with devices go on."""
        self.journal.close()
        await self.devices.finish()
        # A host that is just being started could not be told to stop.
        await self.ready()
        for task in (self._started, self._watching):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        try:
            busy = {device.parent for device in await self.devices.every()}
        except MdevError:
            log.exception("it cannot be told which hosts have devices")
            busy = set()
        await self.hosts.close(busy)
        self._forker.close()
