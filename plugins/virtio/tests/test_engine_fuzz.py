"""The C engine under AddressSanitizer and UndefinedBehaviorSanitizer, fuzzed; CI gives it more time with MDEVKIT_FUZZ_SECONDS."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "fuzz" / "run"
SECONDS = int(os.environ.get("MDEVKIT_FUZZ_SECONDS", "3"))


@pytest.mark.timeout(SECONDS + 100)
def test_the_engine_survives_random_rings():
    if shutil.which("gcc") is None:
        pytest.skip("no compiler: apt-get install gcc libc6-dev")
    done = subprocess.run([RUN, str(SECONDS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reached = {name: int(value) for name, value in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}
    assert min(reached["moved"], reached["taken"]) > 1000, done.stdout
    assert reached["truncated"] > 0
    assert all(reached[f"fault {number}"] for number in range(1, 11)), f"a check was never reached: {done.stdout}"
