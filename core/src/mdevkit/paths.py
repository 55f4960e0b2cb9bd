"""Where this user's running parts keep their sockets and notes. Imports little: quick commands look here first."""

from __future__ import annotations

import errno
import os
import stat

from mdevkit.errors import MdevError

TYPE_CHECKING = False  # typing takes as long to import as a quick command may take for everything
if TYPE_CHECKING:
    from pathlib import Path

#: Where the system's service is, for users whom its group admits.
SYSTEM_RUNTIME = "/run/mdevkit"


def runtime_path() -> str:
    """Return the folder for sockets, which may not exist.

    $MDEVKIT_RUNTIME_DIR, else $XDG_RUNTIME_DIR/mdevkit, else one of this user's in the temporary folder.
    """
    named, base = os.environ.get("MDEVKIT_RUNTIME_DIR"), os.environ.get("XDG_RUNTIME_DIR")
    if named:
        return named
    if base:
        return os.path.join(base, "mdevkit")  # noqa: PTH118
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"mdevkit-{os.getuid()}")  # noqa: PTH118


def runtime_dir() -> Path:
    """Return the folder for sockets, made if need be; see `runtime_path`.

    EPERM when somebody else owns it or others may write there: in a folder everybody can write, a name of ours may be a trap.
    """
    from pathlib import Path

    folder = Path(runtime_path())
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"{folder} cannot be made: {error.strerror}", folder) from error
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise MdevError(
            errno.EPERM, f"{folder} is not a folder of this user that nobody else can write; set XDG_RUNTIME_DIR", folder
        )
    return folder


def control_socket() -> str:
    """Return where the service listens.

    $MDEVKIT_SOCKET, else ``control.sock`` in this user's folder; the system's if that is one this user may connect to and there is
    none of his own.
    """
    named = os.environ.get("MDEVKIT_SOCKET")
    if named:
        return named
    own, system = f"{runtime_path()}/control.sock", f"{SYSTEM_RUNTIME}/control.sock"
    given = "MDEVKIT_RUNTIME_DIR" in os.environ or os.path.exists(own)  # noqa: PTH110
    return system if not given and os.access(system, os.W_OK) else own
