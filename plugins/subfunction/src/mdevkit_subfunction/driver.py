"""The driver ``mlx5_sf``: gives a sub-function of flavour ``mlx5`` a network interface.

There are no ops between the two: the driver is the vendor's own, finds its function in the device's data, and talks to the
card's switch. Hooks are called by core from any thread.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from mdevkit.driver import Driver
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.paths import runtime_dir
from mdevkit_vdev.bus import VdevMdev
from mdevkit_virtio.virtio.stream import attach_arguments

from mdevkit_subfunction.netdev import SfNetdev

if TYPE_CHECKING:
    from mdevkit.device import Device

    from mdevkit_subfunction.eswitch import Port


class SfEndpoint:
    """A sub-function's network interface."""

    def __init__(self, netdev: SfNetdev, port: Port) -> None:
        self.netdev: Final = netdev
        self._port: Final = port
        #: What QEMU is to call it.
        self._id: Final = f"net-{port.uuid[:8]}"

    def describe(self) -> Mapping[str, str]:
        """See `mdevkit.driver.Endpoint.describe`."""
        mac = self._port.hw_addr.hex(":")
        name = f"enp6s0f0s{self._port.sfnum}"
        return {"kind": "netdev", "name": name, "mac": mac, "socket": self.netdev.path, "client": self.netdev.client}

    def attach(self, client: str) -> Sequence[str]:
        """Return QEMU's or libvirt's arguments; EOPNOTSUPP for DPDK, which cannot use a stream of frames."""
        arguments = attach_arguments(client, self.netdev.path, self._port.hw_addr.hex(":"), self._id)
        if arguments:
            return arguments
        raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use a netdev", client)


class Mlx5SfDriver(Driver):
    """The driver; one object serves any number of devices."""

    name = "mlx5_sf"
    bus = "vdev"
    id_table = ("subfunction.sf",)

    @hookimpl
    def driver_probe(self, device: Device) -> SfEndpoint:
        """Make the interface: errors of a socket path that cannot be used."""
        mdev = VdevMdev.from_device(device)
        eswitch, port = mdev.data
        path = mdev.endpoint_path or str(runtime_dir() / f"{mdev.name}.sock")
        port.function = netdev = SfNetdev(eswitch, port, path, mdev.listen)
        return SfEndpoint(netdev, port)

    @hookimpl
    def driver_remove(self, device: Device) -> None:
        """Take the interface down."""
        _, port = VdevMdev.from_device(device).data
        port.function = None
        _netdev(device).close()

    @hookimpl
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`: EBUSY with the pid of the program at the socket."""
        _netdev(device).let_go(timeout, force)

    @hookimpl
    def driver_suspend(self, device: Device) -> None:
        """Let no frame pass; the program at the socket stays."""
        _netdev(device).set_up(False)

    @hookimpl
    def driver_resume(self, device: Device) -> None:
        """Let frames pass."""
        _netdev(device).set_up(True)


def _netdev(device: Device) -> SfNetdev:
    if not isinstance(device.endpoint, SfEndpoint):
        raise MdevError(errno.ENODEV, f"{device} has no network interface", device)
    return device.endpoint.netdev
