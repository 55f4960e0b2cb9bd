"""Under ``-n`` a test marked `alone` has the machine for itself, and the others still run side by side."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = """
import os, pathlib, time
import pytest

here = pathlib.Path(__file__)
busy = here.with_name("busy")
ours, theirs = here.with_suffix(".there"), here.with_name({other!r}).with_suffix(".there")

@pytest.fixture(autouse=True, scope="module")
def watch():
    assert not busy.exists()
    yield
    assert not busy.exists()

def test_both_files_run_at_once():
    ours.touch()
    end = time.monotonic() + 30
    while not theirs.exists():
        assert time.monotonic() < end
        time.sleep(0.01)

@pytest.mark.alone
@pytest.mark.parametrize("number", range(5))
def test_alone(number):
    os.close(os.open(busy, os.O_CREAT | os.O_EXCL))
    time.sleep(0.05)
    busy.unlink()

@pytest.mark.parametrize("number", range(20))
def test_beside_others(number):
    assert not busy.exists()
    time.sleep(0.02)
    assert not busy.exists()
"""


def test_a_test_marked_alone_has_nothing_beside_it(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--strict-markers"]\n')
    (tmp_path / "test_one.py").write_text(TESTS.format(other="test_two.py"))
    (tmp_path / "test_two.py").write_text(TESTS.format(other="test_one.py"))
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert "52 passed" in done.stdout, done.stdout + done.stderr
