"""``mdevkit screenshot UUID FILE.png``: what a display shows, as a picture file; with ``--watch``, always the latest.

What a display is, core knows by an attribute alone, so that any parent may have some: ``screen_path`` is its screen socket
(`mdevkit.screen`). Pillow makes the file. One thread, the main one.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mdevkit.cli.complete import devices
from mdevkit.cli.remote import find as find_in_service
from mdevkit.cli.remote import running_service
from mdevkit.errors import MdevError
from mdevkit.running import find
from mdevkit.screen import Picture, Screen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

#: The attribute that makes a device a display.
SCREEN_PATH: Final = "screen_path"
#: Seconds between two looks of ``--watch``.
INTERVAL: Final = 0.5


def command(
    uuid: Annotated[
        str, typer.Argument(metavar="UUID", autocompletion=devices, help="The device, or a unique beginning of its UUID.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; .png, or another ending that Pillow knows.")],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Write the file again whenever the picture changes, until Ctrl-C.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.01, metavar="SECONDS", help="How often --watch looks.")] = INTERVAL,
) -> None:
    """Write what a display shows to a picture file."""
    kind = _kind(file)
    with Screen(screen_path(uuid)) as screen:
        if watch:
            _watch(screen, file, kind, interval)
        else:
            _write(image(screen.look()), file, kind)


def screen_path(uuid: str) -> str:
    """Return the screen socket of a running device: ENODEV, EINVAL, EOPNOTSUPP if it is no display, ENOTCONN without a socket."""
    uuid, attributes = _attributes(uuid)
    path = attributes.get(SCREEN_PATH)
    if path is None:
        raise MdevError(errno.EOPNOTSUPP, f"device {uuid} has no display", uuid)
    if not path:
        raise MdevError(errno.ENOTCONN, f"device {uuid} has a display, but lets nobody look (screen_socket)", uuid)
    return path


def _attributes(uuid: str) -> tuple[str, Mapping[str, str]]:
    try:
        facts: Mapping[str, Any] = find(uuid)
    except MdevError as error:
        if error.errno != errno.ENODEV:
            raise
        service = running_service()
        if service is None:
            raise
        with service:
            facts = service.get(f"/v1/devices/{find_in_service(service, uuid)}")
        if facts["error"] and not facts["attributes"]:
            raise MdevError(errno.ENODEV, f"device {facts['uuid']}: {facts['error']}", uuid) from None
    return facts["uuid"], facts["attributes"]


def image(picture: Picture) -> Image:
    """Return a picture as Pillow has them; ENOPKG without Pillow."""
    frame = picture.frame
    # The last row may end before its stride does.
    data = picture.data.ljust(frame.stride * frame.height, b"\0")
    made: Image = _pillow().frombuffer("RGB", (frame.width, frame.height), data, "raw", "BGRX", frame.stride, 1)
    return made


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        message = "pictures need Pillow, which is not installed (pip install 'mdevkit-mbochs[screenshot]')"
        raise MdevError(errno.ENOPKG, message) from None
    return Image


def _kind(file: Path) -> str:
    """Return Pillow's name of the format that a file's ending stands for; a usage error for one it cannot write."""
    pillow = _pillow()
    kind: str | None = pillow.registered_extensions().get(file.suffix.lower())
    if kind is None or kind not in pillow.SAVE:
        raise typer.BadParameter(f"{file} does not say by its ending which format is wanted (.png)")
    return kind


def _watch(screen: Screen, file: Path, kind: str, interval: float) -> None:
    last: Picture | None = None
    while True:
        picture = _look(screen)
        if picture is not None and picture != last:
            _write(image(picture), file, kind)
            last = picture
        time.sleep(interval)  # a guest draws without telling anybody


def _look(screen: Screen) -> Picture | None:
    """Return the picture; None while there is none."""
    try:
        return screen.look()
    except MdevError as error:
        if error.errno != errno.ENODATA:
            raise
    return None


def _write(picture: Image, file: Path, kind: str) -> None:
    """Write the file as a whole, or not at all: whoever reads it never sees half of one."""
    try:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "wb") as output:
                # As any new file, not as private as temporary ones.
                os.fchmod(descriptor, 0o666 & ~_umask())
                picture.save(output, kind)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise MdevError(error.errno or errno.EIO, f"{file} cannot be written: {error.strerror or error}", file) from error


def _umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before
