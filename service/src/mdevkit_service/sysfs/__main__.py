"""Serves one mount: ``python -P -m mdevkit_service.sysfs --socket PATH DIR``, until it is unmounted or gets SIGTERM or SIGINT.

With ``--ready FD`` it writes there once the mount can be used, or why there is none: an errno and a sentence.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from mdevkit.errors import MdevError

from mdevkit_service.sysfs.calls import Calls
from mdevkit_service.sysfs.follower import Follower
from mdevkit_service.sysfs.places import Pci
from mdevkit_service.sysfs.tree import System, Tree
from mdevkit_service.sysfs.uevents import Announcer, Herald
from mdevkit_service.sysfs.view import View

log = logging.getLogger("mdevkit.sysfs")

#: Requests carried out at once: a vendor that takes its time holds up one.
_THREADS: Final = 64
_IDLE_THREADS: Final = 10
#: What libfuse returns when a signal has ended it, after it has unmounted (lib/helper.c, fuse_main_real).
_ENDED: Final = 8
#: Seconds the kernel may remember size and mode, which never change; names it looks up each time.
_ATTR_TIMEOUT: Final = 3600


def main() -> int:
    """Serve a mount until it ends."""
    options = _parser().parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    logging.getLogger("fuse").setLevel(logging.CRITICAL)  # mfusepy reports each errno there
    try:
        _serve(options)
    except MdevError as error:
        _say(options.ready, f"{error.errno} {error}")
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mdevkit_service.sysfs", description="The tree of sysfs over the service's devices.")
    parser.add_argument("--socket", required=True, help="where the service listens")
    parser.add_argument(
        "--pci", action="append", default=[], metavar="PARENT=ADDRESS[,VENDOR:DEVICE]", help="a parent that looks so"
    )
    parser.add_argument("--udev", action="store_true", help="tell libudev's listeners of devices; root only")
    parser.add_argument("--ready", type=int, default=-1, metavar="FD", help="where to say that the mount is there")
    parser.add_argument("folder", type=Path)
    return parser


def _say(descriptor: int, sentence: str) -> None:
    """Tell whoever started us, once."""
    if descriptor >= 0:
        with contextlib.suppress(OSError):
            os.write(descriptor, sentence.encode())
            os.close(descriptor)


def _serve(options: argparse.Namespace) -> None:
    _check(options.folder)
    calls = Calls(options.socket)
    view = View(calls)
    announcer = Announcer() if options.udev else None
    system = System(view, _looks(view, options.pci), announcer)
    follower = Follower(calls, view, Herald(system, announcer) if announcer else None)

    def mounted() -> None:
        follower.start()
        log.info("mounted on %s", options.folder)
        _say(options.ready, "0 mounted")

    _mount(Tree(system), options.folder, mounted)
    log.info("unmounted from %s", options.folder)


def _check(folder: Path) -> None:
    """Find what libfuse would say less clearly."""
    try:
        found = folder.is_dir()
        # The kernel remembers the folder of a mount that is dead; what is in it has to be asked for.
        next(folder.iterdir() if found else iter(()), None)
    except OSError as error:
        message = f"{folder} cannot be used: {error.strerror} (a mount whose process has died? mdevkit sysfs umount {folder})"
        raise MdevError(error.errno or errno.EIO, message, folder) from error
    if not found:
        raise MdevError(errno.ENOTDIR, f"{folder} is not a folder", folder)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MdevError(errno.ENODEV, "/dev/fuse is not there or not ours to use: FUSE is missing (modprobe fuse)", folder)
    if os.geteuid() != 0 and shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        raise MdevError(errno.ENOPKG, "fusermount3 is missing (apt-get install fuse3)", folder)


def _looks(view: View, wanted: list[str]) -> list[Pci]:
    """Return how parents are to look; EINVAL for two at one address, ENODEV for a parent there is not."""
    looks = [Pci.parse(text) for text in wanted]
    if len({one.address for one in looks}) < len(looks) or len({one.parent for one in looks}) < len(looks):
        raise MdevError(errno.EINVAL, "each parent has one PCI address, and each address one parent")
    parents = view.parents()
    for one in looks:
        if one.parent not in parents:
            raise MdevError(errno.ENODEV, f"there is no parent {one.parent!r} (there are: {', '.join(parents) or 'none'})")
    return looks


def _mount(tree: Tree, folder: Path, mounted: Any) -> None:
    """Be the file system on `folder` until it is unmounted."""
    try:
        import mfusepy  # type: ignore[import-untyped]  # it brings no type hints
    except OSError:
        raise MdevError(errno.ENOPKG, "libfuse is missing (apt-get install fuse3)") from None
    from mdevkit_service.sysfs.filesystem import Filesystem

    options: dict[str, Any] = {}
    if (mfusepy.fuse_version_major, mfusepy.fuse_version_minor) >= (3, 12):
        options |= {"max_threads": _THREADS, "max_idle_threads": _IDLE_THREADS}
    try:
        mfusepy.FUSE(
            Filesystem(tree, mounted),
            str(folder),
            foreground=True,
            fsname="mdevkit",
            subtype="mdevkit-sysfs",
            # The kernel checks modes, and lets others in for root only.
            default_permissions=True,
            allow_other=os.geteuid() == 0,
            nosuid=True,
            nodev=True,
            noexec=True,
            direct_io=True,
            attr_timeout=_ATTR_TIMEOUT,
            entry_timeout=0,
            negative_timeout=0,
            **options,
        )
    except RuntimeError as error:
        if error.args != (_ENDED,):
            # libfuse has written the reason on stderr, and tells us nothing but a number.
            raise SystemExit(f"libfuse ended with {error}") from error


if __name__ == "__main__":
    sys.exit(main())
