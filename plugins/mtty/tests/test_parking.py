"""A card goes on in another process: ports, byte counts and the interrupt pin."""

import errno
import socket

import pytest
from mdevkit.errors import MdevError
from mdevkit_mtty.model import MttyDevice, SampleDevice
from mdevkit_vfio.transport import can_be_parked

RBR, IER, FCR, LCR, MCR, LSR = 0, 1, 2, 3, 4, 5


def write(device, port, offset, *values):
    for value in values:
        device.write(port, offset, bytes((value,)))


def read(device, port, offset):
    return device.read(port, offset, 1)[0]


@pytest.mark.parametrize("kind", [MttyDevice, SampleDevice])
def test_bytes_in_the_fifos_go_on(kind):
    card, other = kind(2), kind(2)
    assert can_be_parked(card)
    for port in (0, 1):
        write(card, port, FCR, 0x81)
        write(card, port, RBR, *b"port%d" % port)
    assert read(card, 1, RBR) == ord("p")
    other.restore(card.checkpoint())
    assert bytes(read(other, 0, RBR) for _ in range(5)) == b"port0"
    assert bytes(read(other, 1, RBR) for _ in range(4)) == b"ort1"
    assert (other.counters(0).tx, other.counters(1).rx) == (5, card.counters(1).rx + (4 if kind is SampleDevice else 0))


def test_the_pin_goes_on():
    card, other = MttyDevice(1), MttyDevice(1)
    write(card, 0, FCR, 0x81)
    write(card, 0, IER, 1)
    write(card, 0, RBR, ord("x"))
    assert card.interrupts.intx.level
    other.restore(card.checkpoint())
    assert other.interrupts.intx.level
    assert read(other, 0, RBR) == ord("x")
    assert not other.interrupts.intx.level


def test_a_successor_fetches_what_came_meanwhile(tmp_path):

    card, other = MttyDevice(1), MttyDevice(1)
    other.set_far_end(0, f"unix:{tmp_path}/tty")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{tmp_path}/tty")
        peer.send(b"typed")
        write(card, 0, FCR, 0x81)
        write(card, 0, MCR, 0x0B)
        other.restore(card.checkpoint())
        received = b""
        while len(received) < 5:
            if read(other, 0, LSR) & 1:
                received += bytes((read(other, 0, RBR),))
        assert received == b"typed"
    other.close()


@pytest.mark.parametrize("other", [MttyDevice(2), SampleDevice(1)], ids=["more ports", "another kind"])
def test_the_memory_of_another_card_is_refused(other):
    card = MttyDevice(1)
    with pytest.raises(MdevError, match="bytes are not the memory of this card") as caught:
        card.device_restore(other.device_checkpoint())
    assert caught.value.errno == errno.EINVAL
