"""Devices served to a client: the driver ``vfio_mdev`` binds them, and our vfio-user client uses them over their socket.

What the ops promise is checked elsewhere; this is about a client that comes, goes, misbehaves or is killed.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest
from mdevkit import Mdev, MdevError, MdevType, Registry, State
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.ops import IrqInfo
from mdevkit_vfio.uapi import Irq, IrqSet, MigrationFlag, RegionFlag
from mdevkit_vfio.uapi import MigrationState as S

from mdevkit_testkit.leaks import Snapshot
from mdevkit_testkit.suites.base import refused
from mdevkit_testkit.suites.vfio import base
from mdevkit_testkit.suites.vfio.base import Fingerprint, VfioBase, differences, fingerprint, needs, volatile

#: A client that makes itself at home and waits to be killed; argument: the socket.
_VICTIM: Final = """
import sys
from contextlib import suppress
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.ops import IrqInfo

device = VfioUserClient.connect(sys.argv[1])
device.dma_map(1 << 32, 1 << 16)
for index in range(device.info.num_irqs):
    with suppress(OSError):
        device.arm(index)
for index in range(6):
    for offset in range(0, min(device.region(index).size, 64)):
        with suppress(OSError):
            device.region(index).write(offset, b"\\xa5", posted=True)
print("attached", flush=True)
sys.stdin.read()
"""

#: Seconds a client is given to let go, in a test where it does not.
_BRIEF: Final = 0.2


def connect(mdev: Mdev) -> VfioUserClient:
    """Attach a client to a bound device."""
    assert mdev.endpoint is not None, f"{mdev} is bound to {mdev.driver}, and offers no endpoint"
    return VfioUserClient.connect(mdev.endpoint.describe()["socket"])


def reader(client: VfioUserClient) -> Callable[[int, int, int], bytes]:
    """Return how a client reads a region: index, offset, count."""
    return lambda index, offset, count: client.region(index).read(offset, count)


def scrawl(client: VfioUserClient, where: Fingerprint) -> None:
    """Write to every place of the device."""
    for number, place in enumerate(where):
        client.region(place.region).write(place.offset, bytes([number & 0xFF ^ 0xA5]) * place.width, posted=True)


class Serving(VfioBase):
    """Attach, detach, reattach, kill."""

    @pytest.fixture
    def served(self, registry: Registry, mdev_type: MdevType) -> Mdev:
        """Return a device bound to its driver."""
        return self.create_bound(mdev_type, registry)

    @pytest.fixture
    def pristine(self, type_id: str) -> Callable[[VfioUserClient], None]:
        """Return a check that a client finds a device as it was when it was created."""
        # In a registry of their own: a type may have room for the one device that is served.
        with self.make_registry() as apart:
            fresh, other = (self.fresh(apart.type(type_id), apart) for _ in range(2))

        def check(client: VfioUserClient) -> None:
            found = differences(fresh, fingerprint(reader(client), fresh), volatile(fresh, other))
            assert not found, f"the client finds that {found}"
            scrawl(client, fresh)

        return check

    def test_client_sees_what_the_device_says(self, registry: Registry, mdev_type: MdevType, served: Mdev) -> None:
        """Checks that a client is told of the same regions and interrupts as the ops tell the driver."""
        with self.opened(self.another(mdev_type, registry)) as ops, connect(served) as client:
            assert client.info == ops.info()
            for index in range(ops.info().num_regions):
                told, info = client.region(index), ops.region_info(index)
                assert told.size == info.size, f"region {index}: the client sees {told.size} bytes, the device has {info.size}"
                assert bool(told.flags & RegionFlag.MMAP) == (info.mapping is not None)
            for index in range(ops.info().num_irqs):
                assert _answer(client.irq_info, index) == _answer(ops.irq_info, index)

    def test_clients_come_and_go(self, served: Mdev, pristine: Callable[[VfioUserClient], None]) -> None:
        """Checks that each of several clients, one after the other, finds the device as new."""
        for _ in range(3):
            with connect(served) as client:
                pristine(client)

    def test_second_client_is_refused(self, served: Mdev) -> None:
        """Checks that while one client is attached another is refused with EBUSY, and the first is not disturbed."""
        with connect(served) as client:
            with refused("a second client", errno.EBUSY):
                connect(served).close()
            client.config.read(0, 4)

    def test_killed_client_leaves_the_device_usable(self, served: Mdev, pristine: Callable[[VfioUserClient], None]) -> None:
        """Checks that after a client was killed, with memory mapped and interrupts armed, the next one finds the device as new."""
        assert served.endpoint is not None
        before = Snapshot.take()
        command = [sys.executable, "-c", _VICTIM, served.endpoint.describe()["socket"]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as victim:
            try:
                assert victim.stdout is not None
                assert victim.stdout.readline() == b"attached\n", "a client in a process of its own could not attach"
            finally:
                victim.send_signal(signal.SIGKILL)
        left = before.leaks()
        assert not left, f"left behind by a client that was killed: {', '.join(left)}"
        with connect(served) as client:
            pristine(client)

    def test_client_vanishes_in_the_middle_of_a_message(self, served: Mdev) -> None:
        """Checks that a client which sends half a message and goes leaves the device to the next."""
        for half in (1, 15, 17):
            with connect(served) as client, socket.socket(fileno=os.dup(client.channel.fileno())) as raw:
                raw.send((b"\x01\x00\x09\x00\x20\x00\x00\x00" + bytes(24))[:half])
        with connect(served) as client:
            client.config.read(0, 4)

    def test_wrong_interrupt_requests_are_refused(self, served: Mdev) -> None:
        """Checks that SET_IRQS with flags or ranges that cannot be is refused with EINVAL, and later ones work."""
        wrong = [
            (IrqSet.ACTION_TRIGGER, 0, 1),
            (IrqSet.DATA_NONE, 0, 1),
            (IrqSet.DATA_NONE | IrqSet.DATA_BOOL | IrqSet.ACTION_TRIGGER, 0, 1),
            (IrqSet.DATA_NONE | IrqSet.ACTION_MASK | IrqSet.ACTION_TRIGGER, 0, 1),
            (IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 0, 4096),
            (IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 4096, 1),
            (0x40 | IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 0, 1),
        ]
        with connect(served) as client:
            for flags, start, count in wrong:
                with refused(f"SET_IRQS with flags {int(flags):#x}, start {start}, count {count}", errno.EINVAL):
                    client.set_irqs(Irq.INTX, flags, start, count)
            with refused("SET_IRQS of index 4096", errno.EINVAL):
                client.set_irqs(4096, IrqSet.DATA_NONE | IrqSet.ACTION_TRIGGER, 0, 0)
            client.config.read(0, 4)

    def test_client_is_interrupted(self, served: Mdev) -> None:
        """Checks that every kind of interrupt the device has reaches a client's eventfd."""
        with connect(served) as client:
            for index in (Irq.INTX, Irq.MSI, Irq.MSIX):
                info = _answer(client.irq_info, index)
                if info is not None and info.count:
                    line = client.arm(index)[0]
                    line.wait(0)
                    client.trigger(index)
                    assert line.wait(base.PATIENCE), f"a test signal of {index.name} did not reach the client"
                    client.disarm(index)

    def test_client_shares_memory(self, served: Mdev) -> None:
        """Checks that a client maps and unmaps memory, with a descriptor and without, and an overlap is refused with EEXIST."""
        with connect(served) as client:
            for shared in (True, False):
                memory = client.dma_map(1 << 32, 1 << 16, shared=shared)
                with refused("mapping memory twice", errno.EEXIST):
                    client.dma_map(1 << 32, 1 << 12)
                client.dma_unmap(memory)

    @needs("migration")
    def test_state_moves_between_clients(self, registry: Registry, mdev_type: MdevType, served: Mdev) -> None:
        """Checks that a client's device is migrated to another client's, by STOP_COPY and by PRE_COPY where there is one."""
        other = self.another(mdev_type, registry, bind=True)
        with connect(served) as source, connect(other) as target:
            flags = source.migration.flags
            for path in [[S.STOP_COPY]] + ([[S.PRE_COPY, S.STOP_COPY]] if flags & MigrationFlag.PRE_COPY else []):
                for offset in range(0, min(source.region(0).size, 64), 4):
                    source.region(0).write(offset, b"\xa5\x5a\xc3\x3c", posted=True)
                _move(source, target, path)
                assert _save(target) == _save(source), f"a device migrated by {path[0].name} saves another state"
                for client in (source, target):
                    client.migration.state = S.RUNNING
                    client.config.read(0, 4)

    def test_remove_asks_the_client_first(self, registry: Registry, served: Mdev) -> None:
        """Checks that a device in use is removed by force only, that the error names the client, and it is usable till then."""
        with connect(served) as client:
            with pytest.raises(MdevError, match=rf"\b{os.getpid()}\b") as caught:
                registry.remove(served.uuid, timeout=_BRIEF)
            assert caught.value.errno == errno.EBUSY
            assert served.state is State.BOUND
            client.config.read(0, 4)
            registry.remove(served.uuid, force=True, timeout=0)
            with refused("a read from a device that was removed", errno.ENOTCONN):
                client.config.read(0, 4)

    def test_device_is_unbound_and_bound_again(self, registry: Registry, served: Mdev) -> None:
        """Checks that a device can be taken from its driver and given back, and suspended and resumed in between."""
        driver = served.driver
        for _ in range(2):
            registry.unbind(served.uuid)
            assert served.endpoint is None
            registry.attach(served.uuid)
            assert served.driver == driver
            registry.suspend(served.uuid)
            registry.resume(served.uuid)
            with connect(served) as client:
                client.config.read(0, 4)

    def test_create_fails_where_no_socket_can_be(self, registry: Registry, mdev_type: MdevType, runtime_folder: Path) -> None:
        """Checks that a create whose socket's folder is missing is refused with ENOENT and leaves nothing behind."""
        registry.remove(self.create_bound(mdev_type, registry).uuid)
        before, instances = Snapshot.take(), mdev_type.available_instances
        with refused("a create with its socket in a folder that does not exist", errno.ENOENT):
            self.create(mdev_type, registry, bind=True, endpoint_path=str(runtime_folder / "missing" / "socket"))
        assert mdev_type.available_instances == instances, "a create that failed took an instance"
        left = before.leaks()
        assert not left, f"left behind by a create that failed: {', '.join(left)}"


def _answer(ask: Callable[[int], IrqInfo], index: int) -> IrqInfo | None:
    """Return what is told of an interrupt index; None for a refusal."""
    with suppress(OSError):
        return ask(index)
    return None


def _move(source: VfioUserClient, target: VfioUserClient, path: list[S]) -> None:
    """Carry a device's stream to another; both are left in STOP."""
    target.migration.state = S.RESUMING
    for state in path:
        source.migration.state = state
        for part in source.migration.stream():
            target.migration.write(part)
    source.migration.state = target.migration.state = S.STOP


def _save(client: VfioUserClient) -> bytes:
    """Return the state of a device that is in STOP."""
    client.migration.state = S.STOP_COPY
    data = b"".join(client.migration.stream())
    client.migration.state = S.STOP
    return data
