"""What libfuse calls, on its own threads: paths become nodes, errors become errnos, and files behave as those of sysfs do.

A file's content is made when it is read at its beginning, and each write(2) is one call of its store method, whatever the offset.
Opening checks the file's mode for root too (fs/kernfs/file.c, KERNFS_ROOT_EXTRA_OPEN_PERM_CHECK). What an error says beyond its
errno goes to the log.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn

from mdevkit.errors import MdevError

from mdevkit_service.sysfs.nodes import File, Folder, Link, Node
from mdevkit_service.sysfs.texts import PAGE
from mdevkit_service.sysfs.tree import Tree

log = logging.getLogger("mdevkit.sysfs")

#: The kernel takes no error number from here on, and whoever waits for the answer would wait for ever (fs/fuse/dev.c).
_ERRNO_END: Final = 512


class OpenFile:
    """A file somebody has open."""

    def __init__(self, file: File) -> None:
        self.file: Final = file
        self.content: bytes | None = None

    def read(self, size: int, offset: int) -> bytes:
        """Return a part of the content, made anew at its beginning."""
        if self.content is None or offset == 0:
            self.content = self.file.read()
        return self.content[offset : offset + size]


class Filesystem:
    """The operations over a `Tree`, with the names and arguments of mfusepy.Operations; libfuse answers for those that are missing.

    `mounted` is called when the kernel has the file system.
    """

    #: Times are in ns.
    use_ns: Final = True

    def __init__(self, tree: Tree, mounted: Callable[[], None]) -> None:
        self._tree: Final = tree
        self._mounted: Final = mounted
        self._numbers: Final = itertools.count(1)
        self._open: Final[dict[int, OpenFile]] = {}
        now = time.time_ns()
        times = {"st_atime": now, "st_mtime": now, "st_ctime": now}
        self._common: Final = {"st_nlink": 1, "st_uid": os.getuid(), "st_gid": os.getgid(), **times}

    def init(self, _path: str) -> None:
        """Tell that the file system can be used."""
        self._mounted()

    # -- looking ---------------------------------------------------------------------------------------------------

    def getattr(self, path: str, _fh: int | None = None) -> dict[str, Any]:
        """Return what stat(2) tells."""
        return self._status(self._find(path))

    def _status(self, node: Node) -> dict[str, Any]:
        return {"st_mode": node.mode, "st_size": node.size, **self._common}

    def _find(self, path: str) -> Node:
        try:
            return self._tree.find(path)
        except MdevError as error:
            raise _told(error) from error

    def readlink(self, path: str) -> str:
        """Return where a link leads, relative to its folder."""
        node = self._find(path)
        if not isinstance(node, Link):
            raise OSError(errno.EINVAL, "not a link")
        return node.text(path)

    def readdir(self, path: str, _fh: int) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Yield what is in a folder, with its kind."""
        node = self._find(path)
        if not isinstance(node, Folder):
            raise OSError(errno.ENOTDIR, "not a folder")
        above = {"st_mode": Folder.mode}
        yield from ((name, above, 0) for name in (".", ".."))
        try:
            for name, child in node.children():
                yield name, {"st_mode": child.mode}, 0
        except MdevError as error:
            raise _told(error) from error

    # -- files -----------------------------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """Return a number for a file that is opened; EACCES for what its mode does not allow."""
        node = self._find(path)
        if not isinstance(node, File):
            raise OSError(errno.EISDIR, "not a file")
        wanted = flags & os.O_ACCMODE
        if (wanted != os.O_WRONLY and not node.mode & stat.S_IRUSR) or (wanted != os.O_RDONLY and not node.mode & stat.S_IWUSR):
            raise OSError(errno.EACCES, "its mode does not allow that")
        number = next(self._numbers)
        self._open[number] = OpenFile(node)
        return number

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Return a part of an open file's content."""
        try:
            return self._open[fh].read(size, offset)
        except MdevError as error:
            log.info("%s: %s", path, error)
            raise _told(error) from error

    def write(self, path: str, data: bytes, _offset: int, fh: int) -> int:
        """Store what one system call brings, a page of it at most."""
        data = data[:PAGE]
        try:
            self._open[fh].file.write(data)
        except MdevError as error:
            log.warning("%s: %s", path, error)
            raise _told(error) from error
        return len(data)

    def release(self, _path: str, fh: int) -> int:
        """Forget an open file."""
        self._open.pop(fh, None)
        return 0

    def truncate(self, path: str, _length: int, _fh: int | None = None) -> int:
        """Do nothing: files are opened with O_TRUNC by every shell."""
        self._find(path)
        return 0

    def utimens(self, path: str, _times: tuple[int, int] | None = None) -> int:
        """Do nothing."""
        self._find(path)
        return 0

    # -- what sysfs refuses ----------------------------------------------------------------------------------------

    def create(self, _path: str, _mode: int, _fi: object = None) -> NoReturn:
        """Make no file."""
        raise OSError(errno.EACCES, "files are not made by hand here")

    def _refuse(self, *_arguments: object) -> NoReturn:
        raise OSError(errno.EPERM, "this is not done by hand here")

    mkdir = mknod = symlink = link = unlink = rmdir = rename = chmod = chown = _refuse


def _told(error: MdevError) -> OSError:
    """Return an error the kernel can pass on."""
    number = error.errno or errno.EIO
    if number >= _ERRNO_END:
        number = errno.EIO
    return OSError(number, str(error))
