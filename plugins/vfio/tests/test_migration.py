"""Migration v2: every arc for every set of flags against tables typed from the kernel's documentation, and the streams."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_vfio.migration import Migration, next_state
from mdevkit_vfio.ops import MigrationOps
from mdevkit_vfio.uapi import MigrationFlag, MigrationState

S, R, PC, PCP, SC, RE, RP, ERR = (
    MigrationState.STOP,
    MigrationState.RUNNING,
    MigrationState.PRE_COPY,
    MigrationState.PRE_COPY_P2P,
    MigrationState.STOP_COPY,
    MigrationState.RESUMING,
    MigrationState.RUNNING_P2P,
    MigrationState.ERROR,
)
STOP_COPY, P2P, PRE_COPY = MigrationFlag.STOP_COPY, MigrationFlag.P2P, MigrationFlag.PRE_COPY
EVERYTHING = STOP_COPY | P2P | PRE_COPY
FLAGS = [STOP_COPY, STOP_COPY | P2P, STOP_COPY | PRE_COPY, EVERYTHING]

#: The first step from the row's state towards the column's, for a device with all flags; "-" is refused.
FULL_TABLE = """
     S   R   PC  PCP SC  RE  RP
S    S   RP  RP  RP  SC  RE  RP
R    RP  R   PC  RP  RP  RP  RP
PC   R   R   PC  PCP PCP R   R
PCP  RP  RP  PC  PCP SC  RP  RP
SC   S   S   -   -   SC  S   S
RE   S   S   S   S   S   RE  S
RP   S   R   R   PCP S   S   RP
"""
#: Without P2P and PRE_COPY three quarters of it are gone, and what is left takes one step where P2P takes two.
SMALL_TABLE = """
     S   R   SC  RE
S    S   R   SC  RE
R    S   R   S   S
SC   S   S   SC  S
RE   S   S   S   RE
"""
P2P_TABLE = """
     S   R   SC  RE  RP
S    S   RP  SC  RE  RP
R    RP  R   RP  RP  RP
SC   S   S   SC  S   S
RE   S   S   S   RE  S
RP   S   R   S   S   RP
"""
PRE_COPY_TABLE = """
     S   R   PC  SC  RE
S    S   R   R   SC  RE
R    S   R   PC  S   S
PC   R   R   PC  SC  R
SC   S   S   -   SC  S
RE   S   S   S   S   RE
"""
TABLES = dict(zip(FLAGS, [SMALL_TABLE, P2P_TABLE, PRE_COPY_TABLE, FULL_TABLE], strict=True))
NAMES = {"S": S, "R": R, "PC": PC, "PCP": PCP, "SC": SC, "RE": RE, "RP": RP}


def parse(table: str) -> dict[tuple[MigrationState, MigrationState], MigrationState | None]:
    columns, *rows = [line.split() for line in table.strip().splitlines()]
    return {(NAMES[row[0]], NAMES[column]): NAMES.get(cell) for row in rows for column, cell in zip(columns, row[1:], strict=True)}


@pytest.mark.parametrize("flags", FLAGS)
def test_every_first_step(flags: MigrationFlag) -> None:
    table = parse(TABLES[flags])
    for now, wanted in itertools.product(MigrationState, MigrationState):
        expected = table.get((now, wanted))
        if expected is not None:
            assert next_state(now, wanted, flags) is expected, (now, wanted)
            continue
        with pytest.raises(MdevError, match=f"migration cannot go from {now.name} to {wanted.name}$") as caught:
            next_state(now, wanted, flags)
        assert caught.value.errno == errno.EINVAL


class Device:
    """A device of one string of bytes, with a diary."""

    HEADER = b"magic!"

    def __init__(self, flags: MigrationFlag = EVERYTHING, state: bytes = b"0123456789") -> None:
        self.state = state
        self.diary: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.migration = Migration(
            flags,
            save=self.save,
            load=self.load,
            header=lambda: self.HEADER,
            check_header=self.check_header,
            stop=lambda: self.note("stop"),
            resume=lambda: self.note("resume"),
            quiesce=lambda: self.note("quiesce"),
            unquiesce=lambda: self.note("unquiesce"),
        )

    def note(self, event: str) -> None:
        self.diary.append(event)
        if event in self.failing:
            raise self.failing[event]

    def save(self) -> bytes:
        if "save" in self.failing:
            self.note("save")
        return self.HEADER + self.state

    def load(self, data: bytes) -> None:
        self.note("load")
        self.state = data[len(self.HEADER) :]

    def check_header(self, data: bytes) -> None:
        if data != self.HEADER:
            raise OSError(errno.EFAULT, "not this device's magic")

    def go(self, *states: MigrationState) -> None:
        for state in states:
            self.migration.set_state(state)

    def read(self, chunk: int = 4) -> bytes:
        return b"".join(iter(lambda: self.migration.read(chunk), b""))


def refusal(call: Callable[..., object], *arguments: object) -> tuple[int | None, str]:
    with pytest.raises(MdevError) as caught:
        call(*arguments)
    return caught.value.errno, str(caught.value)


def reach(flags: MigrationFlag, state: MigrationState) -> Device:
    """A device in `state`, with a stream complete where one is expected."""
    device = Device(flags)
    device.go(*([PC] if state is PCP else []), state)
    if state is RE:
        device.migration.write(device.save())
    device.diary.clear()
    return device


def test_it_is_the_ops_of_the_class() -> None:
    ops: MigrationOps = Device().migration
    assert (ops.flags, ops.state, ops.data_size()) == (EVERYTHING, R, 16)


@pytest.mark.parametrize("flags", FLAGS)
def test_every_walk_ends_where_the_table_leads(flags: MigrationFlag) -> None:
    table = parse(TABLES[flags])
    known = {now for now, _ in table}
    for start, wanted in itertools.product(known, MigrationState):
        device = reach(flags, start)
        now: MigrationState | None = start
        while now is not None and now is not wanted:
            end, now = now, table.get((now, wanted))
        if now is wanted:
            device.go(wanted)
            assert device.migration.state is wanted
        else:
            assert refusal(device.go, wanted)[0] == errno.EINVAL
            assert device.migration.state is end, "the state reached so far stays"


def test_no_arc_does_nothing() -> None:
    for state in (S, R, PC, PCP, SC, RE, RP):
        device = reach(EVERYTHING, state)
        device.go(state)
        assert device.diary == []


@pytest.mark.parametrize(
    ("flags", "walk", "told"),
    [
        (STOP_COPY, [S, R], ["stop", "resume"]),
        (STOP_COPY, [SC, R], ["stop", "resume"]),
        (STOP_COPY | P2P, [S, R], ["quiesce", "stop", "resume", "unquiesce"]),
        (STOP_COPY | P2P, [RP, R], ["quiesce", "unquiesce"]),
        (STOP_COPY | PRE_COPY, [PC, SC, S], ["stop"]),
        (EVERYTHING, [PC, R], []),
        (EVERYTHING, [PC, PCP, PC], ["quiesce", "unquiesce"]),
        (EVERYTHING, [PC, SC, S, RP], ["quiesce", "stop", "resume"]),
    ],
)
def test_the_device_is_told_when_to_stand_still(flags: MigrationFlag, walk: list[MigrationState], told: list[str]) -> None:
    device = Device(flags)
    device.go(*walk)
    assert device.diary == told


def test_without_hooks_nothing_is_called() -> None:
    migration = Migration(save=lambda: b"abc", load=lambda data: None)
    for state in (SC, S, R):
        migration.set_state(state)
    assert migration.data_size() == 3


# -- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_stop_copy_moves_the_state(chunk: int) -> None:
    source, target = Device(state=b"important!"), Device()
    source.go(SC)
    target.go(RE)
    while data := source.migration.read(chunk):
        target.migration.write(data)
    target.go(R)
    assert target.state == b"important!"
    assert source.migration.read(1) == b""


def test_pre_copy_offers_the_header_and_stop_copy_goes_on_behind_it() -> None:
    device = Device(state=b"early")
    device.go(PC)
    assert device.migration.precopy_info() == (6, 0)
    assert device.migration.read(4) == b"magi"
    assert device.migration.precopy_info() == (2, 0)
    device.go(PCP)
    assert device.migration.read(10) == b"c!"
    assert device.migration.read(10) == b""
    device.state = b"later"
    device.go(SC)
    assert device.migration.read(100) == b"later"


def test_pre_copy_that_is_given_up_starts_anew() -> None:
    device = Device()
    device.go(PC)
    device.migration.read(4)
    device.go(R)
    assert refusal(lambda: device.migration.read(1)) == (errno.ENODEV, "the outgoing migration stream is closed")
    device.go(PC)
    assert device.migration.read(6) == b"magic!"


def test_a_walk_across_pre_copy_reads_nothing_twice() -> None:
    device = Device(STOP_COPY | PRE_COPY)
    device.go(PC)
    head = device.migration.read(3)
    device.go(SC)
    assert head + device.read() == device.save()


def test_streams_exist_only_where_they_should() -> None:
    device = Device()
    assert refusal(lambda: device.migration.read(1)) == (errno.EINVAL, "there is no outgoing migration stream in this state")
    assert refusal(lambda: device.migration.write(b"x")) == (errno.EINVAL, "there is no incoming migration stream in this state")
    assert refusal(device.migration.precopy_info) == (errno.EINVAL, "no pre-copy in migration state RUNNING")
    device.go(SC)
    assert refusal(lambda: device.migration.read(-1)) == (errno.EINVAL, "cannot read -1 bytes of migration data")
    assert refusal(device.migration.precopy_info)[0] == errno.EINVAL
    device.go(S)
    assert refusal(lambda: device.migration.read(1))[0] == errno.ENODEV
    device.go(RE)
    device.migration.write(device.save())
    device.go(S)
    assert refusal(lambda: device.migration.write(b"x")) == (errno.ENODEV, "the incoming migration stream is closed")


@pytest.mark.parametrize("length", [0, 5, 6, 15])
def test_a_stream_cut_short_is_refused(length: int) -> None:
    device = Device()
    device.go(RE)
    device.migration.write(device.save()[:length])
    assert refusal(lambda: device.go(R)) == (errno.EINVAL, f"migration data ends after {length} of 16 bytes")
    assert device.migration.state is RE
    assert "load" not in device.diary
    device.migration.write(device.save()[length:])
    device.go(R)


def test_too_much_is_refused_and_the_rest_kept() -> None:
    device = Device()
    device.go(RE)
    data = device.save()
    assert refusal(lambda: device.migration.write(data + b"x")) == (
        errno.ENOMEM,
        "more migration data than the 16 bytes this device takes",
    )
    device.migration.write(data)
    assert refusal(lambda: device.migration.write(b"x"))[0] == errno.ENOMEM
    device.go(S)


def test_a_wrong_header_is_refused_as_soon_as_it_is_there() -> None:
    device = Device()
    device.go(RE)
    device.migration.write(b"magi")
    with pytest.raises(OSError, match="not this device's magic") as caught:
        device.migration.write(b"k!rest")
    assert caught.value.errno == errno.EFAULT
    device.migration.write(b"c!0123456789")
    device.go(S)


def test_a_device_may_name_the_size_itself() -> None:
    migration = Migration(save=lambda: b"abcdef", load=lambda data: None, size=lambda: 6)
    assert migration.data_size() == 6
    migration.set_state(RE)
    assert refusal(lambda: migration.write(b"abcdefg"))[0] == errno.ENOMEM


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_load_that_refuses_leaves_the_device_resuming() -> None:
    device = reach(EVERYTHING, RE)
    device.failing["load"] = OSError(errno.EINVAL, "divisor out of range")
    with pytest.raises(OSError, match="divisor out of range"):
        device.go(R)
    assert device.migration.state is RE
    device.failing.clear()
    device.go(R)


def test_a_save_that_fails_lets_the_device_go_on() -> None:
    device = reach(STOP_COPY | PRE_COPY, PC)
    device.failing["save"] = OSError(errno.EIO, "card gone")
    with pytest.raises(OSError, match="card gone"):
        device.go(SC)
    assert device.migration.state is PC
    assert device.diary == ["stop", "save", "resume"]
    assert device.migration.read(2) == b"ma"


def test_a_walk_that_fails_stays_where_it_got() -> None:
    device = Device()
    device.failing["stop"] = OSError(errno.EBUSY, "cannot stop now")
    with pytest.raises(OSError, match="cannot stop now"):
        device.go(SC)
    assert device.migration.state is RP


@pytest.mark.parametrize("event", ["save", "stop", "load"])
def test_a_bug_ends_in_error_which_only_reset_leaves(event: str) -> None:
    device = reach(EVERYTHING, RE if event == "load" else RP)
    device.failing[event] = ZeroDivisionError("division by zero")
    number, sentence = refusal(lambda: device.go(S if event == "load" else SC))
    assert number == errno.EIO
    assert "ZeroDivisionError: division by zero" in sentence
    assert device.migration.state is ERR
    for wanted in MigrationState:
        assert refusal(device.go, wanted)[0] == errno.EINVAL
    device.failing.clear()
    device.migration.reset()
    assert device.migration.state is R
    device.go(S, R)


def test_a_header_that_changes_is_a_bug() -> None:
    device = reach(EVERYTHING, PC)
    device.HEADER = b"other!"
    number, sentence = refusal(lambda: device.go(SC))
    assert number == errno.EIO
    assert "does not begin with the header that was read before" in sentence
    assert device.migration.state is ERR


@pytest.mark.parametrize(
    ("state", "told"),
    [(R, []), (PC, []), (PCP, ["unquiesce"]), (RP, ["unquiesce"]), *((state, ["resume", "unquiesce"]) for state in (S, SC, RE))],
)
def test_reset_leads_to_running_from_everywhere(state: MigrationState, told: list[str]) -> None:
    device = reach(EVERYTHING, state)
    device.migration.reset()
    assert device.migration.state is R
    assert device.diary == told
    for call in (lambda: device.migration.read(1), lambda: device.migration.write(b"x")):
        assert refusal(call)[0] in (errno.EINVAL, errno.ENODEV)


def test_the_lock_is_held_around_the_vendor() -> None:
    lock = threading.Lock()
    held: list[bool] = []

    def save() -> bytes:
        held.append(lock.locked())
        return b"abc"

    migration = Migration(save=save, load=lambda data: held.append(lock.locked()), lock=lock, size=lambda: 3)
    migration.set_state(SC)
    migration.set_state(RE)
    migration.write(b"abc")
    migration.set_state(S)
    assert held == [True, True]
    assert not lock.locked()


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="migration without STOP_COPY"):
        Migration(PRE_COPY, save=bytes, load=lambda data: None)
    with pytest.raises(ValueError, match="PRE_COPY needs a header"):
        Migration(STOP_COPY | PRE_COPY, save=bytes, load=lambda data: None)


@settings(deadline=None)
@given(
    st.sampled_from(FLAGS),
    st.lists(
        st.one_of(
            st.sampled_from(list(MigrationState)),
            st.integers(0, 20),
            st.binary(max_size=20),
            st.sampled_from([b"magic!0123456789", b"magic!", "reset"]),
        ),
        max_size=30,
    ),
)
def test_any_sequence_of_requests_is_answered(flags: MigrationFlag, requests: list[object]) -> None:
    device = Device(flags)
    migration = device.migration
    errors: set[int | None] = set()
    for request in requests:
        before = migration.state
        try:
            match request:
                case MigrationState():
                    migration.set_state(request)
                    assert migration.state is request
                case int():
                    assert len(migration.read(request)) <= request
                    assert before in (PC, PCP, SC)
                case bytes():
                    migration.write(request)
                    assert before is RE
                case _:
                    migration.reset()
                    assert migration.state is R
        except OSError as error:
            errors.add(error.errno)
        assert migration.state is not ERR
        assert len(device.state) == 10
    assert errors <= {errno.EINVAL, errno.ENODEV, errno.ENOMEM, errno.EFAULT}
