"""One queue as a vhost-user frontend sets it up, and what the device is told of it.

A frontend sends a ring's size, place, base and descriptors one by one, in an order of its own, and some of them while the
ring runs. So a `Vring` keeps what was sent, and `update` starts or stops the device's queue when that has come to mean so.
Used on the backend's thread only, but for `Vring.drain`.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.layout import area_sizes, check_size
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.ops import Callback, VirtioOps, drain_eventfd, signal_eventfd
from mdevkit_virtio.vhost.descriptors import close_all
from mdevkit_virtio.vhost.proto import VringAddr


class Vring:
    """Queue `index` of the device `ops`."""

    def __init__(self, ops: VirtioOps, index: int) -> None:
        self.index: Final = index
        #: SET_VRING_ENABLE said so.
        self.enabled = False
        #: SET_VRING_KICK has come, GET_VRING_BASE has not.
        self.started = False
        #: The device's queue is ready.
        self.running = False
        #: The device cannot wait for kicks itself.
        self.kicked_here = False
        self.kick = -1
        self._ops: Final = ops
        #: Held while another thread empties the two, and while they are exchanged: so none is closed meanwhile.
        self._signals: Final = threading.Lock()
        self._call = -1
        self._error = -1
        self._num = 0
        self._addr: VringAddr | None = None
        self._base: int | None = None
        #: Guest addresses of the three areas, as the device knows them.
        self._areas = (0, 0, 0)

    def __str__(self) -> str:
        return f"queue {self.index}"

    @property
    def logged(self) -> bool:
        """Whether what the device writes of the ring itself shall be logged."""
        return self._addr is not None and self._addr.logged

    @property
    def configured(self) -> bool:
        """Whether size and place are known."""
        return self._num > 0 and self._addr is not None

    # -- what the frontend sets -----------------------------------------------------------------------------------------

    def set_num(self, num: int) -> None:
        """Set the ring's size: EBUSY while it runs, EINVAL for one the device cannot have."""
        self._refuse_running("size")
        most = self._ops.get_vq_num_max(self.index)
        check_size(num, packed=True)
        if num > most:
            raise MdevError(errno.EINVAL, f"{self} has {most} descriptors at most, not {num}")
        self._num = num

    def set_base(self, base: int) -> None:
        """Set where the ring goes on: EBUSY while it runs."""
        self._refuse_running("base")
        self._base = base

    def set_addr(self, addr: VringAddr) -> None:
        """Set the ring's place. While it runs only whether it is logged can change, else EBUSY."""
        if self.running and self._addr is not None and not addr.same_place(self._addr):
            self._refuse_running("place")
        self._addr = addr

    def set_kick(self, fd: int) -> None:
        """Start the ring, with `fd` as its kick eventfd, -1 for a frontend that does not kick; takes the descriptor over."""
        self.started = True
        self._tell_kick(fd)

    def set_call(self, fd: int) -> None:
        """Signal the driver through `fd` from now on, -1 for none; takes the descriptor over."""
        with self._signals:
            old, self._call = self._call, fd
        try:
            self._tell_call()
        finally:
            close_all([old])

    def set_error(self, fd: int) -> None:
        """Signal errors through `fd` from now on, -1 for none; takes the descriptor over."""
        with self._signals:
            old, self._error = self._error, fd
        close_all([old])

    def report_error(self) -> None:
        """Tell the frontend that the ring is broken."""
        if self._error >= 0:
            signal_eventfd(self._error)

    def drain(self) -> None:
        """Empty the eventfds that are written to, in case a thread is blocked in that. Any thread; never blocks."""
        with self._signals:
            for fd in (self._call, self._error):
                if fd >= 0:
                    drain_eventfd(fd)

    # -- what the device is told ----------------------------------------------------------------------------------------

    def update(self, table: MemoryTable, *, packed: bool, wanted: bool) -> None:
        """Start or stop the device's queue, as `wanted` says. MdevError if it cannot start, or its memory has gone."""
        if wanted and self.running:
            self._locate(table, packed=packed)
        elif wanted:
            self._start(table, packed=packed)
        else:
            self.stop()

    def make_way(self, table: MemoryTable, *, packed: bool) -> None:
        """Stop the device's queue if it is at other guest addresses in the table that comes; `update` starts it there.

        Before the device has that table: it would go on with what is at the old addresses. One that is not in it at all is left to
        the device, which reports it as broken.
        """
        if not self.running:
            return
        try:
            areas = self._locate(table, packed=packed)
        except MdevError:
            return
        if areas != self._areas:
            self.stop()

    def stop(self) -> int:
        """Stop the device's queue; return where it goes on, which is kept. The device knows where one begins that never ran."""
        if self.running:
            self.running = False
            self._ops.set_vq_ready(self.index, False)
            self._base = self._ops.get_vq_state(self.index)
        return self._ops.get_vq_state(self.index) if self._base is None else self._base

    def end(self) -> int:
        """Do what GET_VRING_BASE asks for: stop the ring until the next kick descriptor. Return where it goes on."""
        self.started = False
        base = self.stop()
        self._tell_kick(-1)
        return base

    def forget(self) -> None:
        """Note that the device has been reset: it runs nothing, and a ring starts at its beginning unless told otherwise."""
        self.started = self.running = False
        self._base = None

    def close(self) -> None:
        """Close the descriptors, all of them whatever the device makes of it; the device forgets them first."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.set_error, -1)
            stack.callback(self.set_call, -1)
            stack.callback(self._tell_kick, -1)

    def _start(self, table: MemoryTable, *, packed: bool) -> None:
        check_size(self._num, packed=packed)
        ops, index = self._ops, self.index
        self._areas = self._locate(table, packed=packed)
        ops.set_vq_num(index, self._num)
        ops.set_vq_address(index, *self._areas)
        if self._base is not None:
            ops.set_vq_state(index, self._base)
        # A reset may have made the device forget these.
        self._tell_call()
        self.kicked_here = not ops.set_vq_kick(index, self.kick)
        ops.set_vq_ready(index, True)
        self.running = True

    def _locate(self, table: MemoryTable, *, packed: bool) -> tuple[int, int, int]:
        """Return the areas' guest addresses: EFAULT for one that is not in shared memory."""
        assert self._addr is not None
        sizes = area_sizes(self._num, packed=packed)
        places = (self._addr.desc, self._addr.avail, self._addr.used)
        desc, driver, device = (table.contiguous(at, size, user=True).guest for at, size in zip(places, sizes, strict=True))
        return desc, driver, device

    def _tell_kick(self, fd: int) -> None:
        old, self.kick = self.kick, fd
        try:
            self.kicked_here = not self._ops.set_vq_kick(self.index, fd)
        finally:
            close_all([old])

    def _tell_call(self) -> None:
        self._ops.set_vq_cb(self.index, Callback(trigger=self._call) if self._call >= 0 else None)

    def _refuse_running(self, what: str) -> None:
        if self.running:
            raise MdevError(errno.EBUSY, f"{self} runs, its {what} cannot change")
