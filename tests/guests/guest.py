"""A guest: the stock kernel and a busybox initramfs in QEMU, driven by commands over its serial console.

The guest reads commands from ttyS0, one base64 line each, and frames what they print with markers, so that
output comes back byte for byte. The kernel's own messages are kept off the console (loglevel 1); read them with
``dmesg``. The console and QMP are socket pairs that QEMU inherits: nothing in the file system to collide or to leak.
Blocking calls with a time limit each, for one thread; QEMU is killed by the kernel if that thread's process dies.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.guests.initramfs import Initramfs, module_image, modules_in_order
from tests.guests.interpreter import add_python
from tests.guests.kit import Kit
from tests.guests.qmp import Qmp

#: Seconds until the guest's init must run; it takes 4 to 5 s alone, more beside other load.
BOOT_TIMEOUT = 60.0

#: Characters of output in an error: enough for a kernel panic.
_TAIL = 6000

_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
{load}
stty -F /dev/ttyS0 raw -echo
sh /commands </dev/ttyS0 >/dev/ttyS0 2>&1
"""

#: Not part of init, which is sent SIGCHLD for every orphan: busybox' read forgets half a line when that comes.
_COMMANDS = b"""\
echo; echo guest-ready
while read -r number command; do
  echo "$command" | base64 -d >/tmp/command
  printf '\\nguest-begin %s\\n' "$number"
  sh /tmp/command </dev/null
  printf '\\nguest-end %s %s\\n' "$number" "$?"
done
"""

_READY = re.compile(rb"\nguest-ready\n")


class GuestError(Exception):
    """The guest did not do what it was asked in time, or its QEMU ended; the text carries the last of its output."""


class CommandFailedError(GuestError):
    """A command ended with a status that is not 0. `status` and `output` are the command's."""

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"the guest's `{command}` ended with {status}: {output.strip()[-2000:]}")
        self.status = status
        self.output = output


class Guest:
    """A running guest; a context manager that ends it.

    `devices` are QEMU arguments as ``mdevkit run`` prints them. `shared_memory` makes the guest's RAM a memfd that
    devices may map. `modules` are loaded before the first command, `files` put into the initramfs, with a `python` if wanted.
    There is always one empty slot for hot plug, the pcie-root-port `SLOT`. With `incoming` the guest does not boot: it is to come
    from another QEMU with the same arguments, by `tests.guests.migration`.
    """

    SLOT = "slot0"
    MEMORY = "256M"

    def __init__(
        self,
        kit: Kit,
        devices: Sequence[str] = (),
        *,
        shared_memory: bool = True,
        modules: Iterable[str] = (),
        files: Mapping[str, bytes] | None = None,
        python: bool = False,
        cpus: int = 1,
        incoming: bool = False,
        boot_timeout: float = BOOT_TIMEOUT,
    ) -> None:
        self._number = 0
        self._received = b""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mdevkit-guest-")))
            initramfs = folder / "initramfs"
            initramfs.write_bytes(_initramfs(kit, modules, files or {}, python))
            self._errors: IO[bytes] = stack.enter_context((folder / "stderr").open("w+b"))
            self._console, console = _socket_pair(stack)
            control, monitor = _socket_pair(stack)
            arguments = _machine(kit, initramfs, shared_memory, console.fileno(), monitor.fileno())
            waiting = ["-S", "-incoming", "defer"] if incoming else []
            self._process = subprocess.Popen(
                [*kit.qemu, *arguments, "-smp", str(cpus), *waiting, *devices],
                env=dict(kit.environment),
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=(console.fileno(), monitor.fileno()),
            )
            stack.callback(self.kill)
            console.close()
            monitor.close()
            #: QEMU's monitor: device_add, device_del, query-..., events.
            self.qmp = Qmp(control)
            if not incoming:
                self._wait_ready(boot_timeout)
            self.qmp.start(boot_timeout)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._process.pid

    @property
    def memory(self) -> Path:
        """A file that holds the guest's RAM, byte for byte, as long as QEMU lives; only with `shared_memory`."""
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            if str(path.readlink()).startswith("/memfd:memory-backend-memfd"):
                return path
        raise GuestError(f"QEMU {self.pid} has no memfd for memory{self._tail()}")

    def run(self, command: str, timeout: float = 30) -> str:
        """Run a shell command and return what it printed, stdout and stderr together.

        CommandFailedError if its status is not 0, GuestError if it takes more than `timeout` seconds or the guest dies.
        """
        self._number += 1
        text = base64.b64encode(command.encode()).decode()
        self._send(f"{self._number} {text}\n".encode())
        end = re.compile(rb"\nguest-begin %d\n(.*?)\nguest-end %d (\d+)\n" % (self._number, self._number), re.DOTALL)
        found = self._read(end, timeout, f"`{command}`")
        output, status = found[1].decode(errors="replace"), int(found[2])
        if status:
            raise CommandFailedError(command, status, output)
        return output

    def write(self, path: str, data: bytes) -> None:
        """Make a file in the guest that holds `data`; for some KiB, the console is slow."""
        self.run(f"echo {base64.b64encode(data).decode()} | base64 -d > {shlex.quote(path)}")

    def read(self, path: str) -> bytes:
        """Return what a file of the guest holds."""
        return base64.b64decode(self.run(f"base64 {shlex.quote(path)}"))

    def wait(self, command: str, timeout: float = 10) -> str:
        """Run a command again and again until it succeeds, and return its output; GuestError with the last failure."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.run(command)
            except CommandFailedError:
                if time.monotonic() > deadline:
                    raise

    def reboot(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Let the guest reboot itself; returns when it takes commands again. Files made by `run` are gone."""
        self._send(b"0 " + base64.b64encode(b"reboot -f") + b"\n")
        self._wait_ready(timeout)

    def plug(self, name: str, device: Mapping[str, Any]) -> None:
        """Hot-plug a device into the empty slot, under the id `name`; `device` is QEMU's description without id and bus."""
        self.qmp.execute("device_add", **device, id=name, bus=self.SLOT)

    def unplug(self, name: str, timeout: float = 20) -> None:
        """Ask the guest to give up a device; returns when it has."""
        self.qmp.execute("device_del", id=name)
        while self.qmp.wait_event("DEVICE_DELETED", timeout).get("device") != name:
            pass

    def kill(self) -> None:
        """Kill QEMU with SIGKILL, as a crash would, and wait until it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the guest and drop everything it held. May be called again."""
        self._stack.close()

    def _wait_ready(self, timeout: float) -> None:
        self._read(_READY, timeout, "its boot")

    def _send(self, line: bytes) -> None:
        self._console.settimeout(10)  # a guest that hangs takes no input either
        try:
            self._console.sendall(line)
        except OSError as error:
            raise GuestError(f"QEMU takes no commands: {error}{self._tail()}") from None

    def _read(self, pattern: re.Pattern[bytes], timeout: float, doing: str) -> re.Match[bytes]:
        """Receive until `pattern` is there, and forget everything up to its end."""
        deadline = time.monotonic() + timeout
        while not (found := pattern.search(self._received)):
            if pattern is not _READY and _READY.search(self._received):
                raise GuestError(f"the guest rebooted during {doing}{self._tail()}")
            self._receive(deadline, doing)
        self._received = self._received[found.end() :]
        return found

    def _receive(self, deadline: float, doing: str) -> None:
        self._console.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            data = self._console.recv(65536)
        except TimeoutError:
            raise GuestError(f"the guest did not finish {doing} in time{self._tail()}") from None
        except ConnectionError:
            data = b""
        if not data:
            raise GuestError(f"QEMU ended during {doing}{self._tail()}")
        self._received += data

    def _tail(self) -> str:
        self._errors.seek(0)
        last = (self._received[-_TAIL:] + b"\n" + self._errors.read()[-_TAIL:]).decode(errors="replace").strip()
        return f"; the last of its output:\n{last}"


def _initramfs(kit: Kit, modules: Iterable[str], files: Mapping[str, bytes], python: bool) -> bytes:
    archive = Initramfs()
    if python:
        add_python(archive, kit)
    archive.add_file("bin/busybox", kit.busybox.read_bytes(), executable=True)
    load = []
    for path in modules_in_order(kit.modules, modules):
        name = f"modules/{path.name.partition('.ko')[0]}.ko"
        archive.add_file(name, module_image(path))
        load.append(f"insmod /{name}")
    for name, data in files.items():
        archive.add_file(name, data)
    archive.add_file("commands", _COMMANDS)
    archive.add_file("init", _INIT.format(load="\n".join(load)).encode(), executable=True)
    return archive.image()


def _machine(kit: Kit, initramfs: Path, shared: bool, console: int, monitor: int) -> list[str]:
    """Return QEMU's arguments for the machine without devices under test."""
    memory = f"memory-backend-memfd,id=memory,size={Guest.MEMORY},share=on"
    backing = ["-object", memory, "-machine", "q35,memory-backend=memory"] if shared else ["-machine", "q35"]
    return [
        *backing,
        *("-accel", "tcg", "-m", Guest.MEMORY, "-no-user-config", "-nodefaults", "-display", "none"),
        *("-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=monitor,fd={monitor}", "-qmp", "chardev:monitor"),
        *("-device", f"pcie-root-port,id={Guest.SLOT},chassis=1,slot=1"),
        *("-kernel", str(kit.kernel), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet loglevel=1 panic=-1"),
    ]


def _socket_pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    return ours, theirs
