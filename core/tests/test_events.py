from __future__ import annotations

import errno
import weakref
from collections import Counter

import pytest
from mdevkit import Action, EventLog, LaggedError, MdevError


@pytest.fixture
def log():
    return EventLog(capacity=8)


def emit(log, count):
    for number in range(count):
        log.emit(Action.CHANGE, f"s{number}")


def drain(subscription):
    """Read what is there without waiting."""
    found = []
    while subscription.position < subscription._log.last:
        found.append(subscription.get(0).seq)
    return found


def test_numbers_count_from_one_without_gaps(log):
    emit(log, 5)
    assert drain(log.subscribe(0)) == [1, 2, 3, 4, 5]
    assert log.last == 5


def test_a_subscriber_begins_behind_the_newest_or_where_it_left_off(log):
    emit(log, 3)
    new, old = log.subscribe(), log.subscribe(after=1)
    emit(log, 1)
    assert (drain(new), drain(old)) == ([4], [2, 3, 4])


@pytest.mark.parametrize("after", [-1, 4])
def test_a_position_that_never_was_is_refused(log, after, fails):
    """Waiting for it would skip everything that happens until then, untold: the reader may come from another registry."""
    emit(log, 3)
    assert fails(errno.EINVAL, log.subscribe, after) == f"there is no event {after}: the newest is 3"


def test_a_slow_subscriber_is_told_how_much_it_missed_and_goes_on(log):
    slow = log.subscribe()
    emit(log, 20)
    with pytest.raises(LaggedError, match="12 events were missed: this subscriber read too slowly") as caught:
        slow.get(0)
    assert (caught.value.missed, caught.value.errno, slow.position) == (12, errno.EOVERFLOW, 12)
    assert drain(slow) == [13, 14, 15, 16, 17, 18, 19, 20]


def test_missed_plus_seen_is_everything(log):
    reader, seen, missed = log.subscribe(), 0, 0
    for burst in (3, 8, 9, 30, 1, 17):
        emit(log, burst)
        try:
            seen += len(drain(reader))
        except LaggedError as error:
            missed += error.missed
            seen += len(drain(reader))
    assert seen + missed == log.last == 68


def test_waiting_ends_with_an_error_an_event_or_the_end(log, thread, fails, kit):
    reader = log.subscribe()
    assert fails(errno.ETIMEDOUT, reader.get, 0.01) == "no event within 0.01 s"
    with pytest.raises(TimeoutError):
        reader.get(0)
    waiting = thread(reader.get)
    log.emit(Action.ADD, "x", {"A": "1"})
    event = waiting.result(kit.PATIENCE)
    assert (event.seq, event.action, event.subject, dict(event.env)) == (1, "add", "x", {"A": "1"})
    waiting = thread(reader.get)
    log.close()
    assert waiting.result(kit.PATIENCE) is None


def test_closing_lets_readers_finish(log):
    reader = log.subscribe()
    emit(log, 3)
    log.close()
    assert [event.seq for event in reader] == [1, 2, 3]
    assert reader.get() is None


def test_every_reader_sees_every_event_once_and_in_order_under_load(thread, kit):
    """Four emitters, three readers, a ring too small for all of it: what is not seen is told to have been missed."""
    log, each = EventLog(capacity=64), 2000

    def emitter(name):
        for number in range(each):
            log.emit(Action.CHANGE, name, {"N": str(number)})

    def reader(subscription):
        seen, missed = [], 0
        while True:
            try:
                event = subscription.get()
            except LaggedError as error:
                missed += error.missed
                continue
            if event is None:
                return seen, missed
            seen.append(event)

    readers = [thread(reader, log.subscribe(0)) for _ in range(3)]
    for done in [thread(emitter, f"e{number}") for number in range(4)]:
        done.result(kit.PATIENCE)
    log.close()
    for future in readers:
        seen, missed = future.result(kit.PATIENCE)
        assert len(seen) + missed == 4 * each
        assert [event.seq for event in seen] == sorted({event.seq for event in seen})
        for name in Counter(event.subject for event in seen):
            numbers = [int(event.env["N"]) for event in seen if event.subject == name]
            assert numbers == sorted(numbers)


def test_a_subscriber_that_goes_away_leaves_nothing_behind(log):
    """The log does not know its readers: none can hold it up, and emitting costs the same for any number of them."""
    gone = weakref.ref(log.subscribe())
    emit(log, 1)
    assert gone() is None


def test_lag_is_an_mdev_error():
    assert isinstance(LaggedError(3), MdevError)
