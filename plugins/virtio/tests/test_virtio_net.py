"""The driver ``virtio_net`` on a real device of this process: frames, features, link, multiqueue, and devices that misbehave."""

from __future__ import annotations

import errno
import threading

import pytest
from mdevkit import MdevError
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.virtio.netdev import NetPort

EXTRA = {
    "split": 0,
    "packed": Feature.RING_PACKED,
    "split-event-indirect": Feature.EVENT_IDX | Feature.INDIRECT_DESC,
    "packed-event-indirect": Feature.RING_PACKED | Feature.EVENT_IDX | Feature.INDIRECT_DESC,
}
BASE = Feature.VERSION_1 | 1 << 3 | 1 << 5 | 1 << 16
PATIENCE = 20


def frame(number, size=60):
    return (b"\xff" * 6 + b"\x02\0\0\0\0\x07" + b"\x88\xb5" + number.to_bytes(4, "big")).ljust(size, bytes([number % 251]))


@pytest.mark.parametrize("mergeable", [0, Feature.NET_MRG_RXBUF], ids=["whole", "mergeable"])
@pytest.mark.parametrize("extra", EXTRA.values(), ids=EXTRA)
def test_frames_come_back_as_they_were(lab, engine, extra, mergeable):
    netdev = lab.netdev(BASE | extra | mergeable, mtu=9000, engine=engine)
    sizes = [14, 60, 61, 1500, 4096, 5000, 9014]
    with netdev.frames(limit=300) as frames:
        sent = [frame(number, sizes[number % len(sizes)]) for number in range(200)]
        for one in sent:
            netdev.send(one, timeout=PATIENCE)
        assert [frames.get(PATIENCE) for _ in sent] == sent
    statistics = netdev.statistics
    assert (statistics.tx_packets, statistics.rx_packets) == (200, 200)
    assert statistics.tx_bytes == statistics.rx_bytes == sum(map(len, sent))
    assert statistics.rx_errors == statistics.rx_nohandler == 0


def test_nothing_is_lost_when_the_reader_is_slow(lab):
    netdev = lab.netdev(num=16)
    with netdev.frames(limit=4) as frames:
        sender = threading.Thread(target=lambda: [netdev.send(frame(number), timeout=PATIENCE) for number in range(500)])
        sender.start()
        assert [frames.get(PATIENCE) for _ in range(500)] == [frame(number) for number in range(500)]
        sender.join()
    assert netdev.statistics.rx_nohandler == 0


def send_all(netdev, count):
    for number in range(count):
        netdev.send(frame(number), timeout=0.05)


def test_a_sender_waits_for_room_and_is_told_when_there_is_none(lab):
    netdev = lab.netdev(num=4)
    with netdev.frames(limit=1) as frames:
        with pytest.raises(MdevError, match=r"has taken no frame for 0\.05 s; does somebody read what it has sent\?") as caught:
            send_all(netdev, 100)
        assert caught.value.errno == errno.ETIMEDOUT
        count = netdev.statistics.tx_packets
        assert 4 < count < 100
        assert [frames.get(PATIENCE) for _ in range(count)] == [frame(number) for number in range(count)]


def test_frames_without_a_reader_are_counted_and_do_not_stop_the_device(lab, wait_until):
    netdev = lab.netdev(num=8)
    for number in range(100):
        netdev.send(frame(number), timeout=PATIENCE)
    wait_until(lambda: netdev.statistics.rx_nohandler == 100)
    with netdev.frames() as frames:
        netdev.send(frame(7))
        assert frames.get(PATIENCE) == frame(7)


def test_what_the_device_says_of_itself(lab):
    netdev = lab.netdev(mtu=2000)
    assert (netdev.mac.hex(":"), netdev.mtu, netdev.carrier, netdev.queue_pairs) == ("02:00:00:00:00:42", 2000, True, 1)
    assert (netdev.max_frame, netdev.name) == (2018, "eth0")


def test_a_device_that_says_little_gets_an_address_made_up(lab):
    netdev = lab.netdev(Feature.VERSION_1)
    assert netdev.mtu == 1500
    assert netdev.carrier
    assert netdev.mac != bytes.fromhex("020000000042")
    assert netdev.mac[0] & 3 == 2, "locally administered, and no multicast address"


def test_an_mtu_no_network_has_is_declined(lab):
    netdev = lab.netdev(mtu=67)
    assert netdev.mtu == 1500
    assert not lab.registry.mdevs[0].endpoint.device.has(3)


def test_the_link_follows_the_device(lab, wait_until):
    netdev = lab.netdev()
    model = lab.registry.mdevs[0].drvdata.ops
    model.update_config(status=0)
    wait_until(lambda: not netdev.carrier)
    with pytest.raises(MdevError, match="netdev eth0: the link is down") as caught:
        netdev.send(frame(0))
    assert caught.value.errno == errno.ENETDOWN
    model.update_config(status=1)
    wait_until(lambda: netdev.carrier)
    with netdev.frames() as frames:
        netdev.send(frame(1))
        assert frames.get(PATIENCE) == frame(1)


def test_two_queue_pairs_by_the_control_queue(lab, engine):
    netdev = lab.netdev(BASE | 1 << 17 | 1 << 22, pairs=2, engine=engine)
    assert (netdev.queue_pairs, lab.registry.mdevs[0].drvdata.ops.active) == (2, 2)
    with netdev.frames() as frames:
        sent = [frame(number) for number in range(100)]
        for one in sent:
            netdev.send(one, timeout=PATIENCE)
        assert sorted(frames.get(PATIENCE) for _ in sent) == sorted(sent)
    pairs = netdev.queue_statistics
    assert all(pair.tx_packets == pair.rx_packets > 20 for pair in pairs)
    assert sum(pair.tx_packets for pair in pairs) == 100


def test_a_device_that_refuses_two_pairs_fails_the_probe(lab):
    class Refusing(type(lab.parent.make("x"))):
        def _control(self, index, queue):
            for buffer in queue.take():
                buffer.write(b"\1")
                queue.complete((buffer, 1))

    with pytest.raises(MdevError, match="virtio0 refuses to use 2 queue pairs") as caught:
        lab.create(lambda name: Refusing(BASE | 1 << 17 | 1 << 22, name=name, pairs=2))
    assert caught.value.errno == errno.EINVAL
    assert not lab.registry.mdevs


def test_one_pair_is_used_where_there_is_no_control_queue(lab):
    netdev = lab.netdev(BASE | 1 << 22, pairs=2)
    assert netdev.queue_pairs == 1
    assert not lab.registry.mdevs[0].endpoint.device.has(22)


@pytest.mark.parametrize(
    ("bad", "number", "text"),
    [
        (b"\0" * 13, errno.EINVAL, "13 bytes are no Ethernet frame, 14 are the least"),
        (b"\0" * 1519, errno.EMSGSIZE, "a frame of 1519 bytes is longer than the 1518 its MTU of 1500 allows"),
    ],
)
def test_frames_that_cannot_be(lab, bad, number, text):
    netdev = lab.netdev()
    for send in (netdev.send, netdev.try_send):
        with pytest.raises(MdevError, match=text) as caught:
            send(bad)
        assert caught.value.errno == number


def test_one_user_at_a_time(lab):
    netdev = lab.netdev()
    with netdev.frames():
        with pytest.raises(MdevError, match=r"netdev eth0 is in use by a frame queue \(pid \d+\)") as caught:
            netdev.frames()
        assert caught.value.errno == errno.EBUSY
    with netdev.frames() as frames:
        with pytest.raises(MdevError, match=r"has received no frame for 0.01 s"):
            frames.get(0.01)
    with pytest.raises(MdevError, match="receives no more: it is disconnected") as caught:
        frames.get()
    assert caught.value.errno == errno.ENODEV


def test_iterating_ends_with_the_queue_and_fails_with_the_netdev(lab):
    netdev = lab.netdev()
    frames = netdev.frames()
    got = []
    reader = threading.Thread(target=lambda: got.extend(frames))
    reader.start()
    netdev.send(frame(3))
    while len(got) < 1:
        reader.join(0.01)
    frames.close()
    reader.join(PATIENCE)
    assert got == [frame(3)]
    frames = netdev.frames()
    lab.registry.close()
    with pytest.raises(MdevError, match="eth0 receives no more: it is gone") as caught:
        next(iter(frames))
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(MdevError, match="netdev eth0 is gone"):
        netdev.send(frame(0))


def test_waiting_on_the_interrupt_thread_is_refused(lab, wait_until):
    netdev = lab.netdev(num=4)
    caught = []

    class Echo(type(netdev.frames(1))):
        def receive(self, one):
            try:
                for _ in range(100):
                    netdev.send(one)
            except MdevError as error:
                caught.append(error)
            return True

    netdev.port.close()
    with Echo(netdev, 1):
        netdev.send(frame(0))
        wait_until(lambda: caught)
    assert caught[0].errno == errno.EDEADLK
    assert "cannot wait for room on its interrupt thread; use try_send" in str(caught[0])


def test_a_broken_device_breaks_its_netdev_only(lab, wait_until):
    netdev, other = lab.netdev(), lab.netdev()
    model = lab.registry.mdevs[0].drvdata.ops
    model.queue_broke(0, MdevError(errno.EINVAL, "a test says so"))
    wait_until(lambda: netdev.broken)
    with pytest.raises(MdevError, match="eth0 is broken: its device needs a reset") as caught:
        netdev.send(frame(0))
    assert caught.value.errno == errno.EIO
    with pytest.raises(MdevError, match="needs a reset"):
        netdev.frames()
    with other.frames() as frames:
        other.send(frame(1))
        assert frames.get(PATIENCE) == frame(1)


def test_a_device_that_gives_back_what_it_does_not_have(lab, wait_until):
    netdev = lab.netdev()
    ring = netdev._rx[0].queue.ring
    used = ring.memory.bytes[ring.device : ring.device + 64].cast("H")
    used[2] = 999
    used[1] = 1
    netdev.irq.post(lambda: netdev.rx_interrupt(0))
    wait_until(lambda: netdev.broken)
    with pytest.raises(
        MdevError, match=r"netdev eth0 is broken: queue input.0: the device gave back a buffer it did not have \(KeyError\(999\)\)"
    ):
        netdev.send(frame(0))


def test_a_received_frame_that_is_none_is_an_error(lab, wait_until):
    netdev = lab.netdev()
    model = lab.registry.mdevs[0].drvdata.ops
    with model.changing():
        queue = model._queues[0].queue
        short, long, missing = queue.take(3)
        missing.write(bytes(10) + b"\5\0" + bytes(60))
        queue.complete((short, 20), (long, long.writable), (missing, 72))
    wait_until(lambda: netdev.statistics.rx_errors == 2)
    assert netdev.statistics.rx_nohandler == 1


def test_suspend_and_resume_keep_user_and_settings(lab):
    netdev = lab.netdev()
    mdev = lab.registry.mdevs[0]
    with netdev.frames() as frames:
        netdev.send(frame(1))
        assert frames.get(PATIENCE) == frame(1)
        lab.registry.suspend()
        with pytest.raises(MdevError, match="netdev eth0 is suspended") as caught:
            netdev.send(frame(2))
        assert caught.value.errno == errno.ENETDOWN
        mdev.drvdata.calls.clear()
        lab.registry.resume()
        assert [call[1] for call in mdev.drvdata.calls if call[0] == "set_status"] == [0, 1, 3, 11, 15]
        netdev.send(frame(3))
        assert frames.get(PATIENCE) == frame(3)
    assert netdev.statistics.tx_packets == 2


def test_a_queue_that_is_taken_down_as_somebody_sends(lab):
    """The sender has chosen it already; it must not look at memory that has gone, nor at queues that are there no more."""
    netdev = lab.netdev(BASE | 1 << 17 | 1 << 22, pairs=2)

    class Slow(bytes):
        """Takes so long to look at that the device is suspended meanwhile."""

        def __getitem__(self, part):
            if netdev.queue_pairs:
                lab.registry.suspend()
            return super().__getitem__(part)

    for send in (netdev.send, netdev.try_send):
        with pytest.raises(MdevError, match="netdev eth0 is suspended") as caught:
            send(Slow(frame(0)))
        assert caught.value.errno == errno.ENETDOWN
        lab.registry.resume()
    with netdev.frames() as frames:
        netdev.send(frame(1))
        assert frames.get(PATIENCE) == frame(1)


def test_a_sender_that_waits_does_not_go_on_with_the_next_queues(lab, wait_until):
    netdev = lab.netdev(num=4)
    caught = []

    def send():
        try:
            for number in range(100):
                netdev.send(frame(number), timeout=PATIENCE)
        except MdevError as error:
            caught.append(error)

    with netdev.frames(limit=1):
        sender = threading.Thread(target=send)
        sender.start()
        wait_until(lambda: netdev._tx[0].wanted)
        lab.registry.suspend()
        lab.registry.resume()
        sender.join(PATIENCE)
    assert [(error.errno, str(error)) for error in caught] == [(errno.ENETDOWN, "netdev eth0 is suspended")]


def test_counters_are_not_read_while_they_change_places(lab):
    """A suspend adds what the queues have counted to what was before: nobody sees it twice."""
    netdev = lab.netdev()
    netdev.send(frame(0))
    seen = []
    reader = threading.Thread(target=lambda: seen.append((netdev.statistics.tx_packets, netdev.queue_statistics[0].tx_packets)))
    with netdev.irq.paused():
        reader.start()
        reader.join(0.05)
        assert not seen
    reader.join(PATIENCE)
    assert seen == [(1, 1)]


@pytest.mark.parametrize("leaves", [True, False])
def test_a_user_of_this_process_has_time_to_leave(lab, wait_until, leaves):
    """And nobody takes its place meanwhile."""
    netdev, (mdev,) = lab.netdev(), lab.registry.mdevs
    frames, caught = netdev.frames(), []

    def unbind():
        try:
            lab.registry.unbind(mdev.name, timeout=PATIENCE if leaves else 0.2)
        except MdevError as error:
            caught.append(error)

    unbinding = threading.Thread(target=unbind)
    unbinding.start()
    wait_until(lambda: netdev._leaving)
    if leaves:
        frames.close()
        with pytest.raises(MdevError, match=r"netdev eth0 is (about to be taken away|gone)"):
            netdev.frames()
    unbinding.join(PATIENCE)
    if leaves:
        assert (caught, mdev.endpoint) == ([], None)
        return
    assert [error.errno for error in caught] == [errno.EBUSY]
    assert "netdev eth0 is in use by a frame queue (pid " in str(caught[0])
    netdev.send(frame(1))
    assert frames.get(PATIENCE) == frame(1)
    frames.close()
    netdev.frames().close()


class Echo(NetPort):
    """Sends back whatever comes: to a device that does so too, for ever. Notes how long others have to wait for their turn."""

    def __init__(self, netdev):
        self.netdev, self.count, self.waits = netdev, 0, []
        netdev.connect(self)

    def receive(self, one):
        self.count += 1
        if self.count % 1000 == 0:
            asked = self.count
            self.netdev.irq.post(lambda: self.waits.append(self.count - asked))
        return self.netdev.try_send(one)


def test_traffic_that_never_ends_lets_others_have_their_turn(lab, wait_until):
    netdev = lab.netdev()
    port = Echo(netdev)
    for number in range(48):
        netdev.send(frame(number), timeout=PATIENCE)
    wait_until(lambda: port.count > 20_000)
    netdev.disconnect(port)
    assert len(port.waits) >= 18
    assert max(port.waits) <= 2 * 64


def test_a_configuration_that_changes_during_the_probe_is_followed(lab, wait_until):
    class Fickle(lab.loop):
        """Loses its link as soon as it has a driver."""

        def driver_ok(self):
            self.update_config(status=0)

    mdev = lab.create(lambda name: Fickle(name=name))
    netdev = mdev.endpoint.device.endpoint.netdev
    wait_until(lambda: not netdev.carrier)
    mdev.drvdata.ops.update_config(status=1)
    wait_until(lambda: netdev.carrier)
