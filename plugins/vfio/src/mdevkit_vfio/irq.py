"""The interrupts of one VFIO device: what SET_IRQS arms, and what the device raises.

The state machine here follows the kernel's vfio-pci (drivers/vfio/pci/vfio_pci_intrs.c): one of INTx, MSI and MSI-X is
active at a time, INTx is level-triggered and masks itself when it fires, ERR and REQ stand beside them. It performs no
I/O: `Interrupts` decides that an eventfd is to be signalled and passes the `Trigger` to a `post` callback.

Threads: every method of `Interrupts` runs under the lock of its device. A `Trigger` has its own lock and must be
signalled and closed with no other lock held, because the client behind it is not trusted: it can fill its eventfd so
that a write blocks. `Trigger.close` frees such a writer by draining the counter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_vfio.ops import IrqInfo, IrqRequest
from mdevkit_vfio.uapi import Irq, IrqFlag, IrqSet

#: How long `Trigger.close` goes on draining for a writer a hostile client keeps blocking, in seconds.
DRAIN_SECONDS: Final = 1.0

#: Largest number of vectors: MSI (PCI 3.0, 6.8.1) and MSI-X (6.8.2).
MSI_MAX: Final = 32
MSIX_MAX: Final = 2048

_NO_INTERRUPT: Final = IrqInfo(IrqFlag(0), 0)

# Plain numbers: an IntFlag makes an object of each result, and UNMASK comes after every interrupt.
_NONE: Final = int(IrqSet.DATA_NONE)
_BOOL: Final = int(IrqSet.DATA_BOOL)
_EVENTFD: Final = int(IrqSet.DATA_EVENTFD)
_MASK: Final = int(IrqSet.ACTION_MASK)
_TRIGGER: Final = int(IrqSet.ACTION_TRIGGER)


#: Index and number of an interrupt.
Slot = tuple[int, int]


class Trigger:
    """An eventfd of the client's that an interrupt signals; owns the descriptor."""

    __slots__ = ("_closed", "_fd", "_lock", "_poll", "_sent", "_users", "blocking", "posted", "slot")

    #: The descriptor was in blocking mode when it came, so a write to it may block; see `mdevkit_vfio.pci.device`.
    blocking: bool

    def __init__(self, fd: int, slot: Slot = (0, 0)) -> None:
        #: Index and number of the interrupt.
        self.slot = slot
        #: How often it was posted to be signalled; under the lock of the device.
        self.posted = 0
        self._sent = 0
        self.blocking = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
        self._fd = fd
        self._lock = threading.Lock()
        # Threads that are using the descriptor; the last one closes it.
        self._users = 0
        self._closed = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def signal(self) -> None:
        """Add 1 to the counter unless it is full, which means that the client has not looked at earlier signals yet.

        Does nothing once closed. Any thread, with no lock held: between the check and the write the client may fill the
        counter of a blocking eventfd, and then this call blocks until the client reads or `close` is called.
        """
        posted = self.posted
        if self._enter():
            try:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self._fd, 1)
            finally:
                self._leave()
        self._sent = posted

    @property
    def owed(self) -> bool:
        """Whether it was posted and the client may not have been signalled since."""
        return self._sent != self.posted

    def close(self) -> None:
        """Give the descriptor back; a thread blocked in `signal` is freed.

        Blocks only for such a thread, and `DRAIN_SECONDS` at most; a client that goes on filling the counter even then keeps
        its thread until it stops.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._users += 1
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._users > 1 and time.monotonic() < deadline:
            self._drain()
        self._leave()

    def _enter(self) -> bool:
        """Become a user of the descriptor, unless it is closed or a write to it would block."""
        with self._lock:
            # One thread at a time may use a poll object, hence under the lock.
            if self._closed or not self._poll.poll(0):
                return False
            self._users += 1
            return True

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            os.close(self._fd)

    def _drain(self) -> None:
        # RWF_NOWAIT: a client that reads at the same moment must not leave this thread waiting instead.
        try:
            os.preadv(self._fd, [bytearray(8)], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            # The counter is 0, so the writer is past its wait; all it needs is the processor.
            time.sleep(0.0005)


#: Called with a trigger to be signalled once the device's lock is free.
Post = Callable[[Trigger], None]


class Intx:
    """The interrupt pin: a level, and the automasked eventfd it drives."""

    def __init__(self, post: Post) -> None:
        self._post: Final = post
        #: What the device drives the pin to.
        self.level = False
        #: No further signal until UNMASK: set by MASK and by every signal.
        self.masked = False
        #: The Interrupt Disable bit of the command register (PCI 3.0, 6.2.2).
        self.disabled = False
        self.trigger: Trigger | None = None

    def set_level(self, level: bool) -> None:
        """Drive the pin."""
        self.level = level
        self.update()

    def set_masked(self, masked: bool) -> None:
        """MASK or UNMASK; a level that is still high signals again at once, or an interrupt would be lost."""
        self.masked = masked
        self.update()

    def set_disabled(self, disabled: bool) -> None:
        """Follow the Interrupt Disable bit."""
        self.disabled = disabled
        self.update()

    def arm(self, trigger: Trigger | None) -> None:
        """Use `trigger` from now on; arming unmasks."""
        self.trigger = trigger
        self.masked = False
        self.update()

    def update(self) -> None:
        """Signal if the pin is high and nothing holds it back."""
        if self.level and not self.masked and not self.disabled and self.trigger is not None:
            self.masked = True
            self._post(self.trigger)

    def test(self) -> None:
        """Signal on the client's own request (SET_IRQS TRIGGER with data NONE or BOOL), whatever the level and mask."""
        if self.trigger is not None and not self.disabled:
            self._post(self.trigger)

    def load(self, state: int) -> None:
        """Take over a state as `Interrupts.save` packs it; signals nothing."""
        self.level, self.masked, self.disabled = bool(state & 1), bool(state & 2), bool(state & 4)


class Vectors:
    """The messages of MSI or MSI-X: an eventfd, a mask bit and a pending bit for each."""

    def __init__(self, count: int, post: Post) -> None:
        self._post: Final = post
        #: Number of vectors the device has.
        self.count: Final = count
        self.triggers: list[Trigger | None] = [None] * count
        #: SET_IRQS has made this index the active one.
        self.active = False
        #: The enable bit of the capability; keeps messages pending while the client re-arms.
        self.enabled = False
        #: The function mask of MSI-X.
        self.function_masked = False
        #: Mask and pending bits, bit n for vector n.
        self.masked = 0
        self.pending = 0

    def fire(self, vector: int) -> None:
        """Send the message of `vector`, or keep it pending while it is masked; lost while messages are off."""
        if not 0 <= vector < self.count:
            raise ValueError(f"vector {vector} is not one of the device's {self.count} vectors")
        if self.active or self.enabled:
            self.pending |= 1 << vector
            self.deliver()

    def deliver(self) -> None:
        """Signal every pending vector that is neither masked nor without an eventfd."""
        ready = 0 if self.function_masked else self.pending & ~self.masked
        while ready:
            vector = ready.bit_length() - 1
            ready ^= 1 << vector
            trigger = self.triggers[vector]
            if trigger is not None:
                self.pending &= ~(1 << vector)
                self._post(trigger)

    def set_masked(self, masked: int) -> None:
        """Replace the mask bits."""
        self.masked = masked
        self.deliver()

    def set_control(self, enabled: bool, function_masked: bool) -> None:
        """Follow the capability's control register; clearing the enable bit forgets what is pending."""
        if self.enabled and not enabled:
            self.pending = 0
        self.enabled = enabled
        self.function_masked = function_masked
        self.deliver()

    def arm(self, start: int, triggers: Iterable[Trigger | None]) -> list[Trigger]:
        """Replace the eventfds from vector `start` on; returns the old ones."""
        retired = []
        for vector, trigger in enumerate(triggers, start):
            old = self.triggers[vector]
            if old is not None:
                retired.append(old)
            self.triggers[vector] = trigger
        self.active = True
        self.deliver()
        return retired

    def disarm(self) -> list[Trigger]:
        """Switch the index off; returns the eventfds it had."""
        retired = [trigger for trigger in self.triggers if trigger is not None]
        self.triggers = [None] * self.count
        self.active = False
        return retired

    def test(self, vectors: Iterable[int]) -> None:
        """Signal on the client's own request, masked or not."""
        for vector in vectors:
            trigger = self.triggers[vector]
            if trigger is not None:
                self._post(trigger)

    def reset(self) -> None:
        """Power-on state of mask, pending and control bits; eventfds stay."""
        self.enabled = self.function_masked = False
        self.masked = self.pending = 0

    @property
    def size(self) -> int:
        """Bytes of the state."""
        return 1 + 2 * _bytes(self.count)

    def save(self) -> bytes:
        """Return the state, without eventfds."""
        flags = self.active | self.enabled << 1 | self.function_masked << 2
        size = _bytes(self.count)
        return bytes((flags,)) + self.masked.to_bytes(size, "little") + self.pending.to_bytes(size, "little")

    def load(self, state: bytes) -> None:
        """Take over a state; signals nothing."""
        middle = 1 + _bytes(self.count)
        self.active, self.enabled, self.function_masked = (bool(state[0] & bit) for bit in (1, 2, 4))
        self.masked = int.from_bytes(state[1:middle], "little")
        self.pending = int.from_bytes(state[middle:], "little")


#: Of a whole state: the pin's, the vector that stands in for it and the limit of MSI (each -1 or 0 for none), and how many
#: signals are owed. The states of MSI and MSI-X follow, then a `_OWED` each.
_STATE: Final = struct.Struct("<BhHH")
_OWED: Final = struct.Struct("<HH")
#: The states of MSI and MSI-X without a vector.
_NO_MESSAGES: Final = bytes(2)


class Interrupts:
    """All interrupts of one PCI device. `post` gets each trigger to signal; see the module for the lock."""

    def __init__(self, post: Post, *, pins: int = 0, msi: int = 0, msix: int = 0) -> None:
        self._deliver: Final = post
        self._infos: Final = _infos(pins, msi, msix)
        self.intx: Final = Intx(self._post)
        self.msi: Final = Vectors(msi, self._post)
        self.msix: Final = Vectors(msix, self._post)
        self._has_messages: Final = bool(msi or msix)
        #: Armed triggers that were posted and perhaps not signalled yet, the others not having been looked at.
        self._posted: Final[set[Trigger]] = set()
        self._single: Final[dict[int, Trigger | None]] = {Irq.ERR: None, Irq.REQ: None}
        # The vector that stands in for the pin while messages are active; None until `set_cause` is used.
        self._cause_vector: int | None = None
        # Vectors of the active MSI: they cannot be resized without disabling the index (NORESIZE).
        self._msi_limit = 0

    def _post(self, trigger: Trigger) -> None:
        trigger.posted += 1
        self._posted.add(trigger)
        self._deliver(trigger)

    # -- the client's side ------------------------------------------------------------------------------------------

    def info(self, index: int) -> IrqInfo:
        """GET_IRQ_INFO; EINVAL for an unknown index. MSI-X may be resized while active, MSI may not."""
        if 0 <= index < len(self._infos):
            return self._infos[index]
        raise MdevError(errno.EINVAL, f"the device has no interrupt index {index}")

    @property
    def active(self) -> Irq | None:
        """Which of INTX, MSI and MSIX the client has enabled."""
        if self.intx.trigger is not None:
            return Irq.INTX
        if self.msi.active:
            return Irq.MSI
        return Irq.MSIX if self.msix.active else None

    @property
    def descriptors(self) -> int:
        """How many eventfds of the client are held."""
        return sum(1 for _ in self._triggers())

    def set_irqs(self, request: IrqRequest) -> list[Trigger]:
        """SET_IRQS. Returns the triggers that were replaced, for the caller to close once it holds no lock.

        Owns ``request.fds``. EINVAL for a request that the index cannot take in its present state, ENOTTY for an action it
        never has; nothing has changed then.
        """
        triggers = _adopt(request.fds, request.index, request.start)
        try:
            flags = int(request.flags)
            self._check(request, flags, triggers)
            retired = self._dispatch(request, flags, triggers)
        except BaseException:
            for trigger in triggers:
                if trigger is not None:
                    trigger.close()
            raise
        # What is about to be closed is owed nothing any more, and a client may re-arm without end.
        self._posted.difference_update(retired)
        return retired

    def _check(self, request: IrqRequest, flags: int, triggers: list[Trigger | None]) -> None:
        count = self.info(request.index).count
        if request.start < 0 or request.count < 0 or request.start + request.count > count:
            raise _refused(request, f"the index has {count} interrupts")
        if flags & _EVENTFD and len(triggers) != request.count:
            raise _refused(request, f"{len(triggers)} descriptors for {request.count} interrupts")
        if flags & _BOOL and len(request.bools) != request.count:
            raise _refused(request, f"{len(request.bools)} bools for {request.count} interrupts")

    def _dispatch(self, request: IrqRequest, flags: int, triggers: list[Trigger | None]) -> list[Trigger]:
        if not flags & _TRIGGER:
            return self._mask(request, flags)
        if flags & _NONE and not request.count:
            return self._disable(request.index)
        match request.index:
            case Irq.INTX:
                return self._trigger_intx(request, flags, triggers)
            case Irq.MSI:
                return self._trigger_msi(request, flags, triggers, self.msi)
            case Irq.MSIX:
                return self._trigger_msi(request, flags, triggers, self.msix)
        return self._trigger_single(request, flags, triggers)

    def _mask(self, request: IrqRequest, flags: int) -> list[Trigger]:
        """MASK and UNMASK, which only the pin has; like the kernel's mtty, not by eventfd."""
        if request.index != Irq.INTX or flags & _EVENTFD:
            raise MdevError(errno.ENOTTY, f"interrupt index {request.index} cannot be masked this way")
        if self.intx.trigger is None or request.count != 1:
            raise _refused(request, "INTx is not enabled")
        if _acts(request, flags):
            self.intx.set_masked(bool(flags & _MASK))
        return []

    def _disable(self, index: int) -> list[Trigger]:
        """TRIGGER with data NONE and count 0; disabling what is not enabled is harmless."""
        match index:
            case Irq.INTX:
                return self._swap_intx(None)
            case Irq.MSI:
                return self.msi.disarm()
            case Irq.MSIX:
                return self.msix.disarm()
        old, self._single[index] = self._single[index], None
        return [old] if old else []

    def _trigger_intx(self, request: IrqRequest, flags: int, triggers: list[Trigger | None]) -> list[Trigger]:
        if request.count != 1:
            raise _refused(request, "INTx is one interrupt")
        if self.active not in (None, Irq.INTX):
            raise _refused(request, "another interrupt index is enabled")
        if flags & _EVENTFD:
            return self._swap_intx(triggers[0])
        if self.intx.trigger is None:
            raise _refused(request, "INTx is not enabled")
        if _acts(request, flags):
            self.intx.test()
        return []

    def _swap_intx(self, trigger: Trigger | None) -> list[Trigger]:
        old = self.intx.trigger
        self.intx.arm(trigger)
        return [old] if old else []

    def _trigger_msi(self, request: IrqRequest, flags: int, triggers: list[Trigger | None], vectors: Vectors) -> list[Trigger]:
        if self.active not in (None, request.index):
            raise _refused(request, "another interrupt index is enabled")
        if flags & _EVENTFD:
            return self._arm_messages(request, triggers, vectors)
        if not vectors.active:
            raise _refused(request, "the index is not enabled")
        vectors.test(_chosen(request, flags))
        return []

    def _arm_messages(self, request: IrqRequest, triggers: list[Trigger | None], vectors: Vectors) -> list[Trigger]:
        end = request.start + request.count
        if not vectors.active and not request.count:
            raise _refused(request, "no vector to enable")
        if vectors is self.msi:
            if vectors.active and end > self._msi_limit:
                raise _refused(request, f"MSI is enabled with {self._msi_limit} vectors and cannot grow")
            self._msi_limit = self._msi_limit if vectors.active else end
        retired = vectors.arm(request.start, triggers)
        cause = self._cause_vector
        if cause is not None and self.intx.level and request.start <= cause < end:
            vectors.fire(cause)
        return retired

    def _trigger_single(self, request: IrqRequest, flags: int, triggers: list[Trigger | None]) -> list[Trigger]:
        """ERR and REQ: one eventfd each, independent of the others."""
        old = self._single[request.index]
        if not request.count:
            raise _refused(request, "no interrupt named")
        if flags & _EVENTFD:
            self._single[request.index] = triggers[0]
            return [old] if old else []
        if flags & _NONE and old is None:
            raise _refused(request, "the interrupt is not enabled")
        if _acts(request, flags):
            self._signal_single(Irq(request.index))
        return []

    # -- the device's side ------------------------------------------------------------------------------------------

    def fire(self, vector: int) -> None:
        """Send the message of `vector` by MSI or MSI-X, whichever is on; ValueError for a vector the device lacks."""
        self._messages().fire(vector)

    def set_cause(self, level: bool, vector: int) -> None:
        """Drive the pin to `level`; where messages are active a rising edge sends `vector` instead."""
        rising = level and not self.intx.level
        self._cause_vector = vector
        self.intx.set_level(level)
        if rising and self._messages().count:
            self.fire(vector)

    def _messages(self) -> Vectors:
        if self.msix.active:
            return self.msix
        if self.msi.active:
            return self.msi
        if self.msi.enabled and not self.msix.enabled:
            return self.msi
        return self.msix if self.msix.count else self.msi

    def request(self) -> bool:
        """Signal REQ (the device is wanted back); False if it is not armed."""
        return self._signal_single(Irq.REQ)

    def error(self) -> bool:
        """Signal ERR (the device has failed); False if it is not armed."""
        return self._signal_single(Irq.ERR)

    def _signal_single(self, index: Irq) -> bool:
        trigger = self._single[index]
        if trigger is not None:
            self._post(trigger)
        return trigger is not None

    # -- life cycle -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Follow a reset of the device: the pin is low, nothing is pending or masked by the device; eventfds stay."""
        self.intx.level = self.intx.disabled = False
        self.msi.reset()
        self.msix.reset()

    def clear(self) -> list[Trigger]:
        """Let go of the client: nothing is armed any more. Returns what the caller closes once it holds no lock."""
        retired = list(self._triggers())
        self.intx.arm(None)
        self.msi.disarm()
        self.msix.disarm()
        self._single.update({Irq.ERR: None, Irq.REQ: None})
        self._posted.clear()
        return retired

    # -- going on in another process --------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the state without eventfds, and which of them are posted and perhaps not signalled yet."""
        owed = self._owed() if self._posted else []
        cause, pin = self._cause_vector, self.intx
        head = _STATE.pack(
            pin.level | pin.masked << 1 | pin.disabled << 2, -1 if cause is None else cause, self._msi_limit, len(owed)
        )
        if owed:
            return head + self.msi.save() + self.msix.save() + b"".join([_OWED.pack(*trigger.slot) for trigger in owed])
        return head + self.msi.save() + self.msix.save() if self._has_messages else head + _NO_MESSAGES

    def _owed(self) -> list[Trigger]:
        """Return the triggers that are posted and perhaps not signalled yet, and forget the others."""
        owed = [trigger for trigger in self._posted if trigger.owed]
        if len(owed) < len(self._posted):
            self._posted.clear()
            self._posted.update(owed)
        return owed

    def load(self, state: bytes) -> None:
        """Take over a state once the eventfds are armed again, and signal what is owed: perhaps once more than needed."""
        pin, cause, self._msi_limit, owed = _STATE.unpack_from(state)
        self._cause_vector = None if cause < 0 else cause
        msix = _STATE.size + self.msi.size
        end = msix + self.msix.size
        self.intx.load(pin)
        self.msi.load(state[_STATE.size : msix])
        self.msix.load(state[msix:end])
        for index, number in _OWED.iter_unpack(state[end : end + owed * _OWED.size]):
            trigger = self._armed(index, number)
            if trigger is not None:
                self._post(trigger)

    def _armed(self, index: int, number: int) -> Trigger | None:
        match index:
            case Irq.INTX:
                return self.intx.trigger
            case Irq.MSI:
                return self.msi.triggers[number]
            case Irq.MSIX:
                return self.msix.triggers[number]
        return self._single[index]

    def _triggers(self) -> Iterator[Trigger]:
        held = [self.intx.trigger, *self.msi.triggers, *self.msix.triggers, *self._single.values()]
        return (trigger for trigger in held if trigger is not None)


def _infos(pins: int, msi: int, msix: int) -> Sequence[IrqInfo]:
    """Make the answers to GET_IRQ_INFO, by index."""
    fixed = IrqFlag.EVENTFD | IrqFlag.NORESIZE
    return (
        IrqInfo(IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED, pins) if pins else _NO_INTERRUPT,
        IrqInfo(fixed, msi) if msi else _NO_INTERRUPT,
        IrqInfo(IrqFlag.EVENTFD, msix) if msix else _NO_INTERRUPT,
        IrqInfo(fixed, 1),
        IrqInfo(fixed, 1),
    )


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _adopt(fds: Iterable[int], index: int, start: int) -> list[Trigger | None]:
    """Wrap descriptors that are now ours; -1 becomes None. On failure all are closed."""
    remaining = list(fds)
    triggers: list[Trigger | None] = []
    try:
        while remaining:
            slot = (index, start + len(triggers))
            triggers.append(Trigger(remaining[0], slot) if remaining[0] >= 0 else None)
            remaining.pop(0)
    except OSError:
        for trigger in triggers:
            if trigger is not None:
                trigger.close()
        for fd in remaining:
            with contextlib.suppress(OSError):
                os.close(fd)
        raise
    return triggers


def _acts(request: IrqRequest, flags: int) -> bool:
    """Whether a request with data NONE or BOOL for one interrupt asks for the action."""
    return bool(flags & _NONE) or bool(request.bools[0])


def _chosen(request: IrqRequest, flags: int) -> Iterator[int]:
    """Yield the interrupts a request with data NONE or BOOL names."""
    for position in range(request.count):
        if flags & _NONE or request.bools[position]:
            yield request.start + position


def _refused(request: IrqRequest, why: str) -> MdevError:
    return MdevError(errno.EINVAL, f"SET_IRQS {request.flags!r} on index {request.index} refused: {why}")
