"""Finds what a guest boots with: a QEMU that has vfio-user-pci, a kernel with its modules, a static busybox.

The Debian root of `tests.guests.root` is preferred, so that everybody tests the same; the machine's own tools are
taken when they will do. Reads files and runs ``qemu -device help``; call it on any thread.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.guests.root import find_root, loader

HOW_TO_GET = "./dev guests"


class MissingKitError(Exception):
    """Nothing here boots a guest; the text says what is missing and which command gets it."""


@dataclass(frozen=True)
class Kit:
    """The tools and images of a guest. `qemu` is a command line to append arguments to, run with `environment` alone."""

    qemu: tuple[str, ...]
    kernel: Path
    #: The kernel's ``/lib/modules/VERSION``.
    modules: Path
    busybox: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    #: The root that has a Python for the guest; None where the kit is the machine's own.
    root: Path | None = None

    def version(self) -> str:
        """Return QEMU's version, as it prints it."""
        return self._ask("--version").splitlines()[0].removeprefix("QEMU emulator version ")

    def has_device(self, name: str) -> bool:
        """Tell whether this QEMU knows the device `name`."""
        return f'name "{name}"' in self._ask("-device", "help")

    def _ask(self, *arguments: str) -> str:
        command = [*self.qemu, *arguments]
        return subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, check=True).stdout


@functools.cache
def find_kit() -> Kit:
    """Return the tools of the Debian root, else the machine's own; MissingKitError if neither will do."""
    root = find_root()
    return _kit_of_root(root) if root else _kit_of_machine()


def _kit_of_root(root: Path) -> Kit:
    modules = max((root / "lib/modules").iterdir())
    program = [*loader(root, "qemu-system-x86_64"), str(root / "usr/bin/qemu-system-x86_64")]
    firmware = [argument for folder in ("qemu", "seabios") for argument in ("-L", str(root / "usr/share" / folder))]
    return Kit(
        qemu=(*dies_with_us(), *program, *firmware),
        kernel=root / "boot" / f"vmlinuz-{modules.name}",
        modules=modules,
        busybox=root / "usr/bin/busybox",
        environment={"QEMU_MODULE_DIR": str(root / "usr/lib/x86_64-linux-gnu/qemu")},
        root=root,
    )


def _kit_of_machine() -> Kit:
    qemu, busybox = shutil.which("qemu-system-x86_64"), shutil.which("busybox")
    release = os.uname().release
    kit = Kit(
        qemu=(*dies_with_us(), qemu or "qemu-system-x86_64"),
        kernel=Path("/boot") / f"vmlinuz-{release}",
        modules=Path("/lib/modules") / release,
        busybox=Path(busybox or "/bin/busybox"),
    )
    if lacking := _lacking(kit, qemu):
        raise MissingKitError(f"no guest can boot here, for want of {lacking}; get all of it with: {HOW_TO_GET}")
    return kit


def _lacking(kit: Kit, qemu: str | None) -> str:
    """Name the first thing that a kit of the machine's own tools lacks; empty if it is complete."""
    if qemu is None or not kit.has_device("vfio-user-pci"):
        return "QEMU 10.1 or newer (qemu-system-x86_64 with vfio-user-pci)"
    if not os.access(kit.kernel, os.R_OK) or not (kit.modules / "modules.dep").exists():
        return f"a kernel image that we may read ({kit.kernel})"
    if not kit.busybox.exists() or b"/ld-linux" in kit.busybox.read_bytes()[:4096]:
        return "a static busybox"
    return ""


def dies_with_us() -> tuple[str, ...]:
    """Return the command prefix that makes a child end when the process that started it is killed (util-linux)."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL") if setpriv else ()
