"""``mdevkit run TYPE``: one device in the foreground, until Ctrl-C."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from mdevkit.cli.options import AsJson, Parent, Settings, Socket, TypeId, Uuid, endpoint_path
from mdevkit.cli.output import say, say_json
from mdevkit.errors import MdevError
from mdevkit.registry import Registry
from mdevkit.running import announced

if TYPE_CHECKING:
    from mdevkit.device import Mdev

#: Those that end it, the terminal's end among them.
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def command(
    type_id: TypeId,
    parent: Parent = None,
    uuid: Uuid = None,
    settings: Settings = None,
    socket: Socket = None,
    as_json: AsJson = False,
) -> None:
    """Create a device, print how to attach a hypervisor, and serve it until Ctrl-C."""
    # nohup(1) has it ignored.
    numbers = _SIGNALS - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set())
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    with Registry.discover() as registry:
        mdev = registry.create(
            type_id,
            uuid=uuid,
            parent=parent,
            params=dict(word.split("=", 1) for word in settings or []),
            endpoint_path=endpoint_path(socket),
        )
        facts = describe(mdev)
        with announced(mdev.name, partial(describe, mdev)):
            # From here on signals end the wait instead of interrupting: nothing can cut the clean-up short.
            stop = threading.Event()
            for number in numbers:
                signal.signal(number, lambda *_: stop.set())
            say_json(facts) if as_json else _print(facts)
            # Whoever started us through a pipe waits for this.
            sys.stdout.flush()
            stop.wait()


def describe(mdev: Mdev) -> dict[str, Any]:
    """Return what other programs need to know about a running device."""
    facts: dict[str, Any] = {"uuid": mdev.name, "type": mdev.type.id, "parent": mdev.parent.name, "pid": os.getpid()}
    facts |= {"state": str(mdev.state), "driver": mdev.driver, "attach": {}}
    facts["attributes"] = mdev.type.device_table.read_all(mdev)
    if mdev.endpoint is not None:
        facts |= mdev.endpoint.describe()
        for client in ("qemu", "dpdk", "libvirt"):
            try:
                facts["attach"][client] = list(mdev.endpoint.attach(client))
            except MdevError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
    return facts


def _print(facts: dict[str, Any]) -> None:
    say(f"device  {facts['uuid']} ({facts['type']} of {facts['parent']})")
    if "socket" in facts:
        say(f"socket  {facts['socket']}")
    for client in ("qemu", "dpdk"):
        if client in facts["attach"]:
            say(f"{client}    {shlex.join(facts['attach'][client])}")
    for name, value in facts["attributes"].items():
        if name.endswith("_path") and value:
            say(f"{name}  {value}")
    say("serving; Ctrl-C ends it")
