"""Builds a guest's initramfs in memory: the newc cpio archive, and the kernel modules it needs in load order.

The format is in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Kernels take the archive
uncompressed, so it needs no tool of the machine. Pure functions of their inputs; call them on any thread.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath


class Initramfs:
    """An archive under construction. Paths are those of the guest, relative to its root; parents are made on the way."""

    def __init__(self) -> None:
        self._image = bytearray()
        self._folders: set[str] = {"."}

    def add_folder(self, path: str) -> None:
        """Add an empty folder and what leads to it; one that is there already is left alone."""
        if path not in self._folders:
            self._folders.add(path)
            self.add_folder(str(PurePosixPath(path).parent))
            self._append(path, stat.S_IFDIR | 0o755)

    def add_file(self, path: str, data: bytes, *, executable: bool = False) -> None:
        """Add a file that holds `data`."""
        self.add_folder(str(PurePosixPath(path).parent))
        self._append(path, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def image(self) -> bytes:
        """Return the finished archive."""
        return bytes(self._image) + _entry("TRAILER!!!", 0, b"")

    def _append(self, path: str, mode: int, data: bytes = b"") -> None:
        self._image += _entry(path, mode, data)


def _entry(name: str, mode: int, data: bytes) -> bytes:
    path = name.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + path) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


class MissingModuleError(LookupError):
    """The kernel has no such module, neither as a file nor built in, or none that can be read here."""


def modules_in_order(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of the modules `names` and of what they depend on, in the order to load them.

    `folder` is the kernel's ``/lib/modules/VERSION``. Built-in modules need no file and are left out;
    MissingModuleError for a name that the kernel does not know.
    """
    dependencies = dict(_dependencies(folder))
    files = {_module_name(path): path for path in dependencies}
    built_in = {_module_name(line) for line in (folder / "modules.builtin").read_text().split()}
    order: dict[str, None] = {}
    for name in map(_module_name, names):
        if name in files:
            order |= dict.fromkeys([*reversed(dependencies[files[name]]), files[name]])
        elif name not in built_in:
            raise MissingModuleError(f"the kernel of {folder} has no module {name}")
    return [folder / path for path in order]


def module_image(path: Path) -> bytes:
    """Return a module's ELF image, unpacked, as insmod wants it; MissingModuleError for a compression other than xz."""
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    raise MissingModuleError(f"{path} is compressed in a way that Python's library cannot unpack")


def _dependencies(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each module's path with the paths it depends on, each before those that it needs itself (modules.dep(5))."""
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, needed = line.partition(":")
        yield path, needed.split()


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")
