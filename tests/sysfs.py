"""Mounts the tree of sysfs for tests, and works in it as a shell does."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services import wait_until

UUID = "83c32df7-d52e-4ec1-9668-1f3c7e4df107"
OTHER = "c4c5a1a3-2bd4-4f83-8c9e-0a55d0d1b0aa"
DEMO = "devices/virtual/demo/demo0"


@contextmanager
def fails(number):
    with pytest.raises(OSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno] == number, caught.value


def write(path, data):
    """One write(2), as a shell does it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    try:
        return os.write(descriptor, data.encode() if isinstance(data, str) else data)
    finally:
        os.close(descriptor)


class Mount:
    """A mount whose process is ours."""

    def __init__(self, service, folder, *options):
        self.root = folder
        folder.mkdir(exist_ok=True)
        command = [Path(sys.executable).with_name("mdevkit"), "sysfs", "mount", "--foreground", *options, folder]
        self.errors = folder.with_suffix(".log")
        with self.errors.open("ab") as log:
            self.process = subprocess.Popen(command, env=service.environment, stderr=log)
        wait_until(lambda: os.path.ismount(folder) or self.process.poll() is not None, what=f"the mount ({self.said()})")
        assert self.process.poll() is None, self.said()

    def said(self):
        return self.errors.read_text() if self.errors.exists() else ""

    def __truediv__(self, path):
        return self.root / path

    def read(self, path):
        return (self.root / path).read_text()

    def write(self, path, data):
        return write(self.root / path, data)

    def ls(self, path):
        return sorted(node.name for node in (self.root / path).iterdir())

    def create(self, uuid=UUID, type_="demo-small", parent="demo0"):
        self.write(f"class/mdev_bus/{parent}/mdev_supported_types/{type_}/create", uuid)

    def end(self):
        if self.process.poll() is None:
            # A connection without its process fails whoever waits in it: nothing can hang from here on.
            self.process.kill()
            self.process.wait()
        unmount(self.root)


def unmount(folder):
    """Take away whatever is mounted there, however often."""
    while subprocess.run(["umount", "-l", folder], capture_output=True, check=False).returncode == 0:
        pass


def reads(path):
    try:
        return path.read_text()
    except OSError as error:
        return errno.errorcode[error.errno]
