"""The demo a newcomer runs first, on a machine that can boot a guest and on one that cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(tmp_path, tmp_path_factory):
    """Runs the demo to its end, and checks that it succeeded and left nothing where temporary files go."""
    # A folder of a test's name is too deep for a socket's path.
    runtime = tmp_path_factory.mktemp("d")
    runtime.chmod(0o700)

    def run(**environment):
        done = subprocess.run(
            [sys.executable, "-m", "tests.demo"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(runtime), **environment},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert [path for folder in (tmp_path, runtime) for path in folder.rglob("*") if not path.is_dir()] == []
        return done.stdout

    return run


def test_in_a_guest(demo, kit):
    output = demo()
    assert f"QEMU {kit.version()} boots" in output
    assert len(re.findall(r"its driver: \S+: ttyS[12] at I/O .* is a 16550A\n", output)) == 2
    assert len(re.findall(r"/dev/ttyS[12]: sent 'Hello from the guest\\n', came back 'Hello from the guest\\n'\n", output)) == 2
    assert "both at once: identical" in output


def test_without_a_guest(demo, tmp_path):
    output = demo(MDEVKIT_CACHE=str(tmp_path / "none"), PATH=str(tmp_path))
    assert "no guest can boot here, for want of QEMU 10.1 or newer" in output
    assert "./dev guests" in output
    assert "sees PCI device 4348:3253" in output
    assert len(re.findall(r"port [01]: sent 'Hello from the guest\\n', came back 'Hello from the guest\\n'", output)) == 2
