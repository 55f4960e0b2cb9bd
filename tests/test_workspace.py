"""The workspace is one: what is imported comes from this checkout, and both set-up paths install the same."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKSPACE = tomllib.loads((ROOT / "pyproject.toml").read_text())
MEMBERS = WORKSPACE["tool"]["uv"]["workspace"]["members"]
PROJECTS = {member: tomllib.loads((ROOT / member / "pyproject.toml").read_text())["project"] for member in MEMBERS}


def _requirements(project: dict) -> list[str]:
    extras = project.get("optional-dependencies", {}).values()
    return [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]


def test_every_folder_with_a_distribution_is_a_member():
    ours = (path.parent for pattern in ("*/pyproject.toml", "plugins/*/pyproject.toml") for path in ROOT.glob(pattern))
    assert sorted(str(folder.relative_to(ROOT)) for folder in ours) == sorted(MEMBERS)


def test_every_installed_distribution_of_ours_is_this_checkout():
    # setuptools leaves an egg-info beside the sources it installs; what is installed is what the environment holds.
    sources = {ROOT / member / "src" for member in MEMBERS}
    installed = {
        distribution.name: json.loads(distribution.read_text("direct_url.json") or "{}").get("url")
        for distribution in importlib.metadata.distributions()
        if re.fullmatch(r"mdevkit(-.+)?", distribution.name) and Path(distribution.locate_file("")) not in sources
    }
    assert installed == {project["name"]: (ROOT / member).as_uri() for member, project in PROJECTS.items()}


@pytest.mark.parametrize("member", MEMBERS)
def test_import_comes_from_this_checkout(member):
    name = PROJECTS[member]["name"].replace("-", "_")
    assert Path(importlib.import_module(name).__file__) == ROOT / member / "src" / name / "__init__.py"


@pytest.mark.parametrize("member", MEMBERS)
def test_member_is_typed_and_described(member):
    name = PROJECTS[member]["name"].replace("-", "_")
    assert (ROOT / member / "src" / name / "py.typed").exists()
    assert (ROOT / member / PROJECTS[member]["readme"]).stat().st_size > 200, "a README says what the package is for"
    assert PROJECTS[member]["license"] == "MIT"
    assert PROJECTS[member]["requires-python"] == WORKSPACE["project"]["requires-python"]
    assert f"{member}/src" in WORKSPACE["tool"]["mypy"]["files"]


@pytest.mark.parametrize("member", MEMBERS)
def test_ranges_between_our_distributions_are_compatible_never_exact(member):
    ours = [requirement for requirement in _requirements(PROJECTS[member]) if requirement.startswith("mdevkit")]
    assert [requirement for requirement in ours if not re.fullmatch(r"[a-z-]+>=0\.1,<0\.2", requirement)] == []
    assert not [requirement for requirement in _requirements(PROJECTS[member]) if "==" in requirement]


def test_the_pip_path_installs_what_uv_installs():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    editable = [line.removeprefix("-e ./") for line in lines if line.startswith("-e ")]
    others = [line for line in lines if not line.startswith(("-e ", "#"))]
    groups = WORKSPACE["dependency-groups"]
    assert editable == MEMBERS
    assert others == [entry for entry in groups["dev"] if isinstance(entry, str)]
    assert groups["members"] == [project["name"] for project in PROJECTS.values()]
    assert WORKSPACE["tool"]["uv"]["sources"] == {name: {"workspace": True} for name in groups["members"]}


def test_only_the_top_folder_of_tests_is_a_package():
    """A second package `tests` would hide the first, in which the guests live, when pytest imports its modules."""
    folders = (path for pattern in ("*/tests", "plugins/*/tests") for path in ROOT.glob(pattern))
    assert [folder for folder in folders if (folder / "__init__.py").exists()] == []


@pytest.fixture
def bare_machine(tmp_path):
    """A folder for PATH that has what every Debian has, and no Python."""
    for program in ("bash", "cat", "dirname", "realpath", "sed", "sha256sum"):
        (tmp_path / program).symlink_to(shutil.which(program))
    return tmp_path


def _dev(*arguments, **environment):
    command = [ROOT / "dev", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=30, check=False)


def test_set_up_names_the_missing_python_with_its_command(bare_machine):
    done = _dev("setup", PATH=str(bare_machine), MDEVKIT_VENV=str(bare_machine / "venv"))
    assert done.returncode == 1
    assert done.stderr == "dev: Python 3.11 or newer is missing; on Debian and Ubuntu: apt-get install python3 python3-venv\n"


def test_set_up_names_the_missing_venv_with_its_command(bare_machine):
    python = bare_machine / "python3"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')  # as Debian splits it
    python.chmod(0o755)
    done = _dev("setup", PATH=str(bare_machine), MDEVKIT_VENV=str(bare_machine / "venv"))
    assert done.returncode == 1
    assert done.stderr == "dev: python3 cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv\n"


def test_unknown_command_shows_what_there_is():
    done = _dev("frobnicate")
    assert (done.returncode, done.stdout) == (1, "")
    assert "./dev test" in done.stderr
    assert done.stderr.endswith("dev: there is no command 'frobnicate'\n")
