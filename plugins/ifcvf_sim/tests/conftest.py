"""A card with functions in this process, and drivers of them."""

from __future__ import annotations

import contextlib
import errno

import pytest
from mdevkit import MdevError
from mdevkit_ifcvf_sim.card import SWITCH, Card
from mdevkit_ifcvf_sim.driver import IfcvfOps
from mdevkit_ifcvf_sim.pci import HostAccess, PciFunction
from mdevkit_testkit.suites.virtio.guest import Guest, NetPort

#: How long a test waits for frames, in seconds: the machine may be busy.
PATIENCE = 20


@pytest.fixture
def fails():
    """Call something that must fail with an errno; returns the sentence."""

    def check(number, call, *args, **kwargs):
        with pytest.raises(MdevError) as caught:
            call(*args, **kwargs)
        assert errno.errorcode[caught.value.errno] == errno.errorcode[number]
        return caught.value.strerror

    return check


class Machine:
    """A card, its functions, and whoever drives them; closed at the end."""

    def __init__(self, stack, forwarding):
        self.card, self.stack = Card(), stack
        self.card.set_forwarding(forwarding)
        self.count = 0

    def function(self):
        """Return another function as a PCI device."""
        self.count += 1
        rings = self.card.add(bytes([2, 0, 0, 0, 0, self.count]), f"function {self.count}")
        self.stack.callback(self.card.remove, rings)
        function = PciFunction(rings, f"function {self.count}")
        self.stack.callback(function.close)
        return function

    def ops(self):
        """Return another function as the parent driver gives it."""
        return IfcvfOps(HostAccess(self.function()))

    def guest(self, ops=None):
        """Return a driver of a function, not started."""
        guest = Guest(ops or self.ops(), features=1 << 32 | 1 << 15)
        self.stack.callback(guest.close)
        return guest

    def running(self):
        """Return a driver's port of a function that runs, with receive buffers posted."""
        guest = self.guest()
        guest.start(num=64)
        port = NetPort(guest)
        port.post(32)
        return port


@pytest.fixture
def make_machine():
    with contextlib.ExitStack() as stack:
        yield lambda forwarding="loopback": Machine(stack, forwarding)


@pytest.fixture
def machine(make_machine):
    return make_machine()


@pytest.fixture
def switched(make_machine):
    return make_machine(SWITCH)
