"""``mdevkit plugin check DIST``: what it finds, what it says, and what it does about plugins that cannot be checked."""

from __future__ import annotations

import re

import pytest

GOOD = "\nParent = SimpleParent\n"


def test_good_plugin_passes(vendor, check):
    done = check("mdevkit-simple", site=vendor("\nclass Parent(SimpleParent):\n    devices = (('regs', Registers),)\n"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"mdevkit-simple 1\.0, checked by mdevkit-testkit \d.*", lines[0])
    assert lines[1] == "  plugin simple (mdevkit.parents) loads"
    assert "  life cycle of simple-regs: 21 passed" in lines
    skipped = r"VFIO class of simple-regs: \d+ passed, 4 skipped\n +4 skipped: the device says it has no region that can be mapped"
    assert re.search(skipped, done.stdout)
    assert re.fullmatch(r"all \d+ checks passed or skipped", lines[-1])


def test_failures_are_explained(vendor, check):
    done = check("mdevkit_simple", "-k", "stated or lives", site=vendor("\nclass Parent(SimpleParent):\n    api = ''\n"))
    assert done.returncode == 1
    assert "  life cycle of simple-regs: 1 FAILED, 1 passed\n" in done.stdout
    assert (
        "FAILED test_parent_and_type_are_stated [simple-mapped]\n"
        "    Checks that the parent has a name that fits a file name, and that the type tells people and tools what it is.\n"
        "    type simple-mapped has no device_api; a tool cannot tell what its devices are\n"
    ) in done.stdout
    assert done.stdout.splitlines()[-1] == "2 of 4 checks failed"


def test_check_that_leaks_counts_once(vendor, check):
    code = """
class Parent(SimpleParent):
    devices = (("regs", Registers),)

    def build(self, mdev, params):
        super().build(mdev, params)
        import os
        os.eventfd(0)
"""
    done = check("mdevkit-simple", "-k", "many_times or lives", site=vendor(code))
    assert done.returncode == 1
    assert "  life cycle of simple-regs: 2 FAILED\n" in done.stdout, "each in one phase or in two"
    assert re.search(r"left behind by 10 devices: descriptor \d+ \(anon_inode:\[eventfd\]\)", done.stdout)
    assert done.stdout.splitlines()[-1] == "2 of 2 checks failed"


def test_verbose_shows_every_check_and_all_of_a_failure(vendor, check):
    code = """
class Parent(SimpleParent):
    def build(self, mdev, params):
        raise KeyError("no such part")
"""
    done = check("mdevkit-simple", "--verbose", "--only", "lives_and_goes", site=vendor(code))
    assert done.returncode == 1
    assert "... test_device_lives_and_goes [simple-regs]" in done.stdout
    assert 'raise KeyError("no such part")' in done.stdout


def test_text_of_a_plugin_cannot_reach_the_terminal_raw(vendor, check):
    done = check("mdevkit-simple", "-k", "stated", site=vendor("\nclass Parent(SimpleParent):\n    name = 'a\\x1b[31mb'\n"))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert r"parent name 'a\\x1b[31mb' is not a file name" in done.stdout or r"a\x1b[31mb" in done.stdout


def test_configuration_of_pytest_has_no_say(vendor, check, tmp_path):
    for name, text in (("pytest.ini", "[pytest]\naddopts = --nonsense\n"), ("conftest.py", "raise RuntimeError('mine')\n")):
        (tmp_path / "cwd" / name).write_text(text)
    done = check(
        "mdevkit-simple", "-k", "lives_and_goes", site=vendor(GOOD), PYTEST_ADDOPTS="--nonsense", PYTEST_PLUGINS="nonsense"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["conftest.py", "pytest.ini"]


def test_nothing_matches(vendor, check):
    done = check("mdevkit-simple", "-k", "nonsense", site=vendor(GOOD))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "no check matches 'nonsense'")


# -- what cannot be checked ------------------------------------------------------------------------------------------------


def test_distribution_that_is_not_installed(check):
    done = check("mdevkit-nowhere")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(
        r"distribution 'mdevkit-nowhere' is not installed \(with mdevkit plugins there are: .*mdevkit-mtty.*\) \[ENOENT\]\n",
        done.stderr,
    )


def test_distribution_without_plugins(check):
    done = check("pytest")
    assert done.returncode == 1
    assert re.fullmatch(
        r"pytest \S+ brings no mdevkit plugin: it has no entry point in mdevkit\.parents, .*\[ENOENT\]\n", done.stderr
    )


def test_distribution_without_parents(check):
    done = check("mdevkit-vfio")
    assert done.returncode == 0
    assert "plugin vfio_mdev.mdev.c01 (mdevkit.drivers) loads" in done.stdout
    assert done.stdout.endswith("mdevkit-vfio brings no parent: there are no devices to check\n")


def test_testkit_is_not_installed(python):
    missing = "import sys; sys.modules['mdevkit_testkit'] = None; from mdevkit.cli import run"
    done = python("-c", f"{missing}; sys.exit(run(['plugin', 'check', 'mdevkit-mtty']))")
    assert done.returncode == 1
    assert done.stderr == "the conformance suite is not installed: pip install mdevkit-testkit [ENOPKG]\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("\n", "AttributeError: module 'simple_plugin' has no attribute 'Parent'"),
        ("\nParent = 5\n", "simple_plugin:Parent is not callable; a factory is wanted"),
        ("\ndef Parent(): raise RuntimeError('no card')\n", r"simple_plugin:Parent\(\) failed: RuntimeError: no card"),
        ("\ndef Parent(): return 5\n", "a parent is wanted, not a int object"),
        ("\nclass Parent(SimpleParent):\n    name = ''\n", "parent Parent has no name"),
        ("\nclass Parent(ParentOps):\n    name = 'x'\n    types = (1,)\n", "does not implement parent_create, parent_remove"),
    ],
)
def test_plugin_that_cannot_be_used(vendor, check, code, reason):
    done = check("mdevkit-simple", site=vendor(code))
    assert done.returncode == 1
    assert re.search(f"FAILED plugin simple of mdevkit-simple 1.0 cannot be used: .*{reason}", done.stdout), done.stdout


def test_plugin_that_is_blocked(vendor, check):
    done = check("mdevkit-simple", site=vendor(GOOD), MDEVKIT_PLUGINS_BLOCK="mdevkit-simple")
    assert done.returncode == 1
    assert "cannot be used: blocked by MDEVKIT_PLUGINS_BLOCK" in done.stdout


def test_name_that_two_distributions_claim(vendor, distribution, check):
    site = vendor(GOOD)
    distribution("mdevkit-other", "[mdevkit.parents]\nsimple = simple_plugin:Parent\n")
    done = check("mdevkit-simple", site=site)
    assert done.returncode == 1
    assert "mdevkit-other 1.0 brings a simple too" in done.stdout


def test_plugin_that_hangs_is_ended(vendor, python):
    code = """
class Parent(SimpleParent):
    def build(self, mdev, params):
        import threading
        threading.Event().wait()
"""
    done = python("-m", "mdevkit_testkit", "mdevkit-simple", "--only", "lives_and_goes", "--limit", "1", site=vendor(code))
    assert done.returncode == 1
    assert "FAILED test_device_lives_and_goes[simple-regs]: it has not ended after 1 seconds" in done.stderr
    assert re.search(r'simple_plugin\.py", line \d+ in build', done.stderr), "it says where the plugin hangs"


def test_plugin_that_crashes_is_reported(vendor, check):
    code = """
class Parent(SimpleParent):
    def build(self, mdev, params):
        import os
        os.abort()
"""
    done = check("mdevkit-simple", "-v", site=vendor(code))
    assert done.returncode == 1
    assert "the check was ended by SIGABRT; --verbose shows which check ran" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("... test_")
