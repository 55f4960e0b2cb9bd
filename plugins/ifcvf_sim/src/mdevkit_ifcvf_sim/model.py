"""The simulated card: functions that are driven by their registers, as the real ones are.

`Function` is all there is between a driver and the rings: configuration space, BARs, vectors. What carries the frames is a virtio
device of the virtio package, which the registers are wired to. Accesses come from one thread at a time, but for reads and
doorbells, which any thread may make; interrupts leave on any.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError
from mdevkit_virtio.ops import Status

from mdevkit_ifcvf_sim import regs
from mdevkit_ifcvf_sim.regs import Cfg, CommonCfg

if TYPE_CHECKING:
    from mdevkit_virtio.ops import Callback, VirtioOps

log: Final = logging.getLogger("mdevkit.ifcvf_sim")


class QueueRegs:
    """What the card keeps of a queue behind `queue_select`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.vector = regs.NO_VECTOR
        self.enabled = False
        #: Descriptor, driver and device area.
        self.areas = [0, 0, 0]
        #: The block of BAR 4.
        self.state = 0


class Function:
    """The registers of one function of the card, on top of the virtio device `rings`.

    `take_isr` reads and clears the interrupt status, for a function that has a pin.
    """

    def __init__(self, rings: VirtioOps, take_isr: Callable[[], int] = lambda: 0) -> None:
        self.rings: Final = rings
        self._take_isr: Final = take_isr
        self._common: Final = CommonCfg()
        self._vectors: dict[int, Callback] = {}
        self._features = [0, 0]
        self._queues: list[QueueRegs] = []
        #: Suspended: see `hold`.
        self._held = False
        #: The rings' generation that reads as 0.
        self._generation = 0
        self._clear()

    def request_vector(self, vector: int, callback: Callback | None) -> None:
        """Have `callback` called for a vector (request_irq), None for nothing; before the vector is given to a queue.

        `regs.NO_QUEUE_VECTOR` and `regs.NO_CONFIG_VECTOR` stand for events that have none, which the pin tells of.
        """
        if callback is None:
            self._vectors.pop(vector, None)
        else:
            self._vectors[vector] = callback

    # -- BARs ------------------------------------------------------------------------------------------------------------

    def read(self, bar: int, offset: int, size: int) -> int:
        """Read a register; one that does not exist, or in a width it does not have, is 0."""
        if bar == regs.LM_BAR:
            return self._read_lm(offset, size)
        area, offset = _area(bar, offset)
        if area is Cfg.COMMON:
            return self._read_common(offset, size)
        if area is Cfg.DEVICE:
            return self._read_device(offset, size)
        return self._take_isr() if area is Cfg.ISR else 0

    def write(self, bar: int, offset: int, size: int, value: int) -> None:
        """Write a register; what cannot be is ignored, as hardware does."""
        try:
            self._write(bar, offset, size, value)
        except MdevError as error:
            log.info("the driver wrote %#x to %#x of BAR %d: %s", value, offset, bar, error)

    def _write(self, bar: int, offset: int, size: int, value: int) -> None:
        if bar == regs.LM_BAR:
            self._write_lm(offset, size, value)
            return
        area, offset = _area(bar, offset)
        if area is Cfg.NOTIFY:
            self.rings.kick_vq(value & 0xFFFF)
        elif area is Cfg.DEVICE:
            self.rings.set_config(offset, value.to_bytes(size, "little"))
        elif area is Cfg.COMMON and offset in regs.FIELDS and size == regs.FIELDS[offset][1]:
            self._write_common(regs.FIELDS[offset][0], value)

    def _read_device(self, offset: int, size: int) -> int:
        try:
            return int.from_bytes(self.rings.get_config(offset, size), "little")
        except MdevError:
            return 0

    # -- common configuration --------------------------------------------------------------------------------------------

    def _read_common(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes(self._refreshed())[offset : offset + size], "little")

    def _refreshed(self) -> CommonCfg:
        """Return the registers with what the device knows in them: a copy, so that threads that read do not meet."""
        common = CommonCfg.from_buffer_copy(self._common)
        common.device_feature = self._select(self.rings.get_features(), common.device_feature_select)
        common.driver_feature = self._select(self._features[0] | self._features[1] << 32, common.driver_feature_select)
        common.num_queues = len(self._queues)
        common.device_status = self.rings.get_status()
        common.config_generation = self.rings.get_generation() - self._generation & 0xFF
        queue = self._selected(common.queue_select)
        common.queue_size = queue.size if queue else 0
        common.queue_msix_vector = queue.vector if queue else regs.NO_VECTOR
        common.queue_enable = int(queue.enabled) if queue else 0
        common.queue_notify_off = common.queue_select if queue else 0
        for name, area in zip(("desc", "driver", "device"), queue.areas if queue else (0, 0, 0), strict=True):
            setattr(common, f"queue_{name}_lo", area & 0xFFFFFFFF)
            setattr(common, f"queue_{name}_hi", area >> 32)
        return common

    @staticmethod
    def _select(features: int, half: int) -> int:
        return features >> 32 * half & 0xFFFFFFFF if half < 2 else 0

    def _selected(self, select: int) -> QueueRegs | None:
        queues = self._queues
        return queues[select] if select < len(queues) else None

    def _write_common(self, name: str, value: int) -> None:
        if name in {"device_feature_select", "driver_feature_select", "queue_select"}:
            setattr(self._common, name, value)
        elif name == "driver_feature" and self._common.driver_feature_select < 2:
            self._features[self._common.driver_feature_select] = value
        elif name == "msix_config":
            self._common.msix_config = self._vector(value)
            self._wire_config()
        elif name == "device_status":
            self._set_status(value)
        elif name.startswith("queue_") and (queue := self._selected(self._common.queue_select)) is not None:
            self._write_queue(queue, name.removeprefix("queue_"), value)

    def _wire_config(self) -> None:
        vector = self._common.msix_config
        self.rings.set_config_cb(self._vectors.get(regs.NO_CONFIG_VECTOR if vector == regs.NO_VECTOR else vector))

    def _wire_queue(self, index: int, queue: QueueRegs) -> None:
        vector = regs.NO_QUEUE_VECTOR if queue.vector == regs.NO_VECTOR else queue.vector
        self.rings.set_vq_cb(index, self._vectors.get(vector))

    def _vector(self, value: int) -> int:
        """Return the vector an event gets: one the card does not have reads back as none (4.1.5.1.2)."""
        return value if value < regs.VECTORS else regs.NO_VECTOR

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        if value & Status.FEATURES_OK and not self.rings.get_status() & Status.FEATURES_OK:
            try:
                self.rings.set_features(self._features[0] | self._features[1] << 32)
            except MdevError as error:
                log.info("features are refused: %s", error)
                value &= ~Status.FEATURES_OK
        self.rings.set_status(value)

    def _write_queue(self, queue: QueueRegs, name: str, value: int) -> None:
        if name == "enable":
            self._enable(self._common.queue_select, queue, bool(value & 1))
        elif name == "msix_vector":
            queue.vector = self._vector(value)
            self._wire_queue(self._common.queue_select, queue)
        elif name == "size" and not queue.enabled:
            queue.size = value
        elif name[:-3] in {"desc", "driver", "device"} and not queue.enabled:
            place, shift = ("desc", "driver", "device").index(name[:-3]), 32 * name.endswith("hi")
            queue.areas[place] = queue.areas[place] & ~(0xFFFFFFFF << shift) | value << shift

    def _enable(self, index: int, queue: QueueRegs, enable: bool) -> None:
        """Start a queue, or stop it: Intel's card takes a 0 here, and then knows where the ring stands."""
        if enable and not queue.enabled:
            self.rings.set_vq_num(index, queue.size)
            self.rings.set_vq_address(index, *queue.areas)
            self.rings.set_vq_state(index, queue.state & 0xFFFF)
            self._wire_queue(index, queue)
            self.rings.set_vq_ready(index, not self._held)
            queue.enabled = True
        elif not enable and queue.enabled:
            self.rings.set_vq_ready(index, False)
            queue.state = self._ring_state(index)
            queue.enabled = False

    def hold(self, held: bool) -> None:
        """Let no ring move, or go on; what the registers say stays, and may change meanwhile."""
        self._held = held
        for index, queue in enumerate(self._queues):
            try:
                if queue.enabled:
                    self.rings.set_vq_ready(index, not held)
            except MdevError as error:  # enabled meanwhile, where no ring can be
                log.info("queue %d does not go on: %s", index, error)
                queue.enabled = False

    def reset(self) -> None:
        """Put everything back to power-on."""
        self.rings.set_status(0)
        self._clear()

    def _clear(self) -> None:
        for index in range(len(self._queues)):
            self.rings.set_vq_cb(index, None)
        for name, *_ in CommonCfg._fields_:
            setattr(self._common, name, 0)
        self._common.msix_config = regs.NO_VECTOR
        self._features = [0, 0]
        self._generation = self.rings.get_generation()
        self._queues = [QueueRegs(size) for size in _sizes(self.rings)]
        self._wire_config()

    # -- live migration --------------------------------------------------------------------------------------------------

    def _ring_state(self, index: int) -> int:
        avail = self.rings.get_vq_state(index) & 0xFFFF
        return avail | avail << 16

    def _read_lm(self, offset: int, size: int) -> int:
        for index, queue in enumerate(self._queues):
            if (offset, size) == (regs.lm_offset(index), 4):
                return self._ring_state(index) if queue.enabled else queue.state
        return 0

    def _write_lm(self, offset: int, size: int, value: int) -> None:
        for index, queue in enumerate(self._queues):
            if (offset, size) == (regs.lm_offset(index), 4) and not queue.enabled:
                queue.state = value


def _area(bar: int, offset: int) -> tuple[Cfg | None, int]:
    """Return which area of BAR 0 an offset is in, and where in it."""
    for area, (start, length) in regs.AREAS.items():
        if bar == regs.BAR and start <= offset < start + length:
            return area, offset - start
    return None, offset


def _sizes(rings: VirtioOps) -> Sequence[int]:
    sizes: list[int] = []
    while size := rings.get_vq_num_max(len(sizes)):
        sizes.append(size)
        if len(sizes) == regs.QUEUES:
            break
    return sizes
