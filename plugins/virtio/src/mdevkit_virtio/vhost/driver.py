"""The driver ``vhost_mdev``: gives virtio devices to hypervisors and to DPDK over vhost-user sockets.

It binds every device of class VHOST on the ``mdev_virtio`` bus, network devices only, and serves it on a socket of its own, one
client at a time. With an endpoint path of the form ``connect:PATH`` it is the frontend who serves the socket at PATH, and the
driver connects to it whenever it is there. Hooks are called by core from any thread.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from mdevkit.driver import Driver, xml_attribute
from mdevkit.errors import MdevError
from mdevkit.hookspecs import hookimpl
from mdevkit.paths import runtime_dir

from mdevkit_virtio.bus import VirtioMdev, VirtioMdevBus
from mdevkit_virtio.netspec import NetFeature
from mdevkit_virtio.vhost.server import VhostUserServer
from mdevkit_virtio.vhost.sources import Connecting, Listening, Source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mdevkit.device import Device

#: Begins the endpoint path of a device that connects to its frontend.
CONNECT: Final = "connect:"
#: The most descriptors DPDK is told to make rings of: more costs it its cache.
_DPDK_RING: Final = 1024


class VhostUserEndpoint:
    """A bound device's vhost-user socket. `name` makes the ids in QEMU's arguments unlike those of other devices."""

    def __init__(self, server: VhostUserServer, name: str) -> None:
        self.server: Final = server
        self._id: Final = name.split("-", 1)[0]
        # Asked now: later the device belongs to the server's thread.
        self._mac: Final = _mac(server)
        self._ring: Final = min(server.ops.get_vq_num_max(0), _DPDK_RING)

    def describe(self) -> Mapping[str, str]:
        """See `mdevkit.driver.Endpoint.describe`; ``mode`` says who serves the socket: this backend, or the frontend."""
        source, client = self.server.source, self.server.client
        facts = {"kind": "vhost-user", "socket": source.path, "client": str(client) if client else ""}
        return facts | {"mode": "client" if source.connects else "server"}

    def attach(self, client: str) -> Sequence[str]:
        """Return the arguments for QEMU or DPDK, or libvirt's domain XML; EOPNOTSUPP for other clients.

        QEMU's memory has to be shared; a machine's size is its user's to choose, 1 GiB stands in for it. ``reconnect-ms`` is
        known to QEMU 9.2 and later; without it a guest whose backend goes has no network for good.
        """
        ways = {"qemu": self._qemu, "dpdk": self._dpdk, "libvirt": self._libvirt}
        if client not in ways:
            raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use a vhost-user device", client)
        return ways[client]()

    def _qemu(self) -> list[str]:
        path = self._path.replace(",", ",,")
        chardev = f"socket,id=vhost-{self._id},path={path}," + ("server=on,wait=off" if self._connects else "reconnect-ms=1000")
        memory = ["-m", "1G", "-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-machine", "memory-backend=mem"]
        netdev = f"vhost-user,id=net-{self._id},chardev=vhost-{self._id}"
        device = f"virtio-net-pci,netdev=net-{self._id}"
        if self._pairs > 1:
            netdev += f",queues={self._pairs}"
            # A vector for each queue, one for the control queue, one for changes of configuration.
            device += f",mq=on,vectors={2 * self._pairs + 2}"
        device += f",mac={self._mac}" if self._mac else ""
        return [*memory, "-chardev", chardev, "-netdev", netdev, "-device", device]

    def _dpdk(self) -> list[str]:
        vdev = f"net_virtio_user0,path={self._path},queues={self._pairs},queue_size={self._ring}"
        vdev += f",mac={self._mac}" if self._mac else ""
        vdev += ",server=1" if self._connects else ""
        return ["--vdev", vdev]

    def _libvirt(self) -> list[str]:
        source = f"<source type='unix' path={xml_attribute(self._path)} mode="
        source += "'server'/>" if self._connects else "'client'><reconnect enabled='yes' timeout='1'/></source>"
        return [
            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
            "<interface type='vhostuser'>",
            *([f"  <mac address='{self._mac}'/>"] if self._mac else []),
            f"  {source}",
            "  <model type='virtio'/>",
            *([f"  <driver queues='{self._pairs}'/>"] if self._pairs > 1 else []),
            "</interface>",
        ]

    @property
    def _path(self) -> str:
        return self.server.source.path

    @property
    def _connects(self) -> bool:
        return self.server.source.connects

    @property
    def _pairs(self) -> int:
        return self.server.traits.queues // 2


def _mac(server: VhostUserServer) -> str:
    """Return the device's own address, empty if it has none: then the frontend makes one up."""
    if not server.traits.features & NetFeature.MAC:
        return ""
    return server.ops.get_config(0, 6).hex(":")


class VhostMdevDriver(Driver):
    """The driver; one object serves any number of devices."""

    name = "vhost_mdev"
    bus = VirtioMdevBus.name
    id_table = ("c02",)

    @hookimpl
    def driver_probe(self, device: Device) -> VhostUserEndpoint:
        """Serve the device: ENOTSUP unless it is a network device; what is wrong with a socket path that cannot be used."""
        mdev = VirtioMdev.from_device(device)
        server = VhostUserServer(mdev.get_ops(), _source(mdev), mdev.name)
        server.examine()
        endpoint = VhostUserEndpoint(server, mdev.name)
        server.start()
        return endpoint

    @hookimpl
    def driver_remove(self, device: Device) -> None:
        """Stop serving; nothing is left of socket, thread and connection."""
        self._server(device).close()

    @hookimpl
    def driver_let_go(self, device: Device, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`; a vhost-user client cannot be asked, only waited for."""
        self._server(device).let_go(timeout, force)

    @hookimpl
    def driver_suspend(self, device: Device) -> None:
        """Stop the device's queues; nothing of their state is lost."""
        self._server(device).suspend()

    @hookimpl
    def driver_resume(self, device: Device) -> None:
        """Let the queues go on."""
        self._server(device).resume()

    @staticmethod
    def _server(device: Device) -> VhostUserServer:
        if not isinstance(device.endpoint, VhostUserEndpoint):
            raise MdevError(errno.ENODEV, f"{device} is not served", device)
        return device.endpoint.server


def _source(mdev: VirtioMdev) -> Source:
    path = mdev.endpoint_path or str(runtime_dir() / f"{mdev.name}.sock")
    if path.startswith(CONNECT):
        return Connecting(path.removeprefix(CONNECT))
    return Listening(path, mdev.listen)
