"""Runs the service: ``python -P -m mdevkit_service --socket PATH``. Users come here through ``mdevkit service start``.

Whoever starts it need not look first whether one runs: the second finds the first, and ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mdevkit.errors import MdevError

from mdevkit_service import forker
from mdevkit_service.settings import (
    ENDPOINT_MODE,
    Settings,
    default_definitions,
    host_environment,
    only_root,
    remember,
    remembered,
)

if TYPE_CHECKING:
    from subprocess import Popen

log = logging.getLogger("mdevkit.service")

#: Seconds we wait for a service that is about to end.
_LOCK_LIMIT: Final = 10.0


def main() -> int:
    """Run the service until it is told to end; 0 also when one runs already."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        options = _parser().parse_args()
        if options.again:
            options = _parser().parse_args(["--socket", str(options.socket), *remembered(options.socket.parent)])
        settings = _settings(options)
        settings.make_folders()
        with contextlib.ExitStack() as stack:
            lock = _lock(settings)
            if lock is None:
                return 0
            remember(settings.runtime, _words(options))
            stack.callback(os.close, lock)
            zygote = forker.spawn(host_environment(settings.shared))
            return _serve(settings, zygote)
    except MdevError as error:
        # The last line, without a time before it: whoever started us shows it to the user.
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdevkit_service", description="The resident service of mdevkit.")
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; its folder is the runtime folder")
    parser.add_argument("--again", action="store_true", help="with the options the last service there had, and no others")
    parser.add_argument("--definitions", type=Path, help="root of the definitions")
    parser.add_argument("--group", help="group whose members may use a service of root's")
    parser.add_argument("--host-user", help="whom hosts of a service of root's run as")
    parser.add_argument("--endpoint-owner", metavar="USER[:GROUP]", help="owner of endpoint sockets")
    parser.add_argument("--endpoint-mode", type=lambda text: int(text, 8), default=ENDPOINT_MODE, help="their mode, octal")
    return parser


def _words(options: argparse.Namespace) -> list[str]:
    """Return what it takes to start a service with these options again, beside the socket."""
    given = {
        "--definitions": options.definitions and options.definitions.absolute(),
        "--group": options.group,
        "--host-user": options.host_user,
        "--endpoint-owner": options.endpoint_owner,
        "--endpoint-mode": f"{options.endpoint_mode:o}" if options.endpoint_mode != ENDPOINT_MODE else None,
    }
    return [str(word) for pair in given.items() if pair[1] is not None for word in pair]


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings; EPERM for those only root can keep."""
    settings = Settings(
        socket=options.socket.absolute(),
        definitions=(options.definitions or default_definitions()).absolute(),
        group=options.group,
        host_user=options.host_user,
        endpoint_owner=options.endpoint_owner,
        endpoint_mode=options.endpoint_mode,
    )
    only_root(settings.shared)
    return settings


def _lock(settings: Settings) -> int | None:
    """Take the runtime folder for ourselves; None when another service serves it. EAGAIN when one neither serves nor ends."""
    fd = os.open(settings.runtime / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + _LOCK_LIMIT
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(os.fsencode(settings.socket))
            os.close(fd)
            return None
        time.sleep(0.02)  # flock has no time limit of its own
    raise MdevError(errno.EAGAIN, f"another service holds {settings.runtime} and does not answer", settings.runtime)


def _serve(settings: Settings, zygote: tuple[socket.socket, Popen[bytes]]) -> int:
    # Imported while the zygote imports what it needs: half a second each.
    from mdevkit_service import server

    group = server.group_id(settings.group)
    passed = server.inherited()
    # Clients may connect from now on; they are answered when we have got so far.
    listener = passed or server.bind(settings.socket, group)
    try:
        asyncio.run(_run(settings, zygote, listener, group))
    finally:
        if passed is None:
            settings.socket.unlink(missing_ok=True)
    return 0


async def _run(settings: Settings, zygote: tuple[socket.socket, Popen[bytes]], listener: socket.socket, group: int | None) -> None:
    from mdevkit_service.app import make_app
    from mdevkit_service.server import Admission, make_server
    from mdevkit_service.service import Service

    processes = forker.Forker(host_environment(settings.shared), zygote)
    service = Service(settings, processes, lambda: server.stop())
    server = make_server(make_app(service), Admission(group), service.journal.close)
    service.start()
    log.info("serving %s", settings.socket)
    try:
        await server.serve(sockets=[listener])
    finally:
        await service.close()
        log.info("ended")


if __name__ == "__main__":
    sys.exit(main())
