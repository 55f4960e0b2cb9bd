"""What one client has given us, counted against what one client may give.

Descriptors belong to the device once it has taken them. Of every eventfd a duplicate stays here: a client may fill its
eventfd until a write of ours blocks, perhaps on the very thread that serves it, and then somebody else must be able to
empty it.

What is counted is what the client has given, `MAX_DESCRIPTORS` (256) for maps and eventfds together. With the duplicates they are
up to twice as many of this process's descriptors, and those of one message more while it is dealt with.

Threads: `drain` from any, the rest from the connection's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.dma import MAX_DESCRIPTORS
from mdevkit_vfio.proto import MAX_DMA_MAPS
from mdevkit_vfio.uapi import IRQ_SET_ACTION_MASK, IrqSet

#: An armed eventfd: (index, action, number).
_Slot = tuple[int, int, int]


class Grants:
    """The eventfds and memory ranges of one client."""

    def __init__(self) -> None:
        self._lock: Final = threading.Lock()
        self._eventfds: Final[dict[_Slot, int]] = {}
        #: Start of each mapped range, and whether it came with a descriptor.
        self._maps: Final[dict[int, bool]] = {}

    @property
    def descriptors(self) -> int:
        """How many descriptors the client has given that are held; the duplicates of eventfds are not counted."""
        return len(self._eventfds) + sum(self._maps.values())

    def check_map(self, shared: bool) -> None:
        """Refuse one more map: ENOSPC beyond `MAX_DMA_MAPS`, EMFILE beyond `MAX_DESCRIPTORS`."""
        if len(self._maps) >= MAX_DMA_MAPS:
            raise MdevError(errno.ENOSPC, f"the client has {MAX_DMA_MAPS} DMA maps, the most one may have")
        if shared:
            self._check_descriptors(1)

    def map(self, iova: int, shared: bool) -> None:
        """Count a map that the device has taken, `shared` if with a descriptor."""
        self._maps[iova] = shared

    def unmap(self, iova: int) -> None:
        """Forget a map."""
        self._maps.pop(iova, None)

    def unmap_all(self) -> None:
        """Forget all maps."""
        self._maps.clear()

    def duplicate(self, flags: int, index: int, start: int, fds: Sequence[int]) -> dict[_Slot, int]:
        """Return duplicates of eventfds about to be armed; EMFILE beyond `MAX_DESCRIPTORS`. The caller owns them."""
        slots = _slots(flags, index, range(start, start + len(fds)))
        self._check_descriptors(sum(slot not in self._eventfds for slot in slots))
        copies: dict[_Slot, int] = {}
        try:
            for slot, fd in zip(slots, fds, strict=True):
                copies[slot] = os.dup(fd)
        except OSError:
            close_all(copies.values())
            raise
        return copies

    @contextlib.contextmanager
    def arming(self, copies: dict[_Slot, int]) -> Iterator[None]:
        """Around the call in which the device takes the eventfds that `copies` duplicates; if it raises, all is as before.

        They can be drained already inside, because arming may signal at once.
        """
        with self._lock:
            replaced = {slot: self._eventfds[slot] for slot in copies if slot in self._eventfds}
            self._eventfds.update(copies)
        try:
            yield
        except BaseException:
            with self._lock:
                for slot in copies:
                    del self._eventfds[slot]
                self._eventfds.update(replaced)
                close_all(copies.values())
            raise
        with self._lock:
            close_all(replaced.values())

    def disarmed(self, flags: int, index: int, start: int, count: int) -> None:
        """Forget the eventfds of a range, or all of an index for a `count` of 0; the device has dropped them."""
        with self._lock:
            if count:
                slots = _slots(flags, index, range(start, start + count))
            else:
                slots = [slot for slot in self._eventfds if slot[0] == index]
            close_all(self._eventfds.pop(slot) for slot in slots if slot in self._eventfds)

    def drain(self) -> None:
        """Empty every eventfd, so that no thread stays blocked in a write to one. Never blocks."""
        buffer = bytearray(8)
        with self._lock:
            for fd in self._eventfds.values():
                # RWF_NOWAIT, since the client decides whether its eventfd blocks.
                with contextlib.suppress(OSError):
                    os.preadv(fd, [buffer], -1, os.RWF_NOWAIT)

    def close(self) -> None:
        """Forget everything; the client is gone and the device released. Frees whoever is blocked in one last write."""
        self.drain()
        with self._lock:
            close_all(self._eventfds.values())
            self._eventfds.clear()
        self._maps.clear()

    def _check_descriptors(self, more: int) -> None:
        if self.descriptors + more > MAX_DESCRIPTORS:
            raise MdevError(errno.EMFILE, f"the client has {self.descriptors} descriptors with us, {MAX_DESCRIPTORS} are the most")


def _slots(flags: int, index: int, numbers: Iterable[int]) -> list[_Slot]:
    action = int(IrqSet(flags) & IRQ_SET_ACTION_MASK)
    return [(index, action, number) for number in numbers]
