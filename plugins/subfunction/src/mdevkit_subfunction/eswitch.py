"""The card's embedded switch: its mode, its ports, and which frame goes where.

A port is a sub-function's place on the switch. It is added (the slot is taken; inactive, detached), configured, and comes to
life when its device is created (active) and a driver has bound that (attached), as with devlink's port functions (Linux,
networking/devlink/devlink-port.rst). Any thread may call; frames are delivered without the lock.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from mdevkit.errors import MdevError
from mdevkit.parent import Pool

if TYPE_CHECKING:
    from mdevkit.device import Mdev

LEGACY: Final = "legacy"
SWITCHDEV: Final = "switchdev"
#: What a sub-function can be, and thereby on which bus its device lands.
FLAVOURS: Final = ("virtio", "mdev", "mlx5")
#: Index of the first sub-function's port: below are the physical and PCI ports (mlx5's numbering).
FIRST_INDEX: Final = 32768
#: Numbers a sub-function can have (mlx5: 12 bits).
MAX_SFNUM: Final = 4095

_GROUP_BIT: Final = 1


class Function(Protocol):
    """What takes a port's frames: the sub-function's device."""

    def deliver(self, frame: bytes) -> bool:
        """Take a frame; false when there is no room. Any thread; does not wait."""
        ...


@dataclass
class Representor:
    """Counts of the port's representor: it receives what the sub-function sends, and sends what that receives."""

    rx_packets: int = 0
    rx_bytes: int = 0
    tx_packets: int = 0
    tx_bytes: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


@dataclass(eq=False)
class Port:
    """A sub-function's port. Fields are the switch's to write."""

    index: int
    flavour: str
    sfnum: int
    uuid: str
    netdev: str
    hw_addr: bytes = bytes(6)
    #: What was configured: the address while inactive.
    configured: bytes = bytes(6)
    #: Made by creating the device, and gone with it.
    implicit: bool = False
    representor: Representor = field(default_factory=Representor)
    mdev: Mdev | None = None
    function: Function | None = None

    @property
    def state(self) -> str:
        """``active`` while the device exists."""
        return "active" if self.mdev is not None else "inactive"

    @property
    def opstate(self) -> str:
        """``attached`` while a driver has the device."""
        return "attached" if self.mdev is not None and self.mdev.driver else "detached"

    def describe(self) -> dict[str, Any]:
        """Return the port as devlink's JSON has it, with our UUID and statistics beside."""
        return {
            "type": "eth",
            "netdev": self.netdev,
            "flavour": self.flavour,
            "controller": 0,
            "pfnum": 0,
            "sfnum": self.sfnum,
            "external": False,
            "splittable": False,
            "uuid": self.uuid,
            "function": {"hw_addr": self.hw_addr.hex(":"), "state": self.state, "opstate": self.opstate},
            "stats": dict(vars(self.representor)),
        }


class Eswitch:
    """The switch of the card `name`; `slots` are the sub-functions it can have. It starts in switchdev mode."""

    def __init__(self, name: str, slots: Pool) -> None:
        self.name: Final = name
        self.slots: Final = slots
        self._mode = SWITCHDEV
        self._ports: Final[dict[int, Port]] = {}
        self._lock: Final = threading.RLock()

    def __str__(self) -> str:
        return f"the eswitch of {self.name}"

    @property
    def mode(self) -> str:
        """``legacy`` or ``switchdev``."""
        return self._mode

    def set_mode(self, mode: str) -> None:
        """Change the mode: EBUSY while there is a sub-function."""
        with self._lock:
            if mode != self._mode and self._ports:
                names = ", ".join(port.netdev for port in list(self._ports.values())[:4])
                text = f"{self} stays in {self._mode} mode while it has sub-functions ({len(self._ports)}: {names})"
                raise MdevError(errno.EBUSY, text, self)
            self._mode = mode

    # -- ports -----------------------------------------------------------------------------------------------------------

    def ports(self) -> list[Port]:
        """Return the ports by index."""
        with self._lock:
            return [self._ports[index] for index in sorted(self._ports)]

    def port(self, index: int) -> Port:
        """Return the port of an index; ENODEV."""
        with self._lock:
            if index not in self._ports:
                raise MdevError(errno.ENODEV, f"{self.name} has no port {index}", self)
            return self._ports[index]

    def add(self, flavour: str, uuid: str, sfnum: int | None = None, name: str | None = None) -> Port:
        """Add a port and take its slot.

        EOPNOTSUPP in legacy mode; EINVAL for a number out of range; EEXIST for a number, name or UUID in use; ENOSPC.
        """
        with self._lock:
            port = self._new_port(flavour, uuid, sfnum, name)
            self.slots.set_aside(1, uuid, f"port {self.name}/{port.index}")
            self._ports[port.index] = port
            return port

    def _new_port(self, flavour: str, uuid: str, sfnum: int | None, name: str | None) -> Port:
        if self._mode != SWITCHDEV:
            text = f"{self} is in {self._mode} mode; `mdevkit dev eswitch set {self.name} mode switchdev` comes first"
            raise MdevError(errno.EOPNOTSUPP, text, self)
        sfnum = self._free_sfnum() if sfnum is None else sfnum
        if not 0 <= sfnum <= MAX_SFNUM:
            raise MdevError(errno.EINVAL, f"sfnum {sfnum} is not between 0 and {MAX_SFNUM}", self)
        port = Port(FIRST_INDEX + sfnum, flavour, sfnum, uuid, name or f"pf0sf{sfnum}")
        for other in self._ports.values():
            for what in ("sfnum", "netdev", "uuid"):
                if getattr(port, what) == getattr(other, what):
                    text = f"{what} {getattr(port, what)} is that of port {self.name}/{other.index} already"
                    raise MdevError(errno.EEXIST, text, self)
        return port

    def _free_sfnum(self) -> int:
        taken = {port.sfnum for port in self._ports.values()}
        return next(number for number in range(MAX_SFNUM + 2) if number not in taken)

    def configure(self, index: int, hw_addr: bytes) -> None:
        """Set a port's address: EBUSY while it is active, EINVAL for a group's address or nobody's."""
        with self._lock:
            port = self._inactive(index, "its address can be set")
            self._check_address(hw_addr)
            port.hw_addr = port.configured = hw_addr

    def _check_address(self, hw_addr: bytes) -> None:
        if hw_addr[0] & _GROUP_BIT or not any(hw_addr):
            raise MdevError(errno.EINVAL, f"{hw_addr.hex(':')} is not the address of one interface", self)

    def delete(self, index: int) -> None:
        """Take a port away and give its slot back: EBUSY while it is active."""
        with self._lock:
            port = self._inactive(index, "the port can be deleted")
            del self._ports[index]
            self.slots.give_back(port.uuid)

    def _inactive(self, index: int, what: str) -> Port:
        port = self.port(index)
        if port.mdev is not None:
            text = f"port {self.name}/{index} is active (device {port.uuid}); set its state to inactive, then {what}"
            raise MdevError(errno.EBUSY, text, self)
        return port

    # -- devices ---------------------------------------------------------------------------------------------------------

    def activate(
        self, flavour: str, mdev: Mdev, hw_addr: bytes | None = None, sfnum: int | None = None, name: str | None = None
    ) -> Port:
        """Give the port of a device its device; a device without a port gets one of its own.

        EINVAL for another flavour, number or name than its port's, or a group's address; else as `add`.
        """
        with self._lock:
            if hw_addr is not None:
                self._check_address(hw_addr)
            port = next((port for port in self._ports.values() if port.uuid == str(mdev.uuid)), None)
            if port is None:
                port = self._new_port(flavour, str(mdev.uuid), sfnum, name)
                port.implicit = True
                self._ports[port.index] = port
            else:
                self._check_port(port, flavour=flavour, sfnum=sfnum, netdev=name)
            port.hw_addr = hw_addr or (port.configured if any(port.configured) else _own_address(port))
            port.mdev = mdev
            return port

    def _check_port(self, port: Port, **wanted: str | int | None) -> None:
        for what, value in wanted.items():
            if value is not None and (has := getattr(port, what)) != value:
                text = f"port {self.name}/{port.index} has {what} {has}, the device {port.uuid} would have {value}"
                raise MdevError(errno.EINVAL, text, self)

    def deactivate(self, port: Port) -> None:
        """Take the device from its port, and the port away if it came with the device."""
        with self._lock:
            port.mdev = port.function = None
            port.hw_addr = port.configured
            if port.implicit:
                del self._ports[port.index]

    # -- frames ----------------------------------------------------------------------------------------------------------

    def forward(self, source: Port, frame: bytes) -> bool:
        """Carry a frame from a sub-function to whom it is for; false when nobody took it.

        By destination address; a group's goes to all others. There is no uplink: what is for nobody here is dropped.
        """
        with self._lock:
            receivers = list(self._receivers(source, frame))
        taken = [(port, function.deliver(frame)) for port, function in receivers]
        with self._lock:
            _count(source, taken, len(frame))
        return any(went for _, went in taken)

    def _receivers(self, source: Port, frame: bytes) -> Iterator[tuple[Port, Function]]:
        group = len(frame) >= 6 and frame[0] & _GROUP_BIT
        for port in self._ports.values():
            if port is not source and port.function is not None and (group or port.hw_addr == frame[:6]):
                yield port, port.function


def _count(source: Port, taken: list[tuple[Port, bool]], size: int) -> None:
    """Count a frame at the representors."""
    source.representor.rx_packets += 1
    source.representor.rx_bytes += size
    source.representor.rx_dropped += not any(went for _, went in taken)
    for port, went in taken:
        port.representor.tx_packets += went
        port.representor.tx_bytes += size * went
        port.representor.tx_dropped += not went


def _own_address(port: Port) -> bytes:
    """Make up a locally administered address from the UUID, so that a device keeps it."""
    return bytes([0x02, *bytes.fromhex(port.uuid.replace("-", ""))[-5:]])
