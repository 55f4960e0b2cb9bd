"""A machine on which nothing runs yet, the commands as the manual has them, and a real guest: create, attach, console.

The first command starts service, host and device; the guest is QEMU with what ``mdevkit attach`` prints.
"""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from tests.guests import Guest
from tests.guests.serial import ports_at_boot, send
from tests.services import Running

TEXT = b"Hello from the guest\n"

#: Says that it listens, then answers each line that comes through the port.
ANSWER = b"""
stty -F /dev/$1 raw -echo
exec 3<>/dev/$1
touch /listening
while read -r line <&3; do echo "$(uname -s) heard: $line" >&3; done
"""


@pytest.fixture
def machine(tmp_path_factory, tmp_path):
    """A machine with mtty installed, where nothing of ours runs; at the end, nothing is left of it."""
    # pytest's own folders are too deep for a socket's path.
    folder = tmp_path_factory.mktemp("s")
    folder.chmod(0o700)
    machine = Running(folder, tmp_path)
    machine.environment["MDEVKIT_PLUGINS"] = "mdevkit-mtty,mdevkit-vfio"
    del machine.environment["PYTHONPATH"]
    yield machine
    stopped = machine.mdevkit("service", "stop", "--remove", "--force")
    hosts, files = machine.hosts(), machine.files()
    machine.clean_up()
    assert (stopped.returncode, hosts, files) == (0, {}, []), stopped.stderr


def _said(done):
    """What a command has printed that went well and had nothing to complain of."""
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextmanager
def _console(machine, uuid):
    """``mdevkit console`` in a pipe."""
    command = [Path(sys.executable).with_name("mdevkit"), "console", uuid]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    console = subprocess.Popen(command, env=machine.environment, bufsize=0, **streams)
    with console:
        try:
            yield console
        finally:
            console.kill()


def _hear(stream, length, seconds=30):
    """So many bytes, as soon as they are there."""
    heard, deadline = b"", time.monotonic() + seconds
    while len(heard) < length:
        assert select.select([stream], [], [], max(0, deadline - time.monotonic()))[0], f"no more came than {heard}"
        data = os.read(stream.fileno(), 4096)
        assert data, f"it ended after {heard}"
        heard += data
    return heard


def test_create_attach_and_console_on_a_fresh_machine(kit, machine):
    assert not machine.runtime.exists()
    uuid = _said(machine.mdevkit("create", "mtty-2")).strip()
    assert str(UUID(uuid)) == uuid
    arguments = shlex.split(_said(machine.mdevkit("attach", uuid, "--qemu")))
    with Guest(kit, arguments, files={"answer": ANSWER}) as guest:
        port, other = ports_at_boot(guest)
        assert send(guest, other, TEXT) == TEXT
        guest.run(f"sh /answer {port} >/dev/null 2>&1 &")
        guest.wait("test -e /listening")
        with _console(machine, uuid) as console:
            for word in ("who is there", "once more"):
                console.stdin.write(f"{word}\n".encode())
                answer = f"Linux heard: {word}\n".encode()
                assert _hear(console.stdout, len(answer)) == answer
            console.stdin.close()
            assert console.wait(10) == 0, console.stderr.read()
        assert send(guest, other, TEXT) == TEXT
    shown = _said(machine.mdevkit("show", uuid))
    assert f"uuid            {uuid}\n" in shown
    assert "state           bound\n" in shown
    assert _said(machine.mdevkit("list")) == f"{uuid} mtty mtty-2 manual\n"
    assert _said(machine.mdevkit("remove", uuid)) == ""
    assert _said(machine.mdevkit("list")) == ""
