"""A TAP on the mvnet loopback, in network namespaces of our own: every frame the host's stack sends comes back as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("tap_ping.py")
#: Root makes a namespace; others are root in one of their own.
UNSHARE = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-Urn"]


@pytest.fixture(scope="module")
def namespaces():
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed: apt-get install iproute2")
    if not Path("/dev/net/tun").exists():
        pytest.skip("there is no /dev/net/tun: modprobe tun")
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces for this user: sysctl kernel.apparmor_restrict_unprivileged_userns=0")


@pytest.mark.parametrize("how", ["process", "command"])
def test_every_frame_of_a_ping_comes_back(namespaces, tmp_path_factory, how):
    folder = tmp_path_factory.mktemp("x")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    done = subprocess.run(
        [*UNSHARE, sys.executable, SCRIPT, how], capture_output=True, text=True, timeout=100, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {"pings": 165, "out": 165, "back": 165, "equal": True}
