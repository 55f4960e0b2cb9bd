"""Distributions made up on the spot, and runs of pytest and of ``mdevkit`` that see them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: A vendor that passes, to be broken by what a test appends.
VENDOR = (Path(__file__).parent / "vendors" / "simple.py").read_text()


@pytest.fixture
def distribution(tmp_path) -> Callable[..., Path]:
    """Install a distribution `name` 1.0 in a folder, which is returned: `modules` by name, `entry_points` as in its file."""
    folder = tmp_path / "site"

    def make(name: str, entry_points: str, **modules: str) -> Path:
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)
        return folder

    return make


@pytest.fixture
def vendor(distribution) -> Callable[[str], Path]:
    """Install ``mdevkit-simple``, whose parent is made by `code`, which follows the good vendor's."""

    def make(code: str) -> Path:
        return distribution("mdevkit-simple", "[mdevkit.parents]\nsimple = simple_plugin:Parent\n", simple_plugin=VENDOR + code)

    return make


@pytest.fixture
def python(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with arguments, in an empty folder; `site` is a folder of made-up distributions, other options are variables."""
    folder = tmp_path / "cwd"
    folder.mkdir()

    def run(*arguments: str, site: Path | str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), **variables}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # would compile everything at each start
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False)

    return run


@pytest.fixture
def check(python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``mdevkit plugin check``."""
    return lambda *arguments, **options: python("-m", "mdevkit", "plugin", "check", *arguments, **options)
