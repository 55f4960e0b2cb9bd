"""Definitions on disk: what devices shall be, in mdevctl's own file format and folder layout: either tool finds the other's.

``<root>/<parent>/<uuid>`` is one device: a JSON object with ``mdev_type``, ``start`` and ``attrs``. Keys beside these are kept as
they are; ``owner`` is one of ours. Several processes and threads use one root at once. A file is replaced in one step, after its
content has reached the disk, so that neither a kill nor a full disk leaves half of one; whoever changes one holds a lock (flock(2))
on the parent's folder, which its death releases. A file that cannot be used is a `BadDefinition`, and hides no other.

Imports little: the mdevctl replacement is started once per command.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from contextlib import contextmanager

from mdevkit.errors import MdevError, shown

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any, Final

#: A stored attribute: one name, one value. The same name may come several times; they are written in order.
Attribute = dict[str, str]

#: The largest definition that is read, in bytes.
SIZE_LIMIT: Final = 1 << 20

#: Not a parent's: mdevctl keeps scripts here.
SCRIPTS: Final = "scripts.d"

_OWN: Final = ("mdev_type", "start", "attrs")
#: One per folder is enough: whoever writes holds the folder's lock.
_TEMPORARY: Final = ".new.tmp"
#: Nanoseconds in which a file can change without its time telling: file systems' clocks are coarse.
_CLOCK: Final = 100_000_000

#: What mdevctl takes for a UUID (the uuid crate's four forms).
_UUID: Final = re.compile(
    r"[0-9a-f]{32}|(urn:uuid:)?H|{H}".replace("H", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), re.IGNORECASE
)


class Definition:
    """What is stored about one device. Does not change."""

    __slots__ = ("_source", "attrs", "extra", "mdev_type", "parent", "path", "start", "uuid")

    def __init__(
        self,
        parent: str,
        uuid: str,
        mdev_type: str,
        start: str = "manual",
        attrs: Sequence[Attribute] = (),
        extra: Mapping[str, Any] | None = None,
        *,
        path: str = "",
        source: bytes | str = "",
    ) -> None:
        self.parent: Final = parent
        self.uuid: Final = uuid
        self.mdev_type: Final = mdev_type
        #: ``auto`` or ``manual``; any other word on disk means the latter.
        self.start: Final = "auto" if start == "auto" else "manual"
        self.attrs: Final = [dict(attribute) for attribute in attrs]
        #: Keys beside those three, as they are.
        self.extra: Final = dict(extra or {})
        #: Where it is stored.
        self.path: Final = path
        self._source: Final = source

    @property
    def tag(self) -> str:
        """What names this content of the file; empty for what is not stored."""
        return _tag(self._source)

    @property
    def auto(self) -> bool:
        """Whether it starts with its parent."""
        return self.start == "auto"

    @property
    def owner(self) -> str | None:
        """A label: whose it is."""
        owner = self.extra.get("owner")
        return owner if isinstance(owner, str) else None

    @property
    def config(self) -> dict[str, Any]:
        """The three keys mdevctl knows."""
        return {"mdev_type": self.mdev_type, "start": self.start, "attrs": self.attrs}

    @property
    def text(self) -> str:
        """What is stored: laid out as mdevctl does."""
        return json.dumps({**self.config, **self.extra}, indent=2, ensure_ascii=False)

    def changed(self, **fields: Any) -> Definition:
        """Return a copy with other ``mdev_type``, ``start``, ``attrs`` or ``extra``."""
        return Definition(self.parent, self.uuid, **{**self.config, "extra": self.extra, **fields})

    def __repr__(self) -> str:
        return f"<Definition {self.parent}/{self.uuid}>"


class BadDefinition:
    """A file among the definitions that cannot be used, and why: `number` is EINVAL for what it says, else what reading it gave."""

    __slots__ = ("_source", "error", "number", "parent", "path", "uuid")

    def __init__(self, parent: str, uuid: str, path: str, error: str, source: bytes | str = "", number: int = errno.EINVAL) -> None:
        self.parent: Final = parent
        #: Its UUID, or the name it has instead.
        self.uuid: Final = uuid
        self.path: Final = path
        self.error: Final = error
        self.number: Final = number
        self._source: Final = source

    @property
    def tag(self) -> str:
        """See `Definition.tag`."""
        return _tag(self._source)

    def __repr__(self) -> str:
        return f"<BadDefinition {self.path}: {self.error}>"


Entry = Definition | BadDefinition
_Stamp = tuple[int, int, int]


def parse(parent: str, uuid: str, text: bytes, *, path: str = "") -> Definition:
    """Return the definition `text` is; EINVAL, in mdevctl's words where it has some."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise MdevError(errno.EINVAL, f"invalid JSON: {reason}", path or None) from None
    return from_config(parent, uuid, value, path=path, source=text)


def from_config(parent: str, uuid: str, value: Any, *, path: str = "", source: bytes | str = "") -> Definition:
    """Return the definition a decoded JSON value is; EINVAL. `source` is what it was decoded from, or the tag of that."""
    if not isinstance(value, dict) or "mdev_type" not in value or "start" not in value:
        raise MdevError(errno.EINVAL, "invalid json: an object with mdev_type and start is wanted", path or None)
    for name in ("mdev_type", "start"):
        if not isinstance(value[name], str):
            raise MdevError(errno.EINVAL, f"invalid json: {name} must be text, not {shown(value[name])}", path or None)
    attrs = check_attributes(value.get("attrs"))
    extra = {name: other for name, other in value.items() if name not in _OWN}
    return Definition(parent, uuid, value["mdev_type"], value["start"], attrs, extra, path=path, source=source)


def check_attributes(value: Any) -> list[Attribute]:
    """Return the attributes a decoded JSON value is, none for null; EINVAL in mdevctl's words."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MdevError(errno.EINVAL, "attributes field is not an array")
    return [_attribute(item) for item in value]


def _attribute(item: Any) -> Attribute:
    prefix = "invalid JSON format for attribute"
    if not isinstance(item, dict):
        raise MdevError(errno.EINVAL, f"{prefix}: not an object")
    if len(item) != 1:
        raise MdevError(errno.EINVAL, f"{prefix}: too many fields")
    [(name, value)] = item.items()
    if not isinstance(value, str):
        raise MdevError(errno.EINVAL, f'{prefix} {{"{name}", {json.dumps(value)}}}: value must be of type str')
    return {name: value}


def check_parent(name: str) -> str:
    """Return a parent's name if it can be the name of a folder; EINVAL."""
    if not name or name.startswith(".") or name == SCRIPTS or "/" in name or "\0" in name:
        raise MdevError(errno.EINVAL, f"{shown(name)} is not the name of a parent", name)
    return name


class Definitions:
    """The definitions below `root`, which need not exist. Any thread may call."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root: Final = os.fspath(root)
        #: Path to the file's stamp and what it said; what has not changed is not read again. Single steps on it are atomic.
        self._cache: Final[dict[str, tuple[_Stamp, Entry]]] = {}

    # -- looking -------------------------------------------------------------------------------------------------------

    def entries(self, parent: str | None = None) -> list[Entry]:
        """Return every definition (of a parent), by parent and UUID, as they are now; only files that changed are read."""
        parents = self._parents() if parent is None else [parent]
        found = [entry for name in parents for entry in self._folder(name)]
        if parent is None:
            for path in {*list(self._cache)} - {entry.path for entry in found}:
                self._cache.pop(path, None)
        return found

    def find(self, uuid: str, parent: str | None = None) -> list[Entry]:
        """Return the definitions of a device, one per parent that has one. Does not look at others."""
        parents = self._parents() if parent is None else [parent]
        return [entry for name in parents if (entry := self._read(name, uuid)) is not None]

    def get(self, parent: str, uuid: str) -> Definition:
        """Return a definition: ENODEV when there is none, EINVAL with the path for one that cannot be used."""
        entry = self._read(check_parent(parent), uuid)
        if entry is None:
            raise MdevError(errno.ENODEV, f"Mediated device {parent}/{uuid} is not defined", uuid)
        return usable(entry)

    def _parents(self) -> list[str]:
        try:
            names = os.listdir(self.root)  # noqa: PTH208  (pathlib takes as long to import as all else here)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed(error, f"the definitions in {self.root} cannot be listed", self.root) from error
        return sorted((name for name in names if not name.startswith(".") and name != SCRIPTS), key=os.fsencode)

    def _folder(self, parent: str) -> list[Entry]:
        """Return the definitions of one parent; a folder that cannot be read is told of as a file would be."""
        try:
            folder = self._path(parent)
            with os.scandir(folder) as files:
                names = sorted(file.name for file in files if not file.name.startswith(".") and not file.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            return [BadDefinition(parent, "", self._path(parent), f"the folder cannot be read: {error.strerror}")]
        return [entry for name in names if (entry := self._read(parent, name)) is not None]

    def _path(self, parent: str, name: str = "") -> str:
        return os.path.join(self.root, check_parent(parent), name) if name else os.path.join(self.root, check_parent(parent))  # noqa: PTH118

    def _read(self, parent: str, name: str) -> Entry | None:
        """Return what a file says, None when there is none."""
        path = self._path(parent, name)
        try:
            known = self._cache.get(path)
            if known is not None and known[0] == _stamp(os.stat(path)):  # noqa: PTH116
                return known[1]
            entry, stamp = _load(parent, name, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            return BadDefinition(parent, name, path, f"it cannot be read: {error.strerror}", number=error.errno or errno.EIO)
        if time.time_ns() - stamp[1] > _CLOCK:
            self._cache[path] = stamp, entry
        return entry

    # -- changing ------------------------------------------------------------------------------------------------------

    def put(self, definition: Definition, *, create: bool = False, tag: str | None = None) -> Definition:
        """Store a definition and return it as stored. When this returns, it is on disk.

        EEXIST with `create` when there is one; EAGAIN when the one there is is not the one `tag` names; EINVAL for a parent's name
        or a text that cannot be stored; ENOSPC, EROFS and the like with the path: what was there before is there still.
        """

        def store(current: Entry | None) -> Definition:
            check_current(current, definition.parent, definition.uuid, create=create, tag=tag)
            return definition

        return self.update(definition.parent, definition.uuid, store)

    def update(self, parent: str, uuid: str, change: Callable[[Entry | None], Definition]) -> Definition:
        """Store what `change` makes of the current definition, and return it as stored; nobody else changes it meanwhile.

        `change` gets None when there is none, and whatever it raises leaves all as it was. See `put` for the errors.
        """
        path = self._path(parent, uuid)
        _check_name(uuid)
        with self._folder_locked(parent, make=True) as folder:
            definition = change(self._read(parent, uuid))
            try:
                data = definition.text.encode()
            except UnicodeEncodeError:
                raise MdevError(errno.EINVAL, f"definition {parent}/{uuid}: it is not text that UTF-8 can hold", path) from None
            with _telling(f"definition {parent}/{uuid} cannot be stored", path):
                _replace(folder, uuid, data)
        stored = self._read(parent, uuid)
        return stored if isinstance(stored, Definition) else definition

    def remove(self, parent: str, uuid: str, *, tag: str | None = None) -> None:
        """Remove a definition, whatever is wrong with it: ENODEV when there is none, EAGAIN when `tag` names another, EROFS."""
        path = self._path(parent, uuid)
        with self._folder_locked(parent, make=False) as folder:
            current = self._read(parent, uuid)
            if current is None or folder < 0:
                raise MdevError(errno.ENODEV, f"Mediated device {parent}/{uuid} is not defined", uuid)
            check_current(current, parent, uuid, tag=tag)
            with _telling(f"definition {parent}/{uuid} cannot be removed", path):
                os.unlink(uuid, dir_fd=folder)
                os.fsync(folder)

    @contextmanager
    def _folder_locked(self, parent: str, *, make: bool) -> Iterator[int]:
        """Hold a parent's folder and give its descriptor; -1 when there is none and none is to be made."""
        path = self._path(parent)
        with _telling(f"definitions of {parent} cannot be changed", path):
            folder = _lock_folder(path, make=make)
        try:
            yield folder
        finally:
            if folder >= 0:
                os.close(folder)


def usable(entry: Entry) -> Definition:
    """Return an entry that is a definition; EINVAL with its path for one that cannot be used, or why it cannot be read."""
    if isinstance(entry, BadDefinition):
        raise MdevError(entry.number, f"{entry.path}: {entry.error}", entry.path)
    return entry


def already_defined(parent: str, uuid: str, entry: Entry | None = None) -> MdevError:
    """Return the error for a definition that is there already; of an entry that cannot be read nobody can tell that."""
    if isinstance(entry, BadDefinition) and entry.number != errno.EINVAL:
        return MdevError(entry.number, f"{entry.path}: {entry.error}", entry.path)
    return MdevError(errno.EEXIST, f"Device {uuid} on {parent} already defined", uuid)


def check_current(current: Entry | None, parent: str, uuid: str, *, create: bool = False, tag: str | None = None) -> None:
    """Raise EEXIST with `create` when there is a definition, EAGAIN when `tag` names another than the one there is."""
    if create and current is not None:
        raise already_defined(parent, uuid, current)
    if tag is not None and tag != (current.tag if current else ""):
        message = f"definition {parent}/{uuid} has been changed by somebody else meanwhile; try again"
        raise MdevError(errno.EAGAIN, message, uuid)


def _check_name(uuid: str) -> None:
    if not uuid or uuid_of(uuid) != uuid:
        raise MdevError(errno.EINVAL, f"{shown(uuid)} is not a UUID in its usual form", uuid)


def uuid_of(text: str) -> str:
    """Return a UUID in its usual form, given in any form mdevctl takes; empty when it is none."""
    if not _UUID.fullmatch(text):
        return ""
    digits = "".join(char for char in text.lower().removeprefix("urn:uuid:") if char not in "{-}")
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _tag(source: bytes | str) -> str:
    """Return what names a content: a hash, or the name we were told."""
    if isinstance(source, str):
        return source
    from hashlib import blake2b

    return blake2b(source, digest_size=8).hexdigest()


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _load(parent: str, name: str, path: str) -> tuple[Entry, _Stamp]:
    """Read a file. It may be anything: nothing here waits for a writer, and nothing large is read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        wrong = _wrong(name, status)
        data = b"" if wrong else _read_all(fd)
    finally:
        os.close(fd)
    if wrong:
        return BadDefinition(parent, name, path, wrong, data), _stamp(status)
    try:
        return parse(parent, name, data, path=path), _stamp(status)
    except MdevError as error:
        return BadDefinition(parent, name, path, str(error), data), _stamp(status)


def _read_all(fd: int) -> bytes:
    chunks = []
    while chunk := os.read(fd, SIZE_LIMIT):
        chunks.append(chunk)
    return b"".join(chunks)


def _wrong(name: str, status: os.stat_result) -> str:
    """Tell what is wrong with a file before it is read."""
    uuid = uuid_of(name)
    if not uuid:
        return "its name is not a UUID"
    if uuid != name:
        return f"its name is not the UUID's usual form; rename it to {uuid}"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a file"
    return f"it is larger than {SIZE_LIMIT} bytes" if status.st_size > SIZE_LIMIT else ""


def _lock_folder(path: str, *, make: bool) -> int:
    """Return a descriptor of a folder that we hold alone; -1 when there is none."""
    import fcntl

    while True:
        if make:
            _make_folders(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if make:
                continue
            return -1
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), os.stat(path)):  # noqa: PTH116
                return fd
        except FileNotFoundError:
            pass  # somebody removed the folder while we waited
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _make_folders(path: str) -> None:
    """Make a folder and those it is in, so that they outlast a crash too."""
    if os.path.isdir(path):  # noqa: PTH112
        return
    above = os.path.dirname(path)  # noqa: PTH120
    _make_folders(above)
    try:
        os.mkdir(path)  # noqa: PTH102
    except FileExistsError:
        if not os.path.isdir(path):  # noqa: PTH112
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return
    fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace(folder: int, name: str, data: bytes) -> None:
    """Put a file in another's place in one step, once it is on disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(_TEMPORARY, flags, 0o644, dir_fd=folder)
    try:
        try:
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(_TEMPORARY, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(_TEMPORARY, dir_fd=folder)
            raise
    finally:
        os.fsync(folder)


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def _telling(what: str, path: str) -> Iterator[None]:
    """Make an operating system's error one that says what could not be done, and where."""
    try:
        yield
    except MdevError:
        raise
    except OSError as error:
        raise _failed(error, what, path) from error


def _failed(error: OSError, what: str, path: str) -> MdevError:
    return MdevError(error.errno or errno.EIO, f"{what}: {path}: {error.strerror}", path)
