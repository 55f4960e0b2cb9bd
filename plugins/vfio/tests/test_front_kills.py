"""A client asks for everything in random order while the process of its device is killed at random: nothing is lost or done twice.

The processes are those of nursery.py, whose device counts every access. How much is done is counted, not timed: a busy machine
only takes longer. One situation at a time is in test_front.py.
"""

import errno
import random
import re
import sys
import threading
import time
from typing import ClassVar

import pytest
from mdevkit_vfio import proto
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import Irq

#: Registers of the nursery's device.
TICKET, SUM, QUEUE, LENGTH, PIN = range(0, 20, 4)
PAGE = 4096


class Load:
    """A client that knows what the device must answer, and asks for everything in random order."""

    def __init__(self, client, seed, fd):
        self.client = client
        self.bar = client.region(0)
        self.rng = random.Random(seed)
        self.requests = self.with_descriptors = self.ticket = self.sum = 0
        self.queue = []
        self.maps = []
        #: Addresses mapped and unmapped by posted messages, and the memory behind them.
        self.posted, self.unmapped, self.fd = [], [], fd
        self.worst = 0.0

    def step(self):
        chosen = self.rng.choices(list(self.WEIGHTS), list(self.WEIGHTS.values()))[0]
        began = time.monotonic()
        chosen(self)
        self.requests += 1
        self.worst = max(self.worst, time.monotonic() - began)

    def take_ticket(self):
        self.ticket += 1
        assert self.bar.read_int(TICKET, 4) == self.ticket

    def add(self, posted=False):
        value = self.rng.randrange(1 << 32)
        self.sum = (self.sum * 31 + value) & 0xFFFFFFFF
        self.bar.write_int(SUM, 4, value, posted=posted)

    def post(self):
        for _ in range(self.rng.randrange(1, 20)):
            self.add(posted=True)

    def check_sum(self):
        assert self.bar.read_int(SUM, 4) == self.sum

    def push(self):
        if len(self.queue) < 200:
            self.queue.append(self.rng.randrange(256))
            self.bar.write_int(QUEUE, 4, self.queue[-1])

    def pop(self):
        if self.queue:
            assert self.bar.read_int(QUEUE, 4) == self.queue.pop(0)
            assert self.bar.read_int(LENGTH, 4) == len(self.queue)

    def map_memory(self):
        self.with_descriptors += 1
        if len(self.maps) < 8:
            self.maps.append(self.client.dma_map(0x100000 + PAGE * self.with_descriptors, PAGE))
        else:
            self.client.dma_unmap(self.maps.pop(self.rng.randrange(8)))

    def post_map(self):
        """The posted kind. What is left of it at the end is told by replies: see `check_posted`."""
        self.with_descriptors += 1
        if len(self.posted) < 8:
            iova = 0x10000000 + PAGE * self.with_descriptors
            self.posted.append(iova)
            self.client.channel.post(Command.DMA_MAP, proto.DmaMap(3, 0, iova, PAGE).pack(), [self.fd])
        else:
            self.unmapped.append(self.posted.pop(self.rng.randrange(8)))
            self.client.channel.post(Command.DMA_UNMAP, self.unmap(self.unmapped[-1]))

    def check_posted(self):
        """What was mapped is there, and what was unmapped is not."""
        errors = [self.client.transact(Command.DMA_UNMAP, self.unmap(iova)).error for iova in self.posted + self.unmapped]
        assert errors == [0] * len(self.posted) + [errno.ENOENT] * len(self.unmapped)

    @staticmethod
    def unmap(iova):
        return proto.DmaUnmap(0, iova, PAGE).pack()

    def interrupt(self):
        self.with_descriptors += 1
        (line,) = self.client.arm(Irq.INTX)
        self.bar.write_int(PIN, 4, 1)
        assert line.wait(100) >= 1
        self.bar.write_int(PIN, 4, 0)

    WEIGHTS: ClassVar = {
        take_ticket: 30,
        add: 20,
        post: 5,
        check_sum: 10,
        push: 12,
        pop: 12,
        map_memory: 3,
        post_map: 3,
        interrupt: 2,
    }


def _kill_at_random(nursery, load, done, seed, counts):
    """Kill 0.5 to 6 ms apart, or after some more requests: else a slow machine would see deaths only while it starts."""
    rng = random.Random(seed)
    while not done.is_set():
        if rng.random() < 0.4:
            time.sleep(rng.uniform(0.0005, 0.006))
        else:
            goal = load.requests + rng.randrange(1, 120)
            while load.requests < goal and not done.is_set():
                time.sleep(rng.uniform(0, 0.001))
        nursery.replace()
        counts.append(load.requests)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_byte_once_and_in_order_under_kills(memfd, make_nursery, seed):
    # Kills at random do hit the same request several times, and a machine may stand still for seconds.
    nursery = make_nursery(fatal=1000, patience=100)
    done, kills = threading.Event(), []
    with VfioUserClient.connect(nursery.path, timeout=100) as client:
        load = Load(client, seed, memfd(PAGE))
        killer = threading.Thread(target=_kill_at_random, args=(nursery, load, done, seed, kills))
        killer.start()
        try:
            while load.requests < 4000 or len(kills) < 60:
                load.step()
        finally:
            done.set()
            killer.join()
        load.check_sum()
        while load.queue:
            load.pop()
        load.take_ticket()
        load.check_posted()
    facts = f"{load.requests} requests, {load.with_descriptors} with descriptors, {len(kills)} kills"
    sys.stdout.write(f"{facts}, the slowest took {load.worst * 1e3:.0f} ms\n")
    pauses = [float(text) for text in re.findall(r"goes on after ([\d.]+) ms", nursery.log)]
    assert len(pauses) > 10
