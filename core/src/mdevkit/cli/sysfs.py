"""``mdevkit sysfs``: the tree of Linux's sysfs over the service's devices, for mdevctl, libvirt and scripts."""

from __future__ import annotations

import errno
import os
import select
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

from mdevkit.client import Client
from mdevkit.errors import MdevError
from mdevkit.paths import runtime_dir

command = typer.Typer(help="Mount the tree of Linux's sysfs, for mdevctl and libvirt.", no_args_is_help=True)

#: Seconds a mount gets to be there.
_LIMIT: Final = 15.0
_MODULE: Final = "mdevkit_service.sysfs"
#: The file system's type in the tables of mounts.
_TYPE: Final = "fuse.mdevkit-sysfs"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Where the tree is.")]


@command.callback()
def _sysfs() -> None:
    """Mount the tree of Linux's sysfs, so that mdevctl and libvirt manage mdevkit's devices."""


@command.command("mount")
def mount(
    folder: Folder,
    pci: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARENT=DDDD:BB:SS.F[,VENDOR:DEVICE]", help="Let a parent look like a PCI function, as libvirt wants it."
        ),
    ] = None,
    udev: Annotated[
        bool, typer.Option("--udev", help="As root: tell libudev's listeners, libvirt among them, of devices that come and go.")
    ] = False,
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Serve the mount here, until Ctrl-C.")] = False,
) -> None:
    """Show parents, types and devices under DIR as sysfs does, until it is unmounted. The service is started if none runs."""
    if find_spec("mdevkit_service") is None:
        raise MdevError(errno.ENOPKG, "the service is not installed (pip install 'mdevkit[service]')")
    with Client() as service:
        path = service.path
        service.get("/v1/parents")
    words = [sys.executable, "-P", "-m", _MODULE, "--socket", path, *(["--udev"] if udev else [])]
    words += [word for looks in pci or [] for word in ("--pci", looks)] + ["--", str(folder.absolute())]
    if not foreground:
        _start(words)
        return
    sys.stdout.flush()
    # In our place: signals are for whoever serves the mount.
    os.execv(words[0], words)  # noqa: S606  (no shell is wanted)


def _start(words: list[str]) -> None:
    """Start the process that serves the mount, and wait until the mount is there."""
    reading, writing = os.pipe()
    log = runtime_dir() / "sysfs.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(reading, "rb") as answer, os.fdopen(descriptor, "ab") as output:
        with os.fdopen(writing, "wb") as ready:
            process = subprocess.Popen(
                [*words[:-2], "--ready", str(ready.fileno()), *words[-2:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[ready.fileno()],
                cwd="/",
            )
        told, _, _ = select.select([answer], [], [], _LIMIT)
        number, _, sentence = (answer.read() if told else b"").decode().partition(" ")
    if number == "0":
        # It goes on without us, and nobody here waits for its end.
        process.returncode = 0
        return
    process.kill()
    process.wait()
    if number:
        raise MdevError(int(number), sentence, words[-1])
    raise MdevError(errno.EIO, f"{words[-1]} cannot be mounted on: {_last_line(log)}", words[-1])


def _last_line(log: Path) -> str:
    """Return what libfuse, or Python, wrote last."""
    return next((line for line in reversed(log.read_text(errors="replace").split("\n")) if line), f"see {log}")


@command.command("umount")
def umount(
    folder: Folder,
    lazy: Annotated[bool, typer.Option("--lazy", "-l", help="Unmount now, and end it when nobody uses it any more.")] = False,
) -> None:
    """Unmount the tree. Devices are not touched."""
    path = folder.resolve() if os.path.lexists(folder) else folder.absolute()
    if not _is_ours(path):
        raise MdevError(errno.EINVAL, f"{folder} is no mount of mdevkit sysfs", folder)
    own = ["umount", *(["-l"] if lazy else [])]
    others = [shutil.which("fusermount3") or "fusermount3", "-u", *(["-z"] if lazy else [])]
    try:
        done = subprocess.run([*(own if os.geteuid() == 0 else others), str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MdevError(errno.ENOPKG, "fusermount3 is missing (apt-get install fuse3)") from None
    if done.returncode:
        busy = " (--lazy unmounts it nevertheless)" if "busy" in done.stderr else ""
        reason = " ".join(done.stderr.split()) or f"{own[0]} ended with {done.returncode}"
        raise MdevError(errno.EBUSY if busy else errno.EIO, f"{folder} cannot be unmounted: {reason}{busy}", folder)


def _is_ours(folder: Path) -> bool:
    """Whether one of our trees is mounted on a folder, dead or alive (proc_pid_mountinfo(5))."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        # Blanks and the like are written as octal escapes.
        place = fields.split()[4].encode().decode("unicode_escape")
        if place == str(folder) and rest.split()[0] == _TYPE:
            return True
    return False
