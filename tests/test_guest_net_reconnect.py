"""A guest's network goes on when the process behind its card has been killed, whichever side waits for the other."""

from __future__ import annotations

import pytest

from tests.guests import Device
from tests.guests.network import Card, arguments, boot

pytestmark = pytest.mark.alone

TYPE = "mvnet_loopback-vhost"


@pytest.mark.parametrize(("mode", "queues"), [("server", 2), ("client", 1)])
def test_traffic_resumes_after_the_backend_was_killed(kit, tmp_path, mode, queues):
    """In mode client it is QEMU that serves the socket, and the backend that connects, then and again."""
    socket = f"connect:{tmp_path}/s" if mode == "client" else f"{tmp_path}/s"
    settings = {"queues": str(queues)}
    with Device(TYPE, settings, socket=socket) as device:
        assert device.facts["mode"] == mode
        with boot(kit, arguments({"card": device}), cpus=queues) as guest:
            card = Card(guest, queues=queues)
            card.bring_up()
            card.generate_on(200)
            card.wait_traffic()
            before = card.carrier_losses()
            device.kill()
            card.wait_carrier_lost(before)
            with Device(TYPE, settings, socket=socket) as successor:
                card.wait_traffic()
                card.stop()
                card.exchange(1500)
                counted = card.generate(60, 10_000)
                assert (counted.sent, counted.received) == (10_000 * queues, 10_000 * queues)
                assert "not a head" not in guest.run("dmesg")
            assert successor.close() == 0, successor.output
