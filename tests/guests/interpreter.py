"""Puts a Python into a guest, for what its busybox cannot do: the Debian root's own, with the standard library's sources.

Python's built-in modules cover sockets; of the library it is the part that Debian calls minimal. 20 MB, which the guest unpacks
in a blink. Reads files of the root and runs its dynamic loader; call it on any thread.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.guests.initramfs import Initramfs
from tests.guests.kit import HOW_TO_GET, Kit, MissingKitError
from tests.guests.root import loader

#: Where a program's loader looks for itself and for libraries, in the guest.
_LOADER = "lib64/ld-linux-x86-64.so.2"
_LIBRARIES = "lib/x86_64-linux-gnu"


def add_python(archive: Initramfs, kit: Kit) -> None:
    """Add ``python3`` to a guest; MissingKitError when the kit has none for it."""
    if kit.root is None:
        raise MissingKitError(f"the guest's Python is in the Debian root only; get it with: {HOW_TO_GET}")
    program = (kit.root / "usr/bin/python3").resolve()
    archive.add_file("bin/python3", program.read_bytes(), executable=True)
    archive.add_file(_LOADER, (kit.root / _LOADER).read_bytes(), executable=True)
    for library in _libraries(kit.root, program):
        archive.add_file(f"{_LIBRARIES}/{library.name}", library.read_bytes())
    sources = kit.root / "usr/lib" / program.name
    for path in sorted(path for path in sources.rglob("*.py") if path.is_file()):  # one is a link to what is not there
        archive.add_file(str(path.relative_to(kit.root)), path.read_bytes())
    archive.add_folder(f"usr/lib/{program.name}/lib-dynload")  # it complains when there is none


def _libraries(root: Path, program: Path) -> list[Path]:
    command = [*loader(root, program.name), "--list", str(program)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [Path(path) for path in re.findall(r"=> (/\S+)", listed)]
