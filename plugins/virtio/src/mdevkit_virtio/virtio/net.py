"""The driver ``virtio_net`` (drivers/net/virtio_net.c): makes a virtio network device a netdev, and offers it at a socket.

The netdev is ``device.endpoint.netdev`` of the virtio device. Nothing is offloaded: frames are whole and no longer than the MTU.
Hooks are called by core from any thread.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError
from mdevkit.paths import runtime_dir

from mdevkit_virtio.netspec import HEADER, LINK_UP, MIN_MTU
from mdevkit_virtio.ops import Status
from mdevkit_virtio.virtio.bus import VirtioDriver
from mdevkit_virtio.virtio.control import ControlQueue
from mdevkit_virtio.virtio.netdev import ETH_HEADER, VLAN_TAG, NetDevice
from mdevkit_virtio.virtio.stream import StreamServer, attach_arguments
from mdevkit_virtio.virtio.vring import QueueRequest

if TYPE_CHECKING:
    from mdevkit_virtio.virtio.device import VirtioDevice
    from mdevkit_virtio.virtio.vring import DriverVirtqueue

log = logging.getLogger("mdevkit.virtio")

#: Feature bits of a network device (virtio 1.2, 5.1.3).
F_MTU: Final = 3
F_MAC: Final = 5
F_MRG_RXBUF: Final = 15
F_STATUS: Final = 16
F_CTRL_VQ: Final = 17
F_MQ: Final = 22
#: struct virtio_net_config (5.1.4): where its fields are.
_MAC_AT, _STATUS_AT, _PAIRS_AT, MTU_AT = 0, 6, 8, 10
_MAC_SIZE: Final = 6
#: The MTU of a device that does not tell.
DEFAULT_MTU: Final = 1500
#: Bytes of a receive buffer where a frame may be spread over several.
_MERGEABLE_SIZE: Final = 2048


class NetEndpoint:
    """A netdev, and the socket that leads to it."""

    def __init__(self, netdev: NetDevice, server: StreamServer, pairs: int, bus_name: str) -> None:
        self.netdev: Final = netdev
        self.server: Final = server
        #: Queue pairs.
        self.pairs: Final = pairs
        #: What QEMU is to call it.
        self._id: Final = f"net-{bus_name[:8]}"

    def describe(self) -> Mapping[str, str]:
        """See `mdevkit.driver.Endpoint.describe`."""
        port = self.netdev.port
        facts = {"kind": "netdev", "name": self.netdev.name, "mac": text_of(self.netdev.mac), "mtu": str(self.netdev.mtu)}
        facts |= {"carrier": "up" if self.netdev.carrier else "down", "queue_pairs": str(self.pairs)}
        return facts | {"socket": self.server.path, "client": port.name if port is not None else ""}

    def attach(self, client: str) -> Sequence[str]:
        """Return QEMU's or libvirt's arguments; EOPNOTSUPP for DPDK, which cannot use a stream of frames."""
        arguments = attach_arguments(client, self.server.path, text_of(self.netdev.mac), self._id)
        if arguments:
            return arguments
        raise MdevError(errno.EOPNOTSUPP, f"{client} cannot use a netdev; bind the device to vhost_mdev", client)


class VirtioNetDriver(VirtioDriver):
    """The driver; one object serves any number of devices."""

    name = "virtio_net"
    id_table = ("d00000001v",)
    feature_table = (F_MTU, F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_MQ)

    def validate(self, device: VirtioDevice) -> None:
        """Decline what cannot be used: an MTU below IPv4's, several queue pairs without a queue to ask for them."""
        if device.has(F_MTU) and device.read_number(MTU_AT, 2) < MIN_MTU:
            device.features &= ~(1 << F_MTU)
        if device.has(F_MQ) and not device.has(F_CTRL_VQ):
            device.features &= ~(1 << F_MQ)
        if device.has(F_CTRL_VQ) and not device.has(F_MQ):
            device.features &= ~(1 << F_CTRL_VQ)

    def probe(self, device: VirtioDevice) -> NetEndpoint:
        """Set up queues and netdev, then the socket: errors of `VirtioTransport.find_vqs`, and of a path that cannot be used."""
        mtu = device.read_number(MTU_AT, 2) if device.has(F_MTU) else DEFAULT_MTU
        netdev = device.drvdata = NetDevice(f"eth{device.index}", _read_mac(device), mtu, device.irq)
        netdev.set_carrier(_link_is_up(device))
        with ExitStack() as undo:
            undo.callback(_tear_down, device)
            _set_up(device, netdev)
            undo.callback(netdev.stop)
            server = StreamServer(netdev, device.endpoint_path or str(runtime_dir() / f"{device.name}.sock"), device.listen)
            undo.pop_all()
        return NetEndpoint(netdev, server, netdev.queue_pairs, device.transport.bus_name)

    def remove(self, device: VirtioDevice) -> None:
        """End netdev and socket, and take the queues down."""
        endpoint = _endpoint_of(device)
        endpoint.server.close()
        endpoint.netdev.shut_down(MdevError(errno.ENODEV, f"{endpoint.netdev} is gone", endpoint.netdev))
        endpoint.netdev.stop()
        _tear_down(device)

    def config_changed(self, device: VirtioDevice) -> None:
        """Follow the link; a device that needs a reset is broken. Comes as soon as `probe` is over, before there is an endpoint."""
        netdev: NetDevice = device.drvdata
        if Status.NEEDS_RESET in device.status:
            netdev.set_carrier(False)
            netdev.shut_down(MdevError(errno.EIO, f"{netdev} is broken: its device needs a reset", netdev))
        else:
            netdev.set_carrier(_link_is_up(device))

    def let_go(self, device: VirtioDevice, timeout: float, force: bool) -> None:
        """See `DriverSpec.driver_let_go`: whoever is connected is waited for, since there is no way to ask."""
        _endpoint_of(device).server.let_go(timeout, force)

    def freeze(self, device: VirtioDevice) -> None:
        """Take the queues down; frames in them are lost, as when a card sleeps. Whoever is connected stays."""
        _endpoint_of(device).netdev.stop()
        _tear_down(device)

    def restore(self, device: VirtioDevice) -> None:
        """Set the queues up again."""
        netdev = _endpoint_of(device).netdev
        _set_up(device, netdev)
        with device.irq.paused():
            netdev.set_carrier(_link_is_up(device))
        netdev.resume()


def text_of(mac: bytes) -> str:
    """Return a MAC address as it is written."""
    return mac.hex(":")


def _endpoint_of(device: VirtioDevice) -> NetEndpoint:
    if not isinstance(device.endpoint, NetEndpoint):
        raise MdevError(errno.ENODEV, f"{device} is no netdev", device)
    return device.endpoint


def _read_mac(device: VirtioDevice) -> bytes:
    """Return the device's address, or one made up: random, locally administered (eth_hw_addr_random)."""
    if device.has(F_MAC):
        return device.read_config(_MAC_AT, _MAC_SIZE)
    made_up = bytearray(os.urandom(_MAC_SIZE))
    made_up[0] = made_up[0] & 0xFC | 2
    return bytes(made_up)


def _link_is_up(device: VirtioDevice) -> bool:
    return not device.has(F_STATUS) or bool(device.read_number(_STATUS_AT, 2) & LINK_UP)


def _set_up(device: VirtioDevice, netdev: NetDevice) -> None:
    """Set up as many queue pairs as there are, make the device ready, and begin."""
    pairs = max(1, device.read_number(_PAIRS_AT, 2)) if device.has(F_MQ) else 1
    requests = [request for pair in range(pairs) for request in _requests(device, netdev, pair)]
    control = ControlQueue(device) if device.has(F_CTRL_VQ) else None
    queues = device.find_vqs([*requests, *([control.request] if control else [])])
    device.ready()
    if control is not None:
        control.queue = queues[-1]
        control.set_pairs(pairs)
    netdev.start(_made(queues[0 : 2 * pairs : 2]), _made(queues[1 : 2 * pairs : 2]))


def _requests(device: VirtioDevice, netdev: NetDevice, pair: int) -> list[QueueRequest]:
    longest = HEADER + netdev.mtu + ETH_HEADER + VLAN_TAG
    room = _MERGEABLE_SIZE if device.has(F_MRG_RXBUF) else longest
    return [
        QueueRequest(f"input.{pair}", partial(netdev.rx_interrupt, pair), room, writable=True),
        QueueRequest(f"output.{pair}", partial(netdev.tx_interrupt, pair), longest),
    ]


def _made(queues: Sequence[DriverVirtqueue | None]) -> list[DriverVirtqueue]:
    return [queue for queue in queues if queue is not None]


def _tear_down(device: VirtioDevice) -> None:
    device.reset()
    device.del_vqs()
