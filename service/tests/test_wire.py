"""Frames between the service and its own processes."""

from __future__ import annotations

import asyncio
import os
import socket

from mdevkit_service.wire import Channel


def test_a_descriptor_nobody_can_get_any_more_is_closed():
    """Else a socket of a host that died would go on listening in the service."""

    async def send_too_late(fd):
        ours, its = socket.socketpair()
        ended = asyncio.Event()
        channel = Channel(ours, lambda _message, _fds: None, ended.set)
        its.close()
        channel.send({"answer": 1}, [fd])
        await asyncio.wait_for(ended.wait(), 10)

    reader, writer = os.pipe2(os.O_NONBLOCK)
    try:
        asyncio.run(send_too_late(writer))
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as end:
        assert end.read(1) == b"", "somebody holds the other end"  # None while that is open
