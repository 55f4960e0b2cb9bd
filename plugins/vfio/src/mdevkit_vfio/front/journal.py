"""What a client has told its device that a new process of the device must be told again: memory maps and eventfds.

A front enters a command here once the device has accepted it, with the client's descriptors, and has the journal written to
each new process before anything else. Bounded like the device itself (`mdevkit_vfio.grants`), because only what the device
accepts gets in. Used on the front's one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from mdevkit_vfio.descriptors import close_all
from mdevkit_vfio.front.wire import pack
from mdevkit_vfio.proto import MAX_MSG_FDS, UNMAP_ALL, Buffer, Command, SetIrqs
from mdevkit_vfio.uapi import IRQ_SET_ACTION_MASK, IrqSet

#: Commands that leave something behind.
JOURNALED: Final = frozenset({Command.DMA_MAP, Command.DMA_UNMAP, Command.DEVICE_SET_IRQS})

_UNMAP: Final = struct.Struct("=4xIQQ")
_MAP: Final = struct.Struct("=4xI8xQQ")
_IRQS: Final = struct.Struct("=4xIIII")


#: Of an eventfd: action, index and number, as in SET_IRQS.
_Slot = tuple[int, int, int]


class Entry(NamedTuple):
    """A message to be written, with descriptors that stay the journal's."""

    message: bytes
    fds: Sequence[int]


class _Map(NamedTuple):
    payload: bytes
    fds: Sequence[int]


class Journal:
    """The configuration of one client's session."""

    def __init__(self) -> None:
        self._maps: Final[dict[int, _Map]] = {}
        self._eventfds: Final[dict[_Slot, int]] = {}

    def enter(self, command: int, payload: Buffer, fds: Sequence[int]) -> None:
        """Take note of a command the device has accepted; owns `fds`. The device has checked the payload."""
        if command == Command.DMA_MAP:
            self._maps[_MAP.unpack_from(payload)[1]] = _Map(bytes(payload), fds)
        elif command == Command.DMA_UNMAP:
            flags, iova, _ = _UNMAP.unpack_from(payload)
            self._unmap(list(self._maps) if flags & UNMAP_ALL else [iova])
        elif command == Command.DEVICE_SET_IRQS:
            self._set_irqs(payload, fds)
        else:
            close_all(fds)

    def _unmap(self, starts: Sequence[int]) -> None:
        for iova in starts:
            gone = self._maps.pop(iova, None)
            if gone is not None:
                close_all(gone.fds)

    def _set_irqs(self, payload: Buffer, fds: Sequence[int]) -> None:
        flags, index, start, count = _IRQS.unpack_from(payload)
        action = flags & IRQ_SET_ACTION_MASK
        if flags & IrqSet.DATA_EVENTFD:
            slots = [(action, index, number) for number in range(start, start + count)]
        elif count == 0:
            slots = [slot for slot in self._eventfds if slot[1] == index]
        else:
            slots = []
        close_all(self._eventfds.pop(slot) for slot in slots if slot in self._eventfds)
        self._eventfds.update(zip(slots, fds, strict=False))

    def entries(self) -> Iterator[Entry]:
        """Yield the messages that tell a new process of the device everything."""
        for entry in self._maps.values():
            yield Entry(pack(Command.DMA_MAP, entry.payload), entry.fds)
        # From the last number down: MSI takes no vector beyond those it was enabled with.
        for slots in reversed(self._runs()):
            action, index, start = slots[0]
            request = SetIrqs(IrqSet.DATA_EVENTFD | action, index, start, len(slots))
            yield Entry(pack(Command.DEVICE_SET_IRQS, request.pack()), [self._eventfds[slot] for slot in slots])

    def _runs(self) -> list[list[_Slot]]:
        """Return the eventfds' slots in order, cut so that each list fits a message."""
        runs: list[list[_Slot]] = []
        for slot in sorted(self._eventfds):
            action, index, number = slot
            if not runs or len(runs[-1]) == MAX_MSG_FDS or runs[-1][-1] != (action, index, number - 1):
                runs.append([])
            runs[-1].append(slot)
        return runs

    def close(self) -> None:
        """Close every descriptor; the client has gone."""
        self._unmap(list(self._maps))
        close_all(self._eventfds.values())
        self._eventfds.clear()
