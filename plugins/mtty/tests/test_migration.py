"""Migration streams: written to the byte, taken over to the byte, and believed in nothing."""

from __future__ import annotations

import errno
import random
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_mtty.model import MttyDevice, SampleDevice, SerialDevice
from mdevkit_mtty.state import CardState
from mdevkit_vfio.uapi import MigrationFlag, MigrationState

Kind = type[MttyDevice] | type[SampleDevice]

KINDS = pytest.mark.parametrize("kind", [MttyDevice, SampleDevice])
PORTS = pytest.mark.parametrize("ports", [1, 2])

#: Where the ports of a stream begin, how long each is, and how much follows the last one.
LAYOUT = {MttyDevice: (24, 48, 4), SampleDevice: (24, 36, 0)}
MAJOR = {MttyDevice: 2, SampleDevice: 1}


def busy(client: Any, ports: int) -> None:
    """Use every register, and leave bytes in every FIFO, not at the beginning of the ring."""
    for port in range(ports):
        client.write(port, 2, 0xC1)
        client.write(port, 3, 0x83)
        client.write(port, 0, 0x0C)
        client.write(port, 1, 0x01)
        client.write(port, 3, 0x1B)
        client.write(port, 4, 0x0B)
        client.write(port, 7, 0xA5 + port)
        for value in range(5):
            client.write(port, 0, value)
        client.receive(port)
        client.write(port, 1, 0x07)
        for value in range(13 + 20 * port):
            client.write(port, 0, 0x80 + value)


def saved(device: SerialDevice) -> bytes:
    device.migration.set_state(MigrationState.STOP_COPY)
    return read_all(device)


def read_all(device: SerialDevice) -> bytes:
    stream = bytearray()
    while part := device.migration.read(7):
        stream += part
    return bytes(stream)


def load(device: SerialDevice, stream: bytes) -> None:
    device.migration.set_state(MigrationState.RESUMING)
    for start in range(0, len(stream), 11):
        device.migration.write(stream[start : start + 11])
    device.migration.set_state(MigrationState.RUNNING)


def refused(device: SerialDevice, stream: bytes) -> MdevError:
    """Offer a stream, see it refused and nothing changed, and go back to RUNNING."""
    state: CardState[Any] = device.state
    before = bytes(state.memory)
    with pytest.raises(MdevError) as caught:
        load(device, stream)
    assert state.memory == before
    device.migration.reset()
    return caught.value


def with_crc(kind: Kind, stream: bytes) -> bytes:
    """Put the checksum right, so that what is behind it is reached."""
    return stream if kind is SampleDevice else stream[:-4] + zlib.crc32(stream[:-4]).to_bytes(4, "little")


def test_what_is_offered():
    assert MttyDevice(1).migration.flags == MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY
    assert [kind(ports).migration.data_size() for kind in (SampleDevice, MttyDevice) for ports in (1, 2)] == [60, 96, 76, 124]


@KINDS
@PORTS
def test_stop_copy_is_exact(connect: Callable[..., Any], kind: Kind, ports: int):
    source, target = connect(kind(ports)), connect(kind(ports))
    busy(source, ports)
    expected = source.device.state.save()
    stream = saved(source.device)
    assert stream == expected
    load(target.device, stream)
    assert target.device.state.save() == expected
    assert saved(target.device) == stream


@KINDS
@PORTS
def test_pre_copy_is_exact(connect: Callable[..., Any], kind: Kind, ports: int):
    """The header while the device runs, and goes on changing; the rest when it has stopped."""
    source, target = connect(kind(ports)), connect(kind(ports))
    source.device.migration.set_state(MigrationState.PRE_COPY)
    early = read_all(source.device)
    assert early == struct.pack("<QIIII", 0x7E9D09898C3E2C4E, MAJOR[kind], 0, ports, 0)
    busy(source, ports)
    assert source.device.migration.read(100) == b""
    late = saved(source.device)
    assert early + late == source.device.state.save()
    load(target.device, early + late)
    assert target.device.state.save() == early + late


def test_our_stream_is_laid_out_as_documented(card: Any):
    busy(card, 2)
    stream = saved(card.device)
    # Five bytes went through every ring before, so the oldest of the next is in slot 5.
    assert stream[24:42] == bytes([0x8B, 0x8C, 2, 3, 4]) + bytes(range(0x80, 0x8B)) + bytes([5, 13])
    assert stream[58:60] == bytes([2, 0])
    # ier fcr lcr mcr lsr msr scr thri dll dlm reserved
    assert stream[24 + 36 : 24 + 48] == bytes([0x07, 0xC1, 0x1B, 0x0B, 0x00, 0xB0, 0xA5, 1, 0x0C, 0x01, 0, 0])
    assert stream[72 + 36 : 72 + 48] == bytes([0x07, 0xC1, 0x1B, 0x0B, 0x02, 0xB0, 0xA6, 0, 0x0C, 0x01, 0, 0])
    assert stream[-4:] == zlib.crc32(stream[:-4]).to_bytes(4, "little")


def test_the_guest_goes_on_where_it_was(connect: Callable[..., Any]):
    source, target = connect(MttyDevice(2)), connect(MttyDevice(2))
    busy(source, 2)
    load(target.device, saved(source.device))
    assert target.device.interrupts.intx.level
    assert target.read(0, 2) == 0xCC
    assert target.receive(0) == bytes(range(0x80, 0x8D))
    assert target.read(1, 2) == 0xC6
    assert target.receive(1) == bytes(range(0x80, 0xA0))
    assert [target.read(port, 7) for port in (0, 1)] == [0xA5, 0xA6]


HEADERS = [
    (0, b"\0", r"magic number 0x7e9d09898c3e2c00, but this device takes 0x7e9d09898c3e2c4e only"),
    (8, b"\3", r"version 3\.0, but this device takes [12]\.0 only"),
    (12, b"\1", r"version [12]\.1, but this device takes [12]\.0 only"),
    (16, b"\3", r"number of ports 3, but this device takes 2 only"),
    (20, b"\1", r"flags 1, but this device takes 0 only"),
]


@KINDS
@pytest.mark.parametrize(("offset", "value", "text"), HEADERS)
def test_a_wrong_header_is_refused_as_soon_as_it_is_there(kind: Kind, offset: int, value: bytes, text: str):
    device = kind(2)
    stream = bytearray(device.state.save())
    stream[offset : offset + len(value)] = value
    device.migration.set_state(MigrationState.RESUMING)
    device.migration.write(bytes(stream[:23]))
    with pytest.raises(MdevError, match=text) as caught:
        device.migration.write(bytes(stream[23:24]))
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize(("source", "target"), [(MttyDevice, SampleDevice), (SampleDevice, MttyDevice)])
def test_the_two_kinds_do_not_take_each_others_streams(source: Kind, target: Kind):
    error = refused(target(1), source(1).state.save())
    assert error.errno == errno.EFAULT
    assert str(error) == f"migration stream: version {MAJOR[source]}.0, but this device takes {MAJOR[target]}.0 only"


@KINDS
def test_a_stream_of_another_length_is_refused(kind: Kind):
    device = kind(2)
    stream = device.state.save()
    assert refused(device, stream[:-1]).errno == errno.EINVAL
    assert refused(device, stream + b"\0").errno == errno.ENOMEM
    with pytest.raises(MdevError, match=f"23 bytes, but this device takes {len(stream)}"):
        device.state.load(stream[:23])


def test_every_flipped_bit_of_our_stream_is_noticed(card: Any, connect: Callable[..., Any]):
    busy(card, 2)
    stream = saved(card.device)
    target = connect(MttyDevice(2)).device
    for bit in range(8 * len(stream)):
        mutated = bytearray(stream)
        mutated[bit // 8] ^= 1 << bit % 8
        refused(target, bytes(mutated))


#: Offset in a port, value, what is said; for a port with 13 bytes received, FIFOs on.
FAULTS = {
    MttyDevice: [
        (16, 16, "head of the receive FIFO"),
        (17, 17, "count of the receive FIFO"),
        (34, 16, "head of the transmit FIFO"),
        (35, 17, "count of the transmit FIFO"),
        (36, 0x10, "IER"),
        (37, 0xC3, "FCR"),
        (37, 0xC0, "FCR"),
        (39, 0x20, "MCR"),
        (40, 0x01, "LSR"),
        (43, 2, "transmitter interrupt"),
        (46, 1, "reserved field"),
        (47, 1, "reserved field"),
    ],
    SampleDevice: [
        (0, 1, "register file"),
        (2, 1, "register file"),
        (5, 1, "register file"),
        (6, 1, "register file"),
        (24, 16, "head"),
        (24, 7, "head"),
        (25, 6, "head"),
        (25, 5 + 16, "tail"),
        (26, 12, "head"),
        (26, 13 + 16, "count"),
        (27, 1, "dlab"),
        (27, 2, "dlab"),
        (3, 0x9B, "dlab"),
        (28, 2, "overrun"),
        (29, 1, "padding"),
        (33, 1, "FIFO size"),
        (33, 17, "FIFO size"),
        (34, 2, "trigger level"),
        (34, 0, "fcr"),
        (35, 1, "padding"),
    ],
}


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in FAULTS.items() for fault in faults])
@pytest.mark.parametrize("port", [0, 1])
def test_every_field_is_checked(connect: Callable[..., Any], kind: Kind, fault: tuple[int, int, str], port: int):
    offset, value, field = fault
    source = connect(kind(2))
    busy(source, 1)
    first, size, _ = LAYOUT[kind]
    stream = bytearray(saved(source.device))
    stream[first + size : first + 2 * size] = stream[first : first + size]
    load(kind(2), with_crc(kind, bytes(stream)))
    stream[first + port * size + offset] = value
    error = refused(kind(2), with_crc(kind, bytes(stream)))
    assert (error.errno, str(error)) == (errno.EINVAL, f"migration stream: port {port}: {field} out of range")


def test_a_transmitter_with_bytes_has_no_interrupt(card: Any):
    busy(card, 2)
    stream = bytearray(card.device.state.save())
    stream[72 + 43] = 1
    error = refused(MttyDevice(2), with_crc(MttyDevice, bytes(stream)))
    assert str(error) == "migration stream: port 1: transmitter interrupt out of range"


def test_one_byte_fifos_hold_one_byte(card: Any):
    """In 16450 mode a count of 2 is as wrong as one of 17 elsewhere."""
    for offset, field in ((17, "receive"), (35, "transmit")):
        stream = bytearray(card.device.state.save())
        stream[24 + offset] = 2
        error = refused(MttyDevice(2), with_crc(MttyDevice, bytes(stream)))
        assert str(error) == f"migration stream: port 0: count of the {field} FIFO out of range"


@KINDS
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), mutations=st.lists(st.tuples(st.integers(24, 127), st.integers(0, 255)), max_size=6))
def test_a_mutated_stream_is_refused_or_harmless(kind: Kind, seed: int, mutations: list[tuple[int, int]]):
    """Whatever gets past the checks is a state the device works in: it saves to the same bytes, and any access is answered."""
    device = kind(2)
    stream = bytearray(device.state.save())
    for offset, value in mutations:
        stream[offset % len(stream)] = value
    stream = bytearray(with_crc(kind, bytes(stream)))
    before = bytes(device.state.memory)
    try:
        load(device, bytes(stream))
    except MdevError:
        assert device.state.memory == before
        return
    chance = random.Random(seed)
    for _ in range(200):
        port, register = chance.randrange(2), chance.randrange(8)
        if chance.random() < 0.5:
            device.write(port, register, bytes([chance.randrange(256)]))
        else:
            device.read(port, register, 1)
    device.state.check(device.state.save())


def test_far_ends_wait_while_the_device_is_stopped(connect: Callable[..., Any]):
    """Nothing moves between stopping and saving, and nothing is lost when the migration is called off."""
    device = MttyDevice(1)
    client = connect(device)
    client.write(0, 2, 0x01)
    client.write(0, 4, 0x0B)
    device.set_far_end(0, "pty")
    with Path(device.far_end_path(0)).open("wb", buffering=0) as terminal:
        device.migration.set_state(MigrationState.STOP)
        state = device.state.save()
        terminal.write(b"while stopped")
        time.sleep(0.1)  # the time a byte that is wrongly taken needs to arrive
        assert device.state.save() == state
        device.migration.set_state(MigrationState.RUNNING)
        assert client.receive_exactly(0, 13) == b"while stopped"
