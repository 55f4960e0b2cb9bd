"""A vendor outside this project types in the manual's page, or starts from the template, builds a wheel, installs it: it passes.

The environment is new and has nothing of this checkout but wheels. Third-party packages are the ones of the environment the tests
run in, shown to it by links, so that pip resolves everything without a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "write-a-device.md").read_text()
TEMPLATE = ROOT / "template"

#: A fenced block of the page: language, the file it belongs to, text.
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def page_files() -> dict[str, str]:
    """Return the files the page makes; blocks of one file follow each other."""
    files: dict[str, list[str]] = {"src/mdevkit_acme/py.typed": []}
    for _, name, text in _BLOCK.findall(PAGE):
        if name:
            files.setdefault(name, []).append(text.strip("\n"))
    return {name: "\n\n".join(parts) + "\n" if parts else "" for name, parts in files.items()}


def page_commands() -> list[str]:
    """Return the commands the page shows, but for the installation, which is done already."""
    shown = [line[2:] for language, _, text in _BLOCK.findall(PAGE) if language == "console" for line in text.splitlines()]
    return [command for command in shown if not command.startswith("pip install")]


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of our own environment."""
    foreign = ("PYTHON", "PIP_", "PYTEST_", "MDEVKIT_", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | variables
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100, check=False)


def done_well(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that has to succeed, and return what it prints."""
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def _closure(names: list[str]) -> dict[str, Distribution]:
    """Return distributions that are installed here, with all they require."""
    found: dict[str, Distribution] = {}
    while names:
        name = names.pop()
        if name not in found:
            found[name] = distribution(name)
            wanted = [Requirement(line) for line in found[name].requires or []]
            names += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def _show(distributions: dict[str, Distribution], site: Path) -> None:
    """Link the top-level files and folders of distributions into a site-packages."""
    for found in distributions.values():
        for top in {path.parts[0] for path in found.files or [] if not path.parts[0].startswith(("..", "__pycache__"))}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(found.locate_file(top)))


def _wheel(source: Path, wheels: Path) -> None:
    done_well(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source, cwd=wheels)


@pytest.fixture(scope="module")
def vendor(tmp_path_factory) -> Path:
    """What a vendor has typed in from the page."""
    folder = tmp_path_factory.mktemp("vendor")
    for name, text in page_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """What another vendor has started from the template."""
    folder = tmp_path_factory.mktemp("copied") / "plugin"
    done_well(sys.executable, TEMPLATE / "new_plugin.py", "turbo", folder, cwd=folder.parent)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory, vendor, copied) -> Path:
    """The scripts of a new environment with both vendors' plugins, installed by pip with what they require."""
    folder, wheels = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("wheels")
    for member in ("core", "plugins/vfio", "testkit"):
        source = tmp_path_factory.mktemp("source") / "member"
        shutil.copytree(ROOT / member, source, ignore=shutil.ignore_patterns("tests", "__pycache__", "build", "dist"))
        _wheel(source, wheels)
    _wheel(vendor, wheels)
    _wheel(copied, wheels)
    done_well(sys.executable, "-m", "venv", folder, cwd=folder)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    _show(_closure(["pluggy", "stevedore", "typer", "pytest"]), site)
    install = ["-m", "pip", "install", "--no-index", "--find-links", wheels, "mdevkit-acme[test]", "mdevkit-turbo[test]"]
    done_well(folder / "bin" / "python", *install, cwd=folder)
    return folder / "bin"


# -- the page and the template ---------------------------------------------------------------------------------------------


def test_page_shows_the_template_file_by_file():
    template = {str(path.relative_to(TEMPLATE / "acme")): path for path in (TEMPLATE / "acme").rglob("*") if path.is_file()}
    shown = {name: path.read_text() for name, path in template.items() if "__pycache__" not in name}
    assert page_files() == shown


def test_nothing_of_the_template_keeps_its_name(copied):
    files = [path for path in copied.rglob("*") if path.is_file()]
    assert (copied / "src" / "mdevkit_turbo" / "py.typed").exists()
    assert (copied / "tests" / "test_turbo.py").exists()
    assert len(files) == len(page_files())
    assert not [path for path in files if "acme" in f"{path.relative_to(copied)}{path.read_text()}".lower()]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Usage: python new_plugin.py NAME"),
        (["--help"], 2, "Usage: python new_plugin.py NAME"),
        (["Turbo-2", "new"], 1, "'Turbo-2' is not a name of small letters and digits that begins with a letter"),
        (["turbo", "."], 1, ". exists already"),
    ],
)
def test_template_says_what_is_wrong(tmp_path, arguments, code, says):
    done = run(sys.executable, TEMPLATE / "new_plugin.py", *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_template_is_typed(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, TEMPLATE / "acme" / "src", TEMPLATE / "new_plugin.py"]
    done_well(*command, cwd=ROOT, MYPYPATH=str(TEMPLATE / "acme" / "src"))


# -- the vendor's plugin in its environment --------------------------------------------------------------------------------


def test_everything_comes_from_wheels(environment):
    program = "import mdevkit, mdevkit_vfio, mdevkit_testkit, mdevkit_acme as a; print(*(m.__file__ for m in (mdevkit, a)))"
    assert str(ROOT) not in done_well(environment / "python", "-c", program, cwd=environment)


def test_types_are_listed(environment):
    parents = json.loads(done_well(environment / "mdevkit", "types", "--json", cwd=environment))
    assert [list(parent) for parent in parents] == [["acme"], ["turbo"]]
    [[one, four]] = parents[0].values()
    assert one == {
        "acme-1": {
            "available_instances": 8,
            "device_api": "vfio-pci",
            "name": "One engine",
            "description": "checksums of up to 64 KiB",
        }
    }
    assert four["acme-4"]["available_instances"] == 2


def test_commands_of_the_page_work(environment, vendor):
    printed = {}
    for command in page_commands():
        module, *arguments = command.split()
        printed[command] = done_well(environment / "python", "-m", module, *arguments, cwd=vendor)
    assert re.search(r"^all \d+ checks passed or skipped$", printed["mdevkit plugin check mdevkit-acme"], re.MULTILINE)
    assert re.search(r"\d+ passed", printed["pytest"])
    assert re.search(r"parents +acme +mdevkit-acme +0\.1\.0 +loaded", printed["mdevkit plugins"])
    assert "acme-4" in printed["mdevkit types"]


def test_python_of_the_page_works(environment, runtime_folder):
    [program] = [text for language, name, text in _BLOCK.findall(PAGE) if language == "python" and not name]
    done_well(environment / "python", "-W", "error", "-c", program, cwd=runtime_folder)


def test_copied_plugin_passes(environment, copied):
    done_well(environment / "mdevkit", "plugin", "check", "mdevkit-turbo", "--only", "lives or reset or carries", cwd=copied)
    done_well(environment / "python", "-m", "pytest", "-k", "checksum", cwd=copied)


def test_device_is_served_until_the_user_ends_it(environment, runtime_folder):
    command = [environment / "mdevkit", "run", "acme-1", "--set", "serial=7"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=runtime_folder) as served:
        lines = [served.stdout.readline() for _ in range(3)]
        served.send_signal(signal.SIGINT)
        assert served.wait(10) == 0
    assert re.match(r"device +[0-9a-f-]{36} \(acme-1 of acme\)\n", lines[0])
    assert '{"driver":"vfio-user-pci","socket":' in lines[2]
