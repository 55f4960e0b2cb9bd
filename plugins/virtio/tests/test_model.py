"""The kit for vendors: a device that answers what it is sent, its driver, and everything either can do wrong."""

import contextlib
import errno
import os
import threading

import pytest
from mdevkit.errors import MdevError
from mdevkit_testkit.suites.virtio.guest import DRIVER_OK, FEATURES_OK, Guest
from mdevkit_virtio.config import ConfigSpace, Field
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.ops import Callback, Status

OFFERED = sum(Feature) | 1 << 3
#: A feature the device offers and cannot work with alone.
ODD = 1 << 4
PATIENCE = 20


class Echo(VirtioModel):
    """Writes back what it reads, in capitals. What it is sent on queue 1 it keeps until it is told to let go."""

    device_id = 42
    vendor_id = 7

    def __init__(self, engine=None, queues=(64, 64)):
        config = ConfigSpace([Field("level", 0, 4, writable=True), Field("size", 4, 4)])
        super().__init__(queues, OFFERED | ODD, config, name="echo", engine=engine)
        self.log = []
        self.kept = []
        self.entered, self.leave = threading.Event(), threading.Event()
        self.leave.set()

    def on_buffers(self, index, queue):
        for buffer in queue.take():
            self.entered.set()
            assert self.leave.wait(PATIENCE)
            if buffer.read(0, 1) == b"!":
                raise ZeroDivisionError("this vendor has a bug")
            if index == 1:
                self.kept.append(buffer)
            else:
                self.answer(queue, buffer)

    def answer(self, queue, buffer):
        answer = buffer.read().upper()
        buffer.write(answer)
        queue.complete((buffer, len(answer)))

    def check_features(self, features):
        if features & ODD and not features & 1 << 3:
            raise MdevError(errno.EINVAL, f"{self}: bit 4 needs bit 3", self)

    def driver_ok(self):
        self.log.append("driver_ok")

    def queue_stopping(self, index, queue):
        self.log.append(f"stopping {index}")
        if index == 1:
            kept, self.kept = self.kept, []
            for buffer in kept:
                self.answer(queue, buffer)

    def device_reset(self):
        self.log.append("reset")

    def config_written(self, offset, data):
        self.log.append((offset, data))


@pytest.fixture
def echo(engine):
    device = Echo(engine)
    yield device
    device.close()


@pytest.fixture
def guests(no_leaks):
    made = []

    def make(ops, features=Feature.VERSION_1, **options):
        made.append(Guest(ops, int(features), **options))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@pytest.fixture
def guest(guests, echo):
    guest = guests(echo)
    guest.start()
    return guest


def ask(guest, text, index=0, *, kick=True):
    """Make a question available; return where its answer comes."""
    answer = guest.room(len(text))
    assert guest.rings[index].add([guest.place(text)], [answer], answer)
    if kick:
        guest.kick(index)
    return answer


def answered(guest, index=0, count=1):
    """Return the next answers."""
    done = []
    assert guest.wait(lambda: done.extend(guest.rings[index].collect()) or len(done) >= count, PATIENCE)
    return [guest.look(completion.token) for completion in done]


def stopped_by(error):
    return error.value.errno, str(error.value)


# -- buffers ---------------------------------------------------------------------------------------------------------------


def test_questions_are_answered(guests, echo, features):
    guest = guests(echo, features | Feature.VERSION_1)
    guest.start()
    for number in range(300):
        text = b"question %d" % number
        ask(guest, text)
        assert answered(guest) == [text.upper()]
    assert guest.signalled(guest.calls[0], PATIENCE)


def test_a_full_ring_at_once(guests, echo, features):
    guest = guests(echo, features | Feature.VERSION_1)
    guest.start()
    texts = [b"%d" % number for number in range(32)]
    for text in texts:
        ask(guest, text, kick=False)
    guest.kick(0)
    assert answered(guest, count=32) == texts


@pytest.mark.parametrize("way", ["descriptor", "call", "neither"])
def test_ways_to_kick(guests, echo, way):
    guest = guests(echo)
    guest.start(kick=way == "descriptor")
    if way == "neither":
        assert echo.set_vq_kick(0, -1)
    kick = guest.eventfd()
    if way == "descriptor":
        assert echo.set_vq_kick(0, kick)
    for _ in range(3):
        ask(guest, b"x", kick=way == "call")
        if way == "descriptor" and guest.rings[0].needs_kick():
            os.eventfd_write(kick, 1)
        assert answered(guest) == [b"X"]


def test_what_was_there_before_driver_ok_is_not_touched_until_then(guests, echo):
    guest = guests(echo)
    guest.negotiate()
    echo.set_map(guest.table())
    guest.set_up(0)
    ask(guest, b"early", kick=False)
    echo.set_vq_ready(0, True)
    guest.kick(0, always=True)
    assert not echo.entered.wait(0.1)
    echo.set_status(DRIVER_OK)
    assert answered(guest) == [b"EARLY"]


def test_stopping_waits_for_the_vendor(guest, echo):
    echo.leave.clear()
    ask(guest, b"slow")
    assert echo.entered.wait(PATIENCE)
    stopper = threading.Thread(target=echo.set_vq_ready, args=(0, False))
    stopper.start()
    stopper.join(0.1)
    assert stopper.is_alive()
    echo.leave.set()
    stopper.join(PATIENCE)
    assert not stopper.is_alive()
    assert answered(guest) == [b"SLOW"]
    assert echo.get_vq_state(0) == 1


def test_a_vendor_gives_back_what_it_holds_when_a_queue_stops(guest, echo):
    ask(guest, b"kept", index=1)
    assert guest.wait(lambda: echo.kept, PATIENCE)
    assert echo.get_vq_state(1) == 1
    echo.set_vq_ready(1, False)
    assert answered(guest, 1) == [b"KEPT"]
    assert "stopping 1" in echo.log


def test_a_vendor_hears_of_the_end_of_a_broken_queue_too(guest, echo, caplog):
    """What it holds it could use in the memory of a driver that is gone; giving it back is of no use, and no bug."""
    ask(guest, b"kept", index=1)
    assert guest.wait(lambda: echo.kept, PATIENCE)
    guest.memory.map[guest.rings[1].driver + 2 : guest.rings[1].driver + 4] = b"\xff\x7f"
    guest.kick(1, always=True)
    assert guest.wait(lambda: echo.error, PATIENCE)
    echo.set_status(0)
    assert "stopping 1" in echo.log
    assert echo.kept == []
    assert "failed" not in caplog.text


def test_a_buffer_of_a_queue_that_stopped_is_of_no_use(guest, echo, monkeypatch):
    monkeypatch.setattr(Echo, "queue_stopping", lambda *_: None)
    ask(guest, b"kept", index=1)
    assert guest.wait(lambda: echo.kept, PATIENCE)
    stale = echo.kept.pop()
    echo.set_vq_ready(1, False)
    assert echo.get_vq_state(1) == 0, "it is taken again"
    echo.set_vq_ready(1, True)
    assert guest.wait(lambda: echo.kept, PATIENCE)
    with echo.changing(), pytest.raises(MdevError, match="echo queue 1 is not started"):
        stale._queue.complete((stale, 0))


def test_a_vendor_that_fails_to_give_back_keeps_no_device_from_being_reset(guest, echo, monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError("this vendor has a bug")

    monkeypatch.setattr(Echo, "queue_stopping", fail)
    echo.set_status(0)
    assert (echo.get_status(), echo.get_vq_ready(0), echo.log[-1]) == (0, False, "reset")
    assert "giving back the buffers of queue 0 failed" in caplog.text
    caplog.clear()


def test_what_a_vendor_leaves_waits_for_a_wake(guests, engine):
    class Patient(Echo):
        ready = False

        def on_buffers(self, index, queue):
            self.entered.set()
            if self.ready:
                super().on_buffers(index, queue)

    device = Patient(engine)
    with contextlib.closing(device):
        guest = guests(device)
        guest.start()
        ask(guest, b"later")
        assert device.entered.wait(PATIENCE)
        device.ready = True
        (worker,) = device._workers
        worker.wake(0)
        assert answered(guest) == [b"LATER"]


# -- what breaks ---------------------------------------------------------------------------------------------------------------


def test_a_broken_ring_breaks_its_queue_alone(guest, echo):
    ring = guest.rings[0]
    at = ring.driver + 2
    guest.memory.map[at : at + 2] = (5000).to_bytes(2, "little")
    guest.kick(0, always=True)
    assert guest.signalled(guest.config_call, PATIENCE)
    assert echo.get_status() == DRIVER_OK | Status.NEEDS_RESET
    assert str(echo.error) == "echo queue 0 is broken by its driver: more buffers are available than the ring has (index 5000)"
    ask(guest, b"other", index=1)
    assert guest.wait(lambda: echo.kept, PATIENCE)
    echo.set_status(0)
    assert echo.error is None


def test_a_vendor_with_a_bug_breaks_its_queue_alone(guest, echo, caplog):
    ask(guest, b"!")
    assert guest.signalled(guest.config_call, PATIENCE)
    assert echo.get_status() & Status.NEEDS_RESET
    assert str(echo.error) == "serving echo queue 0: ZeroDivisionError: this vendor has a bug"
    assert "serving echo queue 0 failed" in caplog.text
    caplog.clear()  # its records keep the frames, and those the memory
    ask(guest, b"fine", index=1)
    assert guest.wait(lambda: echo.kept, PATIENCE)


def test_a_queue_made_ready_again_goes_on_after_it_was_broken(guest, echo):
    ring = guest.rings[0]
    good = bytes(guest.memory.map[ring.driver + 2 : ring.driver + 4])
    guest.memory.map[ring.driver + 2 : ring.driver + 4] = b"\xff\x7f"
    guest.kick(0, always=True)
    assert guest.wait(lambda: echo.error, PATIENCE)
    echo.set_vq_ready(0, False)
    guest.memory.map[ring.driver + 2 : ring.driver + 4] = good
    echo.set_vq_ready(0, True)
    ask(guest, b"again")
    assert answered(guest) == [b"AGAIN"]
    assert echo.get_status() & Status.NEEDS_RESET, "only a reset clears it"


def test_memory_that_is_taken_away(guest, echo):
    with pytest.raises(MdevError, match=r"1024 bytes at guest address 0x.* are not in one shared region") as caught:
        echo.set_map(MemoryTable())
    assert caught.value.errno == errno.EFAULT
    assert guest.signalled(guest.config_call, PATIENCE)
    assert echo.get_vq_ready(0)
    assert echo.get_status() == DRIVER_OK | Status.NEEDS_RESET
    echo.set_map(guest.table())
    echo.set_vq_ready(0, False)
    echo.set_vq_ready(0, True)
    ask(guest, b"back")
    assert answered(guest) == [b"BACK"]


# -- refusals --------------------------------------------------------------------------------------------------------------------

BEYOND = [
    lambda ops: ops.set_vq_num(2, 8),
    lambda ops: ops.set_vq_address(2, 0, 0, 0),
    lambda ops: ops.set_vq_state(2, 0),
    lambda ops: ops.get_vq_state(2),
    lambda ops: ops.set_vq_cb(2, None),
    lambda ops: ops.set_vq_ready(2, True),
    lambda ops: ops.get_vq_ready(2),
    lambda ops: ops.kick_vq(2),
    lambda ops: ops.set_vq_kick(2, -1),
    lambda ops: ops.get_vq_ready(-1),
]


@pytest.mark.parametrize("call", BEYOND)
def test_a_queue_there_is_none_of(echo, call):
    with pytest.raises(MdevError, match=r"echo has no queue (2|-1), the last one is 1") as caught:
        call(echo)
    assert caught.value.errno == errno.EINVAL


def test_largest_rings(echo):
    assert [echo.get_vq_num_max(index) for index in (-1, 0, 1, 2)] == [0, 64, 64, 0]


LIVE = [
    (lambda ops: ops.set_vq_num(0, 8), "echo: queue 0 is ready, its size cannot change"),
    (lambda ops: ops.set_vq_address(0, 0, 0, 0), "echo: queue 0 is ready, its place cannot change"),
    (lambda ops: ops.set_vq_state(0, 0), "echo: queue 0 is ready, its state cannot change"),
    (lambda ops: ops.set_features(0), "echo: features cannot change after FEATURES_OK, before a reset"),
]


@pytest.mark.parametrize(("call", "text"), LIVE)
def test_what_cannot_change_on_a_live_device(guest, echo, call, text):
    with pytest.raises(MdevError) as caught:
        call(echo)
    assert (caught.value.errno, str(caught.value)) == (errno.EBUSY, text)
    ask(guest, b"alive")
    assert answered(guest) == [b"ALIVE"]


WRONG = [
    (lambda ops: ops.set_vq_num(0, 128), "echo: queue 0 has 64 descriptors at most, not 128"),
    (lambda ops: ops.set_vq_num(0, 0), "a ring of 0 descriptors is not possible, 32768 are the most"),
    (lambda ops: ops.set_vq_num(0, 12), "a split ring of 12 descriptors is not possible, the size must be a power of 2"),
    (lambda ops: ops.set_vq_address(0, 1 << 64, 0, 0), "echo: queue 0 cannot be at addresses beyond 64 bits"),
    (lambda ops: ops.set_vq_address(0, 0, -1, 0), "echo: queue 0 cannot be at addresses beyond 64 bits"),
    (lambda ops: ops.set_vq_state(0, 1 << 32), "echo: queue 0 cannot go on at 0x100000000"),
    (lambda ops: ops.set_vq_state(0, -1), "echo: queue 0 cannot go on at -0x1"),
    (lambda ops: ops.set_status(FEATURES_OK | 0x20), "status 0x2b has bits that are none, or not a driver's to set"),
]


@pytest.mark.parametrize(("call", "text"), WRONG)
def test_values_that_cannot_be(guests, echo, call, text):
    guests(echo).negotiate()
    with pytest.raises(MdevError) as caught:
        call(echo)
    assert (caught.value.errno, str(caught.value)) == (errno.EINVAL, text)


def test_a_packed_ring_of_any_size(guests, echo):
    guest = guests(echo, Feature.VERSION_1 | Feature.RING_PACKED)
    guest.start(num=12)
    for _ in range(30):
        ask(guest, b"odd")
        assert answered(guest) == [b"ODD"]


UNREADY = [
    ((0, 0x1000, 1 << 40), errno.EFAULT, r"518 bytes at guest address 0x10000000000 are not in one shared region"),
    ((0, 0x1001, 0x2000), errno.EINVAL, "the driver area at 0x1001 is not aligned to 2 bytes"),
    ((8, 0x1000, 0x2000), errno.EINVAL, "the descriptor area at 0x8 is not aligned to 16 bytes"),
]


@pytest.mark.parametrize(("areas", "number", "text"), UNREADY)
def test_queues_that_cannot_start_are_not_ready(guests, echo, areas, number, text):
    guest = guests(echo)
    guest.negotiate()
    echo.set_map(guest.table())
    guest.set_up(0)
    echo.set_vq_address(0, *areas)
    with pytest.raises(MdevError, match=text) as caught:
        echo.set_vq_ready(0, True)
    assert caught.value.errno == number
    assert not echo.get_vq_ready(0)


def test_a_packed_state_that_cannot_be(guests, echo):
    guest = guests(echo, Feature.VERSION_1 | Feature.RING_PACKED)
    guest.negotiate()
    echo.set_map(guest.table())
    guest.set_up(0)
    echo.set_vq_state(0, 64)
    with pytest.raises(MdevError, match="echo queue 0 of 64 descriptors cannot go on at 64/64"):
        echo.set_vq_ready(0, True)
    assert not echo.get_vq_ready(0)


# -- features and status -----------------------------------------------------------------------------------------------------------


def test_features_that_are_not_offered(echo):
    echo.set_status(3)
    with pytest.raises(MdevError) as caught:
        echo.set_features(1 << 40 | 1 << 32)
    assert stopped_by(caught) == (errno.EINVAL, "echo: features 0x10000000000 are not offered")


def test_features_the_vendor_refuses_do_not_stick(echo):
    echo.set_status(3)
    with pytest.raises(MdevError) as caught:
        echo.set_features(ODD)
    assert stopped_by(caught) == (errno.EINVAL, "echo: bit 4 needs bit 3")
    echo.set_status(11)
    assert echo.get_status() == 3
    with pytest.raises(MdevError, match="echo: the device refuses the features, and so status 0xf"):
        echo.set_status(15)
    assert echo.get_status() == 3
    echo.set_features(ODD | 1 << 3)
    echo.set_status(11)
    assert echo.get_status() == 11
    assert echo.accepted == ODD | 1 << 3


def test_features_cannot_change_under_a_queue(guests, echo):
    guest = guests(echo)
    echo.set_status(3)
    echo.set_map(guest.table())
    guest.set_up(0)
    echo.set_vq_ready(0, True)
    with pytest.raises(MdevError, match="echo: features cannot change while a queue is ready") as caught:
        echo.set_features(0)
    assert caught.value.errno == errno.EBUSY


def test_a_reset_makes_it_new(guest, echo):
    generation = echo.get_generation()
    echo.set_vq_ready(1, False)
    echo.set_vq_state(1, 9)
    echo.set_status(0)
    assert (echo.get_status(), echo.accepted, echo.get_generation()) == (0, 0, generation + 1)
    assert [echo.get_vq_ready(index) for index in range(2)] == [False, False]
    assert [echo.get_vq_state(index) for index in range(2)] == [0, 0]
    assert echo.log[-1] == "reset"
    echo.update_config(size=3)
    echo.kick_vq(0)
    assert not guest.signalled(guest.config_call, 0)
    ask(guest, b"nobody")
    assert not guest.wait(lambda: guest.rings[0].completed, 0.05)


def test_the_beginning_of_a_packed_ring(guests, echo):
    guests(echo, Feature.RING_PACKED).negotiate()
    assert echo.get_vq_state(0) == 0x80008000


def test_hooks_in_a_drivers_order(guest, echo):
    assert echo.log == ["reset", "driver_ok"]
    assert (echo.get_device_id(), echo.get_vendor_id(), echo.get_vq_align()) == (42, 7, 4096)


# -- configuration and interrupts --------------------------------------------------------------------------------------------------


def test_configuration(guest, echo):
    generation = echo.get_generation()
    echo.set_config(0, b"\1\2\3\4")
    assert echo.log[-1] == (0, b"\1\2\3\4")
    assert not guest.signalled(guest.config_call, 0), "a driver is not told of its own changes"
    echo.update_config(level=5, size=6)
    assert echo.get_config(0, 8) == b"\5\0\0\0\6\0\0\0"
    assert guest.signalled(guest.config_call, PATIENCE)
    assert echo.get_generation() == generation + 2
    echo.update_config(level=5)
    assert not guest.signalled(guest.config_call, 0)
    with pytest.raises(MdevError, match="4 bytes at 4 of the configuration space are read-only"):
        echo.set_config(4, bytes(4))


def test_callbacks_that_are_functions(guests, echo):
    guest = guests(echo)
    guest.start()
    calls = [threading.Semaphore(0) for _ in range(2)]
    for index, semaphore in enumerate(calls):
        echo.set_vq_cb(index, Callback(function=semaphore.release))
    ask(guest, b"call me")
    assert calls[0].acquire(timeout=PATIENCE)
    echo.set_vq_cb(0, None)
    answered(guest)
    echo.set_vq_cb(0, Callback(function=lambda: 1 // 0))
    ask(guest, b"call me")
    answered(guest)
    echo.set_vq_cb(0, Callback(function=calls[0].release))
    ask(guest, b"call me again")
    assert calls[0].acquire(timeout=PATIENCE)


def test_a_callback_set_late_is_called_once(guests, echo):
    """Whoever had none may have missed something: buffers come back before the first SET_VRING_CALL of QEMU."""
    guest = guests(echo)
    guest.start()
    echo.set_vq_cb(0, None)
    ask(guest, b"unheard")
    answered(guest)
    late = guest.eventfd()
    echo.set_vq_cb(0, Callback(trigger=late))
    assert guest.signalled(late, PATIENCE)


def test_a_full_eventfd_stops_nobody(guests, echo):
    guest = guests(echo)
    guest.start()
    full = os.eventfd(2**64 - 2 & 0xFFFFFFFF, os.EFD_CLOEXEC)
    os.eventfd_write(full, 2**64 - 2 - (2**64 - 2 & 0xFFFFFFFF))
    echo.set_vq_cb(0, Callback(trigger=full))
    echo.set_config_cb(Callback(trigger=full))
    for _ in range(3):
        ask(guest, b"x")
        assert answered(guest) == [b"X"]
    echo.update_config(size=1)
    echo.set_status(0)
    os.close(full)


def test_live_changes_lose_nothing(guests, echo, features):
    guest = guests(echo, features | Feature.VERSION_1)
    guest.start()
    changes = [
        lambda: echo.set_map(guest.table()),
        lambda: guest.set_kick(0, guest.eventfd()),
        lambda: echo.set_vq_cb(0, Callback(trigger=guest.eventfd())),
        lambda: echo.set_log(None),
    ]
    for number in range(100):
        text = b"%d" % number
        ask(guest, text)
        changes[number % len(changes)]()
        assert answered(guest) == [text]


def test_closing_ends_everything(no_leaks, guests, engine):
    device = Echo(engine)
    guest = Guest(device, int(Feature.VERSION_1))
    guest.start()
    device.set_vq_cb(0, Callback(function=lambda: None))
    ask(guest, b"last words")
    answered(guest)
    guest.close()
    device.close()
    device.close()
