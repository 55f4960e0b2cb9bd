"""What a path of the tree is: a folder, a file, a link. Made anew for each look-up, cheap, and without state of their own."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from mdevkit.errors import MdevError

from mdevkit_service.sysfs.texts import PAGE

Show = Callable[[], str]
Store = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class File:
    """An attribute. `show` returns its text without the newline, `store` takes what one write(2) brings."""

    show: Show | None = None
    store: Store | None = None
    #: Whether no text is no line, instead of an empty one.
    bare: bool = False

    @property
    def mode(self) -> int:
        """The mode sysfs gives a file that can be read, written, or both; root is held to it too."""
        if self.show is None:
            return stat.S_IFREG | 0o200
        return stat.S_IFREG | (0o644 if self.store else 0o444)

    @property
    def size(self) -> int:
        """What stat(2) says, whatever the text's length is."""
        return PAGE

    def read(self) -> bytes:
        """Return the content; EIO when it cannot be read, as the driver core does without a show method."""
        if self.show is None:
            raise MdevError(errno.EIO, "this file cannot be read")
        content = self.show()
        return b"" if self.bare and not content else content.encode("utf-8", "replace") + b"\n"

    def write(self, data: bytes) -> None:
        """Store; EIO when it cannot be written."""
        if self.store is None:
            raise MdevError(errno.EIO, "this file cannot be written")
        self.store(data)


@dataclass(frozen=True, slots=True)
class Binary(File):
    """A file of bytes that do not change."""

    data: bytes = b""

    @property
    def mode(self) -> int:
        """Read only."""
        return stat.S_IFREG | 0o444

    @property
    def size(self) -> int:
        """What there is."""
        return len(self.data)

    def read(self) -> bytes:
        """Return the bytes."""
        return self.data


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link to a path of the tree, given from its root."""

    target: str

    mode: ClassVar[int] = stat.S_IFLNK | 0o777
    size: ClassVar[int] = 0

    def text(self, path: str) -> str:
        """Return the relative link that leads from `path` there, as short as sysfs makes it."""
        here, there = path.split("/")[1:-1], self.target.split("/")[1:]
        common = 0
        while common < min(len(here), len(there)) and here[common] == there[common]:
            common += 1
        return "/".join([".."] * (len(here) - common) + there[common:])


class Folder:
    """A folder. Subclasses find a child in constant time."""

    mode: ClassVar[int] = stat.S_IFDIR | 0o755
    size: ClassVar[int] = 0

    def child(self, name: str) -> Node | None:
        """Return a child, None when there is none."""
        raise NotImplementedError

    def names(self) -> Iterable[str]:
        """Return the names of all children."""
        raise NotImplementedError

    def children(self) -> Iterator[tuple[str, Node]]:
        """Yield all children; those that go meanwhile are left out."""
        for name in self.names():
            node = self.child(name)
            if node is not None:
                yield name, node


Node = Folder | File | Link


class Fixed(Folder):
    """A folder of what was given."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes: Final = nodes

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        return self._nodes.get(name)

    def names(self) -> Iterable[str]:
        """See `Folder`."""
        return self._nodes


class Listing(Folder):
    """A folder whose children come and go: `find` returns one, `names` tells all."""

    def __init__(self, find: Callable[[str], Node | None], names: Callable[[], Iterable[str]]) -> None:
        self._find: Final = find
        self._names: Final = names

    def child(self, name: str) -> Node | None:
        """See `Folder`."""
        return self._find(name)

    def names(self) -> Iterable[str]:
        """See `Folder`."""
        return self._names()


def text(value: str) -> File:
    """Return a file that can be read and says `value`."""
    return File(lambda: value)
