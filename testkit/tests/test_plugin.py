"""What vendors' own test runs get from the pytest plugin."""

from __future__ import annotations

import re

import pytest

SUITE = "class TestIt(ParentSuite):\n    factory = Parent\n"


@pytest.fixture
def run(python, vendor, tmp_path):
    """Run pytest on a test module of a vendor's; the parent is `Parent`."""

    def run(tests, code="\nParent = SimpleParent\n", *options):
        (tmp_path / "cwd" / "test_vendor.py").write_text(
            f"from mdevkit_testkit import *\nfrom simple_plugin import Parent\n{tests}"
        )
        return python("-m", "pytest", "-rA", "-p", "no:cacheprovider", *options, site=vendor(code))

    return run


def test_importing_the_plugin_imports_neither_mdevkit_nor_a_vendor(python):
    done = python("-c", "import sys, mdevkit_testkit.plugin; print(*sorted(name for name in sys.modules if 'mdevkit' in name))")
    ours = {name for name in done.stdout.split() if not name.startswith("__editable__")}
    assert ours == {"mdevkit_testkit", "mdevkit_testkit.leaks", "mdevkit_testkit.plugin"}


def test_suite_runs_once_for_each_type(run):
    done = run(SUITE)
    assert done.returncode == 0, done.stdout
    assert "TestIt::test_device_lives_and_goes[simple-regs]" in done.stdout
    assert "TestIt::test_device_lives_and_goes[simple-mapped]" in done.stdout


def test_suites_themselves_are_not_collected(run):
    done = run("def test_mine(): pass\n")
    assert "1 passed" in done.stdout


def test_function_may_be_the_factory(run):
    done = run("class TestIt(ParentSuite):\n    def factory(): return [Parent()]\n", "\nParent = SimpleParent\n", "-k", "lives")
    assert "2 passed" in done.stdout


def test_failed_assertions_show_values(run):
    done = run(
        "class TestIt(ParentSuite):\n    factory = Parent\n", "\nclass Parent(SimpleParent):\n    api = ''\n", "-k", "stated"
    )
    assert "AssertionError: type simple-regs has no device_api; a tool cannot tell what its devices are" in done.stdout
    assert re.search(r"where '' = MdevType\(", done.stdout), "pytest rewrites the suites' assertions"


def test_suite_is_skipped_for_devices_of_another_class(run):
    done = run(
        "class TestIt(VfioSuite):\n    factory = Parent\n", "\nclass Parent(SimpleParent):\n    bus = 'vdev'\n", "-k", "irq_info"
    )
    assert "devices of type simple-regs are on bus vdev, not of the VFIO class" in done.stdout
    assert "2 skipped" in done.stdout


def test_what_a_device_lacks_is_skipped_with_the_reason(run):
    done = run("class TestIt(VfioSuite):\n    factory = Parent\n", "\nParent = SimpleParent\n", "-k", "sealed")
    assert "the device says it has no region that can be mapped" in done.stdout
    assert "1 passed, 1 skipped" in done.stdout


def test_suite_for_some_types(run):
    done = run(f"{SUITE}    types = ['simple-mapped']\n", "\nParent = SimpleParent\n", "-k", "lives")
    assert "1 passed" in done.stdout
    assert "test_device_lives_and_goes[simple-mapped]" in done.stdout


def test_suite_for_a_type_that_is_not_there(run):
    done = run(f"{SUITE}    types = ['simple-maped']\n")
    assert done.returncode == 2
    assert "TestIt.types names simple-maped, but there are simple-regs, simple-mapped" in done.stdout + done.stderr


EXPECTED = """
class TestIt(VfioSuite):
    factory = Parent
    types = ["simple-mapped"]
    expected = ["reset", "msix", "mapped"]
"""


def test_what_is_not_expected_is_left_out(run):
    done = run(EXPECTED, "\nParent = SimpleParent\n", "-k", "expected or sealed or size_is_told")
    assert "2 passed" in done.stdout
    assert "skipped" not in done.stdout


def test_what_is_expected_has_to_be_there(run):
    code = """
class Parent(SimpleParent):
    devices = (("mapped", Registers),)
"""
    done = run(EXPECTED, code, "-k", "expected")
    assert done.returncode == 1
    assert "the device says it has intx, migration, msi, precopy, reset; expected is mapped, msix, reset" in done.stdout


GAP = """
class TestIt(ParentSuite):
    factory = Parent
    known_gaps = {"test_parent_and_type_are_stated": "to be written"}
"""


def test_known_gap_is_an_expected_failure(run):
    done = run(GAP, "\nclass Parent(SimpleParent):\n    api = ''\n", "-k", "stated or lives")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert re.search(r"XFAIL .*test_parent_and_type_are_stated.*to be written", done.stdout)


def test_known_gap_that_is_none_any_more_fails(run):
    done = run(GAP, "\nParent = SimpleParent\n", "-k", "stated")
    assert done.returncode == 1
    assert "[XPASS(strict)] to be written" in done.stdout


def test_known_gap_has_to_exist(run):
    done = run(GAP.replace("test_parent", "test_patent"))
    assert done.returncode == 4
    assert "TestIt.known_gaps names test_patent_and_type_are_stated, which the suite does not have" in done.stderr


def test_leak_check_for_a_vendors_own_tests(run):
    done = run("import os\ndef test_mine(no_leaks): os.eventfd(0)\n")
    assert done.returncode == 1
    assert re.search(r"left behind: descriptor \d+ \(anon_inode:\[eventfd\]\)", done.stdout)


def test_runtime_folder_for_a_vendors_own_tests(run):
    done = run(
        "import os, pathlib\n"
        "def test_mine(runtime_folder):\n"
        "    assert os.environ['XDG_RUNTIME_DIR'] == str(runtime_folder)\n"
        "    (runtime_folder / 'it.sock').touch()\n"
    )
    assert done.returncode == 1
    assert "files left behind: it.sock" in done.stdout
