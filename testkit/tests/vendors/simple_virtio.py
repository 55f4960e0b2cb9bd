"""A virtio device and its parent that keep every contract, written so that each of their rules can be broken in one place."""

from __future__ import annotations

from typing import Any

from mdevkit import Mdev, MdevType, ParentOps, hookimpl
from mdevkit_testkit.suites.virtio.guest import Guest
from mdevkit_virtio.bus import ClassId, VirtioMdev
from mdevkit_virtio.config import ConfigSpace, Field
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.queue import Virtqueue

#: Questions of one exchange.
_COUNT = 10


class Echo(VirtioModel):
    """Writes what it reads back into the same buffer, on two queues alike."""

    device_id = 0xEC0
    vendor_id = 0xBAD0
    queues = (64, 64)

    def __init__(self, name: str = "echo") -> None:
        config = ConfigSpace([Field("level", 0, 4, writable=True), Field("size", 4, 8)])
        super().__init__(self.queues, sum(Feature) | 1 << 27, config, name=name)
        self.config.update(size=0x123456789)

    def on_buffers(self, index: int, queue: Virtqueue) -> None:
        for buffer in queue.take():
            size = min(buffer.readable, buffer.writable)
            buffer.write(buffer.read(0, size))
            queue.complete((buffer, size))


def exchange(self: Any, guest: Guest) -> None:
    """Ask the device something on each queue, and check its answers."""
    for index in guest.queues:
        ring = guest.rings[index]
        questions = [b"question %d" % number for number in range(_COUNT)]
        for text in questions:
            answer = guest.room(len(text))
            assert ring.add([guest.place(text)], [answer], answer), "the ring is full"
        guest.kick(index)
        done: list[Any] = []
        assert guest.wait(lambda ring=ring, done=done: done.extend(ring.collect()) or len(done) == _COUNT), (
            f"{len(done)} of {_COUNT} questions were answered"
        )
        assert [guest.look(completion.token) for completion in done] == questions, "wrong answers"


class EchoParent(ParentOps):
    """As many as you like."""

    name = "echo"
    device: Any = Echo
    class_id = ClassId.VIRTIO
    api = "virtio_mdev"

    def __init__(self) -> None:
        self.types = [MdevType("one", "mdev_virtio", self.api)]

    @hookimpl
    def parent_create(self, mdev: Mdev) -> None:
        mdev.drvdata = self.device()
        self.publish(VirtioMdev.from_device(mdev))

    def publish(self, mdev: VirtioMdev) -> None:
        mdev.set_ops(self.class_id, mdev.drvdata)

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        self.take_down(mdev)

    def take_down(self, mdev: Mdev) -> None:
        mdev.drvdata.close()
