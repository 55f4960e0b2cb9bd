"""A device that records what reaches it, a client that says exactly what it is told, and checks that nothing is left."""

import contextlib
import errno
import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.memory import sealed_memfd
from mdevkit_vfio.migration import Migration
from mdevkit_vfio.ops import DeviceInfo, GfxPlane, IrqInfo, Mapping, RegionInfo, SparseArea
from mdevkit_vfio.pci import Bar, Msix, PciDevice, PciIds
from mdevkit_vfio.proto import Command
from mdevkit_vfio.server import VfioUserServer
from mdevkit_vfio.uapi import Device, IrqFlag, IrqSet, MigrationFlag, MigrationState, RegionFlag

RW = RegionFlag.READ | RegionFlag.WRITE


class RecordedMigration:
    """A stream of fixed bytes out, and a list of what came in."""

    flags = MigrationFlag.STOP_COPY | MigrationFlag.PRE_COPY

    def __init__(self):
        self.state = MigrationState.RUNNING
        self.outgoing = b"state of the device"
        self.incoming = b""

    def set_state(self, wanted):
        if wanted is MigrationState.ERROR:
            raise MdevError(errno.EINVAL, "nobody walks to ERROR")
        self.state = wanted

    def read(self, count):
        if self.state is not MigrationState.STOP_COPY:
            raise MdevError(errno.EINVAL, "not saving")
        part, self.outgoing = self.outgoing[:count], self.outgoing[count:]
        return part

    def write(self, data):
        if self.state is not MigrationState.RESUMING:
            raise MdevError(errno.EINVAL, "not resuming")
        self.incoming += data

    def data_size(self):
        return len(self.outgoing)


class Recorder:
    """`VfioOps` made of lists. `fail` holds what an op raises, by name; `calls` the ops called, in order."""

    #: What `region_info` offers, by index: a register block, one to be mapped in two areas, one to be mapped whole, one that
    #: can only be read, one that can only be written, configuration space, and a device-specific one with areas.
    def __init__(self):
        self.calls = []
        self.fail = {}
        self.migration = RecordedMigration()
        self.dma = None
        self.registers = bytearray(range(256)) * 16
        self.file = sealed_memfd("recorder", 0x10000)
        areas = (SparseArea(0x1000, 0x1000), SparseArea(0x3000, 0x2000))
        mapped = Mapping(self.file, 0x8000, areas)
        self.regions = {
            0: RegionInfo(RW, 4096),
            1: RegionInfo(RW, 0x8000, mapped),
            2: RegionInfo(RegionFlag.READ, 256),
            3: RegionInfo(RegionFlag.WRITE, 256),
            5: RegionInfo(RW, 0x8000, Mapping(self.file)),
            7: RegionInfo(RW, 256),
            9: RegionInfo(RW, 0x8000, mapped, (1 << 31 | 0x1234, 7)),
        }
        self.irqs = (1, 4, 300, 1, 1)
        self.armed = {}
        self.maps = {}
        self.reads_of = bytes
        self.during = {}

    def called(self, name, *args):
        self.calls.append((name, *args))
        if name in self.during:
            self.during[name]()
        if name in self.fail:
            raise self.fail[name]

    def open(self, dma):
        self.dma = dma
        self.called("open")

    def release(self):
        for fd in [*self.armed.values(), *(region.fd for region in self.maps.values() if region.fd >= 0)]:
            os.close(fd)
        self.armed.clear()
        self.maps.clear()
        self.called("release")

    def info(self):
        return DeviceInfo(Device.RESET | Device.PCI, 10, 5)

    def region_info(self, index):
        return self.regions.get(index, RegionInfo(RegionFlag(0), 0))

    def irq_info(self, index):
        return IrqInfo(IrqFlag.EVENTFD, self.irqs[index])

    def set_irqs(self, request):
        if "set_irqs" in self.fail:
            for fd in request.fds:
                os.close(fd)
        self.called("set_irqs", request)
        for number, fd in enumerate(request.fds, request.start):
            old = self.armed.pop((request.index, number), None)
            if old is not None:
                os.close(old)
            if fd >= 0:
                self.armed[request.index, number] = fd
        if request.flags == IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER and not request.count:
            for key in [key for key in self.armed if key[0] == request.index]:
                os.close(self.armed.pop(key))

    def read(self, region, offset, count):
        self.called("read", region, offset, count)
        return self.reads_of(self.registers[offset : offset + count])

    def write(self, region, offset, data):
        self.called("write", region, offset, data)

    def reset(self):
        self.called("reset")

    def dma_map(self, region):
        self.called("dma_map", region)
        if region.iova in self.maps:
            raise MdevError(errno.EEXIST, "mapped")
        self.maps[region.iova] = region

    def dma_unmap(self, iova, size):
        self.called("dma_unmap", iova, size)
        if iova not in self.maps or self.maps[iova].size != size:
            raise MdevError(errno.ENOENT, "not mapped")
        fd = self.maps.pop(iova).fd
        if fd >= 0:
            os.close(fd)

    def dma_unmap_all(self):
        self.called("dma_unmap_all")
        while self.maps:
            fd = self.maps.popitem()[1].fd
            if fd >= 0:
                os.close(fd)

    def query_gfx_plane(self, plane_type):
        return GfxPlane()

    def gfx_dmabuf(self, dmabuf_id):
        raise MdevError(errno.ENOENT, "no such buffer")

    def request(self, count):
        self.called("request", count)
        return False

    def names(self):
        return [call[0] for call in self.calls]


class Wire:
    """A connection that sends and receives exactly what a test says."""

    def __init__(self, path, timeout=5):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(str(path))
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(timeout)
        self.id = 0x100

    def close(self):
        self.sock.close()

    def send(self, data, fds=()):
        if fds:
            sent = socket.send_fds(self.sock, [data], list(fds))
            data = data[sent:]
        if data:
            self.sock.sendall(data)

    def receive(self):
        """The next message: header, payload, descriptors; None at the end of the stream."""
        data, fds = b"", []
        size = proto.HEADER_SIZE
        while len(data) < size:
            part, got, _, _ = socket.recv_fds(self.sock, size - len(data), 16)
            if not part:
                assert not data, "the server closed in the middle of a message"
                return None
            data += part
            fds += got
            if len(data) == proto.HEADER_SIZE:
                size = proto.Header(*proto.HEADER.unpack(data)).size
        return proto.Header(*proto.HEADER.unpack_from(data)), data[proto.HEADER_SIZE :], fds

    def hello(self, payload=None):
        reply = self.ask(Command.VERSION, proto.Version(0, 2).pack() if payload is None else payload)
        return proto.Version.parse(reply)

    def exchange(self, command, payload=b"", fds=(), flags=0):
        """Send a command, return header, payload and descriptors of its reply."""
        self.id += 1
        self.send(proto.message(self.id, command, payload, flags), fds)
        header, payload, received = self.receive()
        assert header.id == self.id
        assert header.command == command
        assert header.flags & proto.TYPE_MASK == proto.TYPE_REPLY
        return header, payload, received

    def ask(self, command, payload=b"", fds=()):
        """Send a command that succeeds without descriptors; return its reply's payload."""
        header, reply, received = self.exchange(command, payload, fds)
        assert header.flags == proto.TYPE_REPLY, errno.errorcode.get(header.error)
        assert received == []
        return reply

    def refused(self, command, payload=b"", fds=(), flags=0):
        """Send a command that is refused; return the errno."""
        header, reply, received = self.exchange(command, payload, fds, flags)
        assert header.flags == proto.TYPE_REPLY | proto.ERROR
        assert reply == b""
        assert received == []
        return header.error

    def read(self, region, offset, count):
        access, data = proto.parse_region_data(
            Command.REGION_READ, self.ask(Command.REGION_READ, proto.Access(offset, region, count).pack())
        )
        assert access == proto.Access(offset, region, count)
        return data

    def ended(self):
        """Whether the server has closed the connection."""
        try:
            return self.receive() is None
        except ConnectionError:
            return True


def descriptors():
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        # The descriptor of this very listing is gone by now.
        with contextlib.suppress(OSError):
            found[entry.name] = str(entry.readlink())
    return found


def until(condition, timeout=5):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)  # another thread or process has to run


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture(scope="module", autouse=True)
def no_garbage():
    """What the tests of other files left is not closed in the middle of these."""
    gc.collect()


@pytest.fixture
def open_files():
    """Tells which descriptors this process has."""
    return descriptors


@pytest.fixture
def no_leaks():
    """Nothing is left behind: no thread, no descriptor."""
    fds, threads = descriptors(), set(threading.enumerate())
    yield
    until(lambda: set(threading.enumerate()) <= threads)
    assert descriptors() == fds


@pytest.fixture
def folder():
    """A folder with a short path: a socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vfio-") as name:
        yield Path(name)


@pytest.fixture
def recorder(no_leaks):
    device = Recorder()
    yield device
    os.close(device.file)


@pytest.fixture
def make_recorder(no_leaks):
    """Makes another recorder each time it is called."""
    made = []

    def make():
        made.append(Recorder())
        return made[-1]

    yield make
    for device in made:
        os.close(device.file)


@pytest.fixture
def serve(no_leaks, folder):
    """Serves ops at a new path each time it is called; every server is closed, and its file must be gone, at the end."""
    servers = []

    def serve(ops, name=None, **options):
        name = name or f"device{len(servers)}"
        server = VfioUserServer(ops, folder / name, name, **options)
        servers.append(server)
        server.start()
        return server

    yield serve
    for server in servers:
        server.close()
    assert [server.path for server in servers if server.path.exists()] == []


@pytest.fixture
def connect(serve):
    """Makes connections that have said VERSION, unless `hello` is false."""
    wires = []

    def connect(server, hello=True, **options):
        wire = Wire(server.path, **options)
        wires.append(wire)
        if hello:
            wire.hello()
        return wire

    yield connect
    for wire in wires:
        wire.close()


@pytest.fixture
def connect_to(no_leaks):
    """Makes connections to a path."""
    wires = []

    def connect_to(path):
        wires.append(Wire(path))
        wires[-1].hello()
        return wires[-1]

    yield connect_to
    for wire in wires:
        wire.close()


@pytest.fixture
def server(serve, recorder):
    return serve(recorder)


@pytest.fixture
def wire(server, connect):
    return connect(server)


@pytest.fixture
def eventfd(no_leaks):
    """Makes eventfds that are closed at the end."""
    made = []

    def make(flags=os.EFD_CLOEXEC | os.EFD_NONBLOCK):
        made.append(os.eventfd(0, flags))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def memfd(no_leaks):
    """Makes memfds of a size that are closed at the end."""
    made = []

    def make(size):
        made.append(os.memfd_create("guest", os.MFD_CLOEXEC))
        os.ftruncate(made[-1], size)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


class Card(PciDevice):
    """A real PCI device: a block of registers, a doorbell, and a DMA engine that copies.

    BAR 0: 0x00 INTx level; 0x04 sends MSI number n; 0x08 status (errno of the last copy, all ones while none is done);
    0x10 source, 0x18 target, 0x20 length; 0x24 starts a copy, which sends MSI 0; from 0x40 on plain registers.
    """

    IDS = PciIds(0x1234, 0x5678, 0x1234, 1, 0x058000, 1)

    def __init__(self, name="card", mapped=False):
        self.registers = bytearray(256)
        bars = {0: Bar(4096), 4: Bar(32, "io"), 5: Bar(0x2000)}
        if mapped:
            areas = (SparseArea(0x1000, 0x1000), SparseArea(0x4000, 0x4000))
            bars[1] = Bar(0x10000, "mem64", mapped=True, areas=areas)
        pin = 0 if mapped else 1
        super().__init__(self.IDS, bars, interrupt_pin=pin, msi_vectors=4, msix=Msix(300, 5), name=name)
        self.migration = Migration(
            MigrationFlag.STOP_COPY | MigrationFlag.PRE_COPY,
            save=lambda: b"card" + self.registers,
            load=self.load,
            header=lambda: b"card",
            lock=self.lock,
        )

    def load(self, data):
        if data[:4] != b"card":
            raise MdevError(errno.EINVAL, "not the state of a card")
        self.registers[:] = data[4:]

    def device_reset(self):
        self.registers[:] = bytes(256)
        self.registers[8:12] = b"\xff" * 4

    def bar_read(self, bar, offset, size):
        return int.from_bytes(self.registers[offset : offset + size], "little") if bar == 0 else 0

    def bar_write(self, bar, offset, size, value):
        if bar == 0 and offset + size <= len(self.registers):
            self.registers[offset : offset + size] = value.to_bytes(size, "little")
            if offset == 0x00:
                self.set_intx(bool(value))
            elif offset == 0x04:
                self.trigger_msi(value & 3)
            elif offset == 0x24:
                self.defer(self.copy)

    def copy(self):
        source, target, length = struct.unpack_from("<QQI", self.registers, 0x10)
        try:
            self.dma.write(target, self.dma.read(source, min(length, 1 << 20)))
            status = 0
        except OSError as error:
            status = error.errno
        with self.lock:
            self.registers[8:12] = status.to_bytes(4, "little")
        self.trigger_msi(0)


@pytest.fixture
def make_card(no_leaks):
    """Makes cards."""
    return Card


class Nursery:
    """Processes that serve the one device at `path`, one after the other."""

    def __init__(self, folder, fatal=2, patience=4.5):
        self.folder = folder
        self.path = folder / "s"
        self.control = folder / "c"
        self.pid = 0
        program = str(Path(__file__).with_name("nursery.py"))
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", program, str(self.control), str(self.path), str(fatal), str(patience)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    @property
    def log(self):
        return (self.folder / "log").read_text()

    def start(self):
        """Start a process; the one before it is dead, or dying."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.pid = int(self.process.stdout.readline())
        return self.pid

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def replace(self):
        self.kill()
        self.start()

    def end(self):
        """End the last process as its host would, and see that nothing is left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def _listens(path):
    """Whether a socket has got past bind(2), which makes its file: __SO_ACCEPTCON is set (proc_pid_net(5), unix)."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return any(line.endswith(f" {path}") and line.split()[3] == "00010000" for line in lines)


@pytest.fixture
def make_nursery(folder, until):
    nurseries = []

    def make(**options):
        nursery = Nursery(folder, **options)
        nurseries.append(nursery)
        nursery.start()
        until(lambda: _listens(nursery.path))
        return nursery

    yield make
    for nursery in nurseries:
        nursery.end()
        until(lambda nursery=nursery: not nursery.path.exists(), timeout=10)
        until(lambda nursery=nursery: not nursery.control.exists(), timeout=10)
