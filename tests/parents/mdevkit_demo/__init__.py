"""Parents that exist for tests of the service and of management tools: put this folder's parent on PYTHONPATH.

``demo0`` and ``demo1`` each have a host of their own, ``twin0`` and ``twin1`` share one. All have the driver name ``demo`` and the
types ``demo-small`` (1 of 8 slots), ``demo-big`` (4 slots) and ``demo-many`` (no limit). Devices sit on a bus of their own, whose
driver listens at the endpoint's path and serves nobody. Attributes let a test do what a broken vendor would: `crash`, `hang`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import signal
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdevkit import Attribute, Bool, Bus, Driver, Int, Mdev, MdevError, MdevType, ParentOps, Pool, Text, hookimpl
from mdevkit.sockets import socket_identity, unlink_socket

SLOTS = 8


class DemoMdev(Mdev):
    """A device of the bus; its ops are its state."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Set the class and what the device is."""
        self._set_class(1, state)

    @property
    def values(self) -> dict[str, Any]:
        """What the vendor keeps."""
        found: dict[str, Any] = self._get_ops(1)
        return found


class DemoBus(Bus):
    """The bus."""

    name = "demo"
    device_class = DemoMdev


class DemoEndpoint:
    """A socket that listens, and the client that is never there unless the `client` attribute says so."""

    def __init__(self, mdev: DemoMdev) -> None:
        self.mdev = mdev
        self.path = str(mdev.endpoint_path)
        self.listener = mdev.listen(self.path)
        self.identity = socket_identity(self.path)

    def describe(self) -> dict[str, str]:
        """See `Endpoint`."""
        return {"kind": "demo", "socket": self.path, "client": self.mdev.values["client"]}

    def attach(self, client: str) -> list[str]:
        """See `Endpoint`."""
        if client != "qemu":
            raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use a demo device", client)
        return ["-demo", self.path]

    def close(self) -> None:
        """Give the path back, as far as that is ours to do."""
        with contextlib.suppress(OSError):
            unlink_socket(self.listener, self.identity, self.path)
        self.listener.close()


class DemoDriver(Driver):
    """The driver."""

    name = "demo_drv"
    bus = "demo"
    id_table = ("c01",)

    @hookimpl
    def driver_probe(self, device: DemoMdev) -> DemoEndpoint | None:
        return DemoEndpoint(device) if device.endpoint_path else None

    @hookimpl
    def driver_remove(self, device: DemoMdev) -> None:
        if isinstance(device.endpoint, DemoEndpoint):
            device.endpoint.close()

    @hookimpl
    def driver_let_go(self, device: DemoMdev, timeout: float, force: bool) -> None:
        deadline = time.monotonic() + timeout
        while (client := device.values["client"]) and not force:
            if time.monotonic() >= deadline:
                raise MdevError(errno.EBUSY, f"{device} is in use by {client}", device)
            time.sleep(0.01)  # nothing tells that an attribute has changed

    @hookimpl
    def driver_suspend(self, device: DemoMdev) -> None:
        if device.values["note"] == "awake":
            raise MdevError(errno.EBUSY, f"{device} has work to do", device)


def _stored(name: str) -> Any:
    def store(mdev: DemoMdev, value: Any) -> None:
        mdev.values[name] = value

    return store


def _shown(name: str) -> Any:
    return lambda mdev: mdev.values[name]


def _refuse_three(mdev: DemoMdev, value: int) -> None:
    if value == 3:
        raise MdevError(errno.ERANGE, f"{mdev} does not like 3", mdev)
    mdev.values["moody"] = value


def _die(number: int) -> None:
    # To this very thread: a signal to the process may reach another one, and this one would go on for a moment.
    signal.pthread_kill(threading.get_ident(), number)


def _crash(mdev: DemoMdev, value: int) -> None:
    _die(value or signal.SIGSEGV)


def _lie(messages: list[dict[str, Any]]) -> None:
    """Tell the service what our host would not, as vendor code that means harm can: it has all that its process has."""
    from mdevkit_service.host import Connection

    for connection in [found for found in gc.get_objects() if isinstance(found, Connection)]:
        for message in messages:
            connection.send(message)


def _assign(mdev: DemoMdev, value: int) -> None:
    mdev.values["assigned"].append(value)


def _plug(mdev: DemoMdev, path: str) -> None:
    """Listen where a user said, with that user's rights."""
    old = mdev.values.pop("listener", None)
    if old is not None:
        old.close()
    mdev.values["listener"] = mdev.listen(path) if path else None
    mdev.values["line"] = path


DEVICE_ATTRIBUTES = (
    Attribute("speed", Int(0, 1000), "Any number.", _shown("speed"), _stored("speed"), create=True, default=10),
    Attribute("note", Text(), "Any text.", _shown("note"), _stored("note"), create=True, default=""),
    Attribute("moody", Int(0, 9), "Refuses 3 when it is stored.", _shown("moody"), _refuse_three),
    Attribute("client", Text(), "Who seems to be attached.", _shown("client"), _stored("client")),
    Attribute("line", Text(), "Path of a socket to listen at.", _shown("line"), _plug, create=True, default=""),
    Attribute("serial", Text(), "Read-only.", lambda mdev: f"demo {mdev.uuid}"),
    Attribute("assign", Int(), "Adds a number to `assigned`, as vfio_ap's assign_adapter does.", store=_assign),
    Attribute("assigned", Text(), "What has been assigned.", lambda mdev: " ".join(map(str, mdev.values["assigned"]))),
    Attribute("count", Int(), "How much has been assigned.", lambda mdev: len(mdev.values["assigned"]), counter=True),
    Attribute(
        "counts", Text(), "The same in two queues, and none.", lambda mdev: f"{len(mdev.values['assigned'])} 0", counter=True
    ),
    Attribute("odd", Text(), "A counter that is none.", lambda _: "many", counter=True),
    Attribute("crash", Int(0, 64), "Ends the process by this signal, 0 for SIGSEGV.", store=_crash),
    Attribute("hang", Int(0, 60), "Takes so many seconds.", store=lambda _mdev, value: time.sleep(value)),
)


def _type_attributes() -> tuple[Attribute[Any], ...]:
    kept = {"weight": 1}
    return (
        Attribute("weight", Int(0, 100), "Any number.", lambda _: kept["weight"], lambda _, value: kept.update(weight=value)),
        Attribute("vendor/revision", Int(), "Read-only, in a folder.", lambda _: 3),
    )


def _types(pool: Pool) -> tuple[MdevType, ...]:
    def make(group: str, costs: Mapping[Pool, int], name: str) -> MdevType:
        text, own = f"{name}\nfor tests", _type_attributes()
        return MdevType(group, "demo", "demo", name, text, costs, own, DEVICE_ATTRIBUTES)

    return (
        make("small", {pool: 1}, "Small demo device"),
        make("big", {pool: 4}, "Big demo device"),
        make("many", {}, "Unlimited demo device"),
    )


class DemoParent(ParentOps):
    """One parent."""

    driver_name = "demo"

    def __init__(self, name: str, host_key: str = "") -> None:
        self.name = name
        self.host_key = host_key
        self.types = _types(Pool("slots", SLOTS))
        self.label = "none"
        self.crash_on_create = False
        #: Creates that wait until so many have begun.
        self.crowd: dict[str, threading.Barrier] = {}
        self.attributes = (
            Attribute("label", Text(), "Any text.", lambda _parent: self.label, self._set_label),
            Attribute(
                "crash_on_create", Bool(), "Whether a create kills the process.", lambda _: self.crash_on_create, self._set_crash
            ),
        )

    def _set_label(self, _parent: Any, value: str) -> None:
        self.label = value

    def _set_crash(self, _parent: Any, value: bool) -> None:
        self.crash_on_create = value

    @hookimpl
    def parent_create(self, mdev: DemoMdev, params: Mapping[str, Any]) -> None:
        if self.crash_on_create or params["note"] == "crash":
            _die(signal.SIGKILL)
        if params["note"] == "refuse":
            raise OSError(errno.EIO, "the demo hardware does not answer")
        if params["note"].startswith("slow "):
            time.sleep(float(params["note"].removeprefix("slow ")))  # a vendor that takes its time
        if params["note"].startswith("crowd "):
            self.crowd.setdefault(params["note"], threading.Barrier(int(params["note"].removeprefix("crowd ")))).wait(20)
        if params["note"].startswith("lie "):
            _lie(json.loads(params["note"].removeprefix("lie ")))
        listener: socket.socket | None = mdev.listen(params["line"]) if params["line"] else None
        mdev.set_state({**params, "moody": 0, "client": "", "listener": listener, "assigned": []})

    @hookimpl
    def parent_remove(self, mdev: DemoMdev) -> None:
        listener, path = mdev.values["listener"], mdev.values["line"]
        if listener is not None:
            listener.close()
            with contextlib.suppress(OSError):
                Path(path).unlink()


def parents() -> list[DemoParent]:
    """The factory of the entry point."""
    return [DemoParent("demo0"), DemoParent("demo1"), DemoParent("twin0", "twins"), DemoParent("twin1", "twins")]
