"""Devices that break one rule of the VFIO class each, as their clients notice. `fails`: as in `broken_devices`."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Any

import broken_devices
from broken_devices import Suite
from mdevkit import MdevError
from mdevkit_testkit import VfioSuite
from mdevkit_vfio.ops import DeviceInfo, IrqInfo
from simple import Registers, SimpleParent, fails


@fails(test_client_sees_what_the_device_says="assert DeviceInfo")
class TestTellsClientsApart(Suite):
    class device(Registers):
        made = 0

        def __init__(self, name: str) -> None:
            super().__init__(name)
            type(self).made += 1
            self.irqs = 5 + self.made % 2

        def info(self) -> DeviceInfo:
            return replace(super().info(), num_irqs=self.irqs)


@fails(
    test_clients_come_and_go="the client finds that BAR0 at 0x3. reads .*, not 0x00000000",
    test_killed_client_leaves_the_device_usable="the client finds that BAR0 at 0x3. reads .*, not 0x00000000",
)
class TestRemembersClients(Suite):
    device = broken_devices.TestResetsHalf.device


@fails(test_killed_client_leaves_the_device_usable=r"left behind by a client that was killed: .*anon_inode:")
class TestKeepsEventfds(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            for fd in request.fds:
                os.dup(fd)
            super().set_irqs(request)


@fails(
    test_second_client_is_refused="the server refuses VERSION: EACCES",
    test_client_is_interrupted="the server refuses VERSION: EACCES",
)
class TestRefusesEverybody(Suite):
    class device(Registers):
        def device_attached(self) -> None:
            raise MdevError(errno.EACCES, "nobody may use this")


@fails(test_client_vanishes_in_the_middle_of_a_message="logged as errors: .*RuntimeError.*cannot let go")
class TestReleaseRaises(Suite):
    class device(Registers):
        def release(self) -> None:
            super().release()
            raise RuntimeError("cannot let go")


@fails(test_wrong_interrupt_requests_are_refused="SET_IRQS with flags 0x21, start 0, count 4096 was not refused")
class TestEndlessInterrupts(Suite):
    class device(Registers):
        def irq_info(self, index: int) -> IrqInfo:
            return replace(super().irq_info(index), count=1 << 16)

        def set_irqs(self, request: Any) -> None:
            pass


@fails(test_client_is_interrupted="a test signal of INTX did not reach the client")
class TestNeverSignals(Suite):
    class device(Registers):
        def set_irqs(self, request: Any) -> None:
            if request.fds or not request.count:
                super().set_irqs(request)


@fails(test_client_shares_memory="the server refuses DMA_UNMAP: ENOENT|ENOENT")
class TestLosesMaps(Suite):
    class device(Registers):
        def dma_unmap(self, iova: int, size: int) -> None:
            super().dma_unmap(iova, size)
            super().dma_unmap(iova, size)


@fails(test_state_moves_between_clients="a device migrated by STOP_COPY saves another state")
class TestSavesItsNumber(Suite):
    class device(Registers):
        made = 0

        def __init__(self, name: str) -> None:
            super().__init__(name)
            type(self).made += 1
            self.number = self.made % 256

        def save(self) -> bytes:
            return super().save()[:-1] + bytes([self.number])


@fails(test_remove_asks_the_client_first="logged as errors: .*KeyError")
class TestBugInRequest(Suite):
    class device(Registers):
        def request(self, count: int) -> bool:
            return {}[count]


@fails(test_device_is_unbound_and_bound_again="the server refuses VERSION: EBUSY")
class TestWorksOnce(Suite):
    class device(Registers):
        used = False

        def device_attached(self) -> None:
            if self.used:
                raise MdevError(errno.EBUSY, "used up")
            self.used = True


@fails(test_create_fails_where_no_socket_can_be=r"left behind by a create that failed: descriptor \d+ \(anon_inode:\[eventfd\]")
class TestCreateLeaks(VfioSuite):
    class factory(SimpleParent):
        def build(self, mdev: Any, params: Any) -> None:
            super().build(mdev, params)
            os.eventfd(0)
