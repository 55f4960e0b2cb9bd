"""Devices: what sits on a bus. Data and state only; binding is `mdevkit.dd`, the life cycle is `mdevkit.registry`.

A device's state changes under `Device.lock` alone, and that lock is never held while a driver or a vendor is called: a
transition is claimed (`claim`), the call is made, the outcome is stored (`settle`). Whoever finds a device in the middle
of a transition waits, except on its own thread, where that would wait for itself: EDEADLK.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from mdevkit.errors import MdevError
from mdevkit.sockets import Listen, listen_at

if TYPE_CHECKING:
    from mdevkit.driver import Endpoint
    from mdevkit.parent import MdevType, Parent
    from mdevkit.registry import Registry


log = logging.getLogger(__name__)

#: Seconds in which attribute calls that are running have to return when their device is removed.
DRAIN_LIMIT = 5.0


class State(StrEnum):
    """Where a device is in its life."""

    #: The vendor's create or the first probe runs; nobody else can see the device.
    CREATING = "creating"
    UNBOUND = "unbound"
    #: A driver's probe runs.
    PROBING = "probing"
    BOUND = "bound"
    #: A driver's remove runs.
    UNBINDING = "unbinding"
    #: A driver asked to be tried again after the next successful bind.
    DEFERRED = "deferred"
    #: Power-management callbacks run; afterwards the device is what it was.
    SUSPENDING = "suspending"
    RESUMING = "resuming"
    REMOVING = "removing"
    #: Removed; only references held by callers are left.
    GONE = "gone"


#: States in which somebody is at work and others wait.
_TRANSITIONS = frozenset({State.PROBING, State.UNBINDING, State.SUSPENDING, State.RESUMING})
#: States a device rests in: every transition starts in one of them.
RESTING = frozenset({State.UNBOUND, State.BOUND, State.DEFERRED})


class Device:
    """A device on a bus (struct device). Public attributes are read-only to everybody but core and the device's vendor."""

    def __init__(self, name: str, bus: str, parent: Device | Parent | None = None) -> None:
        #: Unique on its bus.
        self.name = name
        #: Name of the bus it sits on.
        self.bus = bus
        self.parent = parent
        #: Condition guarding `state`: the life-cycle lock of the parent at the root of the tree.
        self.lock: threading.Condition = parent.lock if parent is not None else threading.Condition()
        self.state = State.CREATING
        #: Name of the driver that is bound.
        self.driver: str | None = None
        #: When set, only the driver of this name is tried, whatever its id table.
        self.driver_override: str | None = None
        #: What the driver offers to the outside while bound.
        self.endpoint: Endpoint | None = None
        #: Where the endpoint's socket shall be; None lets the driver choose.
        self.endpoint_path: str | None = None
        #: Why the last probe failed or was deferred.
        self.error: MdevError | None = None
        #: For whoever made the device (dev_set_drvdata); core never looks.
        self.drvdata: Any = None
        #: The registry it lives in: through it a driver adds devices below this one. Set before anybody else sees the device.
        self.registry: Registry | None = None
        self.suspended = False
        #: Being suspended, with all that is below it: nothing there is probed from now on.
        self.suspending = False
        #: While it is being created: what is to be told of the devices below it once its own ADD has been. None: tell at once.
        self.held: list[Callable[[], object]] | None = None
        #: The thread inside a driver's probe of this device.
        self.prober: int | None = None
        #: Devices below this one, in the order they were added.
        self.children: dict[str, Device] = {}
        #: Set by a removal from where it cannot be refused any more.
        self.departing = False
        self._owner: int | None = None

    def __str__(self) -> str:
        return f"device {self.name}"

    @property
    def match(self) -> str:
        """What drivers' id tables hold for this device; the part of MODALIAS after the bus."""
        return self.name

    @property
    def modalias(self) -> str:
        """``<bus>:<match>``, by which a driver's package is found."""
        return f"{self.bus}:{self.match}"

    @property
    def root(self) -> Device:
        """The device at the top of the tree: this one, or the one that has no device above it."""
        device = self
        while isinstance(device.parent, Device):
            device = device.parent
        return device

    def uevent(self) -> dict[str, str]:
        """Return the variables every event of this device carries."""
        return {"MODALIAS": self.modalias}

    def claim(self, wanted: State, of: Collection[State] = RESTING, *, wait: bool = True) -> State:
        """Enter the transition `wanted` if the device rests in one of the states `of`; return the state it was found in.

        Waits while another thread is in a transition, unless `wait` is false: then that is EAGAIN. Raises EAGAIN while the
        device is created or removed, ENODEV once it is gone, EDEADLK for a call back from this device's own transition.
        """
        with self.lock:
            self.wait_for_rest(wait=wait)
            found = self.state
            if found in of:
                self.state = wanted
                self._owner = threading.get_ident()
            return found

    def wait_for_rest(self, *, wait: bool = True) -> None:
        """Wait, with `lock` held, until nobody is at work on the device; errors as for `claim`."""
        while self.state in _TRANSITIONS and (wait or self.claimed_here):
            if self.claimed_here:
                raise MdevError(errno.EDEADLK, f"{self} is {self.state} on this very thread", self)
            self.lock.wait()
        if self.state is State.GONE:
            raise MdevError(errno.ENODEV, f"{self} is gone", self)
        if self.state not in RESTING:
            raise MdevError(errno.EAGAIN, f"{self} is {self.state}; try again", self)

    @property
    def undecided(self) -> bool:
        """Whether a removal runs that may yet be refused, and leave the device as it was."""
        return self.state is State.REMOVING and not self.departing

    @property
    def claimed_here(self) -> bool:
        """Whether the calling thread is inside a transition of this device."""
        return self._owner == threading.get_ident()

    def settle(self, state: State) -> None:
        """Leave the transition claimed before; called with or without `lock` held."""
        with self.lock:
            self.state = state
            self._owner = None
            self.lock.notify_all()

    def depart(self) -> None:
        """Note that the removal that is running cannot be refused any more; whoever waits for its outcome knows it now."""
        with self.lock:
            self.departing = True
            self.lock.notify_all()


class Mdev(Device):
    """A mediated device (struct mdev_device): opaque to everybody but its vendor.

    A bus brings a subclass with a typed setter and getter for its ops (V12's composition by size).
    """

    parent: Parent

    def __init__(self, uuid: UUID, type_: MdevType, params: Mapping[str, Any]) -> None:
        super().__init__(str(uuid), type_.bus, type_.parent)
        #: What the device is called everywhere.
        self.uuid = uuid
        self.type = type_
        #: Checked create parameters, as given to the vendor.
        self.params = params
        #: Makes a socket that listens at a path, with the rights of whoever named that path (`mdevkit.sockets`): the device's
        #: vendor and driver call it instead of binding paths themselves, and for a path that a user names, first while the
        #: call lasts that brings it (create, an attribute's store). In a service of root's, any other is EPERM.
        self.listen: Listen = listen_at
        self._class_id = 0
        self._ops: Any = None
        #: How many calls of an attribute each thread is inside; none while no attribute was ever used.
        self._inside: dict[int, int] | None = None

    @property
    def class_id(self) -> int:
        """The class id (u16, per bus); 0 until the vendor has set it."""
        return self._class_id

    @property
    def match(self) -> str:
        """``c%02X`` of the class id, as the V12 series' modpost writes it."""
        return f"c{self._class_id:02X}"

    def uevent(self) -> dict[str, str]:
        """See `Device.uevent`."""
        return {"MODALIAS": self.modalias, "MDEV_TYPE": self.type.id, "MDEV_PARENT": self.parent.name}

    def get_attribute(self, name: str) -> Any:
        """Read an attribute: ENOENT, EACCES, ENODEV once the device goes, or what the vendor raises."""
        return self.type.device_table.read(name, self)

    def set_attribute(self, name: str, value: Any) -> None:
        """Check and set an attribute: ENOENT, EACCES, EINVAL, ENODEV once the device goes, or what the vendor raises."""
        self.type.device_table.write(name, value, self)

    def enter_attribute(self) -> None:
        """Begin a call of an attribute (kernfs_get_active), which the vendor's remove waits for; ENODEV once the device goes."""
        here = threading.get_ident()
        with self.lock:
            if self.departing:
                what = "gone" if self.state is State.GONE else "being removed"
                raise MdevError(errno.ENODEV, f"{self} is {what}", self)
            if self._inside is None:
                self._inside = {}
            self._inside[here] = self._inside.get(here, 0) + 1

    def leave_attribute(self) -> None:
        """End what `enter_attribute` has begun, on the same thread."""
        here, inside = threading.get_ident(), self._inside
        assert inside is not None
        with self.lock:
            inside[here] -= 1
            if not inside[here]:
                del inside[here]
                if self.departing:
                    self.lock.notify_all()

    @property
    def in_attribute_here(self) -> bool:
        """Whether the calling thread is inside a call of an attribute of this device."""
        return self._inside is not None and threading.get_ident() in self._inside

    def depart(self) -> None:
        """See `Device.depart`; refuse attributes from now on and wait for those in use (kernfs_drain).

        The calling thread's own is not waited for, so that an attribute can remove its device (device_remove_file_self); after
        that, its vendor must not touch what the remove has freed. Nor does one that never returns keep the device for ever, as it
        would in Linux: after `DRAIN_LIMIT` the removal goes on, and its vendor is named.
        """
        super().depart()
        if not self._inside:  # nobody enters any more
            return
        with self.lock:
            calm = self.lock.wait_for(lambda: not self._inside or not self._inside.keys() - {threading.get_ident()}, DRAIN_LIMIT)
        if not calm:
            log.error("%s: an attribute of %s does not return; it is removed all the same", self, self.parent)

    def _set_class(self, class_id: int, ops: Any) -> None:
        """Set class id and ops together, once, inside create; for the typed setters of the buses.

        EBUSY on a second set, EINVAL outside create, for class id 0 or beyond u16, and for missing ops.
        """
        if self._class_id:
            raise MdevError(errno.EBUSY, f"{self}: class id and ops are already set (class id {self._class_id})", self)
        if self.state is not State.CREATING:
            raise MdevError(errno.EINVAL, f"{self}: class id and ops can be set inside create only", self)
        if not 0 < class_id <= 0xFFFF:
            raise MdevError(errno.EINVAL, f"{self}: class id {class_id} is not between 1 and 65535", self)
        if ops is None:
            raise MdevError(errno.EINVAL, f"{self}: no ops were given with class id {class_id}", self)
        self._class_id = class_id
        self._ops = ops

    def _get_ops(self, class_id: int) -> Any:
        """Return the ops set for `class_id`; EINVAL when the device has another class or none. For the typed getters."""
        if self._class_id != class_id:
            raise MdevError(errno.EINVAL, f"{self} has class id {self._class_id}, not {class_id}", self)
        return self._ops
