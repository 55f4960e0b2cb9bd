"""The kit for vendors of virtio devices: `VirtioModel` does the twenty ops, a subclass says what the device is and does.

Threads. Ops come from the driver's thread, one at a time; a vendor's attributes come from any. `VirtioModel.lock` is held in every
op that changes something and in the hooks that say so. Buffers are processed on the threads of workers (`mdevkit_virtio.workers`).
Those never take the lock, nor wait for a thread that may have it: whoever holds it may be waiting for a worker to stand still.
Status, configuration and readiness can be read by any thread without it.

Changes of a live device (memory, logging, descriptors, callbacks) are made while its workers stand still, for about one burst.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar, Final

from mdevkit.errors import MdevError, brief

from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.engine import Engine, load
from mdevkit_virtio.interrupts import ConfigInterrupt, FunctionCaller
from mdevkit_virtio.layout import Feature, RingError, VringBase, check_size
from mdevkit_virtio.memory import DirtyLog, MemoryTable
from mdevkit_virtio.ops import Callback, DeviceId, Status, VirtioOps, signal_eventfd
from mdevkit_virtio.queue import QueueConfig, Virtqueue
from mdevkit_virtio.status import DeviceStatus
from mdevkit_virtio.workers import BufferWorker, Worker

_log: Final = logging.getLogger("mdevkit.virtio")

_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF
#: All bits the rings know (6).
_RING_FEATURES: Final = sum(Feature)


class QueueState:
    """What the driver has set up of one queue. For `VirtioModel`; vendors get the `Virtqueue`."""

    def __init__(self, index: int, num_max: int) -> None:
        self.index: Final = index
        self.num_max: Final = num_max
        #: Where kicks of `kick_vq` go as long as the driver has not given a descriptor.
        self.own_kick = -1
        self.callback: Callback | None = None
        #: The eventfd that signals the driver; ours if the callback is a function, else the driver's; -1 for none.
        self.call = -1
        self.clear()

    def clear(self) -> None:
        """Forget what a reset forgets; the callback is taken away by `VirtioModel`."""
        self.num = self.num_max
        self.areas = (0, 0, 0)
        #: As `VringBase.encode` says; None for the beginning.
        self.base: int | None = None
        self.ready = False
        #: The driver's kick descriptor, -1 for none, None as long as it has not said.
        self.kick: int | None = None
        #: Set while ready; None also if the ring is lost because its memory has gone.
        self.queue: Virtqueue | None = None

    def __str__(self) -> str:
        return f"queue {self.index}"


class VirtioModel(VirtioOps):
    """A virtio device. A vendor states `device_id`, `vendor_id` and what the constructor takes, and overrides hooks.

    `queues`: the largest ring of each. `features`: what is offered. `name` is what threads and errors are called after.
    ``parent_remove`` calls `close`, which gives everything back.
    """

    #: The kind of device (virtio 1.2, section 5).
    device_id: ClassVar[int] = DeviceId.NONE
    vendor_id: ClassVar[int] = 0
    #: The alignment of ring areas in bytes.
    vq_align: ClassVar[int] = 4096

    def __init__(
        self, queues: Sequence[int], features: int, config: ConfigSpace | None = None, *, name: str, engine: Engine | None = None
    ) -> None:
        self.name: Final = name
        self.engine: Final = engine if engine is not None else load()
        self.features: Final = features
        self.config: Final = config if config is not None else ConfigSpace()
        #: See the module.
        self.lock: Final = threading.RLock()
        self._queues: Final = [QueueState(index, num_max) for index, num_max in enumerate(queues)]
        self._status: Final = DeviceStatus()
        self._error: MdevError | None = None
        #: What the driver accepts; None for a choice that was refused.
        self._accepted: int | None = 0
        self._table = MemoryTable()
        self._log: DirtyLog | None = None
        self._logged_rings: frozenset[int] = frozenset()
        self._config_interrupt: Final = ConfigInterrupt()
        #: Held while a kick is written, so that its descriptor is not closed meanwhile.
        self._kick_lock: Final = threading.Lock()
        self._caller: FunctionCaller | None = None
        self._workers: Sequence[Worker] | None = None

    def __str__(self) -> str:
        return self.name

    def close(self) -> None:
        """End every thread and close every descriptor of ours. No op is called afterwards; closing twice is harmless."""
        with self.lock:
            self._reset()
            for worker in self._workers or ():
                worker.close()
            self._workers = ()
            if self._caller is not None:
                self._caller.close()
                self._caller = None
            for slot in self._queues:
                if slot.own_kick >= 0:
                    os.close(slot.own_kick)
                    slot.own_kick = -1
            self._table, self._log = MemoryTable(), None

    # -- hooks for vendors ---------------------------------------------------------------------------------------------------

    def make_workers(self) -> Sequence[Worker]:
        """Return who carries the traffic; called once, when the first queue runs. By default one thread and `on_buffers`."""
        return [BufferWorker(f"{self.name} queues", range(len(self._queues)), self.queue_broke, self.on_buffers)]

    def on_buffers(self, index: int, queue: Virtqueue) -> None:
        """Process buffers: on a worker's thread, when the driver has made some available, or after `BufferWorker.wake`.

        Take what is wanted with ``queue.take``, give it back with ``queue.complete``, now or in a later call, and return soon.
        An error breaks the queue. Other queues of the same worker may be used here too, if they run: see `running_queue`.
        """

    def check_features(self, features: int) -> None:
        """Refuse, with EINVAL, features of those offered that do not go together; under the lock."""

    def driver_ok(self) -> None:
        """Note that the driver has finished: queues that are ready run after this; under the lock, with workers paused."""

    def queue_stopping(self, index: int, queue: Virtqueue) -> None:
        """Give back what was taken from a queue that is about to stop; under the lock, with its worker paused.

        What is not given back now is taken again by whoever goes on with the ring, so give back in order, or everything. Keep no
        buffer of it: that would be used with another driver, and holds the memory of this one. The hook comes for a broken
        queue too (``queue.broken``), which takes nothing back: `RingError`, that may leave the hook.
        """

    def device_reset(self) -> None:
        """Forget what the driver has set; under the lock, with workers paused and every queue stopped."""

    def config_written(self, offset: int, data: bytes) -> None:
        """Act on what the driver has written to the configuration space; under the lock."""

    # -- services for vendors ------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> Feature:
        """What the driver has accepted of the features; bits that are not the rings' too."""
        return Feature(self._accepted or 0)

    @property
    def running(self) -> bool:
        """Whether the driver has set DRIVER_OK; any thread."""
        return Status.DRIVER_OK in self._status

    @property
    def error(self) -> MdevError | None:
        """Why the device needs a reset: the first error since the last one, None if there was none; any thread."""
        return self._error

    def running_queue(self, index: int) -> Virtqueue | None:
        """Return another queue of the same worker, None if it does not run or is broken; on the worker's thread."""
        queue = self._queues[index].queue
        return queue if queue is not None and self.running and queue.broken is None else None

    def update_config(self, **values: int | bytes) -> None:
        """Change fields of the configuration space, all in one, and tell the driver; any thread, workers' too."""
        if self.config.update(**values) and self.running:
            self._config_interrupt.fire()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Change inside the block how queues are processed: workers stand still, and serve their queues anew afterwards."""
        with self.lock, self._paused():
            yield
            self._serve()

    def queue_broke(self, index: int, error: MdevError) -> None:
        """Note that a queue is broken: the device needs a reset (2.1.1), its driver is told, other queues go on. Any thread."""
        _log.debug("%s: queue %d: %s", self, index, error)
        self._error = self._error or brief(error)
        if self._status.breaks():
            self._config_interrupt.fire()

    # -- ops: queues ---------------------------------------------------------------------------------------------------------

    def get_vq_num_max(self, index: int) -> int:
        """See `VirtioOps.get_vq_num_max`."""
        return self._queues[index].num_max if 0 <= index < len(self._queues) else 0

    def get_vq_align(self) -> int:
        """See `VirtioOps.get_vq_align`."""
        return self.vq_align

    def set_vq_num(self, index: int, num: int) -> None:
        """See `VirtioOps.set_vq_num`."""
        with self.lock:
            slot = self._stopped(index, "size")
            check_size(num, packed=self._packed or not self.negotiated)
            if num > slot.num_max:
                raise MdevError(errno.EINVAL, f"{self}: {slot} has {slot.num_max} descriptors at most, not {num}", self)
            slot.num = num

    def set_vq_address(self, index: int, desc: int, driver: int, device: int) -> None:
        """See `VirtioOps.set_vq_address`; alignment and memory are checked when the queue is made ready."""
        with self.lock:
            slot = self._stopped(index, "place")
            if not all(0 <= address <= _U64 for address in (desc, driver, device)):
                raise MdevError(errno.EINVAL, f"{self}: {slot} cannot be at addresses beyond 64 bits", self)
            slot.areas = (desc, driver, device)

    def set_vq_state(self, index: int, state: int) -> None:
        """See `VirtioOps.set_vq_state`; what a packed ring cannot have is refused when the queue is made ready."""
        with self.lock:
            slot = self._stopped(index, "state")
            if not 0 <= state <= _U32:
                raise MdevError(errno.EINVAL, f"{self}: {slot} cannot go on at {state:#x}", self)
            slot.base = state

    def get_vq_state(self, index: int) -> int:
        """See `VirtioOps.get_vq_state`."""
        with self.lock:
            slot = self._slot(index)
            if slot.queue is not None:
                return slot.queue.ring.base.encode(packed=self._packed)
            return VringBase().encode(packed=self._packed) if slot.base is None else slot.base

    def set_vq_cb(self, index: int, callback: Callback | None) -> None:
        """See `VirtioOps.set_vq_cb`. A running queue whose driver could not be told of anything before signals once."""
        with self.lock:
            slot = self._slot(index)
            with self._paused(index):
                had = slot.call >= 0
                self._set_callback(slot, callback)
                if slot.call >= 0 and not had and slot.queue is not None and self.running:
                    signal_eventfd(slot.call)

    def set_vq_ready(self, index: int, ready: bool) -> None:
        """See `VirtioOps.set_vq_ready`."""
        with self.lock:
            slot = self._slot(index)
            if slot.ready == ready:
                return
            with self._paused(index):
                if ready:
                    self._start(slot)
                else:
                    self._stop(slot)
                slot.ready = ready
                self._serve(index)

    def get_vq_ready(self, index: int) -> bool:
        """See `VirtioOps.get_vq_ready`."""
        return self._slot(index).ready

    def kick_vq(self, index: int) -> None:
        """See `VirtioOps.kick_vq`."""
        slot = self._slot(index)
        with self._kick_lock:
            fd = slot.own_kick if slot.kick is None else slot.kick
            if slot.ready and fd >= 0:
                signal_eventfd(fd)

    def set_vq_kick(self, index: int, fd: int) -> bool:
        """See `VirtioOps.set_vq_kick`. For a driver without one (-1) the device looks for buffers a thousand times a second."""
        with self.lock:
            slot = self._slot(index)
            with self._paused(index), self._kick_lock:
                slot.kick = fd
                if slot.queue is not None:
                    slot.queue.set_kick(fd)
                    self._serve(index)
        return True

    # -- ops: features and status --------------------------------------------------------------------------------------------

    def get_device_id(self) -> int:
        """See `VirtioOps.get_device_id`."""
        return self.device_id

    def get_vendor_id(self) -> int:
        """See `VirtioOps.get_vendor_id`."""
        return self.vendor_id

    def get_features(self) -> int:
        """See `VirtioOps.get_features`."""
        return self.features

    def set_features(self, features: int) -> None:
        """See `VirtioOps.set_features`; EBUSY also while a queue is ready. After a refusal FEATURES_OK does not stick."""
        with self.lock:
            if self.negotiated:
                raise MdevError(errno.EBUSY, f"{self}: features cannot change after FEATURES_OK, before a reset", self)
            if any(slot.ready for slot in self._queues):
                raise MdevError(errno.EBUSY, f"{self}: features cannot change while a queue is ready", self)
            self._accepted = None
            self._check_features(features)
            self._accepted = features

    @property
    def negotiated(self) -> bool:
        """Whether FEATURES_OK is set; any thread."""
        return Status.FEATURES_OK in self._status

    def get_status(self) -> int:
        """See `VirtioOps.get_status`."""
        return int(self._status.value)

    def set_status(self, status: int) -> None:
        """See `VirtioOps.set_status`."""
        with self.lock:
            if status == 0:
                self._reset()
                return
            added = self._status.check(status)
            if Status.FEATURES_OK in added and not self._agreed:
                if Status.DRIVER_OK in added:
                    raise MdevError(errno.EINVAL, f"{self}: the device refuses the features, and so status {status:#x}", self)
                added &= ~Status.FEATURES_OK
            if Status.DRIVER_OK not in added:
                self._status.add(added)
                return
            with self._paused():
                self._status.add(added)
                self.driver_ok()
                self._serve()

    # -- ops: configuration --------------------------------------------------------------------------------------------------

    def get_config(self, offset: int, length: int) -> bytes:
        """See `VirtioOps.get_config`."""
        return self.config.read(offset, length)

    def set_config(self, offset: int, data: bytes) -> None:
        """See `VirtioOps.set_config`."""
        with self.lock:
            if self.config.write(offset, data):
                self.config_written(offset, data)

    def set_config_cb(self, callback: Callback | None) -> None:
        """See `VirtioOps.set_config_cb`."""
        self._config_interrupt.set(callback)

    def get_generation(self) -> int:
        """See `VirtioOps.get_generation`; a reset changes it too."""
        return self.config.generation

    # -- ops: memory ---------------------------------------------------------------------------------------------------------

    def set_map(self, table: MemoryTable) -> None:
        """See `VirtioOps.set_map`. The table survives a reset: it is not the device's."""
        with self.lock, self._paused():
            self._table = table
            self._restart()

    def set_log(self, log: DirtyLog | None, rings: Collection[int] = ()) -> bool:
        """See `VirtioOps.set_log`. The log survives a reset, as memory does."""
        with self.lock, self._paused():
            self._log, self._logged_rings = log, frozenset(rings)
            self._restart()
        return True

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def _slot(self, index: int) -> QueueState:
        if not 0 <= index < len(self._queues):
            raise MdevError(errno.EINVAL, f"{self} has no queue {index}, the last one is {len(self._queues) - 1}", self)
        return self._queues[index]

    def _stopped(self, index: int, what: str) -> QueueState:
        slot = self._slot(index)
        if slot.ready:
            raise MdevError(errno.EBUSY, f"{self}: {slot} is ready, its {what} cannot change", self)
        return slot

    @property
    def _packed(self) -> bool:
        return Feature.RING_PACKED in self.accepted

    @property
    def _agreed(self) -> bool:
        """Whether the features chosen, none if none were, are ones to work with."""
        if self._accepted is None:
            return False
        try:
            self._check_features(self._accepted)
        except MdevError:
            return False
        return True

    def _check_features(self, features: int) -> None:
        if features & ~self.features:
            raise MdevError(errno.EINVAL, f"{self}: features {features & ~self.features:#x} are not offered", self)
        self.check_features(features)

    @contextlib.contextmanager
    def _paused(self, index: int | None = None) -> Iterator[None]:
        """Let workers stand still: all, or those of one queue."""
        with contextlib.ExitStack() as stack:
            for worker in self._workers or ():
                if index is None or index in worker.serves:
                    stack.enter_context(worker.paused())
            yield

    def _serve(self, index: int | None = None) -> None:
        """Tell workers which queues run; they are paused. Once DRIVER_OK is set and a queue is ready, there are workers."""
        live = {slot.index: slot.queue for slot in self._queues if slot.queue is not None and self.running}
        if self._workers is None:
            if not live:
                return
            self._workers = self.make_workers()
        for worker in self._workers:
            if index is None or index in worker.serves:
                worker.update({i: queue for i, queue in live.items() if i in worker.serves})

    def _start(self, slot: QueueState) -> None:
        """Start a queue with what the driver has set up; errors as `Virtqueue.start`."""
        if slot.own_kick < 0 and slot.kick is None:
            slot.own_kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # A new one each time: buffers of an earlier start belong to a queue that does not run any more.
        queue = Virtqueue(f"{self.name} {slot}", self.engine)
        queue.set_kick(slot.own_kick if slot.kick is None else slot.kick)
        queue.set_call(slot.call)
        queue.start(self._table, self._queue_config(slot))
        slot.queue = queue

    def _queue_config(self, slot: QueueState) -> QueueConfig:
        return QueueConfig(
            slot.num,
            *slot.areas,
            features=Feature(self.accepted & _RING_FEATURES),
            base=slot.base,
            log=self._log,
            log_ring=slot.index in self._logged_rings,
        )

    def _stop(self, slot: QueueState) -> None:
        queue, slot.queue = slot.queue, None
        if queue is not None:
            self._let_vendor_stop(slot, queue)
            slot.base = queue.stop().encode(packed=self._packed)

    def _let_vendor_stop(self, slot: QueueState, queue: Virtqueue) -> None:
        """Ask for the vendor's buffers; one that fails stops nobody from stopping: a reset always works."""
        try:
            self.queue_stopping(slot.index, queue)
        except RingError as error:
            _log.debug("%s: the buffers of %s cannot be given back: %s", self, slot, error)
        except Exception:  # noqa: BLE001  # a bug of the vendor is reported, and keeps no device from being reset
            _log.exception("%s: giving back the buffers of %s failed", self, slot)

    def _restart(self) -> None:
        """Let every queue that is started go on with the memory and log there are now; the first failure is raised at the end."""
        failure = None
        for slot in self._queues:
            if slot.queue is None:
                continue
            broken = slot.queue.broken
            self._stop(slot)
            try:
                # A broken ring stays alone; its old memory must go nevertheless.
                if broken is None:
                    self._start(slot)
            except MdevError as error:
                failure = failure or error
                self.queue_broke(slot.index, error)
        self._serve()
        if failure is not None:
            raise failure

    def _set_callback(self, slot: QueueState, callback: Callback | None) -> None:
        """Signal the driver by this callback; nobody uses the queue."""
        ours = slot.callback is not None and slot.callback.trigger < 0 and slot.call >= 0
        old, slot.callback = slot.call, callback
        slot.call = self._find_call(callback)
        if slot.queue is not None:
            slot.queue.set_call(slot.call)
        if ours and self._caller is not None:
            self._caller.remove(old)

    def _find_call(self, callback: Callback | None) -> int:
        if callback is None or callback.trigger >= 0 or callback.function is None:
            return callback.trigger if callback is not None else -1
        if self._caller is None:
            self._caller = FunctionCaller(self.name)
        return self._caller.add(callback)

    def _reset(self) -> None:
        """Be as a new device, but for memory, logging and the generation."""
        with self._paused():
            for slot in self._queues:
                self._stop(slot)
            self._status.reset()
            self._error = None
            self._serve()
            for slot in self._queues:
                self._set_callback(slot, None)
                with self._kick_lock:
                    slot.clear()
            self._config_interrupt.set(None)
            self._accepted = 0
            self.config.advance()
            self.device_reset()
