"""The control queue of a network device (virtio 1.2, 5.1.6.5): only what multiqueue needs of it.

Commands are rare and sent while the device is set up, on the thread that does that, which waits for the answer.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.virtio.vring import QueueRequest

if TYPE_CHECKING:
    from mdevkit_virtio.virtio.device import VirtioDevice
    from mdevkit_virtio.virtio.vring import DriverVirtqueue

#: VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_OK.
_CLASS_MQ, _PAIRS_SET, _OK = 4, 0, 0
#: Bytes of a command with its answer, which has one.
_COMMAND_SIZE: Final = 4
#: Seconds a device may take to answer.
TIMEOUT: Final = 5.0


class ControlQueue:
    """Sends commands. `queue` is set once the device's queues are set up."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device: Final = device
        self._answered: Final = threading.Event()
        #: What to ask `VirtioDevice.find_vqs` for.
        self.request: Final = QueueRequest("control", self._answered.set, _COMMAND_SIZE + 1)
        self.queue: DriverVirtqueue | None = None

    def set_pairs(self, pairs: int) -> None:
        """Have the device use that many queue pairs: EINVAL if it refuses, ETIMEDOUT if it does not answer."""
        if self._command(bytes([_CLASS_MQ, _PAIRS_SET]) + pairs.to_bytes(2, "little")) != _OK:
            raise MdevError(errno.EINVAL, f"{self._device} refuses to use {pairs} queue pairs", self._device)

    def _command(self, command: bytes) -> int:
        """Send a command and return the device's answer."""
        assert self.queue is not None, "commands follow find_vqs"
        ring, slot = self.queue.ring, self.queue.free[0]
        ring.memory.map[slot.address : slot.address + _COMMAND_SIZE] = command
        answer = slot.address + _COMMAND_SIZE
        self.queue.enable_signals()
        ring.add([Segment(slot.address, 2), Segment(slot.address + 2, 2)], [Segment(answer, 1)], slot)
        self.queue.kick()
        if not ring.completed:
            self._answered.wait(TIMEOUT)
        if not self.queue.collect():
            raise MdevError(errno.ETIMEDOUT, f"{self._device} has not answered a command for {TIMEOUT:g} s", self._device)
        return ring.memory.map[answer]
