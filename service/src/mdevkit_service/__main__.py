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
        where, words = _where().parse_known_args()
        if where.again:
            words = remembered(where.socket.parent)
        settings = _settings(_parser().parse_args(words), where.socket)
        settings.make_folders()
        with contextlib.ExitStack() as stack:
            lock = _lock(settings)
            if lock is None:
                return 0
            stack.callback(os.close, lock)
            zygote = forker.spawn(host_environment(settings.shared))
            return _serve(settings, zygote, words)
    except MdevError as error:
        # The last line, without a time before it: whoever started us shows it to the user.
        sys.stderr.write(f"{error}\n")
        return 1


def _where() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdevkit_service", add_help=False, allow_abbrev=False)
    parser.add_argument("--socket", type=Path, required=True, help="where to listen; its folder is the runtime folder")
    parser.add_argument("--again", action="store_true", help="with the options the last service there had, and no others")
    return parser


def _parser() -> argparse.ArgumentParser:
    """Return the parser of what is remembered for a service that is started again."""
    parser = argparse.ArgumentParser(prog="mdevkit_service", description="The resident service of mdevkit.")
    parser.add_argument("--definitions", type=Path, help="root of the definitions")
    parser.add_argument("--group", help="group whose members may use a service of root's")
    parser.add_argument("--host-user", help="whom hosts of a service of root's run as")
    parser.add_argument("--endpoint-owner", metavar="USER[:GROUP]", help="owner of endpoint sockets")
    parser.add_argument("--endpoint-mode", type=lambda text: int(text, 8), default=ENDPOINT_MODE, help="their mode, octal")
    return parser


def _settings(options: argparse.Namespace, path: Path) -> Settings:
    """Return the settings; EPERM for those only root can keep."""
    settings = Settings(
        socket=path.absolute(),
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


def _serve(settings: Settings, zygote: tuple[socket.socket, Popen[bytes]], words: list[str]) -> int:
    # Imported while the zygote imports what it needs: half a second each.
    from mdevkit_service import server

    group = server.group_id(settings.group)
    passed = server.inherited()
    # Clients may connect from now on; they are answered when we have got so far.
    listener = passed or server.bind(settings.socket, group)
    # Not before it is certain that they can be used.
    remember(settings.runtime, words)
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
