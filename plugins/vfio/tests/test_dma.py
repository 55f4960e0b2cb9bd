"""DMA on real memory files: the map's rules, and a client that changes its memory under us."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mdevkit.errors import MdevError
from mdevkit_vfio import descriptors
from mdevkit_vfio.dma import MAX_DESCRIPTORS, MAX_MAPS, Dma, _Piece, _write_mapped
from mdevkit_vfio.ops import DmaRegion

PAGE = 4096


class Client:
    """Guest memory reached by message; addresses are its indexes."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.memory = bytearray(size)
        self.messages: list[tuple[str, int, int]] = []

    def dma_read(self, iova: int, count: int) -> bytes:
        self.messages.append(("read", iova, count))
        return bytes(self.memory[iova : iova + count])

    def dma_write(self, iova: int, data: bytes) -> None:
        self.messages.append(("write", iova, len(data)))
        self.memory[iova : iova + len(data)] = data


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memory_file(size: int) -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def region(iova: int, size: int, fd: int = -1, offset: int = 0, access: str = "rw") -> DmaRegion:
    return DmaRegion(iova, size, "r" in access, "w" in access, fd, offset)


@pytest.fixture
def dma() -> Iterator[Dma]:
    before = open_files()
    dma = Dma()
    dma.attach(Client())
    yield dma
    dma.detach()
    assert open_files() == before


def refused(call: Callable[..., object], *arguments: object) -> tuple[int | None, str]:
    with pytest.raises(MdevError) as caught:
        call(*arguments)
    return caught.value.errno, str(caught.value)


# -- access ---------------------------------------------------------------------------------------------------------


def test_reads_and_writes_are_the_clients_memory(dma: Dma) -> None:
    fd = memory_file(4 * PAGE)
    dma.map(region(0x10000, 2 * PAGE, fd, offset=PAGE))
    os.pwrite(fd, b"guest", PAGE + 100)
    assert dma.read(0x10000 + 100, 5) == b"guest"
    dma.write(0x10000 + 2 * PAGE - 3, b"end")
    assert os.pread(fd, 3, 3 * PAGE - 3) == b"end"
    dma.write(0x10000, memoryview(b"view"))
    assert os.pread(fd, 4, PAGE) == b"view"
    assert dma.read(0x10000, 0) == b""
    dma.write(0x10000, b"")


def test_nothing_outside_the_map_can_be_reached(dma: Dma) -> None:
    dma.map(region(PAGE, PAGE, memory_file(PAGE)))
    for iova, count in ((0, 1), (PAGE - 1, 1), (PAGE - 1, 2), (2 * PAGE, 1), (2 * PAGE - 1, 2), ((1 << 64) - 1, 4)):
        assert refused(dma.read, iova, count)[0] == errno.EFAULT
        assert refused(dma.write, iova, bytes(count))[0] == errno.EFAULT
    assert "DMA address 0x2000 is outside the memory the client has mapped" in refused(dma.read, 2 * PAGE - 1, 2)[1]
    with pytest.raises(ValueError, match="a DMA read of -1 bytes"):
        dma.read(PAGE, -1)


def test_nothing_is_written_unless_all_of_it_can_be(dma: Dma) -> None:
    fd = memory_file(PAGE)
    dma.map(region(0, PAGE, os.dup(fd)))
    assert refused(dma.write, PAGE - 2, b"abcd")[0] == errno.EFAULT
    assert os.pread(fd, 2, PAGE - 2) == bytes(2)
    os.close(fd)


def test_adjoining_regions_are_one_range(dma: Dma) -> None:
    first, last = memory_file(PAGE), memory_file(PAGE)
    dma.map(region(2 * PAGE, PAGE, last))
    dma.map(region(0, PAGE, first))
    dma.map(region(PAGE, PAGE))
    data = bytes(range(256)) * 32
    dma.write(PAGE // 2, data)
    assert dma.read(PAGE // 2, len(data)) == data
    assert os.pread(first, PAGE, PAGE // 2) == data[: PAGE // 2]
    assert os.pread(last, PAGE // 2, 0) == data[-PAGE // 2 :]


def test_memory_without_a_descriptor_is_reached_by_message() -> None:
    client, dma = Client(), Dma()
    dma.attach(client)
    dma.map(region(0x1000, PAGE))
    dma.write(0x1010, b"abc")
    assert dma.read(0x1010, 3) == b"abc"
    assert client.messages == [("write", 0x1010, 3), ("read", 0x1010, 3)]
    dma.detach()


def test_a_message_may_wait_for_the_thread_that_unmaps() -> None:
    """The reply arrives on the connection's thread, which may have an unmap to process first."""
    dma = Dma()

    class Busy(Client):
        def dma_read(self, iova: int, count: int) -> bytes:
            other = threading.Thread(target=dma.unmap, args=(0, PAGE))
            other.start()
            other.join(5)
            assert not other.is_alive(), "the table is locked during a message"
            return super().dma_read(iova, count)

    dma.attach(Busy())
    dma.map(region(0, PAGE))
    assert dma.read(0, 4) == bytes(4)
    assert dma.maps == 0


def test_permissions_are_the_clients(dma: Dma) -> None:
    dma.map(region(0, PAGE, memory_file(PAGE), access="r"))
    dma.map(region(PAGE, PAGE, memory_file(PAGE), access="w"))
    dma.read(0, 4)
    dma.write(PAGE, b"abcd")
    assert refused(dma.write, 0, b"x") == (errno.EACCES, "the client does not let the device write to DMA address 0x0")
    assert refused(dma.read, PAGE, 1) == (errno.EACCES, "the client does not let the device read DMA address 0x1000")
    assert refused(dma.read, PAGE - 2, 4)[0] == errno.EACCES


def test_a_file_the_client_opened_read_only_cannot_be_written(dma: Dma) -> None:
    fd = memory_file(PAGE)
    dma.map(region(0, PAGE, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)))
    os.close(fd)
    sentence = "the memory behind DMA address 0x0 cannot be written: Bad file descriptor"
    assert refused(dma.write, 0, b"x") == (errno.EBADF, sentence)
    assert dma.read(0, 1) == b"\0"


def test_truncated_memory_is_a_fault_and_stays_truncated(dma: Dma) -> None:
    fd = memory_file(4 * PAGE)
    dma.map(region(0, 4 * PAGE, os.dup(fd)))
    os.ftruncate(fd, PAGE + 10)
    assert dma.read(0, PAGE + 10) == bytes(PAGE + 10)
    for iova, count in ((PAGE + 10, 1), (PAGE, 11), (0, 4 * PAGE), (3 * PAGE, 4)):
        number, sentence = refused(dma.read, iova, count)
        assert (number, sentence) == (errno.EFAULT, f"the client has truncated the memory behind DMA address {iova:#x}")
        assert refused(dma.write, iova, bytes(count))[0] == errno.EFAULT
    assert os.fstat(fd).st_size == PAGE + 10, "a write does not make the file grow"
    os.ftruncate(fd, 4 * PAGE)
    dma.write(3 * PAGE, b"back")
    os.close(fd)


def test_memory_truncated_during_the_accesses_never_kills_us(dma: Dma) -> None:
    fd = memory_file(64 * PAGE)
    dma.map(region(0, 64 * PAGE, os.dup(fd)))
    stopping = threading.Event()

    def truncate() -> None:
        while not stopping.is_set():
            os.ftruncate(fd, 0)
            os.ftruncate(fd, 64 * PAGE)

    thread = threading.Thread(target=truncate)
    thread.start()
    outcomes = set()
    for turn in range(400):
        try:
            if turn % 2:
                dma.write(0, b"x" * 64 * PAGE)
            else:
                assert len(dma.read(0, 64 * PAGE)) == 64 * PAGE
            outcomes.add(0)
        except MdevError as error:
            outcomes.add(error.errno or 0)
    stopping.set()
    thread.join()
    os.close(fd)
    assert outcomes <= {0, errno.EFAULT}


def test_memory_of_huge_pages(dma: Dma) -> None:
    """Where no client can get any, the error says so."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    page = os.fstat(fd).st_blksize
    os.ftruncate(fd, 2 * page)
    dma.map(region(0x1000, 2 * page, fd))
    try:
        mmap.mmap(fd, 2 * page).close()
    except OSError:
        sentence = "the memory behind DMA address 0x1000 cannot be mapped: Cannot allocate memory"
        assert refused(dma.write, 0x1000, b"x") == (errno.ENOMEM, sentence)
        return
    dma.write(0x1000 + page - 2, b"abcd")
    assert dma.read(0x1000 + page - 2, 4) == b"abcd"
    os.ftruncate(fd, page)
    assert refused(dma.write, 0x1000 + page, b"x")[0] == errno.EFAULT


class TestWritesThroughAMapping:
    """What hugetlbfs needs, on a file that is always to be had."""

    SIZE = 16 * PAGE

    @pytest.fixture
    def fd(self) -> Iterator[int]:
        fd = memory_file(self.SIZE)
        yield fd
        os.close(fd)

    @pytest.mark.parametrize(("position", "count"), [(0, PAGE), (1, 1), (PAGE - 1, 2), (100, 15 * PAGE), (15 * PAGE, PAGE)])
    def test_they_arrive_where_they_belong(self, fd: int, position: int, count: int) -> None:
        before = open_files()
        offset = position // 2
        piece = _Piece(region(0x100, self.SIZE - offset, fd, offset), 0x100 + position - offset, count)
        _write_mapped(piece, memoryview(b"x" * count))
        assert os.pread(fd, self.SIZE, 0) == bytes(position) + b"x" * count + bytes(self.SIZE - position - count)
        assert open_files() == before

    def test_memory_truncated_meanwhile_is_a_fault_and_never_kills_us(self, fd: int) -> None:
        stopping = threading.Event()

        def truncate() -> None:
            while not stopping.is_set():
                os.ftruncate(fd, 0)
                os.ftruncate(fd, self.SIZE)

        thread = threading.Thread(target=truncate)
        thread.start()
        outcomes = set()
        for _ in range(1000):
            try:
                _write_mapped(_Piece(region(0, self.SIZE, fd), 0, self.SIZE), memoryview(bytes(self.SIZE)))
            except MdevError as error:
                outcomes.add((error.errno, str(error)))
        stopping.set()
        thread.join()
        assert outcomes == {(errno.EFAULT, "the client has truncated the memory behind DMA address 0x0")}


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_sealed_memory(dma: Dma, seal: int) -> None:
    fd = memory_file(PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
    dma.map(region(0, PAGE, fd))
    assert dma.read(0, 4) == bytes(4)
    if seal == fcntl.F_SEAL_WRITE:
        sentence = "the memory behind DMA address 0x0 cannot be written: Operation not permitted"
        assert refused(dma.write, 0, b"x") == (errno.EPERM, sentence)
    else:
        dma.write(0, b"xyz")
        assert dma.read(0, 3) == b"xyz"


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_DIRECTORY])
def test_what_a_file_system_answers_to_a_read_is_told(dma: Dma, tmp_path: Path, flags: int) -> None:
    fd = memory_file(PAGE)
    dma.map(region(0, PAGE, os.open(tmp_path if flags == os.O_DIRECTORY else f"/proc/self/fd/{fd}", flags)))
    os.close(fd)
    number, sentence = refused(dma.read, 0, 1)
    assert number == (errno.EISDIR if flags == os.O_DIRECTORY else errno.EBADF)
    assert sentence.startswith("the memory behind DMA address 0x0 cannot be read: ")


class TestTheClientsFileDescription:
    """SCM_RIGHTS shares it, so the client can change its flags."""

    @pytest.fixture
    def fd(self) -> Iterator[int]:
        fd = memory_file(2 * PAGE)
        yield fd
        os.close(fd)

    @pytest.fixture
    def denied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a client's `fchmod(fd, 0)` does to all but root."""

        def deny(*arguments: object) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(descriptors, "os", SimpleNamespace(**{**vars(os), "open": deny}))

    def append(self, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)

    def check_writes(self, dma: Dma, fd: int) -> None:
        for _ in range(10):
            dma.write(PAGE - 2, b"abcd")
        assert os.fstat(fd).st_size == 2 * PAGE, "a write does not make the file grow"
        assert os.pread(fd, 4, PAGE - 2) == dma.read(PAGE - 2, 4) == b"abcd"

    def test_it_may_append_before(self, dma: Dma, fd: int) -> None:
        self.append(fd)
        dma.map(region(0, 2 * PAGE, os.dup(fd)))
        self.check_writes(dma, fd)

    def test_it_may_append_afterwards(self, dma: Dma, fd: int) -> None:
        dma.map(region(0, 2 * PAGE, os.dup(fd)))
        self.append(fd)
        self.check_writes(dma, fd)

    @pytest.mark.usefixtures("denied")
    def test_it_may_append_afterwards_even_if_it_is_all_there_is(self, dma: Dma, fd: int) -> None:
        dma.map(region(0, 2 * PAGE, os.dup(fd)))
        self.append(fd)
        self.check_writes(dma, fd)

    @pytest.mark.usefixtures("denied")
    def test_one_that_appends_and_is_all_there_is_is_refused(self, dma: Dma, fd: int) -> None:
        self.append(fd)
        number, sentence = refused(dma.map, region(0, PAGE, fd))
        assert number == errno.EINVAL
        assert sentence.endswith("is open for appending (O_APPEND), and cannot be opened again")
        assert (dma.maps, dma.descriptors) == (0, 0)
        dma.map(region(0, PAGE, os.dup(fd), access="r"))
        assert dma.read(0, 1) == b"\0"

    @pytest.mark.usefixtures("denied")
    def test_writes_end_where_the_file_does(self, dma: Dma, fd: int) -> None:
        dma.map(region(0, 2 * PAGE, os.dup(fd)))
        os.ftruncate(fd, PAGE + 10)
        dma.write(PAGE + 2, b"12345678")
        assert refused(dma.write, PAGE + 3, b"12345678")[0] == errno.EFAULT
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert refused(dma.write, 0, b"x")[0] == errno.EPERM

    def test_a_number_that_is_used_again_is_another_file(
        self, dma: Dma, fd: int, denied: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dma.map(region(0, PAGE, os.dup(fd)))
        assert dma._foreign
        dma.unmap(0, PAGE)
        assert not dma._foreign
        monkeypatch.undo()
        dma.map(region(0, PAGE, os.dup(fd)))
        assert not dma._foreign

    @pytest.mark.parametrize(
        ("given", "access", "kept"),
        [
            (os.O_RDWR, "rw", os.O_RDWR),
            (os.O_RDWR, "w", os.O_RDWR),
            (os.O_RDWR, "r", os.O_RDONLY),
            (os.O_RDONLY, "rw", os.O_RDONLY),
            (os.O_WRONLY, "w", os.O_WRONLY),
        ],
    )
    def test_ours_has_no_more_rights_than_are_needed_and_were_given(
        self, dma: Dma, fd: int, given: int, access: str, kept: int
    ) -> None:
        number = os.open(f"/proc/self/fd/{fd}", given)
        dma.map(region(0, PAGE, number, access=access))
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == kept
        assert not os.get_inheritable(number)
        assert os.path.sameopenfile(number, fd)

    def test_a_lease_on_the_file_keeps_nobody_waiting(self, dma: Dma) -> None:
        """Who opens the file has to wait until its holder gives way."""
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(2 * PAGE)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            began = time.monotonic()
            dma.map(region(0, 2 * PAGE, os.dup(file.fileno())))
            assert time.monotonic() - began < 2
            self.append(file.fileno())
            self.check_writes(dma, file.fileno())
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        signal.signal(signal.SIGIO, before)

    def test_what_is_no_memory_is_left_as_it_is(self, dma: Dma) -> None:
        end, other = os.pipe()
        dma.map(region(0, PAGE, os.dup(end)))
        os.set_blocking(end, False)
        assert not os.get_blocking(dma._regions[0].fd), "it is the same description still"
        os.close(end)
        os.close(other)


def test_holes_read_as_zeros(dma: Dma) -> None:
    fd = memory_file(1 << 30)
    dma.map(region(0, 1 << 30, fd))
    assert dma.read((1 << 30) - 8, 8) == bytes(8)
    assert os.fstat(fd).st_blocks == 0


# -- map and unmap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iova", "size"), [(0x3000, 1), (0x2000, PAGE), (0x2FFF, 1), (0x1FFF, 2), (0x1000, 4 * PAGE), (0x2800, 0x100), (0, 1 << 40)]
)
def test_overlapping_maps_are_refused(dma: Dma, iova: int, size: int) -> None:
    dma.map(region(0x2000, 2 * PAGE))
    number, sentence = refused(dma.map, region(iova, size))
    assert number == errno.EEXIST
    assert sentence == f"DMA range {iova:#x} of {size:#x} bytes overlaps the mapped DMA range 0x2000 of 0x2000 bytes"
    dma.map(region(0x1000, PAGE))
    dma.map(region(0x4000, PAGE))


@pytest.mark.parametrize(
    ("iova", "size", "fd", "offset"),
    [(0, 0, -1, 0), (0, -1, -1, 0), (-1, 2, -1, 0), (1 << 63, (1 << 63) + 1, -1, 0), (0, 1, 0, -1), (0, 2, 0, (1 << 63) - 1)],
)
def test_maps_that_make_no_sense_are_refused(dma: Dma, iova: int, size: int, fd: int, offset: int) -> None:
    number, sentence = refused(dma.map, region(iova, size, fd, offset))
    assert number == errno.EINVAL
    assert "cannot be mapped" in sentence
    assert dma.maps == 0


def test_the_whole_address_space_can_be_mapped(dma: Dma) -> None:
    dma.map(region(0, 1 << 64))
    assert refused(dma.read, (1 << 64) - 1, 2)[0] == errno.EFAULT
    dma.unmap(0, 1 << 64)


@pytest.mark.parametrize(("iova", "size"), [(0, PAGE), (0x1000, PAGE), (0x1000, 3 * PAGE), (0x2000, PAGE), (0x9000, PAGE)])
def test_only_an_exact_map_goes_away(dma: Dma, iova: int, size: int) -> None:
    dma.map(region(0x1000, 2 * PAGE))
    number, sentence = refused(dma.unmap, iova, size)
    assert (number, sentence) == (errno.ENOENT, f"DMA range {iova:#x} of {size:#x} bytes is not a mapped range")
    dma.unmap(0x1000, 2 * PAGE)
    assert refused(dma.read, 0x1000, 1)[0] == errno.EFAULT


def test_a_client_may_have_so_many_maps(dma: Dma) -> None:
    for index in range(MAX_MAPS):
        dma.map(region(index * PAGE, PAGE))
    number, sentence = refused(dma.map, region(MAX_MAPS * PAGE, PAGE))
    assert (number, sentence) == (errno.ENOSPC, "the client has 1024 DMA maps already, the most a device takes")
    dma.unmap(0, PAGE)
    dma.map(region(MAX_MAPS * PAGE, PAGE))


def test_and_so_many_descriptors(dma: Dma) -> None:
    fd = memory_file(PAGE)
    for index in range(MAX_DESCRIPTORS):
        dma.map(region(index * PAGE, PAGE, os.dup(fd)))
    number, sentence = refused(dma.map, region(MAX_DESCRIPTORS * PAGE, PAGE, fd))
    assert number == errno.EMFILE
    assert sentence == "the client has 256 DMA maps with a descriptor, the most a device takes"
    os.fstat(fd)  # still ours: the map was refused
    dma.map(region(MAX_DESCRIPTORS * PAGE, PAGE))
    dma.unmap(0, PAGE)
    dma.map(region(0, PAGE, fd))
    assert dma.descriptors == MAX_DESCRIPTORS


def test_unmap_closes_the_descriptor(dma: Dma) -> None:
    for leave in (lambda: dma.unmap(0, PAGE), dma.unmap_all, dma.detach):
        fd = memory_file(PAGE)
        dma.map(region(0, PAGE, fd))
        leave()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert (dma.maps, dma.descriptors) == (0, 0)


def test_after_the_client_left_messages_find_nobody() -> None:
    dma = Dma()
    dma.map(region(0, PAGE))
    assert refused(dma.read, 0, 1) == (errno.ENOTCONN, "the client is gone, DMA address 0x0 cannot be reached")
    assert refused(dma.write, 0, b"x")[0] == errno.ENOTCONN


def test_no_access_after_unmap_has_returned(dma: Dma) -> None:
    """Each turn maps a file, lets another thread write to it, unmaps, and then expects the file to stay as it is."""
    stopping = threading.Event()
    written: list[int] = []
    failures: set[int | None] = set()

    def device() -> None:
        while not stopping.is_set():
            try:
                dma.write(0, b"x" * 8 * PAGE)
                written.append(1)
            except MdevError as error:
                failures.add(error.errno)

    thread = threading.Thread(target=device)
    thread.start()
    fd = memory_file(8 * PAGE)
    turns = 0
    while turns < 200 or not written:
        dma.map(region(0, 8 * PAGE, os.dup(fd)))
        dma.unmap(0, 8 * PAGE)
        os.pwrite(fd, bytes(8 * PAGE), 0)
        assert os.pread(fd, 8 * PAGE, 0) == bytes(8 * PAGE)
        turns += 1
    stopping.set()
    thread.join()
    os.close(fd)
    assert failures == {errno.EFAULT}


# -- against a flat array -------------------------------------------------------------------------------------------


class MapMachine(RuleBasedStateMachine):
    """Random maps over 64 small blocks, against one array of bytes and one of permissions."""

    BLOCKS = 64
    BLOCK = 16

    @initialize()
    def start(self) -> None:
        self.client = Client(self.BLOCKS * self.BLOCK)
        self.dma = Dma()
        self.dma.attach(self.client)
        self.fd = memory_file(self.BLOCKS * self.BLOCK)
        self.memory = bytearray(self.BLOCKS * self.BLOCK)
        self.maps: dict[int, tuple[int, str]] = {}
        self.access: list[str | None] = [None] * self.BLOCKS

    @rule(first=st.integers(0, 63), blocks=st.integers(1, 20), shared=st.booleans(), access=st.sampled_from(["r", "w", "rw", "rw"]))
    def map(self, first: int, blocks: int, shared: bool, access: str) -> None:
        blocks = min(blocks, self.BLOCKS - first)
        fd = os.dup(self.fd) if shared else -1
        new = region(first * self.BLOCK, blocks * self.BLOCK, fd, first * self.BLOCK, access)
        if any(self.access[first : first + blocks]):
            assert refused(self.dma.map, new)[0] == errno.EEXIST
            if shared:
                os.close(fd)
            return
        self.dma.map(new)
        if not shared:
            # A message and the file show the same memory, so the model is one array.
            start, end = first * self.BLOCK, (first + blocks) * self.BLOCK
            self.client.memory[start:end] = self.memory[start:end]
        self.maps[first] = (blocks, "file" if shared else "message")
        self.access[first : first + blocks] = [access] * blocks

    @rule(first=st.integers(0, 63), wrong=st.integers(-1, 1), choose=st.integers(0, 63))
    def unmap(self, first: int, wrong: int, choose: int) -> None:
        if self.maps and choose % 4:
            first = sorted(self.maps)[choose % len(self.maps)]
        blocks, kind = self.maps.get(first, (1, ""))
        size = blocks * self.BLOCK + wrong
        if not kind or wrong:
            assert refused(self.dma.unmap, first * self.BLOCK, size)[0] == errno.ENOENT
            return
        self.dma.unmap(first * self.BLOCK, size)
        if kind == "message":
            os.pwrite(self.fd, self.client.memory[first * self.BLOCK : first * self.BLOCK + size], first * self.BLOCK)
        del self.maps[first]
        self.access[first : first + blocks] = [None] * blocks

    def expect(self, start: int, count: int, what: str) -> int:
        for position in range(start, start + count):
            access = self.access[position // self.BLOCK] if position < len(self.memory) else None
            if access is None:
                return errno.EFAULT
            if what not in access:
                return errno.EACCES
        return 0

    @rule(start=st.integers(0, 1023), count=st.integers(0, 200))
    def read(self, start: int, count: int) -> None:
        expected = self.expect(start, count, "r")
        if expected:
            assert refused(self.dma.read, start, count)[0] == expected
        else:
            assert self.dma.read(start, count) == self.memory[start : start + count]

    @rule(start=st.integers(0, 1023), data=st.binary(max_size=200))
    def write(self, start: int, data: bytes) -> None:
        expected = self.expect(start, len(data), "w")
        if expected:
            assert refused(self.dma.write, start, data)[0] == expected
        else:
            self.dma.write(start, data)
            self.memory[start : start + len(data)] = data

    @invariant()
    def counts_match(self) -> None:
        assert self.dma.maps == len(self.maps)
        assert self.dma.descriptors == sum(1 for _, kind in self.maps.values() if kind == "file")

    def teardown(self) -> None:
        self.dma.detach()
        os.close(self.fd)


TestMaps = MapMachine.TestCase
TestMaps.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
