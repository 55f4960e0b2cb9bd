"""A PCI function as the driver sees it: regions, life cycle, threads. Configuration space and messages have files of their own."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio.memory import SEALS, sealed_memfd
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.ops import DmaRegion, IrqRequest, RegionInfo, VfioOps
from mdevkit_vfio.pci import Bar, PciDevice, PciIds, SparseArea
from mdevkit_vfio.uapi import Device, Irq, IrqSet, MigrationState, Region, RegionFlag

IDS = PciIds(0x1234, 0x5678)
PAGE = mmap.PAGESIZE
ARM = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
UNMASK = IrqSet.DATA_NONE | IrqSet.ACTION_UNMASK
FULL = 0xFFFF_FFFF_FFFF_FFFE
STANDARD = {0: Bar(256, "io"), 1: Bar(4096)}


class NoMemory:
    """A client that shares no memory."""

    def dma_read(self, iova: int, count: int) -> bytes:
        raise OSError(errno.ENOTCONN, f"{iova} {count}")

    def dma_write(self, iova: int, data: bytes) -> None:
        raise OSError(errno.ENOTCONN, f"{iova} {data!r}")


class Board(PciDevice):
    """Registers are plain memory, every access to them is written down, and so is every notification."""

    def __init__(self, bars: Mapping[int, Bar] = STANDARD, *, interrupt_pin: int = 1) -> None:
        super().__init__(IDS, bars, interrupt_pin=interrupt_pin)
        self.registers = bytearray(4096)
        self.log: list[object] = []
        self.on_write: Callable[[], None] = lambda: None
        self.failing: str | None = None

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        self.log.append(("read", bar, offset, size))
        return int.from_bytes(self.registers[offset : offset + size], "little")

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.log.append(("write", bar, offset, size, value))
        self.registers[offset : offset + size] = value.to_bytes(size, "little")
        self.on_write()

    def note(self, event: str) -> None:
        self.log.append(event)
        if self.failing == event:
            raise OSError(errno.EIO, "the vendor's reason")

    def device_reset(self) -> None:
        self.note("reset")

    def device_attached(self) -> None:
        self.note("attached")

    def device_detached(self) -> None:
        self.note("detached")


@pytest.fixture
def board() -> Iterator[Board]:
    files = open_files()
    board = Board()
    board.open(NoMemory())
    board.log.clear()
    yield board
    board.release()
    assert not workers()
    gc.collect()
    assert open_files() == files


def arm(device: PciDevice, index: int = Irq.INTX, vector: int = 0, flags: int = os.EFD_NONBLOCK) -> int:
    """Give the device an eventfd; returns the client's end."""
    fd = os.eventfd(0, flags)
    device.set_irqs(IrqRequest(ARM, index, vector, 1, fds=[os.dup(fd)]))
    return fd


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pci worker"]


def wait_for_signal(fd: int) -> None:
    assert select.select([fd], [], [], 5)[0], "no interrupt"
    os.eventfd_read(fd)


# -- regions --------------------------------------------------------------------------------------------------------


def test_it_is_the_ops_of_the_class() -> None:
    ops: VfioOps = Board()
    info = ops.info()
    assert (info.flags, info.num_regions, info.num_irqs) == (Device.RESET | Device.PCI, 9, 5)


def test_regions_that_exist_and_those_that_do_not(board: Board) -> None:
    both = RegionFlag.READ | RegionFlag.WRITE
    found = {index: board.region_info(index) for index in range(9)}
    assert {index for index, info in found.items() if info.size} == {0, 1, 7}
    assert (found[0], found[1]) == (RegionInfo(both, 256), RegionInfo(both, 4096))
    assert found[6] == RegionInfo(RegionFlag(0), 0)
    for index in (-1, 9):
        with pytest.raises(MdevError, match=f"the device has no region {index}") as caught:
            board.region_info(index)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_natural_access_reaches_the_vendor_as_it_is(board: Board, count: int) -> None:
    board.write(1, 8, bytes(range(1, 1 + count)))
    assert board.read(1, 8, count) == bytes(range(1, 1 + count))
    value = int.from_bytes(bytes(range(1, 1 + count)), "little")
    assert board.log == [("write", 1, 8, count, value), ("read", 1, 8, count)]


def test_other_accesses_are_split_as_the_kernel_does(board: Board) -> None:
    board.write(1, 3, bytes(range(10)))
    assert [entry[2:4] for entry in board.log if isinstance(entry, tuple)] == [(3, 1), (4, 4), (8, 4), (12, 1)]
    board.log.clear()
    assert board.read(1, 3, 10) == bytes(range(10))
    assert [entry[2:4] for entry in board.log if isinstance(entry, tuple)] == [(3, 1), (4, 4), (8, 4), (12, 1)]
    board.log.clear()
    assert board.read(1, 8, 8) == bytes([5, 6, 7, 8, 9, 0, 0, 0])
    assert board.log == [("read", 1, 8, 4), ("read", 1, 12, 4)]
    assert board.read(1, 0, 0) == b""


def test_eight_bytes_and_odd_offsets_where_the_bar_wants_them() -> None:
    board = Board({0: Bar(4096, widest=8), 1: Bar(4096, allow_unaligned=True), 2: Bar(8, "io", widest=1)})
    board.write(0, 16, bytes(range(8)))
    assert board.read(0, 16, 8) == bytes(range(8))
    assert board.read(0, 20, 8) == bytes(range(4, 8)) + bytes(4)
    assert board.read(1, 17, 4) == bytes([1, 2, 3, 4])
    assert board.read(1, 17, 3) == bytes([1, 2, 3])
    assert board.read(2, 0, 2) == bytes(2)
    assert board.log[1:] == [
        ("read", 0, 16, 8),
        *[("read", 0, 20, 4), ("read", 0, 24, 4)],
        ("read", 1, 17, 4),
        *[("read", 1, 17, 1), ("read", 1, 18, 2)],
        *[("read", 2, 0, 1), ("read", 2, 1, 1)],
    ]


def test_registers_that_do_not_exist_read_as_zero() -> None:
    device = PciDevice(IDS, {0: Bar(16)})
    device.write(0, 0, b"\xff" * 16)
    assert device.read(0, 0, 16) == bytes(16)


def test_device_specific_regions_are_the_vendors() -> None:
    class Special(PciDevice):
        edid = bytearray(16)

        def region_info(self, index: int) -> RegionInfo:
            return RegionInfo(RegionFlag.READ, 16) if index == 9 else super().region_info(index)

        def region_read(self, region: int, offset: int, count: int) -> bytes:
            return bytes(self.edid[offset : offset + count]) if region == 9 else super().region_read(region, offset, count)

        def region_write(self, region: int, offset: int, data: bytes) -> None:
            if region != 9:
                super().region_write(region, offset, data)
            self.edid[offset : offset + len(data)] = data

    device = Special(IDS, {})
    device.write(9, 2, b"xy")
    assert device.read(9, 0, 4) == b"\0\0xy"
    assert device.region_info(9).size == 16
    for act in (lambda: device.read(10, 0, 4), lambda: device.write(6, 0, b"a"), lambda: device.region_info(10)):
        with pytest.raises(MdevError, match="the device has no region"):
            act()


def test_the_vendor_may_take_configuration_writes() -> None:
    class Hooked(PciDevice):
        def config_write_hook(self, offset: int, data: bytes) -> bool:
            if offset == 4:
                self.config.put(0x40, 1, data[0])
            return offset == 4

    device = Hooked(IDS, {0: Bar(16)})
    device.write(Region.CONFIG, 4, b"\x02\x00")
    device.write(Region.CONFIG, 0x3C, b"\x0b")
    assert device.read(Region.CONFIG, 4, 2) == bytes(2)
    assert device.read(Region.CONFIG, 0x40, 1) == b"\x02"
    assert device.read(Region.CONFIG, 0x3C, 1) == b"\x0b"


def test_a_device_has_no_display_by_default(board: Board) -> None:
    for ask in (lambda: board.query_gfx_plane(1), lambda: board.gfx_dmabuf(1)):
        with pytest.raises(MdevError, match="pci has no display") as caught:
            ask()
        assert caught.value.errno == errno.ENOTTY


# -- mapped BARs ----------------------------------------------------------------------------------------------------


def mapped_board() -> Board:
    areas = [SparseArea(PAGE, PAGE), SparseArea(3 * PAGE, PAGE)]
    return Board({0: Bar(4 * PAGE, mapped=True, areas=areas), 2: Bar(2 * PAGE, "mem64", mapped=True)}, interrupt_pin=0)


def test_the_client_maps_what_the_vendor_sees() -> None:
    device = mapped_board()
    info = device.region_info(2)
    assert info.mapping is not None
    assert RegionFlag.MMAP in info.flags
    assert (info.mapping.offset, info.mapping.areas) == (0, ())
    with mmap.mmap(info.mapping.fd, info.size) as client:
        client[:4] = b"pixl"
        assert device.bar_memory(2)[:4] == b"pixl"
        assert device.read(2, 1, 2) == b"ix"
        device.write(2, PAGE - 1, b"ab")
        assert client[PAGE - 1 : PAGE + 1] == b"ab"
    assert device.log == [], "registers had no part in it"


def test_messages_outside_the_areas_reach_the_vendor() -> None:
    device = mapped_board()
    sparse = device.region_info(0).mapping
    assert sparse is not None
    assert list(sparse.areas) == [SparseArea(PAGE, PAGE), SparseArea(3 * PAGE, PAGE)]
    device.write(0, PAGE - 2, b"abcd")
    assert device.log == [("write", 0, PAGE - 2, 2, 0x6261)]
    assert device.bar_memory(0)[PAGE : PAGE + 2] == b"cd"
    assert device.read(0, PAGE - 2, 4) == b"abcd"


def test_nobody_can_resize_what_the_client_gets() -> None:
    mapping = mapped_board().region_info(2).mapping
    assert mapping is not None
    assert fcntl.fcntl(mapping.fd, fcntl.F_GET_SEALS) == SEALS
    for size in (0, PAGE, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(mapping.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(mapping.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_the_next_client_gets_memory_the_last_one_cannot_see() -> None:
    device = mapped_board()
    device.open(NoMemory())
    old = device.region_info(2).mapping
    assert old is not None
    with mmap.mmap(old.fd, 2 * PAGE) as spy:
        device.bar_memory(2)[:6] = b"secret"
        device.reset()
        assert device.bar_memory(2)[:6] == b"secret", "RESET keeps memory"
        device.release()
        device.open(NoMemory())
        assert device.bar_memory(2)[:6] == bytes(6)
        device.bar_memory(2)[:6] = b"hidden"
        assert spy[:6] == b"secret"
    device.release()


def test_nor_memory_of_a_client_whose_leaving_the_vendor_fails_at() -> None:
    device = mapped_board()
    device.open(NoMemory())
    device.bar_memory(2)[:6] = b"secret"
    device.failing = "detached"
    device.release()
    device.open(NoMemory())
    assert device.bar_memory(2)[:6] == bytes(6)
    device.release()


def test_memory_of_a_bar_that_has_none() -> None:
    device = Board({0: Bar(4096)})
    with pytest.raises(ValueError, match="BAR 0 is not a mapped one"):
        device.bar_memory(0)
    with pytest.raises(ValueError, match="the device has no BAR 3"):
        device.bar_memory(3)


def test_memory_that_cannot_be_had() -> None:
    with pytest.raises(MdevError, match=r"cannot allocate -4096 bytes of memory for big") as caught:
        sealed_memfd("big", -PAGE)
    assert caught.value.errno == errno.EINVAL
    huge = PciDevice(IDS, {0: Bar(1 << 62, "mem64", mapped=True)})
    gc.collect()  # an mmap has a descriptor of its own, and devices of other tests may wait for the collector
    files = open_files()
    with pytest.raises(MdevError, match="Cannot allocate memory") as caught:
        huge.bar_memory(0)
    assert caught.value.errno == errno.ENOMEM
    assert open_files() == files


# -- interrupts through the device ----------------------------------------------------------------------------------


def test_the_level_shows_in_the_status_register_even_when_disabled(board: Board) -> None:
    fd = arm(board)
    board.write(Region.CONFIG, 4, b"\x00\x04")
    board.set_intx(True)
    assert board.read(Region.CONFIG, 6, 1) == b"\x08"
    assert not select.select([fd], [], [], 0)[0]
    board.write(Region.CONFIG, 4, b"\x00\x00")
    wait_for_signal(fd)
    board.set_intx(False)
    assert board.read(Region.CONFIG, 6, 1) == b"\x00"
    os.close(fd)


def test_an_interrupt_raised_inside_an_access_comes_with_it(board: Board) -> None:
    fd = arm(board)
    board.on_write = lambda: board.set_intx(True)
    board.write(1, 0, b"go!!")
    assert os.eventfd_read(fd) == 1
    assert not workers(), "no other thread was needed"
    board.set_irqs(IrqRequest(UNMASK, Irq.INTX, 0, 1))
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_a_cause_reaches_pin_and_status(board: Board) -> None:
    fd = arm(board)
    board.interrupt(True)
    wait_for_signal(fd)
    assert board.read(Region.CONFIG, 6, 1) == b"\x08"
    os.close(fd)


def test_error_and_request(board: Board) -> None:
    assert not board.report_error()
    assert not board.request(0)
    err, req = arm(board, Irq.ERR), arm(board, Irq.REQ)
    assert board.report_error()
    assert board.request(1)
    assert (os.eventfd_read(err), os.eventfd_read(req)) == (1, 1)
    os.close(err)
    os.close(req)


def test_no_eventfd_is_written_while_the_lock_is_held(board: Board) -> None:
    fd = arm(board)
    with board.lock:
        with board.lock:
            board.set_intx(True)
        assert not select.select([fd], [], [], 0)[0], "only when the lock is free for good"
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_a_thread_of_the_vendors_never_writes_an_eventfd_itself(board: Board) -> None:
    """It may serve other devices too, so it must not be the one that a client makes wait."""
    fd = arm(board)
    thread = threading.Thread(target=board.set_intx, args=(True,))
    thread.start()
    thread.join(5)
    assert workers()
    wait_for_signal(fd)
    os.close(fd)


class Filler(threading.Thread):
    """A hostile client: keeps its blocking eventfd full, except for the moments that let a check pass."""

    def __init__(self, fd: int) -> None:
        super().__init__(daemon=True)
        self.fd = fd
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            if select.select([], [self.fd], [], 0)[1]:
                os.eventfd_write(self.fd, FULL)
            if select.select([self.fd], [], [], 0)[0]:
                os.eventfd_read(self.fd)

    def stop(self) -> None:
        """End, also if our own read or write blocks because the device was faster."""
        self.stopping = True
        while self.is_alive():
            if select.select([self.fd], [], [], 0)[0]:
                os.eventfd_read(self.fd)
            else:
                os.eventfd_write(self.fd, 1)
            self.join(0.01)


def test_a_client_that_fills_its_eventfd_does_not_hold_up_its_own_connection(board: Board) -> None:
    fd = arm(board, flags=0)
    filler = Filler(fd)
    filler.start()
    slowest = 0.0
    for _ in range(300):
        started = time.perf_counter()
        board.set_intx(True)
        board.set_intx(False)
        board.set_irqs(IrqRequest(UNMASK, Irq.INTX, 0, 1))
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.5
    started = time.monotonic()
    board.release()
    assert time.monotonic() - started < 2.5
    filler.stop()
    os.close(fd)


# -- deferred jobs --------------------------------------------------------------------------------------------------


def test_a_deferred_job_runs_after_the_access_without_the_lock(board: Board) -> None:
    done = threading.Event()
    order: list[str] = []

    def job() -> None:
        with board.lock:
            order.append(threading.current_thread().name)
        done.set()

    def access() -> None:
        board.defer(job)
        order.append("access ends")

    board.on_write = access
    board.write(0, 0, b"x")
    assert done.wait(5)
    assert order == ["access ends", "pci worker"]


def test_jobs_keep_their_order_and_survive_one_that_fails(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("the vendor's bug")

    with board.lock:
        board.defer(lambda: seen.append(1))
        board.defer(fail)
        board.defer(lambda: seen.append(2))
        board.defer(done.set)
    assert done.wait(5)
    assert seen == [1, 2]
    assert "a deferred job of pci worker failed" in caplog.text
    assert "the vendor's bug" in caplog.text


def test_a_waiting_job_is_not_added_again(board: Board) -> None:
    started, go, done = threading.Event(), threading.Event(), threading.Event()
    runs: list[int] = []

    def slow() -> None:
        started.set()
        go.wait(5)

    def doorbell() -> None:
        runs.append(1)

    board.defer(slow)
    assert started.wait(5)
    for _ in range(1000):
        board.defer(doorbell)
    go.set()
    board.defer(done.set)
    assert done.wait(5)
    assert runs == [1]
    done.clear()
    board.defer(doorbell)
    board.defer(done.set)
    assert done.wait(5)
    assert runs == [1, 1], "once it has run it may wait again"


def test_without_a_client_a_job_is_dropped() -> None:
    board = Board()
    board.defer(lambda: pytest.fail("ran"))
    assert not workers()


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A system that has no thread left, until undone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield patch


def test_jobs_wait_for_a_worker_that_cannot_start(
    board: Board, no_threads: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ran, done = list[int](), threading.Event()
    board.defer(lambda: ran.append(1))
    assert "pci worker cannot start, its jobs have to wait: can't start new thread" in caplog.text
    no_threads.undo()
    board.defer(lambda: ran.append(2))
    board.defer(done.set)
    assert done.wait(5)
    assert ran == [1, 2]


def test_a_device_whose_worker_could_not_start_has_a_next_client(board: Board, no_threads: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    board.defer(lambda: ran.append(1))
    board.release()
    assert board.log == ["detached", "reset"]
    no_threads.undo()
    board.open(NoMemory())
    assert not ran


def test_release_ends_the_worker_and_drops_waiting_jobs(board: Board) -> None:
    started, go = threading.Event(), threading.Event()
    ran: list[str] = []

    def slow() -> None:
        started.set()
        go.wait(5)

    board.defer(slow)
    board.defer(lambda: ran.append("late"))
    assert started.wait(5)
    threading.Timer(0.05, go.set).start()
    board.release()
    assert not ran
    assert not workers()


def test_a_job_that_does_not_end_keeps_the_next_client_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mdevkit_vfio.pci.device.WORKER_SECONDS", 0.01)
    board = Board()
    board.open(NoMemory())
    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        go.wait(5)

    board.defer(slow)
    assert started.wait(5)
    [worker] = workers()
    board.release()
    assert "a deferred job still runs after its client has gone" in caplog.text
    with pytest.raises(MdevError, match="still runs a deferred job") as caught:
        board.open(NoMemory())
    assert caught.value.errno == errno.EBUSY
    go.set()
    worker.join(5)
    board.open(NoMemory())
    board.release()


def test_release_may_come_from_the_worker_itself() -> None:
    board = Board()
    board.open(NoMemory())
    done = threading.Event()

    def leave() -> None:
        board.release()
        done.set()

    board.defer(leave)
    assert done.wait(5)


# -- life cycle -----------------------------------------------------------------------------------------------------


def test_reset_comes_before_the_first_client_and_after_each() -> None:
    board = Board()
    assert board.log == []
    for _ in range(2):
        board.open(NoMemory())
        board.release()
    assert board.log == ["reset", "attached", "detached", "reset", "attached", "detached", "reset"]
    board.release()
    assert board.log[-1] == "reset", "a second release does nothing"
    assert len(board.log) == 7


def test_one_client_at_a_time(board: Board) -> None:
    with pytest.raises(MdevError, match="pci has a client already") as caught:
        board.open(NoMemory())
    assert caught.value.errno == errno.EBUSY


def test_reset_is_what_power_on_is_but_keeps_what_the_client_gave(board: Board) -> None:
    fd = arm(board)
    memory = os.memfd_create("guest")
    board.dma_map(DmaRegion(0, PAGE, readable=True, writable=True, fd=memory))
    os.ftruncate(memory, PAGE)
    board.write(Region.CONFIG, 4, b"\x07\x04")
    board.set_intx(True)
    board.reset()
    assert board.log == ["reset"]
    assert board.read(Region.CONFIG, 4, 4) == bytes(4)
    board.set_intx(True)
    wait_for_signal(fd)
    assert board.dma.read(0, 4) == bytes(4)
    os.close(fd)


def test_a_vendor_may_refuse_a_client() -> None:
    board = Board()
    board.failing = "attached"
    with pytest.raises(OSError, match="the vendor's reason"):
        board.open(NoMemory())
    board.failing = None
    board.open(NoMemory())
    board.release()


@pytest.mark.parametrize("failing", ["detached", "reset"])
def test_a_vendor_that_fails_on_release_is_reset_before_the_next_client(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    board = Board()
    board.open(NoMemory())
    board.failing = failing
    board.release()
    assert "reset after its client has gone failed" in caplog.text
    if failing == "reset":
        with pytest.raises(OSError, match="the vendor's reason"):
            board.open(NoMemory())
    board.failing = None
    board.log.clear()
    board.open(NoMemory())
    assert board.log == ["reset", "attached"]
    board.release()


def test_release_gives_everything_back(board: Board) -> None:
    fd = arm(board)
    memory = os.memfd_create("guest")
    os.ftruncate(memory, PAGE)
    board.dma_map(DmaRegion(0, PAGE, readable=True, writable=True, fd=os.dup(memory)))
    assert (board.interrupts.descriptors, board.dma.descriptors) == (1, 1)
    board.set_intx(True)
    board.release()
    assert (board.interrupts.descriptors, board.dma.descriptors, board.dma.maps) == (0, 0, 0)
    assert not board.interrupts.intx.level
    with pytest.raises(MdevError, match="outside the memory"):
        board.dma.read(0, 1)
    os.close(fd)
    os.close(memory)


def test_dma_requests_go_to_the_table(board: Board) -> None:
    board.dma_map(DmaRegion(0, PAGE, readable=True, writable=True))
    board.dma_map(DmaRegion(PAGE, PAGE, readable=True, writable=True))
    board.dma_unmap(0, PAGE)
    assert board.dma.maps == 1
    with pytest.raises(MdevError, match="is not a mapped range"):
        board.dma_unmap(0, PAGE)
    board.dma_unmap_all()
    assert board.dma.maps == 0


def test_reset_and_a_new_client_end_a_migration(board: Board) -> None:
    migration = Migration(save=lambda: b"state", load=lambda data: None, lock=board.lock)
    board.migration = migration
    for end in (board.reset, board.release):
        migration.set_state(MigrationState.STOP_COPY)
        end()
        assert migration.state is MigrationState.RUNNING


def test_a_value_that_does_not_fit_the_register_is_a_bug_of_the_vendor(board: Board) -> None:
    class Wrong(PciDevice):
        def bar_read(self, bar: int, offset: int, size: int) -> int:
            del bar, offset, size
            return 1 << 32

    device = Wrong(IDS, {0: Bar(16)})
    with pytest.raises(OverflowError):
        device.read(0, 0, 4)
    with device.lock:
        assert device.read(7, 0, 2) == b"\x34\x12", "and the lock is free again"
