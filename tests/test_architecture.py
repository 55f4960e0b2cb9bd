"""The import contracts of pyproject.toml hold, and they cover every distribution of the workspace."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _toml(path: str) -> dict:
    return tomllib.loads((ROOT / path).read_text())


def _members() -> list[str]:
    return _toml("pyproject.toml")["tool"]["uv"]["workspace"]["members"]


def _import_name(member: str) -> str:
    return _toml(f"{member}/pyproject.toml")["project"]["name"].replace("-", "_")


@pytest.fixture(scope="module")
def rules() -> dict:
    return _toml("pyproject.toml")["tool"]["importlinter"]


def _lint(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", program, "--no-cache", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_contract_is_kept():
    done = _lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_arrow_that_points_up_is_noticed(tmp_path, rules):
    """The linter would see core import a parent: the same contracts, on packages that break them."""
    for package in rules["root_packages"]:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "mdevkit" / "__init__.py").write_text("import mdevkit_mtty\n")
    config = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(config)
    done = _lint(tmp_path)
    assert done.returncode == 1
    assert "mdevkit -> mdevkit_mtty" in done.stdout


def test_contracts_cover_every_distribution(rules):
    assert sorted(rules["root_packages"]) == sorted(map(_import_name, _members()))
    layers = next(contract for contract in rules["contracts"] if contract["id"] == "layers")["layers"]
    assert sorted(" | ".join(layers).split(" | ")) == sorted(rules["root_packages"])


def test_parents_share_the_layer_in_which_nobody_knows_another(rules):
    layers = next(contract for contract in rules["contracts"] if contract["id"] == "layers")["layers"]
    for member in _members():
        groups = _toml(f"{member}/pyproject.toml")["project"].get("entry-points", {})
        if "mdevkit.parents" in groups:
            assert _import_name(member) in layers[0].split(" | ")
