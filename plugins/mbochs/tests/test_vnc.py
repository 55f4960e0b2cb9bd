"""The VNC server, by a client of our own: log in, pictures, changes, sizes, pixel formats, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import mmap
import random
import resource
import socket
import stat
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit import Mdev, MdevError
from mdevkit.screen import Frame
from mdevkit_mbochs.onlookers import vnc as server
from mdevkit_mbochs.onlookers.loop import Loop
from mdevkit_mbochs.onlookers.pixels import OURS, Converter, PixelFormat
from mdevkit_mbochs.onlookers.rfb import RfbError
from mdevkit_mbochs.onlookers.tiles import Tiles
from mdevkit_mbochs.onlookers.viewer import Viewer

RAW, ZRLE, DESKTOP_SIZE = 0, 16, -223
Connect = Callable[[str], Any]


@pytest.fixture
def password_file(tmp_path: Path) -> str:
    file = tmp_path / "password"
    file.write_text("secret\n")
    file.chmod(0o600)
    return str(file)


@pytest.fixture
def screen(card: Callable[..., Any], tmp_path: Path) -> Any:
    """A card with a picture of noise, 200x130, and viewers at a socket."""
    device = card("mbochs-small", vnc=f"unix:{tmp_path}/vnc")
    device.set_mode(200, 130)
    device.fill(random.Random(1).randbytes(200 * 130 * 4))
    return device


def address(device: Any) -> str:
    found: str = device.mdev.get_attribute("vnc_address")
    return found


def test_a_socket_is_private(screen: Any):
    assert stat.S_IMODE(Path(address(screen)).stat().st_mode) == 0o600


@pytest.mark.parametrize("encodings", [(), (RAW,), (ZRLE, RAW), (RAW, ZRLE), (7, 5, ZRLE)])
def test_the_picture_is_right(screen: Any, vnc: Connect, without_padding: Callable[[bytes], bytes], encodings: tuple[int, ...]):
    viewer = vnc(address(screen)).log_in()
    assert (viewer.width, viewer.height, viewer.name) == (200, 130, screen.ops.name)
    viewer.set_encodings(*encodings)
    rectangles = viewer.look()
    used = ZRLE if encodings and encodings[0] != RAW else RAW
    assert {rectangle[4] for rectangle in rectangles} == {used}
    assert viewer.colours == without_padding(screen.memory[: 200 * 130 * 4])


@pytest.mark.parametrize("version", [b"RFB 003.003\n", b"RFB 003.005\n", b"RFB 003.007\n", b"RFB 003.008\n", b"RFB 003.889\n"])
def test_old_versions(screen: Any, vnc: Connect, version: bytes):
    viewer = vnc(address(screen))
    if version in {b"RFB 003.007\n", b"RFB 003.008\n"}:
        assert viewer.greet(version) == b"\x01"
        viewer.sock.sendall(b"\x01")
        if version.endswith(b"8\n"):
            assert viewer.read(4) == bytes(4)
    else:
        assert viewer.read(12) == b"RFB 003.008\n"
        viewer.sock.sendall(version)
        assert viewer.read(4) == b"\0\0\0\x01"
    assert viewer.initialise().width == 200


def test_only_what_has_changed_is_sent(screen: Any, vnc: Connect, without_padding: Callable[[bytes], bytes]):
    viewer = vnc(address(screen)).log_in()
    viewer.set_encodings(ZRLE)
    viewer.look()
    viewer.ask(incremental=True)
    viewer.sock.settimeout(0.6)
    with pytest.raises(TimeoutError):
        viewer.sock.recv(1)  # nothing has changed: nothing may come, for longer than the longest pause between looks
    viewer.sock.settimeout(10)
    screen.fill(b"\1\2\3\4", (129 * 200 + 199) * 4)
    screen.fill(b"\1\2\3\4", (64 * 200 + 70) * 4)
    seen = {rectangle[:4] for rectangle in viewer.update()}
    while len(seen) < 2:
        seen |= {rectangle[:4] for rectangle in viewer.look(incremental=True)}
    assert seen == {(64, 64, 64, 64), (192, 128, 8, 2)}
    assert viewer.colours == without_padding(screen.memory[: 200 * 130 * 4])


def test_a_change_of_size(screen: Any, vnc: Connect, without_padding: Callable[[bytes], bytes]):
    able, unable = vnc(address(screen)).log_in(), vnc(address(screen)).log_in()
    able.set_encodings(RAW, DESKTOP_SIZE)
    for viewer in (able, unable):
        viewer.look()
        viewer.ask(incremental=True)
    screen.set_mode(300, 100, virtual=310, x=5, y=2)
    screen.fill(random.Random(2).randbytes(310 * 110 * 4))
    assert able.update() == [(0, 0, 300, 100, DESKTOP_SIZE)]
    able.look()
    rows = [screen.memory[((row + 2) * 310 + 5) * 4 :][: 300 * 4] for row in range(100)]
    assert able.colours == without_padding(b"".join(rows))
    unable.update()
    part = b"".join(unable.colours[row * 800 :][:800] for row in range(100))
    assert part == without_padding(b"".join(row[:800] for row in rows)), "the part that it has room for"


def test_a_display_that_is_off_is_black(screen: Any, vnc: Connect):
    viewer = vnc(address(screen)).log_in()
    viewer.look()
    viewer.ask(incremental=True)
    screen.dispi(4, 0)
    viewer.update()
    assert not any(viewer.colours)
    newcomer = vnc(address(screen)).log_in()
    assert (newcomer.width, newcomer.height) == (200, 130), "the shape stays while somebody looks"


def test_a_viewer_that_comes_back_at_once_is_told_the_size(screen: Any, vnc: Connect, monkeypatch: pytest.MonkeyPatch):
    """It comes sooner than the picture may be looked at again."""
    monkeypatch.setattr(server, "MOST_OFTEN", 3600)
    monkeypatch.setattr(server, "LEAST_OFTEN", 3600)
    first = vnc(address(screen)).log_in()
    first.sock.sendall(b"\xff")  # which ends it
    with pytest.raises(EOFError):
        first.read(1)
    second = vnc(address(screen)).log_in()
    assert (second.width, second.height) == (200, 130)


def test_what_was_seen_is_forgotten_when_nobody_looks(screen: Any, vnc: Connect):
    with vnc(address(screen)).log_in() as viewer:
        viewer.look()
    screen.dispi(4, 0)
    for _ in range(20):
        time.sleep(0.3)  # longer than the longest pause between looks
        with vnc(address(screen)).log_in() as viewer:
            if (viewer.width, viewer.height) == (640, 480):
                return
    pytest.fail("the shape of long ago is still known")


def test_nobody_has_set_a_mode_yet(card: Callable[..., Any], vnc: Connect, tmp_path: Path):
    viewer = vnc(address(card("mbochs-small", vnc=f"unix:{tmp_path}/vnc"))).log_in()
    assert (viewer.width, viewer.height) == (640, 480)
    viewer.look()
    assert not any(viewer.colours)


FORMATS = {
    "rgb565": PixelFormat(16, 16, 0, 1, 31, 63, 31, 11, 5, 0),
    "rgb565 big-endian": PixelFormat(16, 16, 1, 1, 31, 63, 31, 11, 5, 0),
    "bgr233": PixelFormat(8, 8, 0, 1, 7, 7, 3, 0, 3, 6),
    "big-endian": PixelFormat(32, 24, 1, 1, 255, 255, 255, 16, 8, 0),
    "rgb the other way": PixelFormat(32, 24, 0, 1, 255, 255, 255, 0, 8, 16),
    "high bytes": PixelFormat(32, 24, 0, 1, 255, 255, 255, 24, 16, 8),
    "30 bits": PixelFormat(32, 30, 0, 1, 1023, 1023, 1023, 20, 10, 0),
}


def _expected(wanted: PixelFormat, pixel: bytes) -> bytes:
    """Convert one pixel as the standard says, without tricks."""
    blue, green, red = pixel[:3]
    value = 0
    for colour, (most, shift) in zip((red, green, blue), wanted.channels, strict=True):
        value |= (colour * most + 127) // 255 << shift
    return value.to_bytes(wanted.bits // 8, "big" if wanted.big_endian else "little")


@pytest.mark.parametrize("name", FORMATS)
def test_pixel_formats(name: str):
    wanted = FORMATS[name]
    assert PixelFormat.unpack(wanted.pack()) == wanted
    pixels = random.Random(3).randbytes(4 * 500)
    converter = Converter(wanted)
    one_by_one = [_expected(wanted, pixels[at : at + 4]) for at in range(0, len(pixels), 4)]
    assert converter.convert(pixels) == b"".join(one_by_one)
    compact = {"big-endian": slice(1, 4), "rgb the other way": slice(0, 3), "high bytes": slice(1, 4)}.get(name, slice(None))
    assert converter.compact(pixels) == b"".join(pixel[compact] for pixel in one_by_one)


def test_our_own_format_is_sent_as_it_is():
    pixels = random.Random(3).randbytes(400)
    assert Converter(OURS).convert(pixels) == pixels
    assert Converter(OURS).compact(b"\1\2\3\4\5\6\7\x08") == b"\1\2\3\5\6\7"


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (PixelFormat(true_colour=0, bits=8), "pixels of 8 bits with a colour map are not served"),
        (PixelFormat(bits=24), "pixels of 24 bits are not served"),
        (PixelFormat(bits=16), "a colour of up to 255, 16 bits up, does not fit pixels of 16 bits"),
        (PixelFormat(red_max=100), "a colour of up to 100, 16 bits up, does not fit"),
    ],
)
def test_pixel_formats_that_cannot_be(wanted: PixelFormat, text: str):
    with pytest.raises(RfbError, match=text):
        PixelFormat.unpack(wanted.pack())


def test_a_viewer_gets_the_format_it_asked_for(screen: Any, vnc: Connect):
    viewer = vnc(address(screen)).log_in()
    viewer.sock.sendall(struct.pack(">B3x16s", 0, FORMATS["rgb565"].pack()))
    viewer.pixel_size = 2
    viewer.sock.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, 10, 10))
    viewer.update()
    rows = [screen.memory[row * 800 :][: 64 * 4] for row in range(64)]
    pixels = [row[at : at + 4] for row in rows for at in range(0, 256, 4)]
    assert viewer.raw == b"".join(_expected(FORMATS["rgb565"], pixel) for pixel in pixels)


# -- who may look -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tcp:0", "tcp:127.0.0.1:0", "tcp:[::1]:0", "unix"])
def test_a_password(card: Callable[..., Any], vnc: Connect, password_file: str, tmp_path: Path, where: str):
    where = f"unix:{tmp_path}/vnc" if where == "unix" else where
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        if "::1" in where and probe.connect_ex(("::1", 9)) == 99:  # EADDRNOTAVAIL
            where = "tcp:0"
    device = card("mdpy-vga", vnc=where, vnc_password_file=password_file)
    assert vnc(address(device)).log_in(b"secret").look()
    began = time.monotonic()
    with pytest.raises(PermissionError, match="wrong password"):
        vnc(address(device)).log_in(b"Secret")
    assert time.monotonic() - began >= server.PENALTY
    assert vnc(address(device)).log_in(b"secret").look(), "and the next one is let in"


def test_not_even_the_first_viewer_does_without_the_password(
    create: Callable[..., Mdev], vnc: Connect, password_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which comes as soon as there is a socket, while the device is still being created."""
    offered = []
    run = Loop.run

    def slow(loop: Loop, function: Callable[[], None]) -> None:
        run(loop, function)
        if not offered:
            offered.append(vnc(f"{tmp_path}/vnc").greet())

    monkeypatch.setattr(Loop, "run", slow)
    create("mdpy-vga", vnc=f"unix:{tmp_path}/vnc", vnc_password_file=password_file, screen_socket="none")
    assert offered == [b"\x02"]


def test_a_place_that_cannot_be_had_changes_nothing(create: Callable[..., Mdev], password_file: str):
    mdev = create("mdpy-vga")
    with pytest.raises(MdevError, match="the folder /nowhere does not exist"):
        mdev.drvdata.onlookers.set_vnc("unix:/nowhere/vnc", password_file, insecure=True)
    shown = [mdev.get_attribute(name) for name in ("vnc", "vnc_address", "vnc_password_file", "vnc_insecure")]
    assert shown == ["none", "", "", False]


def test_a_device_that_is_being_removed_lets_nobody_in(create: Callable[..., Mdev], tmp_path: Path):
    """Its parent has closed everything; the device itself is there for a moment yet."""
    mdev = create("mdpy-vga", vnc=f"unix:{tmp_path}/vnc")
    mdev.drvdata.close()
    with pytest.raises(MdevError, match="is being removed: nobody can be let in") as caught:
        mdev.set_attribute("vnc", f"unix:{tmp_path}/late")
    assert caught.value.name == "ENODEV"
    assert list(tmp_path.iterdir()) == []


def test_an_old_viewer_with_a_wrong_password(card: Callable[..., Any], vnc: Connect, password_file: str, tmp_path: Path):
    viewer = vnc(address(card("mdpy-vga", vnc=f"unix:{tmp_path}/vnc", vnc_password_file=password_file)))
    assert viewer.greet(b"RFB 003.003\n") == b"\0\0\0\x02"
    viewer.read(16)
    viewer.sock.sendall(bytes(16))
    assert viewer.read(4) == b"\0\0\0\x01"
    with pytest.raises(EOFError):
        viewer.read(1)


def test_a_password_file_that_goes_away_keeps_everybody_out(
    card: Callable[..., Any], vnc: Connect, password_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    device = card("mdpy-vga", vnc=f"unix:{tmp_path}/vnc", vnc_password_file=password_file)
    Path(password_file).unlink()
    viewer = vnc(address(device))
    assert viewer.greet() == b""
    assert viewer.read_reason() == "the password file cannot be read"
    assert f"a VNC viewer is refused: the password file {password_file} cannot be read" in caplog.text


def test_password_files_of_others_are_refused(create: Callable[..., Mdev], password_file: str, tmp_path: Path):
    mdev = create("mdpy-vga")
    Path(password_file).chmod(0o640)
    with pytest.raises(MdevError, match="nobody else's business") as caught:
        mdev.set_attribute("vnc_password_file", password_file)
    assert caught.value.name == "EPERM"
    with pytest.raises(MdevError, match="must be a file of the user"):
        mdev.set_attribute("vnc_password_file", str(tmp_path))
    (tmp_path / "link").symlink_to(password_file)
    with pytest.raises(MdevError, match="cannot be read"):
        mdev.set_attribute("vnc_password_file", f"{tmp_path}/link")
    Path(password_file).write_text("\n")
    Path(password_file).chmod(0o600)
    with pytest.raises(MdevError, match="begins with an empty line"):
        mdev.set_attribute("vnc_password_file", password_file)
    assert mdev.get_attribute("vnc_password_file") == ""


def test_attributes_change_it_while_it_runs(create: Callable[..., Mdev], vnc: Connect, password_file: str, tmp_path: Path):
    mdev = create("mdpy-vga")
    mdev.set_attribute("vnc", f"unix:{tmp_path}/vnc")
    first = vnc(f"{tmp_path}/vnc").log_in()
    mdev.set_attribute("vnc_insecure", "yes")
    mdev.set_attribute("vnc", "tcp:0")
    with pytest.raises(EOFError):
        first.read(1)
    assert not Path(f"{tmp_path}/vnc").exists()
    port = mdev.get_attribute("vnc_address")
    assert vnc(port).log_in().look()
    with pytest.raises(MdevError, match="lets every user of this machine look"):
        mdev.set_attribute("vnc_insecure", "no")
    mdev.set_attribute("vnc_password_file", password_file)
    mdev.set_attribute("vnc_insecure", "no")
    assert vnc(port).log_in(b"secret").look()
    with pytest.raises(MdevError, match="Address already in use"):
        create("mdpy-vga", vnc=f"tcp:{port}", vnc_insecure="yes")
    mdev.set_attribute("vnc", "none")
    assert mdev.get_attribute("vnc_address") == ""
    with pytest.raises(ConnectionRefusedError):
        vnc(port)


# -- viewers that misbehave -------------------------------------------------------------------------------------------

GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"RFB 003.008\n\x02",
    b"RFB 003.008\n\x01\x01\x63",
    b"RFB 003.008\n\x01\x01\x00" + bytes(3) + PixelFormat(bits=7).pack(),
    b"RFB 003.008\n\x01\x01" + b"\xff" * 100,
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_ends_the_connection_alone(screen: Any, vnc: Connect, garbage: bytes):
    other = vnc(address(screen)).log_in()
    viewer = vnc(address(screen))
    viewer.sock.sendall(garbage)
    with contextlib.suppress(ConnectionResetError):
        while viewer.sock.recv(4096):
            pass
    assert other.look()


def test_keys_pointer_and_clipboard_are_ignored(screen: Any, vnc: Connect):
    viewer = vnc(address(screen)).log_in()
    text = b"x" * 200_000
    viewer.sock.sendall(b"\x04" + bytes(7) + b"\x05" + bytes(5) + struct.pack(">B3xI", 6, len(text)) + text)
    assert viewer.look()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=12), st.booleans(), st.booleans())
def test_any_input_takes_little_memory_and_ends_in_one_way(parts: list[bytes], polite: bool, secret: bool):
    viewer = Viewer(Tiles(), "fuzzed", b"secret" if secret else None)
    start = b"RFB 003.008\n\x01\x01" if polite and not secret else b""
    with contextlib.suppress(RfbError):
        for part in [start, *parts]:
            viewer.feed(part)
            viewer.update()
            assert len(viewer._received) < 1 << 19
            viewer.out.clear()


def test_a_viewer_that_never_reads_hurts_nobody(screen: Any, vnc: Connect):
    lazy, other = vnc(address(screen)).log_in(), vnc(address(screen)).log_in()
    lazy.sock.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, 200, 130) * 2000)
    for _ in range(3):
        assert other.look()


def test_no_more_viewers_than_there_is_room_for(screen: Any, vnc: Connect):
    for _ in range(server.MOST):
        vnc(address(screen)).log_in()
    one_more = vnc(address(screen))
    assert one_more.greet() == b""
    assert one_more.read_reason() == f"{server.MOST} viewers are looking already"
    with pytest.raises(EOFError):
        one_more.read(1)


def test_a_crowd_is_not_even_told(screen: Any, vnc: Connect):
    """Those who say nothing, and are still to be told that there is no room, take room as well."""
    for _ in range(server.MOST_CONNECTIONS):
        assert vnc(address(screen)).read(12) == b"RFB 003.008\n"
    with pytest.raises(EOFError):
        vnc(address(screen)).read(1)


def test_who_says_nothing_costs_little_memory():
    tiles = Tiles()
    tracemalloc.start()
    try:
        viewer = Viewer(tiles, "silent")
        assert tracemalloc.get_traced_memory()[0] < 1 << 14
        assert viewer.out
    finally:
        tracemalloc.stop()


def test_a_shortage_of_descriptors_passes(screen: Any, vnc: Connect, shortage: Callable[[str], None]):
    shortage(address(screen))
    assert vnc(address(screen)).log_in().look()


BURSTS = [
    struct.pack(">BBHHHH", 3, 0, 0, 0, 0xFFFF, 0xFFFF),
    struct.pack(">B3x16s", 0, FORMATS["rgb565"].pack()) + struct.pack(">B3x16s", 0, FORMATS["bgr233"].pack()),
]


@pytest.mark.parametrize("message", BURSTS, ids=["requests", "formats"])
def test_a_burst_of_messages_is_little_work(message: bytes):
    tiles = Tiles()
    tiles.look((Frame(4095, 4095, 4095 * 4), mmap.mmap(-1, 4095 * 4095 * 4)))
    viewer = Viewer(tiles, "busy")
    viewer.feed(b"RFB 003.008\n\x01\x01")
    began = time.thread_time()
    viewer.feed(message * ((1 << 16) // len(message)))
    assert time.thread_time() - began < 0.4


def test_several_requests_get_one_answer(screen: Any, vnc: Connect, without_padding: Callable[[bytes], bytes]):
    """With what they have asked for, and what is between."""
    viewer = vnc(address(screen)).log_in()
    requests = [struct.pack(">BBHHHH", 3, 0, x, y, 1, 1) for x, y in ((70, 129), (199, 70))]
    viewer.sock.sendall(b"".join(requests))
    assert {rectangle[:4] for rectangle in viewer.update()} == {(64, 64, 136, 64), (64, 128, 136, 2)}
    columns = [without_padding(screen.memory[(row * 200 + 64) * 4 : (row + 1) * 800]) for row in range(64, 130)]
    assert [viewer.colours[(row * 200 + 64) * 4 : (row + 1) * 800] for row in range(64, 130)] == columns


def test_viewers_come_and_go_while_the_guest_draws(screen: Any, vnc: Connect):
    stop = threading.Event()

    def draw() -> None:
        colours = random.Random(4)
        while not stop.wait(0.002):
            screen.fill(colours.randbytes(4000), colours.randrange(0, 100_000, 4))

    artist = threading.Thread(target=draw)
    artist.start()
    try:
        for number in range(10):
            with vnc(address(screen)).log_in() as viewer:
                viewer.set_encodings(*((ZRLE,) if number % 2 else ()))
                viewer.look()
                viewer.look(incremental=True)
                viewer.ask()  # and leave in the middle
    finally:
        stop.set()
        artist.join()


def test_a_picture_nobody_looks_at_costs_nothing(screen: Any, vnc: Connect):
    """Not one look is taken once the last viewer has gone, nor while the one that is there asks for nothing."""
    looks = []
    scanout = screen.ops.scanout

    def counted() -> Any:
        looks.append(1)
        return scanout()

    screen.mdev.set_attribute("vnc", "none")
    screen.ops.scanout = counted
    screen.mdev.set_attribute("vnc", f"unix:{Path(address(screen) or screen.mdev.get_attribute('screen_path')).parent}/v2")
    viewer = vnc(address(screen)).log_in()
    viewer.look()
    before, began = len(looks), _cpu()
    time.sleep(0.7)  # longer than the longest pause between looks
    assert len(looks) == before
    viewer.ask(incremental=True)
    time.sleep(0.3)  # long enough for a look, since now somebody waits
    assert len(looks) > before
    viewer.sock.close()
    time.sleep(0.1)  # the loop notices
    before, began = len(looks), _cpu()
    time.sleep(0.7)  # longer than the longest pause between looks
    assert len(looks) == before
    assert _cpu() - began < 0.35


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_a_card_in_use_is_looked_at_when_its_client_leaves(screen: Any, vnc: Connect):
    """The memory is exchanged under the viewer's eyes."""
    viewer = vnc(address(screen)).log_in()
    viewer.look()
    viewer.ask(incremental=True)
    screen.ops.release()
    viewer.update()
    assert not any(viewer.colours)


def test_memory_that_cannot_be_had_is_black_and_ends_nothing(screen: Any, vnc: Connect, caplog: pytest.LogCaptureFixture):
    viewer = vnc(address(screen)).log_in()
    viewer.look()
    viewer.ask(incremental=True)
    scanout = screen.ops.onlookers._display.scanout

    def fail() -> None:
        raise MdevError(12, "no memory today")

    screen.mdev.set_attribute("vnc", "none")
    screen.ops.scanout = fail
    screen.mdev.set_attribute("vnc", f"unix:{Path(screen.mdev.get_attribute('screen_path')).parent}/v3")
    viewer = vnc(address(screen)).log_in()
    assert (viewer.width, viewer.height) == (640, 480)
    screen.ops.scanout = scanout
    assert "nothing to show: no memory today" in caplog.text
