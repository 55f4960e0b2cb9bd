"""Devices that break one rule of the virtio class each. `fails`: the tests that must notice, and what they must say."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Any

from mdevkit import MdevError
from mdevkit_testkit import VirtioSuite
from mdevkit_virtio.bus import ClassId
from mdevkit_virtio.memory import MemoryTable
from mdevkit_virtio.ops import Status
from simple import fails
from simple_virtio import Echo, EchoParent, exchange


class Suite(VirtioSuite):
    """The virtio suite on a parent whose devices are of class `device`."""

    device: Any = Echo
    exchange = exchange

    @classmethod
    def factory(cls) -> EchoParent:
        # pytest calls it on the class: see `Suite.parents`.
        parent = EchoParent()
        parent.device = cls.device
        return parent


# -- what a device is ------------------------------------------------------------------------------------------------------


@fails(test_class_and_ops_are_set_once="the device API is virtio_mdev, the class that of vhost_mdev")
class TestOtherClass(VirtioSuite):
    class factory(EchoParent):
        class_id = ClassId.VHOST


@fails(test_device_can_do_what_is_expected="the device has config, kick, log, packed, traffic, writable; expected is log")
class TestLacksExpected(Suite):
    expected = ("log",)


@fails(test_device_says_what_it_is="device id 0")
class TestNoDevice(Suite):
    class device(Echo):
        device_id = 0


@fails(test_queues_can_be_counted="queue 2 does not exist, a later one does")
class TestHoleInQueues(Suite):
    class device(Echo):
        def get_vq_num_max(self, index: int) -> int:
            return 64 if index == 5 else super().get_vq_num_max(index)


@fails(test_features_stay_the_same="assert ")
class TestFeaturesShrink(Suite):
    class device(Echo):
        def get_features(self) -> int:
            return self.features if not self.negotiated else self.features & ~(1 << 27)


@fails(test_new_device_is_reset="a device that is new has status 0x1")
class TestBornAcknowledged(Suite):
    class device(Echo):
        def __init__(self) -> None:
            super().__init__()
            self.set_status(1)


@fails(test_drivers_order_is_taken="assert ")
class TestForgetsFailed(Suite):
    class device(Echo):
        def get_status(self) -> int:
            return super().get_status() & ~Status.FAILED


@fails(
    test_wrong_status_is_refused="status 0x1 after 0x3 was not refused",
)
class TestClearsBits(Suite):
    class device(Echo):
        def set_status(self, status: int) -> None:
            if status != 1 or not self.get_status():
                super().set_status(status)


@fails(test_features_that_are_not_offered_are_refused="features 0x.*, which are not offered, was not refused")
class TestTakesAnyFeature(Suite):
    class device(Echo):
        def set_features(self, features: int) -> None:
            super().set_features(features & self.features)


@fails(test_features_are_final="setting features with status 0xb was not refused")
class TestFeaturesAreNotFinal(Suite):
    class device(Echo):
        def set_features(self, features: int) -> None:
            if not self.negotiated:
                super().set_features(features)


@fails(test_reset_always_works="a device that is reset with queues that run has queue 0 ready")
class TestQueuesOutliveReset(Suite):
    class device(Echo):
        _was = False

        def set_vq_ready(self, index: int, ready: bool) -> None:
            super().set_vq_ready(index, ready)
            self._was = ready

        def get_vq_ready(self, index: int) -> bool:
            return super().get_vq_ready(index) or (self._was and index == 0)


_shared_status = [0]


@fails(test_devices_share_no_state="a device that is untouched has status 0xf")
class TestSharedStatus(Suite):
    class device(Echo):
        def set_status(self, status: int) -> None:
            super().set_status(status)
            _shared_status[0] = self._status.value

        def get_status(self) -> int:
            return _shared_status[0]


@fails(test_drivers_leave_nothing="left behind by 10 drivers: anon_inode:.eventfd")
class TestLeaksOnReset(Suite):
    class device(Echo):
        def device_reset(self) -> None:
            os.eventfd(0)


@fails(test_live_device_can_be_removed="left behind by a device that was removed: .*thread 'echo queues'")
class TestThreadOutlivesDevice(VirtioSuite):
    class factory(EchoParent):
        def take_down(self, mdev: Any) -> None:
            pass


# -- configuration ---------------------------------------------------------------------------------------------------------


@fails(test_configuration_reads_the_same_in_every_width="4 bytes at 0 read 01000000")
class TestOtherInWords(Suite):
    class device(Echo):
        def get_config(self, offset: int, length: int) -> bytes:
            return b"\1\0\0\0" if length == 4 else super().get_config(offset, length)


@fails(test_ranges_outside_are_refused="a read of 2 bytes at 11 of 12 was not refused")
class TestReadsBeyond(Suite):
    class device(Echo):
        def get_config(self, offset: int, length: int) -> bytes:
            super().get_config(offset, 1)
            return bytes(length)


@fails(test_bytes_are_written_or_refused="a write at 4 was refused, and made")
class TestRefusesAndWrites(Suite):
    class device(Echo):
        def set_config(self, offset: int, data: bytes) -> None:
            try:
                super().set_config(offset, data)
            except MdevError as error:
                if error.errno == errno.EACCES:
                    self.config._bytes[offset : offset + len(data)] = data
                raise


@fails(test_generation_counts_changes="after a change: True")
class TestOneGeneration(Suite):
    class device(Echo):
        def get_generation(self) -> int:
            return 0


@fails(test_generation_is_a_number_of_32_bits="generation 4294967296")
class TestWideGeneration(Suite):
    class device(Echo):
        def get_generation(self) -> int:
            return 1 << 32


# -- queues ----------------------------------------------------------------------------------------------------------------


@fails(test_queues_beyond_the_last_are_refused="kick_vq of queue 2 was not refused")
class TestKicksAnything(Suite):
    class device(Echo):
        def kick_vq(self, index: int) -> None:
            if index < 2:
                super().kick_vq(index)


@fails(test_sizes_that_cannot_be_are_refused="a ring of 3 descriptors was not refused")
class TestOddSizes(Suite):
    class device(Echo):
        def set_vq_num(self, index: int, num: int) -> None:
            super().set_vq_num(index, 2 if num == 3 else num)


@fails(test_queue_becomes_ready_and_stops="queue 0, set to ready True, says False")
class TestReadyToggles(Suite):
    class device(Echo):
        def set_vq_ready(self, index: int, ready: bool) -> None:
            super().set_vq_ready(index, ready and not self.get_vq_ready(index))


@fails(test_rings_outside_memory_are_refused="was not refused")
class TestReadyWithoutMemory(Suite):
    class device(Echo):
        def set_vq_ready(self, index: int, ready: bool) -> None:
            try:
                super().set_vq_ready(index, ready)
            except MdevError:
                self._queues[index].ready = ready


@fails(test_ready_queue_cannot_be_changed="set_vq_state of a ready queue was not refused")
class TestStateOfLiveQueue(Suite):
    class device(Echo):
        def set_vq_state(self, index: int, state: int) -> None:
            if not self.get_vq_ready(index):
                super().set_vq_state(index, state)


@fails(test_state_is_what_was_set="the state of queue 0 .split. was set to 0x3 and reads 0x0")
class TestForgetsState(Suite):
    class device(Echo):
        def set_vq_state(self, index: int, state: int) -> None:
            pass


@fails(test_kicks_of_idle_queues_are_ignored="assert ")
class TestKickBreaks(Suite):
    class device(Echo):
        def kick_vq(self, index: int) -> None:
            super().kick_vq(index)
            self.queue_broke(index, MdevError(errno.EIO, "kicked"))


@fails(test_callbacks_can_change_at_any_time="AttributeError")
class TestNoCallbackTaken(Suite):
    class device(Echo):
        def set_vq_cb(self, index: int, callback: Any) -> None:
            super().set_vq_cb(index, callback)
            os.set_blocking(callback.trigger, False) if callback.trigger >= 0 else None


@fails(test_memory_can_change_at_any_time="a queue stopped when the memory changed")
class TestMemoryStops(Suite):
    class device(Echo):
        def set_map(self, table: MemoryTable) -> None:
            for index in range(2):
                self.set_vq_ready(index, False)
            super().set_map(table)


@fails(test_ring_without_memory_breaks="the rings are gone, and the status is 0xf")
class TestNeverBroken(Suite):
    class device(Echo):
        def queue_broke(self, index: int, error: MdevError) -> None:
            pass


@fails(test_kick_descriptor_is_taken_or_not="set_vq_kick returned None")
class TestSaysNothing(Suite):
    class device(Echo):
        def set_vq_kick(self, index: int, fd: int) -> Any:
            super().set_vq_kick(index, fd)


@fails(test_packed_ring_may_have_any_size="size must be a power of 2")
class TestPackedPowersOnly(Suite):
    class device(Echo):
        def set_vq_num(self, index: int, num: int) -> None:
            if num & (num - 1):
                raise MdevError(errno.EINVAL, "the size must be a power of 2")
            super().set_vq_num(index, num)


@fails(test_errors_leave_the_device_usable="a call with .* raised OverflowError")
class TestBugInState(Suite):
    class device(Echo):
        def set_vq_state(self, index: int, state: int) -> None:
            state.to_bytes(4, "little")
            super().set_vq_state(index, state)


# -- traffic ---------------------------------------------------------------------------------------------------------------


@fails(
    test_buffers_are_used_in_every_format="wrong answers",
    test_memory_moves_under_a_live_device="wrong answers",
)
class TestWrongAnswers(Suite):
    class device(Echo):
        def on_buffers(self, index: int, queue: Any) -> None:
            for buffer in queue.take():
                queue.complete((buffer, 4))


@fails(test_kicks_by_call_are_enough="0 of 10 questions were answered")
class TestIgnoresCalls(Suite):
    class device(Echo):
        def kick_vq(self, index: int) -> None:
            self._slot(index)


class Early(Echo):
    """Does not wait for the driver."""

    @property
    def running(self) -> bool:
        return True


@fails(test_nothing_is_touched_before_driver_ok="the device writes memory before DRIVER_OK")
class TestEarly(Suite):
    device = Early


class Late(Echo):
    """Says that a queue has stopped, and uses it."""

    def set_vq_ready(self, index: int, ready: bool) -> None:
        self._queues[index].claimed = ready
        if ready:
            super().set_vq_ready(index, ready)

    def get_vq_ready(self, index: int) -> bool:
        return super().get_vq_ready(index) and self._queues[index].claimed


@fails(test_nothing_is_touched_after_a_stop="the device writes memory after its queues were stopped")
class TestLate(Suite):
    device = Late


@fails(test_stopped_queue_goes_on_where_it_was="0 of 10 questions were answered")
class TestStaysStopped(Suite):
    class device(Echo):
        def set_vq_ready(self, index: int, ready: bool) -> None:
            super().set_vq_ready(index, ready)
            self._stops = getattr(self, "_stops", 0) + (not ready)

        def on_buffers(self, index: int, queue: Any) -> None:
            if not getattr(self, "_stops", 0):
                super().on_buffers(index, queue)


@fails(test_memory_moves_under_a_live_device="memory was written that is not the device's any more")
class TestOldMemory(Suite):
    class device(Echo):
        _tables = 0

        def set_map(self, table: MemoryTable) -> None:
            self._tables += 1
            if self._tables > 1 and table.regions:
                self._previous = self._table
            super().set_map(table)

        def on_buffers(self, index: int, queue: Any) -> None:
            previous = getattr(self, "_previous", None)
            if previous is not None and previous.regions:
                self.engine.write(previous, None, list(previous.pieces((1 << 21) - 4096, 4)), 0, os.urandom(4))
            super().on_buffers(index, queue)


@fails(test_callbacks_are_called="no eventfd was signalled")
class TestSilent(Suite):
    class device(Echo):
        def set_vq_cb(self, index: int, callback: Any) -> None:
            super().set_vq_cb(index, None)


@fails(test_descriptors_change_under_a_live_device="0 of 10 questions were answered")
class TestFirstDescriptorOnly(Suite):
    class device(Echo):
        def set_vq_kick(self, index: int, fd: int) -> bool:
            return super().set_vq_kick(index, fd) if not self.running else True


@fails(test_everything_written_is_logged="the device has written pages .* and not logged them")
class TestLogsNothing(Suite):
    class device(Echo):
        def set_log(self, log: Any, rings: Any = ()) -> bool:
            return True


@fails(test_everything_written_is_logged="the device has written pages .* and not logged them")
class TestLogsNoRings(Suite):
    class device(Echo):
        def set_log(self, log: Any, rings: Any = ()) -> bool:
            return super().set_log(log)


@fails(test_everything_written_is_logged="the device logs after logging has ended")
class TestLogsForever(Suite):
    class device(Echo):
        def set_log(self, log: Any, rings: Any = ()) -> bool:
            return super().set_log(log, rings) if log is not None else True

        def device_reset(self) -> None:
            super().set_log(None)


@fails(test_broken_ring_needs_a_reset="the device does not notice a broken ring")
class TestNoticesNothing(Suite):
    class device(Echo):
        def queue_broke(self, index: int, error: MdevError) -> None:
            pass


@fails(test_broken_ring_needs_a_reset="nobody told the driver that the device needs a reset")
class TestBreaksInSilence(Suite):
    class device(Echo):
        def set_config_cb(self, callback: Any) -> None:
            pass


@fails(test_buffers_outside_memory_hurt_nobody="questions were answered|needs a new machine")
class TestBrokenForGood(Suite):
    class device(Echo):
        def set_status(self, status: int) -> None:
            if self.error is not None:
                raise MdevError(errno.EIO, "the device needs a new machine")
            super().set_status(status)


@fails(test_idle_costs_no_processor_time="threads of the device run although there is nothing to do")
class TestPolls(Suite):
    class device(Echo):
        def __init__(self) -> None:
            super().__init__()
            self._ends = threading.Event()
            self._poller = threading.Thread(target=self._poll)
            self._poller.start()

        def _poll(self) -> None:
            while not self._ends.is_set():
                time.sleep(0.001)

        def close(self) -> None:
            self._ends.set()
            self._poller.join()
            super().close()
