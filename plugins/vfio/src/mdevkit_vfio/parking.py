"""The memory in which the process of a device keeps what its successor needs to go on: the device's state and the last reply.

A `Park` is a sealed memfd of two slots and a byte that says which of them counts. The process of the device writes the slot
that does not count, then the byte: a process that is killed at any instruction leaves the last whole slot behind, with a
state and a reply that belong together. A turn is one message of the client's; turns are numbered, and the slot says which
one its state has seen last, so none is ever carried out twice.

The memory outlives the process in the hands of the device's front (`mdevkit_vfio.front`), which reads it once the process is
dead, and never while it may write. `commit` is called under the device's lock; the rest by whoever owns the park.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

from mdevkit.errors import MdevError

from mdevkit_vfio.memory import sealed_memfd
from mdevkit_vfio.proto import MAX_MESSAGE_SIZE

#: The most bytes of state and of one reply. The memory is sparse: what is not written costs nothing.
MAX_STATE: Final = 1 << 24
MAX_REPLY: Final = MAX_MESSAGE_SIZE

#: turn, bytes of reply, bytes of state; reply and state follow.
_HEAD: Final = struct.Struct("=III")
#: Byte 0 is the slot that counts, bytes 4 to 7 the turn that was begun last.
_BEGUN: Final = struct.Struct("=I")
_BEGUN_AT: Final = 4
_FIRST: Final = mmap.PAGESIZE
_SLOT: Final = -(-(_HEAD.size + MAX_REPLY + MAX_STATE) // mmap.PAGESIZE) * mmap.PAGESIZE
_SIZE: Final = _FIRST + 2 * _SLOT


class Parkable(Protocol):
    """What `VfioOps` have besides if their device can go on in another process. `PciDevice` implements it."""

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Held while state changes; re-entrant."""
        ...

    @property
    def parkable(self) -> bool:
        """Whether all that the guest could tell is in `checkpoint`."""
        ...

    def park(self, store: Callable[[bytes], None] | None) -> None:
        """Call `store` with a checkpoint whenever `lock` is about to be released, until called with None."""
        ...

    def checkpoint(self) -> bytes:
        """Return the state, `MAX_STATE` bytes at most; with `lock` held."""
        ...

    def files(self) -> Mapping[str, int]:
        """Return the files that hold the rest of the state, at most 15 by names of their own; they stay the device's."""
        ...

    def adopt(self, files: Mapping[str, int]) -> None:
        """Before `open`: go on with these files of the predecessor's, which are the device's from now on, without a reset."""
        ...

    def restore(self, state: bytes) -> None:
        """After `open` and the client's maps and eventfds: take over a checkpoint; interrupts under way are sent again."""
        ...


class Commit(NamedTuple):
    """What a slot holds."""

    turn: int
    reply: bytes
    state: bytes


class Park:
    """The memory behind `fd`, which it owns. A park without a commit has one of turn 0."""

    def __init__(self, fd: int) -> None:
        self.fd: Final = fd
        #: What the next commit says of the turn; set before the lock is released.
        self.turn = 0
        self.reply = b""
        try:
            if os.fstat(fd).st_size != _SIZE:
                raise MdevError(errno.EINVAL, "this file is not the memory of a parked device")
            self._map: Final = mmap.mmap(fd, _SIZE)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, name: str) -> Park:
        """Return an empty park; `name` is for /proc. ENOMEM, EMFILE."""
        return cls(sealed_memfd(f"mdevkit-park-{name}", _SIZE))

    def begin(self, turn: int) -> None:
        """Note that a turn is about to be carried out, so that a death can be laid to it."""
        _BEGUN.pack_into(self._map, _BEGUN_AT, turn)

    @property
    def begun(self) -> int:
        """The turn that was begun last."""
        turn: int = _BEGUN.unpack_from(self._map, _BEGUN_AT)[0]
        return turn

    def commit(self, state: bytes) -> None:
        """Make `state`, `turn` and `reply` what counts, all at once. EFBIG for more than there is room for."""
        reply = self.reply
        if len(state) > MAX_STATE or len(reply) > MAX_REPLY:
            raise MdevError(errno.EFBIG, f"{len(state)} bytes of state and {len(reply)} of reply cannot be parked")
        slot = 1 - self._map[0]
        at = _FIRST + slot * _SLOT
        data = _HEAD.pack(self.turn, len(reply), len(state)) + reply + state
        self._map[at : at + len(data)] = data
        # One byte, one store: before it the old slot counts, after it the new one, and there is no third case.
        self._map[0] = slot

    def read(self) -> Commit:
        """Return the last commit; EPROTO for nonsense. Only while nobody commits."""
        slot = self._map[0]
        if slot in {0, 1}:
            at = _FIRST + slot * _SLOT
            turn, reply, state = _HEAD.unpack_from(self._map, at)
            if reply <= MAX_REPLY and state <= MAX_STATE:
                at += _HEAD.size
                return Commit(turn, self._map[at : at + reply], self._map[at + reply : at + reply + state])
        raise MdevError(errno.EPROTO, "the memory of a parked device is damaged")

    def resume(self) -> bytes:
        """Go on from the last commit, and return its state. EPROTO."""
        self.turn, self.reply, state = self.read()
        return state

    def close(self) -> None:
        """Give the memory back."""
        self._map.close()
        os.close(self.fd)
