"""systemd units: a socket that starts the service on first use, for the system (as root) or for one user.

Run by ``mdevkit service install``. Hosts outlive a service that is stopped or restarted, so only the main process is ended, and
the runtime folder stays.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from mdevkit.errors import MdevError
from mdevkit.paths import SYSTEM_RUNTIME

from mdevkit_service.opener import ids
from mdevkit_service.server import group_id
from mdevkit_service.settings import only_root

_SOCKET: Final = """\
# Written by: mdevkit service install
[Unit]
Description=Control socket of mdevkit

[Socket]
ListenStream={socket}
SocketMode={mode}
{group}DirectoryMode=0755
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""

_SERVICE: Final = """\
# Written by: mdevkit service install
[Unit]
Description=mdevkit: mediated devices
Requires=mdevkit.socket
After=mdevkit.socket

[Service]
ExecStart={command}
Restart=on-failure
# Device hosts go on while the service is stopped, restarted or upgraded.
KillMode=process
RuntimeDirectory=mdevkit
RuntimeDirectoryPreserve=yes
RuntimeDirectoryMode={folder_mode}
UMask=0077

NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6
SystemCallArchitectures=native
{system}
[Install]
WantedBy=default.target
"""

#: What only the system's manager can do. /home and /tmp stay as they are: clients name paths there, opened with their own rights.
_SYSTEM: Final = """\
CapabilityBoundingSet=CAP_SETUID CAP_SETGID CAP_CHOWN CAP_KILL CAP_DAC_OVERRIDE CAP_FOWNER
ProtectSystem=full
ReadWritePaths=-/etc/mdevctl.d
ConfigurationDirectory=mdevctl.d
ConfigurationDirectoryMode=0755
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
"""


def units(options: argparse.Namespace) -> dict[str, str]:
    """Return the units by file name; EINVAL for a user or group there is not, EPERM for what only root's service can have."""
    system = os.getuid() == 0
    only_root(bool(options.group or options.host_user or options.endpoint_owner))
    group_id(options.group)
    words = [
        sys.executable,
        "-P",
        "-m",
        "mdevkit_service",
        "--socket",
        f"{SYSTEM_RUNTIME if system else '%t/mdevkit'}/control.sock",
    ]
    for name, owner in (("--host-user", options.host_user), ("--endpoint-owner", options.endpoint_owner)):
        if owner:
            ids(owner)
            words += [name, owner]
    if options.group:
        words += ["--group", options.group]
    if system:
        words += ["--definitions", "/etc/mdevctl.d"]
    socket = _SOCKET.format(
        socket=words[words.index("--socket") + 1],
        mode="0660" if options.group else "0600",
        group=f"SocketGroup={options.group}\n" if options.group else "",
    )
    service = _SERVICE.format(
        command=" ".join(_quoted(word) for word in words),
        folder_mode="0711" if system else "0700",
        system=_SYSTEM if system else "",
    )
    return {"mdevkit.socket": socket, "mdevkit.service": service}


def _quoted(word: str) -> str:
    """Return a word of ExecStart; specifiers of ours (%t) stay."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if " " in word else escaped


def _folder() -> Path:
    if os.getuid() == 0:
        return Path("/etc/systemd/system")
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def main() -> int:
    """Write the units and say what to do with them."""
    parser = argparse.ArgumentParser(prog="mdevkit service install")
    parser.add_argument("--group")
    parser.add_argument("--host-user")
    parser.add_argument("--endpoint-owner")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder or _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in units(options).items():
            (folder / name).write_text(text)
            sys.stdout.write(f"{folder / name}\n")
    except (MdevError, OSError) as error:
        what = str(error) if isinstance(error, MdevError) else f"{error.filename or folder}: {error.strerror}"
        sys.stderr.write(f"the units cannot be written: {what}\n")
        return 1
    user = "" if os.getuid() == 0 else " --user"
    sys.stderr.write(f"next: systemctl{user} daemon-reload && systemctl{user} enable --now mdevkit.socket\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
