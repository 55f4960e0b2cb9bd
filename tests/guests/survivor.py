"""A program for tests: forks, at each line on stdin, a process that serves a device through a front, as a host of the service does.

    python -P -m tests.guests.survivor TYPE SOCKET [NAME=VALUE]...

$MDEVKIT_FRONT names the porter's control socket. It prints the pid of each process it has forked, and ``ready`` and the pid once
the device is served. The device has the same UUID each time. The processes go on until they are killed or get SIGTERM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from uuid import UUID

from mdevkit.registry import Registry

_DEVICE = UUID("5c1a9c1e-7a52-4b5e-9a53-0d6f6c1f3a11")


def _serve(registry: Registry, type_id: str, socket: str, params: dict[str, str]) -> None:
    parent = os.getppid()
    with registry:
        registry.create(type_id, uuid=_DEVICE, params=params, endpoint_path=socket)
        sys.stdout.write(f"ready {os.getpid()}\n")
        sys.stdout.flush()
        # Nor does it outlive a test run that was killed.
        while signal.sigtimedwait({signal.SIGTERM}, 1) is None and os.getppid() == parent:
            pass


def main() -> None:
    """See the module."""
    type_id, socket, *settings = sys.argv[1:]
    params = dict(setting.split("=", 1) for setting in settings)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    logging.basicConfig(format="%(process)d %(name)s: %(message)s", level=logging.WARNING)
    registry = Registry.discover()
    # What takes time is imported here, so that a process is there in a few milliseconds.
    with Registry.discover() as warm:
        warm.create(type_id, params=params, endpoint_path=f"{socket}.warm", bind=False)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _serve(registry, type_id, socket, params)
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
