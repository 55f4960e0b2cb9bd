"""The memory of a parked device: whole at every instruction, and never believed blindly."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from mdevkit.errors import MdevError
from mdevkit_vfio.memory import sealed_memfd
from mdevkit_vfio.parking import MAX_REPLY, MAX_STATE, Park

#: Commits for ever; turn, reply and state of one commit tell the same number, and their lengths change all the time.
WRITER = """
import sys
from mdevkit_vfio.parking import Park
park = Park(int(sys.argv[1]))
number = 0
while True:
    number += 1
    park.turn, park.reply = number, b"%d" % number * (number % 50)
    park.commit(b"%d" % number * (number % 3000))
"""


@pytest.fixture
def park(no_leaks):
    park = Park.create("test")
    yield park
    park.close()


def test_a_new_park_holds_nothing(park):
    assert park.read() == (0, b"", b"")
    assert park.begun == 0


def test_the_last_commit_counts(park):
    for turn in (1, 2, 0xFFFFFFFF):
        park.turn, park.reply = turn, b"reply %d" % turn
        park.commit(b"state %d" % turn)
        assert park.read() == (turn, b"reply %d" % turn, b"state %d" % turn)
    park.begin(7)
    assert park.begun == 7
    assert park.read().turn == 0xFFFFFFFF


def test_another_process_goes_on(park):
    park.turn, park.reply = 5, b"reply"
    park.commit(b"state")
    other = Park(os.dup(park.fd))
    assert other.resume() == b"state"
    other.commit(b"later")
    assert park.read() == (5, b"reply", b"later")
    other.close()


def test_a_process_killed_at_any_instruction_leaves_a_whole_commit(park):
    """Each writer is killed at another point of its loop; what it leaves belongs together."""
    rng = random.Random(11)
    seen = set()
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(park.fd)], pass_fds=[park.fd])
        try:
            start = park.read().turn
            deadline = time.monotonic() + 10
            while park.read().turn == start and time.monotonic() < deadline:
                time.sleep(0.001)  # the writer imports
            for _ in range(40):
                time.sleep(rng.uniform(0, 0.002))
                # Stopped, it is as good as dead: no instruction of it runs while we look.
                writer.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
                turn, reply, state = park.read()
                assert reply == b"%d" % turn * (turn % 50)
                assert state == b"%d" % turn * (turn % 3000)
                seen.add(turn)
                writer.send_signal(signal.SIGCONT)
        finally:
            writer.kill()
            writer.wait()
        turn, reply, state = park.read()
        assert (reply, state) == (b"%d" % turn * (turn % 50), b"%d" % turn * (turn % 3000))
    assert len(seen) > 50


@pytest.mark.parametrize(("reply", "state"), [(MAX_REPLY + 1, 0), (0, MAX_STATE + 1)])
def test_too_much_is_refused_and_changes_nothing(park, reply, state):
    park.turn, park.reply = 1, b"reply"
    park.commit(b"state")
    park.turn, park.reply = 2, bytes(reply)
    with pytest.raises(MdevError, match=f"{state} bytes of state and {reply} of reply cannot be parked") as caught:
        park.commit(bytes(state))
    assert caught.value.errno == errno.EFBIG
    assert park.read() == (1, b"reply", b"state")


def test_the_most_there_is_room_for(park):
    park.turn, park.reply = 1, b"r" * MAX_REPLY
    park.commit(b"s" * MAX_STATE)
    park.commit(b"t" * MAX_STATE)
    assert park.read() == (1, b"r" * MAX_REPLY, b"t" * MAX_STATE)


def test_another_file_is_no_park(no_leaks):
    with pytest.raises(MdevError, match="this file is not the memory of a parked device") as caught:
        Park(sealed_memfd("small", 4096))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("damage", [b"\2", b"\xff"], ids=["no such slot", "no slot"])
def test_a_damaged_park_is_not_believed(park, damage):
    os.pwrite(park.fd, damage, 0)
    with pytest.raises(MdevError, match="the memory of a parked device is damaged") as caught:
        park.read()
    assert caught.value.errno == errno.EPROTO


def test_lengths_beyond_the_slot_are_not_believed(park):
    os.pwrite(park.fd, b"\xff" * 12, 4096)
    with pytest.raises(MdevError, match="damaged"):
        park.read()


def test_nobody_can_resize_it(park):
    with pytest.raises(PermissionError):
        os.ftruncate(park.fd, 0)
