"""The manual's page about virtio devices: its example runs as it is printed, and its tables name what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mdevkit_testkit import VirtioSuite
from mdevkit_virtio.config import ConfigSpace
from mdevkit_virtio.model import VirtioModel
from mdevkit_virtio.queue import Buffer, Virtqueue
from mdevkit_virtio.workers import BufferWorker

PAGE = Path(__file__).parents[3] / "docs" / "virtio.md"


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_example_runs(blocks, no_leaks):
    assert VirtioSuite.title  # imported now, it is not imported by the page, while leaks are looked for
    names = {"__name__": "entropy"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["given"] == 32


def test_the_example_passes_the_suite(blocks, tmp_path):
    (tmp_path / "test_entropy.py").write_text("\n\n".join(blocks[:3]))
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^4\d passed", done.stdout, re.MULTILINE), done.stdout


def test_what_the_page_names_exists():
    text = PAGE.read_text(encoding="utf-8")
    hooks = re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE)
    assert len(hooks) == 7
    for name in [*hooks, "lock", "accepted", "running", "error", "changing", "update_config", "device_id", "vendor_id", "vq_align"]:
        assert name in {*dir(VirtioModel), "lock"}, name
    named = {(owner, name) for owner, name in re.findall(r"`(queue|buffer|BufferWorker|self\.config)\.(\w+)", text)}
    owners = {"queue": Virtqueue, "buffer": Buffer, "BufferWorker": BufferWorker, "self.config": ConfigSpace}
    assert named
    for owner, name in named:
        assert hasattr(owners[owner], name), f"{owner}.{name}"
