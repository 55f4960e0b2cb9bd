"""The screen socket: the picture with its memory, whoever asks and however."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mdevkit import Mdev, MdevError, Registry
from mdevkit.screen import Frame, Screen
from mdevkit.sockets import listen_at
from mdevkit_mbochs.onlookers import screen as server


def path_of(mdev: Mdev) -> str:
    path: str = mdev.get_attribute("screen_path")
    return path


@pytest.mark.parametrize(("size", "more"), [((640, 480), {}), ((641, 479), {"virtual": 643, "x": 1, "y": 3}), ((64, 64), {"y": 7})])
def test_a_look_is_the_picture(card: Callable[..., Any], size: tuple[int, int], more: dict[str, int]):
    """Panning, odd strides and offsets included."""
    device = card()
    device.set_mode(*size, **more)
    noise = random.Random(1).randbytes(4 << 20)
    device.fill(noise)
    with Screen(path_of(device.mdev)) as screen:
        picture = screen.look()
        frame = device.ops.frame()
        assert picture.frame == frame
        assert picture.data == noise[frame.offset : frame.offset + frame.size]
        device.set_mode(100, 100, virtual=333, x=9)
        assert screen.look().frame == Frame(100, 100, 1332, 36)
        device.set_mode(0, 0)
        with pytest.raises(MdevError, match="shows nothing: the guest has set no mode") as caught:
            screen.look()
        assert caught.value.errno == errno.ENODATA


def test_the_descriptor_cannot_write(create: Callable[..., Mdev]):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path_of(create("mdpy-vga")))
        client.sendall(b"\n")
        line, fds, _, _ = socket.recv_fds(client, 4096, 4)
    try:
        assert json.loads(line) == {"width": 640, "height": 480, "stride": 2560, "offset": 0, "format": "XR24"}
        (fd,) = fds
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096)
    finally:
        for fd in fds:
            os.close(fd)


def test_the_socket_is_private_and_goes_with_the_device(registry: Registry, create: Callable[..., Mdev], tmp_path: Path):
    automatic, named = create(), create("mdpy-vga", screen_socket=f"unix:{tmp_path}/s")
    assert path_of(named) == f"{tmp_path}/s"
    for mdev in (automatic, named):
        path = Path(path_of(mdev))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        registry.remove(mdev.uuid)
        assert not path.exists()
        with pytest.raises(MdevError, match="no display can be reached at") as caught:
            Screen(path)
        assert caught.value.errno == errno.ENODEV


def test_it_is_beside_the_devices_own_socket(registry: Registry, tmp_path: Path):
    mdev = registry.create("mdpy-vga", endpoint_path=f"{tmp_path}/card.sock", bind=False)
    assert path_of(mdev) == f"{tmp_path}/card.screen"


def test_a_socket_that_cannot_be_is_done_without(registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    mdev = registry.create("mdpy-vga", endpoint_path=f"{tmp_path}/{'x' * 100}.sock", bind=False)
    assert path_of(mdev) == ""
    assert "no screenshots can be taken: " in caplog.text
    assert "a socket's path may have 107" in caplog.text


def test_sockets_are_made_by_the_devices_listen(registry: Registry, tmp_path: Path):
    asked = []

    def listen(path: str) -> socket.socket:
        asked.append(path)
        return listen_at(path)

    registry.listen = listen
    registry.create("mdpy-vga", bind=False, params={"screen_socket": f"unix:{tmp_path}/s", "vnc": f"unix:{tmp_path}/v"})
    assert asked == [f"{tmp_path}/s", f"{tmp_path}/v"]


@pytest.mark.parametrize("garbage", [b"x", b"\n\nGET / HTTP/1.1\r\n", b"\0" * 1000])
def test_garbage_ends_the_connection_alone(create: Callable[..., Mdev], garbage: bytes):
    path = path_of(create("mdpy-vga"))
    with socket.socket(socket.AF_UNIX) as client, Screen(path) as other:
        client.settimeout(10)
        client.connect(path)
        client.sendall(garbage)
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass
        assert other.look().frame.width == 640


def test_a_client_that_never_reads_is_sent_away(create: Callable[..., Mdev]):
    path = path_of(create("mdpy-vga"))
    with socket.socket(socket.AF_UNIX) as client, Screen(path) as other:
        client.settimeout(10)
        client.connect(path)
        with pytest.raises(BrokenPipeError):
            client.sendall(b"\n" * (1 << 24))
        assert other.look().frame.width == 640


def test_so_many_at_once_and_no_more(create: Callable[..., Mdev]):
    path = path_of(create("mdpy-vga"))
    screens = [Screen(path) for _ in range(server.MOST)]
    for screen in screens:
        screen.look()
    with Screen(path) as one_more, pytest.raises(MdevError, match="is gone"):
        one_more.look()
    for screen in screens:
        screen.close()


def test_a_shortage_of_descriptors_passes(create: Callable[..., Mdev], shortage: Callable[[str], None]):
    path = path_of(create("mdpy-vga"))
    shortage(path)
    with Screen(path) as screen:
        assert screen.look().frame.width == 640


LIES = [
    b"nonsense\n",
    b"[]\n",
    b'{"width": 0, "height": 1, "stride": 4}\n',
    b'{"width": 10, "height": 10, "stride": 39}\n',
    b'{"width": 10, "height": 10, "stride": 40, "offset": -1}\n',
    b'{"width": 99999999, "height": 10, "stride": 400000000}\n',
    b'{"width": 10, "height": 10, "stride": "x"}\n',
    b'{"width": 10, "height": 10, "stride": 40}\n',
    b'{"colour": 10}\n',
    b"x" * 5000,
]


@pytest.mark.parametrize("lie", LIES)
def test_a_display_that_lies_is_not_believed(no_leaks: None, tmp_path: Path, lie: bytes):
    """The last but two comes without a descriptor, all others are wrong in themselves."""
    with listen_at(f"{tmp_path}/s") as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1)
                peer.sendall(lie)

        thread = threading.Thread(target=serve)
        thread.start()
        with Screen(f"{tmp_path}/s") as screen, pytest.raises(MdevError, match="gives no picture") as caught:
            screen.look()
        thread.join()
        assert caught.value.errno == errno.EPROTO


def test_a_memory_that_is_too_short(no_leaks: None, tmp_path: Path):
    with listen_at(f"{tmp_path}/s") as listener, (tmp_path / "memory").open("w+b") as memory:
        memory.truncate(100)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1)
                socket.send_fds(peer, [b'{"width": 10, "height": 10, "stride": 40}\n'], [memory.fileno()])

        thread = threading.Thread(target=serve)
        thread.start()
        with Screen(f"{tmp_path}/s") as screen, pytest.raises(MdevError, match="gives no picture: 100 bytes for Frame"):
            screen.look()
        thread.join()
