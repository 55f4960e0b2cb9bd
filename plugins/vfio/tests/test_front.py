"""A client goes on while the process of its device dies: real processes, real SIGKILLs, one situation at a time.

The processes are those of nursery.py, whose device counts every access. Kills at random are in test_front_kills.py.
"""

import contextlib
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.client import VfioUserClient
from mdevkit_vfio.pci import PciDevice, PciIds
from mdevkit_vfio.proto import Command
from mdevkit_vfio.transport import Fronts, ParkedServer
from mdevkit_vfio.uapi import Irq, IrqSet

#: Registers of the nursery's device.
TICKET, SUM, QUEUE, LENGTH, PIN, DIE, FIRE, DMA = range(0, 32, 4)
SOURCE = 0x10000
PAGE = 4096


@pytest.fixture
def nursery(make_nursery):
    return make_nursery()


@pytest.fixture
def client(nursery):
    with VfioUserClient.connect(nursery.path) as client:
        yield client


@pytest.fixture
def bar(client):
    return client.region(0)


def test_state_survives(nursery, bar):
    assert [bar.read_int(TICKET, 4) for _ in range(3)] == [1, 2, 3]
    nursery.replace()
    assert [bar.read_int(TICKET, 4) for _ in range(3)] == [4, 5, 6]


def test_configuration_space_survives(nursery, client):
    client.config.write_int(4, 2, 0x6)
    client.config.write_int(0x10, 4, 0xFEBF0000)
    nursery.replace()
    assert client.config.read_int(4, 2) == 0x6
    assert client.config.read_int(0x10, 4) == 0xFEBF0000


def test_a_request_made_while_there_is_no_process_waits(nursery, bar):
    nursery.kill()
    thread = threading.Timer(0.3, nursery.start)
    thread.start()
    began = time.monotonic()
    assert bar.read_int(TICKET, 4) == 1
    assert time.monotonic() - began > 0.25
    thread.join()


def test_a_client_that_waits_for_nothing_is_not_held_up(nursery, bar, until):
    bar.read_int(TICKET, 4)
    nursery.replace()
    until(lambda: "it goes on after" in nursery.log, timeout=20)
    assert bar.read_int(TICKET, 4) == 2
    assert nursery.log.count("it goes on after") == 1


def test_posted_writes_survive(nursery, bar):
    """Some are carried out by the process that dies, some wait in its socket, some are sent while there is none."""
    expected = 0
    for value in range(500):
        if value == 250:
            nursery.kill()
        if value == 400:
            nursery.start()
        bar.write_int(SUM, 4, value, posted=True)
        expected = (expected * 31 + value) & 0xFFFFFFFF
    assert bar.read_int(SUM, 4) == expected


def test_write_multi_is_done_as_a_whole(nursery, client, bar):
    expected = 0
    for number in range(60):
        values = range(number, number + 20)
        client.write_multi([proto.Write(0, SUM, value.to_bytes(4, "little")) for value in values], posted=number % 2 == 0)
        for value in values:
            expected = (expected * 31 + value) & 0xFFFFFFFF
        if number % 20 == 10:
            nursery.replace()
    assert bar.read_int(SUM, 4) == expected


def test_an_eventfd_survives_and_the_level_with_it(nursery, client, bar):
    (line,) = client.arm(Irq.INTX)
    bar.write_int(PIN, 4, 1)
    assert line.wait(5) == 1
    nursery.replace()
    # Still high: the guest's end-of-interrupt brings the next signal.
    client.unmask(Irq.INTX)
    assert line.wait(5) >= 1
    bar.write_int(PIN, 4, 0)
    client.unmask(Irq.INTX)
    line.wait(0)
    assert line.wait(0.1) == 0
    bar.write_int(PIN, 4, 1)
    assert line.wait(5) == 1


def test_a_pin_the_client_has_masked_stays_masked(nursery, client, bar):
    (line,) = client.arm(Irq.INTX)
    client.mask(Irq.INTX)
    bar.write_int(PIN, 4, 1)
    nursery.replace()
    bar.read_int(TICKET, 4)
    assert line.wait(0.1) == 0
    client.unmask(Irq.INTX)
    assert line.wait(5) == 1


@pytest.mark.parametrize(("index", "count"), [(Irq.MSI, 4), (Irq.MSIX, 40)])
def test_messages_survive(nursery, client, bar, index, count):
    vectors = client.arm(index, count)
    client.set_irqs(index, IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, 1, 1)
    nursery.replace()
    for number in (0, 2, count - 1):
        bar.write_int(FIRE, 4, number)
        assert vectors[number].wait(5) == 1
    bar.write_int(FIRE, 4, 1)
    assert vectors[1].wait(0.1) == 0


def test_guest_memory_survives(nursery, client, bar):
    client.config.write_int(4, 2, 0x4)
    memory = client.dma_map(SOURCE, PAGE)
    gone = client.dma_map(SOURCE + PAGE, PAGE)
    memory.write(SOURCE, b"\2" * 100)
    nursery.replace()
    client.dma_unmap(gone)
    bar.write_int(DMA, 4, 1)
    deadline = time.monotonic() + 5
    while bar.read_int(DMA, 4) != 200:
        assert time.monotonic() < deadline
    assert client.transact(Command.DMA_UNMAP, proto.DmaUnmap(0, gone.iova, PAGE).pack()).error == errno.ENOENT


def test_what_is_posted_survives(memfd, eventfd, nursery, client, bar):
    client.config.write_int(4, 2, 0x4)
    gone, memory, line = client.dma_map(SOURCE + PAGE, PAGE), memfd(PAGE), eventfd()
    os.pwrite(memory, b"\2" * 100, 0)
    post = client.channel.post
    post(Command.DMA_MAP, proto.DmaMap(proto.DMA_READABLE, 0, SOURCE, PAGE).pack(), [memory])
    post(Command.DMA_UNMAP, proto.DmaUnmap(0, gone.iova, PAGE).pack())
    post(Command.DEVICE_SET_IRQS, proto.SetIrqs(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, Irq.INTX, 0, 1).pack(), [line])
    for expected in (200, 400):
        assert bar.read_int(DMA, 4) == expected - 200
        nursery.replace()
        bar.write_int(PIN, 4, 1)
        assert select.select([line], [], [], 5)[0]
        os.eventfd_read(line)
        bar.write_int(PIN, 4, 0)
        client.unmask(Irq.INTX)
        bar.write_int(DMA, 4, 1)
        deadline = time.monotonic() + 5
        while bar.read_int(DMA, 4) != expected:
            assert time.monotonic() < deadline
    assert client.transact(Command.DMA_UNMAP, proto.DmaUnmap(0, gone.iova, PAGE).pack()).error == errno.ENOENT


def test_what_is_posted_has_no_reply(connect_to, nursery):
    """Neither when it is done, nor when it is refused, nor when there is no process for it."""
    wire = connect_to(nursery.path)
    unmap = proto.message(1, Command.DMA_UNMAP, proto.DmaUnmap(0, SOURCE, PAGE).pack(), proto.NO_REPLY)
    for _ in range(3):
        wire.send(proto.message(1, Command.DMA_MAP, proto.DmaMap(3, 0, SOURCE, PAGE).pack(), proto.NO_REPLY))
        wire.send(unmap + unmap)
        assert wire.read(0, LENGTH, 4) == bytes(4)
        nursery.kill()
        wire.send(unmap)
        nursery.start()


def test_what_is_posted_and_comes_too_late_has_no_reply_either(connect_to, make_nursery):
    nursery = make_nursery(patience=0.5)
    wire = connect_to(nursery.path)
    assert wire.read(0, LENGTH, 4) == bytes(4)
    nursery.kill()
    wire.send(proto.message(1, Command.DMA_UNMAP, proto.DmaUnmap(0, SOURCE, PAGE).pack(), proto.NO_REPLY))
    assert wire.refused(Command.REGION_READ, proto.Access(LENGTH, 0, 4).pack()) == errno.ETIMEDOUT
    nursery.start()


def test_memory_reached_by_message_survives(nursery, client, bar):
    memory = client.dma_map(SOURCE, PAGE, shared=False)
    memory.write(SOURCE, b"\3" * 10)
    for expected in (30, 60, 90):
        bar.write_int(DMA, 4, 1)
        deadline = time.monotonic() + 5
        while bar.read_int(DMA, 4) != expected:
            assert time.monotonic() < deadline
        nursery.replace()


def test_the_next_client_gets_a_device_as_new(nursery):
    with VfioUserClient.connect(nursery.path) as first:
        assert first.region(0).read_int(TICKET, 4) == 1
        nursery.replace()
        assert first.region(0).read_int(TICKET, 4) == 2
    with VfioUserClient.connect(nursery.path) as second:
        assert second.region(0).read_int(TICKET, 4) == 1


def test_a_client_may_come_while_there_is_no_process(nursery):
    nursery.kill()
    thread = threading.Timer(0.3, nursery.start)
    thread.start()
    with VfioUserClient.connect(nursery.path) as client:
        assert client.region(0).read_int(TICKET, 4) == 1
    thread.join()


def test_one_client_at_a_time(nursery, client):
    with pytest.raises(MdevError, match="the server refuses VERSION: EBUSY") as caught:
        VfioUserClient.connect(nursery.path)
    assert caught.value.errno == errno.EBUSY
    nursery.replace()
    with pytest.raises(MdevError, match="EBUSY"):
        VfioUserClient.connect(nursery.path)
    assert client.region(0).read_int(TICKET, 4) == 1


def test_a_client_that_dies_frees_the_device(nursery, until):
    program = (
        "import sys, os\nfrom mdevkit_vfio.client import VfioUserClient\n"
        "client = VfioUserClient.connect(sys.argv[1])\nclient.region(0).write_int(8, 4, 1, posted=True)\nos.kill(os.getpid(), 9)\n"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-P", "-c", program, str(nursery.path)], check=False)
        with VfioUserClient.connect(nursery.path) as client:
            assert client.region(0).read_int(LENGTH, 4) == 0


def test_two_processes_cannot_serve_one_device(nursery, until, client):
    first = nursery.pid
    nursery.start()
    until(lambda: "counter is served by another process" in nursery.log)
    nursery.pid = first
    assert client.region(0).read_int(TICKET, 4) == 1


def test_a_request_that_kills_its_process_twice_fails_the_device(nursery, until):
    with VfioUserClient.connect(nursery.path, timeout=10) as client:
        bar = client.region(0)
        assert bar.read_int(TICKET, 4) == 1
        restart = threading.Thread(target=_restart_when_dead, args=(nursery, 2))
        restart.start()
        with pytest.raises(MdevError, match="the server refuses REGION_WRITE: EIO"):
            bar.write_int(DIE, 4, 1)
        restart.join()
        # Nobody is asked any more, and everybody is told.
        with pytest.raises(MdevError, match="the server refuses REGION_READ: EIO"):
            bar.read_int(TICKET, 4)
        sentence = "counter has failed: its process has died 2 times in a row of a client's REGION_WRITE"
        until(lambda: nursery.log.count(sentence) > 1)
    # Its next client gets a device as new.
    until(lambda: _registers(nursery))
    with VfioUserClient.connect(nursery.path) as client:
        assert client.region(0).read_int(TICKET, 4) == 1


def test_a_socket_removed_while_there_is_no_process_was_a_device_removed(nursery, bar, until):
    """What comes to the same name later is another device: it has a socket again, and the old client none."""
    assert bar.read_int(TICKET, 4) == 1
    nursery.kill()
    nursery.path.unlink()
    nursery.start()
    until(nursery.path.exists)
    with VfioUserClient.connect(nursery.path) as second:
        assert second.region(0).read_int(TICKET, 4) == 1
    with pytest.raises(MdevError):
        bar.read_int(TICKET, 4)


def _restart_when_dead(nursery, times):
    for _ in range(times):
        while Path(f"/proc/{nursery.pid}").exists():
            time.sleep(0.005)  # nobody tells us of its end
        nursery.start()


def _registers(nursery):
    """Whether a new process can serve the device again."""
    nursery.start()
    time.sleep(0.2)  # what it takes to be refused
    return Path(f"/proc/{nursery.pid}").exists()


def test_a_failure_the_front_sees_late_reaches_the_process_that_has_taken_over(make_nursery, until):
    nursery = make_nursery(fatal=1)
    server = ParkedServer(PciDevice(PciIds(1, 2), {}), nursery.path, "counter", fronts=Fronts(nursery.control))
    with VfioUserClient.connect(nursery.path, timeout=10) as client:
        client.region(0).write_int(DIE, 4, 10_000, posted=True)
        client.region(0).write_int(SUM, 4, 1, posted=True)
        front = _front(nursery)
        time.sleep(0.1)  # it sleeps in the middle of the request
        os.kill(front, signal.SIGSTOP)
        try:
            nursery.kill()
            server.start()
            assert server.failure is None
        finally:
            os.kill(front, signal.SIGCONT)
        until(lambda: server.failure is not None)
        assert str(server.failure) == "counter has failed: its process has died 1 times in a row of a client's REGION_WRITE"
        with pytest.raises(MdevError, match="the server refuses REGION_READ: EIO"):
            client.region(0).read_int(TICKET, 4)
    until(lambda: server.failure is None)
    with VfioUserClient.connect(nursery.path) as client:
        assert client.config.read_int(0, 2) == 1
    server.close()


def _front(nursery):
    """The process id of the front."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            parent = path.with_name("stat").read_text().rpartition(")")[2].split()[1]
            ours = os.fsencode(nursery.control) in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
            if ours and path.with_name("comm").read_text() == "front counter\n":
                return int(path.parent.name)
    raise AssertionError("there is no front")


def test_a_request_that_kills_its_process_once_is_carried_out_by_the_next(nursery, bar):
    """As when the machine was short of memory: the second time it goes well."""
    bar.write_int(DIE, 4, 300, posted=True)
    time.sleep(0.1)  # it sleeps in the middle of the request
    nursery.replace()
    assert bar.read_int(TICKET, 4) == 1
    assert "has failed" not in nursery.log


def test_a_device_that_takes_too_long_costs_one_answer(nursery):
    """What comes late is not taken for the answer to something else."""
    with VfioUserClient.connect(nursery.path, timeout=6) as client:
        bar = client.region(0)
        began = time.monotonic()
        with pytest.raises(MdevError, match="the server refuses REGION_WRITE: ETIMEDOUT"):
            bar.write_int(DIE, 4, 5200)
        assert 4 < time.monotonic() - began < 5
        assert [bar.read_int(TICKET, 4) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_messages_without_a_pause_do_not_put_a_late_answer_off(make_nursery):
    """A processor waits for its access while another one goes on writing."""
    nursery = make_nursery(patience=1)
    with VfioUserClient.connect(nursery.path) as client:
        bar = client.region(0)
        failures = []
        waiting = threading.Thread(target=lambda: failures.append(_failure(bar.write_int, DIE, 4, 4000)))
        waiting.start()
        while waiting.is_alive():
            bar.write_int(SUM, 4, 0, posted=True)
            waiting.join(0.02)
        assert failures == [errno.ETIMEDOUT]


def _failure(call, *arguments):
    """The errno a call fails with; 0 if it does not."""
    try:
        call(*arguments)
    except MdevError as error:
        return error.errno
    return 0


def test_a_header_cut_short_costs_its_sender_the_connection(connect_to, nursery, until):
    wire = connect_to(nursery.path)
    for _ in range(3):
        wire.read(0, LENGTH, 4)
    # It claims to be whole, and what it lacks is that of the last message.
    wire.send(proto.message(7, Command.REGION_READ, b"")[:4] + (8).to_bytes(4, sys.byteorder))
    until(lambda: _unread(wire.sock) == 0)
    wire.send(proto.message(8, Command.DEVICE_RESET))
    header, _, _ = wire.receive()
    assert (header.id, header.command, header.error) == (7, Command.REGION_READ, errno.EINVAL)
    assert wire.ended()
    assert "has died" not in nursery.log
    assert connect_to(nursery.path).read(0, LENGTH, 4) == bytes(4)


def _unread(sock):
    """How much of what was sent the other end has not taken (SIOCOUTQ, unix(7))."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]


def test_a_process_that_stays_away_costs_answers_in_time(nursery):
    with VfioUserClient.connect(nursery.path, timeout=6) as client:
        bar = client.region(0)
        assert bar.read_int(TICKET, 4) == 1
        nursery.kill()
        began = time.monotonic()
        with pytest.raises(MdevError, match="the server refuses REGION_READ: ETIMEDOUT"):
            bar.read_int(TICKET, 4)
        assert 4 < time.monotonic() - began < 5
        with pytest.raises(MdevError, match="the server refuses REGION_READ: EIO"):
            bar.read_int(TICKET, 4)
        nursery.start()
        deadline = time.monotonic() + 5
        while True:
            try:
                assert bar.read_int(TICKET, 4) == 2
                break
            except MdevError:
                assert time.monotonic() < deadline
