"""The driver ``vfio_mdev``: gives VFIO devices to hypervisors over vfio-user sockets.

It binds every device of class VFIO on the ``mdev`` bus and serves it on a socket of its own: one client at a time, one thread per
device; by itself or through a front (`mdevkit_vfio.transport`). Hooks are called by core from any thread.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mdevkit.driver import Driver, libvirt_arguments
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.paths import runtime_dir

from mdevkit_vfio.bus import VfioBus, VfioMdev
from mdevkit_vfio.ops import PowerManaged, SharedMemory
from mdevkit_vfio.server import Throttle, VfioUserServer
from mdevkit_vfio.transport import VARIABLE, Fronts, ParkedServer, Transport, can_be_parked

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mdevkit.device import Device


#: What makes a machine's memory shared; vhost-user devices say the same.
_QEMU_MEMORY = ("-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-machine", "memory-backend=mem")
_LIBVIRT_MEMORY = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


class VfioUserEndpoint:
    """A bound device's vfio-user socket. `shared_memory`: the device needs the client's memory shared, as `SharedMemory` says."""

    def __init__(self, server: Transport, *, shared_memory: bool = False) -> None:
        self.server = server
        self._shared_memory = shared_memory

    def describe(self) -> Mapping[str, str]:
        """See `mdevkit.driver.Endpoint.describe`; EIO with the reason for a device that its clients' requests have killed."""
        if self.server.failure is not None:
            raise self.server.failure.with_traceback(None)
        client = self.server.client
        return {"kind": "vfio-user", "socket": str(self.server.path), "client": str(client) if client else ""}

    def attach(self, client: str) -> Sequence[str]:
        """Return QEMU's or libvirt's arguments; EOPNOTSUPP for DPDK, which has no vfio-user client.

        For a device that needs QEMU's memory to be shared they say so; its size is its user's to choose, 1 GiB stands in for it.
        """
        device = {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(self.server.path)}}
        qemu = ["-device", json.dumps(device, separators=(",", ":"))]
        if client == "qemu":
            return [*(_QEMU_MEMORY if self._shared_memory else ()), *qemu]
        if client == "libvirt":
            memory = [_LIBVIRT_MEMORY] if self._shared_memory else []
            return [*memory, *libvirt_arguments(qemu)]
        raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use a vfio-user device", client)


class VfioMdevDriver(Driver):
    """The driver; one object serves any number of devices."""

    name = "vfio_mdev"
    bus = VfioBus.name
    id_table = ("c01",)

    def __init__(self) -> None:
        self._throttle = Throttle()
        front = os.environ.get(VARIABLE)
        self._fronts = Fronts(Path(front)) if front else None

    @hookimpl
    def driver_probe(self, device: Device) -> VfioUserEndpoint:
        """Serve the device at a socket of `Mdev.listen`, whose errors are the caller's.

        With a front also EIO, for a device whose process has died of its client's requests.
        """
        mdev = VfioMdev.from_device(device)
        path = Path(mdev.endpoint_path or runtime_dir() / f"{mdev.name}.sock")
        ops = mdev.get_ops()
        # This may run code of the vendor's, which may raise: so it comes before there is anything to undo.
        shared_memory = isinstance(ops, SharedMemory) and ops.shared_memory
        server = self._transport(mdev, path)
        server.start()
        return VfioUserEndpoint(server, shared_memory=shared_memory)

    def _transport(self, mdev: VfioMdev, path: Path) -> Transport:
        """Choose how the device is served: through a front where there are fronts and the device can go on in another process."""
        ops = mdev.get_ops()
        if self._fronts is not None and can_be_parked(ops):
            return ParkedServer(ops, path, mdev.name, fronts=self._fronts, listen=mdev.listen, throttle=self._throttle)
        return VfioUserServer(ops, path, mdev.name, listen=mdev.listen, throttle=self._throttle)

    @hookimpl
    def driver_remove(self, device: Device) -> None:
        """Stop serving; nothing is left of socket, thread and connection."""
        self._server(device).close()

    @hookimpl
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`: the client is asked through the REQ interrupt."""
        self._server(device).let_go(timeout, force)

    @hookimpl
    def driver_suspend(self, device: Device) -> None:
        """Have a device that does something by itself stand still: `PowerManaged`. Its client stays, and is answered."""
        ops = VfioMdev.from_device(device).get_ops()
        if isinstance(ops, PowerManaged):
            ops.suspend()

    @hookimpl
    def driver_resume(self, device: Device) -> None:
        """Have it go on."""
        ops = VfioMdev.from_device(device).get_ops()
        if isinstance(ops, PowerManaged):
            ops.resume()

    @staticmethod
    def _server(device: Device) -> Transport:
        if not isinstance(device.endpoint, VfioUserEndpoint):
            raise MdevError(errno.ENODEV, f"{device} is not served", device)
        return device.endpoint.server
