"""Peers that answer nonsense: somebody else's program where the service or a display is expected. EPROTO, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from mdevkit.client import Client
from mdevkit.errors import MdevError
from mdevkit.screen import Screen

#: Answers whoever comes, once, and returns the path.
Peer = Callable[..., str]


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    threads: list[threading.Thread] = []
    path = str(tmp_path / "s")

    def serve(answer: bytes, fds: Sequence[int] = ()) -> str:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as client:
                client.recv(1 << 16)
                socket.send_fds(client, [answer], fds)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return path

    yield serve
    for thread in threads:
        thread.join(5)


@pytest.fixture
def memory() -> Iterator[int]:
    """As much of it as anybody can claim; none of it is there."""
    fd = os.memfd_create("display", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 40)
    yield fd
    os.close(fd)


ANSWERS = [
    b"HTTP/1.1 \xb2\xb2 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 500 Oh\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_is_not_of_the_service(peer: Peer, answer: bytes) -> None:
    with Client(peer(answer), start=False) as client, pytest.raises(MdevError) as caught:
        client.post("/v1/x")
    assert caught.value.errno == errno.EPROTO


def test_an_event_that_is_none(peer: Peer) -> None:
    path = peer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello\n\r\n")
    with Client(path, start=False) as client, pytest.raises(MdevError) as caught:
        next(client.events())
    assert caught.value.errno == errno.EPROTO


def test_an_errno_that_is_none(peer: Peer) -> None:
    body = b'{"errno": "errorcode", "detail": "no"}'
    path = peer(b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with Client(path, start=False) as client, pytest.raises(MdevError) as caught:
        client.post("/v1/x")
    assert caught.value.errno == errno.EIO


FACTS = {"width": 4, "height": 4, "stride": 16, "offset": 0, "format": "XR24"}


@pytest.mark.parametrize(
    "facts",
    [
        {**FACTS, "offset": 1 << 70},
        {**FACTS, "width": 4.0},
        {**FACTS, "width": True},
        {**FACTS, "format": ["XR24"]},
        {**FACTS, "offset": 1 << 41},
        {**FACTS, "width": 32768, "height": 32768, "stride": 1 << 20},
        {"error": "x"},
        {"error": "x", "errno": "1"},
        {"error": "x", "errno": 1 << 70},
        {"error": ["x"], "errno": 1},
        {"error": "x", "errno": 1, "more": 1},
        ["error"],
    ],
)
def test_a_display_that_tells_nonsense(peer: Peer, memory: int, facts: object) -> None:
    with Screen(peer(json.dumps(facts).encode() + b"\n", [memory])) as screen, pytest.raises(MdevError) as caught:
        screen.look()
    assert caught.value.errno == errno.EPROTO


def test_a_nest_of_lists(peer: Peer, memory: int) -> None:
    with Screen(peer(b"[" * 4000 + b"\n", [memory])) as screen, pytest.raises(MdevError) as caught:
        screen.look()
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("flags", [os.O_DIRECTORY, os.O_WRONLY])
def test_memory_that_cannot_be_read(peer: Peer, memory: int, flags: int, tmp_path: Path) -> None:
    fd = os.open(tmp_path if flags == os.O_DIRECTORY else f"/proc/self/fd/{memory}", flags)
    with Screen(peer(json.dumps(FACTS).encode() + b"\n", [fd])) as screen, pytest.raises(MdevError) as caught:
        screen.look()
    os.close(fd)
    assert caught.value.errno == errno.EPROTO


def test_what_a_display_refuses_is_its_own(peer: Peer) -> None:
    with (
        Screen(peer(b'{"errno": 61, "error": "nothing is shown"}\n')) as screen,
        pytest.raises(MdevError, match="nothing is shown") as caught,
    ):
        screen.look()
    assert caught.value.errno == errno.ENODATA
