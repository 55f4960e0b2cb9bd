"""Guarded access to guest memory without the C engine.

A client may truncate the file behind its memory at any moment; a load or store through our mapping would then be SIGBUS,
which Python cannot survive. So bytes go through /proc/self/mem, where the kernel does the access and answers EIO. That
also never makes the file grow, as pwrite(2) on it would, and works on hugetlbfs, where pwrite does not.

A copy by the kernel may be torn: another processor can see one byte of a field new and the next one old. That is harmless
for everything but the used index of a split ring, which drivers compare for equality. It is stored by ioctl(2): FIONREAD of
a regular file stores size minus position, a number of our choosing, as one 32-bit word, and answers EFAULT where the memory
is gone. (`struct.pack_into` on the mapping would be worse than torn: it clears a field before writing it.) What has to be
changed and not just stored goes through futex(2): FUTEX_WAKE_OP clears a bit of a word atomically.

Any thread may call in.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import termios
import threading
from collections.abc import Callable
from typing import Final, Protocol

from mdevkit.errors import MdevError

_FUTEX_NUMBERS: Final = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_FUTEX_WAKE_OP: Final = 5
_FUTEX_PRIVATE: Final = 128
#: FUTEX_OP_ANDN with FUTEX_OP_OPARG_SHIFT: clear bit 1 << argument.
_OP_CLEAR_BIT: Final = 3 | 8
_OP_ADD: Final = 1


class _Syscall(Protocol):
    def __call__(self, number: int, first: int, op: int, wake: int, wake2: int, second: int, operation: int) -> int: ...


class TruncatedError(Exception):
    """Guest memory that is gone, at address `host` of ours. Engines turn it into `Fault.MEMORY`; nobody else sees it."""

    def __init__(self, host: int) -> None:
        super().__init__(host)
        self.host: Final = host


class _Ioctl(Protocol):
    def __call__(self, fd: int, request: int, address: int) -> int: ...


class _OwnFile:
    """A descriptor that belongs to one process, so a child opens its own; `lock` is for its position."""

    def __init__(self, open_it: Callable[[], int]) -> None:
        self.fd = -1
        self.lock = threading.Lock()
        self._open_it: Final = open_it
        os.register_at_fork(after_in_child=self._forget)

    def open(self) -> int:
        if self.fd < 0:
            self.fd = self._open_it()
        return self.fd

    def _forget(self) -> None:
        # Whoever held the lock is not here.
        self.lock = threading.Lock()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_memory: Final = _OwnFile(lambda: os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC))
#: Empty: minus its position is what FIONREAD stores.
_empty: Final = _OwnFile(lambda: os.memfd_create("words", os.MFD_CLOEXEC))
_futex_number: Final = _FUTEX_NUMBERS.get(platform.machine())
_fence_word: Final = ctypes.c_uint32(0)
_fence_address: Final = ctypes.addressof(_fence_word)


def _load_syscall() -> _Syscall:
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = [
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_uint32,
    ]
    return function


def _load_ioctl() -> _Ioctl:
    function = ctypes.CDLL(None, use_errno=True).ioctl
    function.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    return function


_syscall: Final = _load_syscall()
_ioctl: Final = _load_ioctl()


def open_files() -> None:
    """Open what this module keeps open, which a call might else have to do at a bad time; OSError for want of descriptors."""
    _memory.open()
    with _empty.lock:
        _empty.open()


def read(host: int, size: int) -> bytes:
    """Return `size` bytes at one of our addresses inside a mapping; `TruncatedError` if they are not there any more."""
    try:
        data = os.pread(_memory.fd if _memory.fd >= 0 else _memory.open(), size, host)
    except OSError as error:
        raise _truncated(error, host) from None
    if len(data) != size:
        raise TruncatedError(host)
    return data


def write(host: int, data: bytes) -> None:
    """Write at one of our addresses inside a mapping; `TruncatedError` if it is not there any more."""
    try:
        done = os.pwrite(_memory.fd if _memory.fd >= 0 else _memory.open(), data, host)
    except OSError as error:
        raise _truncated(error, host) from None
    if done != len(data):
        raise TruncatedError(host)


def store_word(host: int, data: bytes) -> None:
    """Write 4 bytes at an address of ours that is a multiple of 4, in one piece; what was written before is seen before it.

    `TruncatedError` if they are not there any more.
    """
    fence()
    with _empty.lock:
        fd = _empty.open()
        os.lseek(fd, -int.from_bytes(data, sys.byteorder) & 0xFFFFFFFF, os.SEEK_SET)
        if _ioctl(fd, termios.FIONREAD, host) == 0:
            return
        number = ctypes.get_errno()
    if number == errno.EFAULT:
        raise TruncatedError(host)
    raise MdevError(number, f"FIONREAD: {os.strerror(number)}")


def clear_bit(host: int, bit: int) -> None:
    """Clear one of the 32 bits of the word at `host`, 4-byte aligned, atomically, and be a full barrier."""
    _futex_op(host, _OP_CLEAR_BIT, bit)


def fence() -> None:
    """Be a full memory barrier."""
    _futex_op(_fence_address, _OP_ADD, 0)


def _futex_op(host: int, operation: int, argument: int) -> None:
    if _futex_number is None:
        raise MdevError(errno.ENOSYS, f"the Python engine does not know {platform.machine()}; build the C engine")
    word = operation << 28 | argument << 12
    if _syscall(_futex_number, _fence_address, _FUTEX_WAKE_OP | _FUTEX_PRIVATE, 0, 0, host, word) >= 0:
        return
    number = ctypes.get_errno()
    if number == errno.EFAULT:
        raise TruncatedError(host)
    raise MdevError(number, f"futex: {os.strerror(number)}")


def _truncated(error: OSError, host: int) -> Exception:
    return TruncatedError(host) if error.errno in (errno.EIO, errno.EFAULT) else error
