"""Where the service keeps things, and what it lets its processes see. Read once, when the service starts."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec
from mdevkit.errors import MdevError
from mdevkit.sockets import MAX_PATH

from mdevkit_service.opener import ids

log = logging.getLogger("mdevkit.service")

#: What sockets of its own a device can have, behind the same name: its endpoint, and what shows its screen.
OWN_SOCKETS: Final = (".sock", ".screen")
#: Bytes that come after the runtime folder in the longest path of a socket: ``/devices/<uuid>.sock``.
_LONGEST: Final = len("/devices/") + 36 + len(".screen")
#: The longest host key that is a file name as it is; a longer one is abbreviated by a hash.
_KEY_MAX: Final = 32

#: Where a service's options are kept, in its runtime folder.
_OPTIONS: Final = "options.json"

#: The mode of endpoint sockets unless another is asked for.
ENDPOINT_MODE: Final = 0o600

#: What a host sees of the environment of whoever started the service.
_KEPT: Final = frozenset(
    {
        "HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
        "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How one service runs."""

    #: Path of the control socket; its folder is the runtime folder.
    socket: Path
    #: Root of the definitions.
    definitions: Path
    #: Name of the group whose members may use the service, for one that runs as root.
    group: str | None = None
    #: Whom hosts run as, for a service that runs as root.
    host_user: str | None = None
    #: Owner and group of endpoint sockets ("qemu:kvm"), and their mode.
    endpoint_owner: str | None = None
    endpoint_mode: int = ENDPOINT_MODE

    @property
    def runtime(self) -> Path:
        """The folder of sockets, locks and records."""
        return self.socket.parent

    @property
    def hosts(self) -> Path:
        """Sockets, locks and logs of hosts."""
        return self.runtime / "hosts"

    @property
    def devices(self) -> Path:
        """Records and endpoint sockets of devices."""
        return self.runtime / "devices"

    @property
    def shared(self) -> bool:
        """Whether others than our user are to use the service or its devices; only root can have that."""
        return bool(self.group) or not self.ordinary

    @property
    def ordinary(self) -> bool:
        """Whether devices' own sockets are as our user makes them, in hosts that are our user's."""
        return not (self.host_user or self.endpoint_owner) and self.endpoint_mode == ENDPOINT_MODE

    @property
    def host_ids(self) -> dict[str, Any]:
        """The ids hosts run with, empty for our own; EINVAL for a user there is not."""
        if self.host_user is None:
            return {}
        uid, gid = ids(self.host_user)
        return {"uid": uid, "gid": gid, "groups": []}

    def host_file(self, key: str, suffix: str) -> Path:
        """Return a file of the host with that key."""
        return self.hosts / (file_name(key) + suffix)

    def make_folders(self) -> None:
        """Make the runtime folder and what is in it: EPERM when others could write there, ENAMETOOLONG for too long a path."""
        if len(os.fsencode(self.runtime)) + _LONGEST > MAX_PATH:
            limit = MAX_PATH - _LONGEST
            raise MdevError(errno.ENAMETOOLONG, f"{self.runtime} is too long for the sockets in it: {limit} bytes at most")
        mode = 0o711 if self.shared else 0o700
        _make(self.runtime, mode)
        _make(self.devices, mode)
        _make(self.hosts, 0o700, self.host_ids)


def _make(folder: Path, mode: int, owner: Mapping[str, Any] | None = None) -> None:
    """Make a folder of ours or of `owner`, or see that it is one and that nobody else can write there."""
    uid, gid = (owner["uid"], owner["gid"]) if owner else (os.getuid(), os.getgid())
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in {uid, os.getuid()} or status.st_mode & 0o022:
            raise MdevError(errno.EPERM, f"{folder} is not a folder of this user that nobody else can write", folder)
        if owner and status.st_uid != uid:
            os.chown(folder, uid, gid)
        if mode & ~status.st_mode:
            folder.chmod(mode)
    except MdevError:
        raise
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"{folder} cannot be made: {error.strerror}", folder) from error


def only_root(asked: bool) -> None:
    """Refuse, with EPERM, what is asked of a service that is not root's: that others use it or its devices."""
    if asked and os.getuid() != 0:
        message = "a group, a host user, and an owner or mode of endpoints are for a service of root's; a user's is for him alone"
        raise MdevError(errno.EPERM, message)


def remember(runtime: Path, options: Sequence[str]) -> None:
    """Note with which options the service of a folder was started: one that a command starts again has them too.

    A service whose note cannot be written serves all the same.
    """
    note = runtime / _OPTIONS
    try:
        if not options:
            note.unlink(missing_ok=True)
        else:
            fresh = note.with_suffix(".tmp")
            fresh.write_bytes(msgspec.json.encode(options))
            fresh.replace(note)
    except OSError as error:
        log.error("%s cannot be written: %s", note, error.strerror)


def remembered(runtime: Path) -> list[str]:
    """Return what `remember` has noted; EINVAL for a note that is none."""
    note = runtime / _OPTIONS
    try:
        return msgspec.json.decode(note.read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        hint = "mdevkit service start makes it anew"
        raise MdevError(errno.EINVAL, f"{note}, the options of the last service, cannot be read: {error}; {hint}", note) from error


def endpoint_in(folder: str, uuid: str) -> str:
    """Return where a device's endpoint is unless another path was asked for."""
    return f"{folder}/{uuid}{OWN_SOCKETS[0]}"


def own_sockets(endpoint: str) -> list[str]:
    """Return the paths of the sockets a device has without more being asked for: its endpoint's, and those beside it."""
    base, _ = os.path.splitext(Path(endpoint))  # noqa: PTH122  (a path without a name has no stem)
    return [str(Path(endpoint)), *(base + suffix for suffix in OWN_SOCKETS[1:])]


def file_name(key: str) -> str:
    """Return a file name for a host key, the key itself where that will do."""
    name = quote(key, safe=":@+,=")
    if name.startswith(".") or len(name) > _KEY_MAX:
        name = hashlib.sha256(key.encode()).hexdigest()[:_KEY_MAX]
    return name


def default_definitions(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the root of the definitions: $MDEVKIT_DEFINITIONS, else in $XDG_STATE_HOME; root's is mdevctl's own."""
    named = environment.get("MDEVKIT_DEFINITIONS")
    if named:
        return Path(named)
    state = environment.get("XDG_STATE_HOME")
    if not state and os.getuid() == 0:
        return Path("/etc/mdevctl.d")
    return (Path(state) if state else Path.home() / ".local/state") / "mdevkit" / "mdevctl.d"


def host_environment(system: bool, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what hosts see of the environment. A user's own service passes PYTHONPATH on: his plugins may be there."""
    own = set() if system else {"PYTHONPATH"}
    return {
        name: value for name, value in environment.items() if name in _KEPT or name in own or name.startswith(("MDEVKIT_", "LC_"))
    }
