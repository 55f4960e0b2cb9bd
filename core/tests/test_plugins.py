"""Installed plugins, with real distributions: a dist-info folder and a module on the path of a fresh interpreter each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest
from mdevkit.plugins import GROUPS, driver_line

#: What the installed members of this workspace bring would only be in the way.
OURS = ",".join(sorted({entry.dist.name for group in GROUPS for entry in entry_points(group=group)}))

GOOD = """
    from mdevkit import Bus, Driver, MdevType, ParentOps, hookimpl

    class {name}(ParentOps):
        name = "{name}"
        def __init__(self):
            self.types = [MdevType("1", "{bus}", "vfio-pci")]
        @hookimpl
        def parent_create(self, mdev):
            mdev._set_class({class_id}, self)
        @hookimpl
        def parent_remove(self, mdev):
            pass

    class AcmeBus(Bus):
        name = "{bus}"

    class AcmeDriver(Driver):
        name, bus, id_table = "acme_drv", "{bus}", {ids}
        @hookimpl
        def driver_probe(self, device):
            pass
        @hookimpl
        def driver_remove(self, device):
            pass
"""

PRELUDE = """
    import json, logging, sys
    logging.disable()
    from mdevkit import *
    from mdevkit.plugins import *
    def facts(registry):
        return [[p.group, p.name, p.distribution, p.version, p.status, p.reason] for p in registry.catalog.plugins
                if not p.distribution.startswith("mdevkit-")]
    def text(call, *arguments, **keywords):
        try:
            call(*arguments, **keywords)
        except MdevError as error:
            return [error.name, str(error)]
    def say(answer):
        print("ANSWER " + json.dumps(answer))
"""


def good(name="acme", bus="acme", class_id=1, ids=("c01",)):
    return dedent(GOOD).format(name=name, bus=bus, class_id=class_id, ids=tuple(ids))


class World:
    """A folder with distributions, and an interpreter that sees them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, distribution, source, version="1.0", *, metadata=True, module=None, **groups):
        """Install a distribution of one module; `groups` maps the end of an entry-point group to its lines."""
        module = module or distribution.replace("-", "_")
        (self.folder / f"{module}.py").write_text(dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"[mdevkit.{group}]\n" + "\n".join(stated) + "\n" for group, stated in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return info

    def run(self, code, **environment):
        """Run a script and return what it `say`s."""
        environment = {"MDEVKIT_PLUGINS_BLOCK": OURS, "PYTHONPATH": str(self.folder), **environment}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MDEVKIT_")}
        done = subprocess.run(
            [sys.executable, "-c", dedent(PRELUDE) + dedent(code)],
            capture_output=True, text=True, env=kept | environment, timeout=60, check=False,
        )  # fmt: skip
        answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert done.returncode == 0, done.stderr
        return json.loads(answers[-1])

    def discover(self, code="say([facts(registry), [p.name for p in registry.parents]])", **environment):
        return self.run(f"with Registry.discover() as registry:\n    {code}", **environment)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture
def acme(world):
    """A vendor with parent, bus and driver in one module."""
    world.add(
        "acme-card", good(), "2.3",
        parents=["acme = acme_card:acme"], buses=["acme = acme_card:AcmeBus"], drivers=["acme_drv.acme.c01 = acme_card:AcmeDriver"],
    )  # fmt: skip
    return world


# -- what is broken is told, and the rest works ------------------------------------------------------------------------

BROKEN = {
    "import": ("import nothing_like_this", "x", "ModuleNotFoundError: No module named 'nothing_like_this'"),
    "exit": ("raise SystemExit(3)", "x", "SystemExit: 3"),
    "assertion": ("assert 1 == 2, 'sums'", "x", "AssertionError: sums"),
    "syntax": ("def (", "x", "SyntaxError: invalid syntax"),
    "attribute": ("y = 1", "x", "AttributeError: module 'bad_attribute' has no attribute 'x'"),
    "value": ("x = 5", "x", "bad_value:x is not callable; a factory is wanted"),
    "factory": ("def x(): raise ValueError('no\\ncard')", "x", "bad_factory:x() failed: ValueError: no card"),
    "quits": ("def x(): raise SystemExit", "x", "bad_quits:x() failed: SystemExit"),
    "cancelled": ("import asyncio\nraise asyncio.CancelledError('no loop')", "x", "CancelledError: no loop"),
    "generator": ("def x(): raise GeneratorExit", "x", "bad_generator:x() failed: GeneratorExit"),
    "nothing": ("def x(): pass", "x", "a parent is wanted, not a NoneType object"),
    "string": ("def x(): return 'acme'", "x", "a parent is wanted, not a str object"),
    "types": (
        "from mdevkit import *\nclass x(ParentOps):\n name='x'\n @property\n def types(self): return 1 / 0\n"
        " @hookimpl\n def parent_create(self): pass\n @hookimpl\n def parent_remove(self): pass",
        "x", "parent x cannot be registered: ZeroDivisionError: division by zero",
    ),
}  # fmt: skip


def test_one_of_each_kind_broken_and_the_good_one_works(acme):
    for kind, (source, attribute, _) in BROKEN.items():
        acme.add(f"bad-{kind}", source, "0.7", parents=[f"{kind} = bad_{kind}:{attribute}"])
    acme.add("bad-class", good("klass") + "\ndef factory(): return klass\n", "0.7", parents=["klass = bad_class:factory"])
    acme.add(
        "bad-signature", good("wrong").replace("def parent_create(self, mdev)", "def parent_create(self, mdev, size)"), "0.7",
        parents=["wrong = bad_signature:wrong"],
    )  # fmt: skip
    misspelt = good("typo") + "\n    @hookimpl\n    def driver_sispend(self, device): pass\n"
    acme.add(
        "bad-spelling", misspelt.replace('name, bus, id_table = "acme_drv"', 'name, bus, id_table = "typo_drv"'), "0.7",
        drivers=["typo_drv.acme.c01 = bad_spelling:AcmeDriver"],
    )  # fmt: skip
    told, parents, driver = acme.discover(
        """
    mdev = registry.create("acme-1")
    say([facts(registry), [p.name for p in registry.parents], mdev.driver])
    """.strip()
    )
    assert (parents, driver) == (["acme"], "acme_drv")
    by_distribution = {distribution: (version, status, reason) for _, _, distribution, version, status, reason in told}
    assert by_distribution.pop("acme-card") == ("2.3", "loaded", "")
    for kind, (_, _, reason) in BROKEN.items():
        assert by_distribution[f"bad-{kind}"][:2] == ("0.7", "failed"), kind
        assert reason in by_distribution[f"bad-{kind}"][2]
        assert "\n" not in by_distribution[f"bad-{kind}"][2]
    assert by_distribution["bad-class"][2] == "a parent is wanted, not the class klass (an instance is wanted)"
    assert "bad_signature.wrong" in by_distribution["bad-signature"][2]
    assert "size" in by_distribution["bad-signature"][2]
    assert "bad_spelling.AcmeDriver" in by_distribution["bad-spelling"][2]
    assert "driver_sispend" in by_distribution["bad-spelling"][2]


@pytest.mark.parametrize("others", [[], ["m-between"]])
def test_a_name_that_two_distributions_claim_is_nobodys(acme, others):
    """Also when another distribution comes between them in the order of the path."""
    for distribution in ("a-first", *others, "z-last"):
        name = "twin" if distribution != "m-between" else "other"
        module = distribution.replace("-", "_")
        acme.add(distribution, good(name), "1.1", parents=[f"{name} = {module}:{name}"], buses=[f"{name} = {module}:AcmeBus"])
    told, parents = acme.discover()
    assert parents == ["acme", *(["other"] if others else [])]
    reasons = {(group, distribution): reason for group, name, distribution, _, _, reason in told if name == "twin"}
    for group in ("mdevkit.parents", "mdevkit.buses"):
        for mine, other in (("a-first", "z-last 1.1"), ("z-last", "a-first 1.1")):
            reason = f"{other} brings a twin too; remove one, or block it with MDEVKIT_PLUGINS_BLOCK"
            assert reasons.pop((group, mine)) == reason
    assert not reasons


def test_a_driver_that_two_distributions_claim(acme):
    """Under different lines: the names differ, the driver is the same."""
    acme.add("rival", good(ids=["c02"]), "3.0", drivers=["acme_drv.acme.c02 = rival:AcmeDriver"])
    told, error = acme.discover("e = text(registry.create, 'acme-1'); say([facts(registry), e])")
    status = {distribution: (status, reason) for group, _, distribution, _, status, reason in told if group == "mdevkit.drivers"}
    assert status["rival"][0] == status["acme-card"][0] == "failed"
    assert status["acme-card"][1].startswith("rival 3.0 brings a acme_drv too")
    assert error[0] == "ENOEXEC"
    assert "no driver for acme:c01: plugin acme_drv.acme.c01 of acme-card 2.3 cannot be used: rival 3.0 brings" in error[1]


def test_blocking_one_of_two_resolves_the_conflict(acme):
    acme.add("rival", good(), "3.0", drivers=["acme_drv.acme.c01 = rival:AcmeDriver"])
    code = "mdev = registry.create('acme-1'); say([mdev.driver, sys.modules.get('rival') is not None])"
    assert acme.discover(code, MDEVKIT_PLUGINS_BLOCK=f"{OURS},rival") == ["acme_drv", False]


def test_an_installation_without_metadata(acme):
    """What is left of an uninstallation that was cut short."""
    acme.add("torn", "raise ImportError('files are gone')", metadata=False, parents=["torn = torn:x"])
    told, parents = acme.discover()
    assert parents == ["acme"]
    assert ["mdevkit.parents", "torn", "?", "?", "failed", "ImportError: files are gone"] in told


LATIN = "Metadata-Version: 2.1\nName: {name}\nVersion: 0.4\nAuthor: J\u00fcrgen\n"


def test_metadata_that_is_not_utf8_costs_nobody_anything(acme):
    """Name and version are told all the same, by which the plugin can be blocked, and found if it is broken otherwise too."""
    for name, source in (("latin-good", good("latin")), ("latin-bad", "import nothing_like_this"), ("latin-torn", "")):
        info = acme.add(name, source, "0.4", parents=[f"{name} = {name.replace('-', '_')}:latin"])
        (info / "METADATA").write_bytes(LATIN.format(name=name).encode("latin-1"))
    told, parents = acme.discover(MDEVKIT_PLUGINS_BLOCK=f"{OURS},latin-torn")
    assert parents == ["acme", "latin"]
    by_name = {fact[1]: fact[2:5] for fact in told}
    assert by_name["latin-good"] == ["latin-good", "0.4", "loaded"]
    assert by_name["latin-bad"] == ["latin-bad", "0.4", "failed"]
    assert by_name["latin-torn"] == ["latin-torn", "0.4", "blocked"]
    # With a damaged file elsewhere, each distribution is read apart.
    (info / "entry_points.txt").write_text("[mdevkit.parents]\ngarbage\n")
    told, parents = acme.discover()
    assert parents == ["acme", "latin"]
    assert [fact[1:5] for fact in told if fact[2] == "latin-torn"] == [["?", "latin-torn", "0.4", "failed"]]


def test_metadata_whose_name_is_not_ascii(acme):
    info = acme.add("odd", good("odd"), "0.4", parents=["odd = odd:odd"])
    (info / "METADATA").write_bytes(LATIN.format(name="J\u00fcrgen").encode("latin-1"))
    told, parents = acme.discover()
    assert parents == ["acme", "odd"]
    assert ["mdevkit.parents", "odd", "J\ufffdrgen", "0.4", "loaded", ""] in told


def test_two_installations_without_metadata_do_not_hide_each_other(acme):
    for name in ("first", "second"):
        acme.add(name, good(name), metadata=False, parents=[f"{name} = {name}:{name}"])
    info = acme.add("damaged", "")
    (info / "entry_points.txt").write_text("[mdevkit.parents]\ngarbage\n")
    assert acme.discover()[1] == ["acme", "first", "second"]


@pytest.mark.parametrize("content", [b"[mdevkit.parents]\ngarbage\n", b"[mdevkit.parents]\nx = \xff\n"])
def test_a_damaged_entry_points_file_costs_its_own_distribution_only(acme, content):
    info = acme.add("damaged", "", "0.1", parents=[])
    (info / "entry_points.txt").write_bytes(content)
    stranger = acme.add("stranger", "", "0.1")
    (stranger / "entry_points.txt").write_text("[console_scripts]\nnonsense\n")
    told, parents = acme.discover()
    assert parents == ["acme"]
    (mine,) = [fact for fact in told if fact[2] == "damaged"]
    assert mine[:5] == ["mdevkit.parents", "?", "damaged", "0.1", "failed"]
    assert mine[5].startswith("its entry_points.txt is damaged: ")
    assert "stranger" not in {fact[2] for fact in told}, "what is no plugin is nothing of ours"
    driver = acme.discover("say(registry.create('acme-1').driver)")
    assert driver == "acme_drv"


def test_a_distribution_that_is_on_the_path_twice(acme, tmp_path):
    """The first one hides the other, as for imports: that is no conflict. Damage elsewhere does not change that."""
    second = World(tmp_path / "second")
    second.folder.mkdir()
    second.add("acme-card", good(), "1.0", parents=["acme = acme_card:acme"])
    path = f"{acme.folder}{os.pathsep}{second.folder}"
    assert acme.discover(PYTHONPATH=path)[1] == ["acme"]
    info = acme.add("damaged", "")
    (info / "entry_points.txt").write_text("[mdevkit.parents]\ngarbage\n")
    told, parents = acme.discover(PYTHONPATH=path)
    assert parents == ["acme"]
    assert {fact[3] for fact in told if fact[2] == "acme-card"} == {"2.3"}


def test_parents_of_one_factory_all_or_none(acme):
    acme.add("pair", good("left") + good("right") + "\ndef both(): return left(), right()\n", parents=["pair = pair:both"])
    acme.add("trio", good("third") + good("acme") + "\ndef both(): return [third(), acme()]\n", parents=["trio = trio:both"])
    acme.add("none", "def none(): return []", parents=["none = none:none"])
    told, parents = acme.discover()
    assert parents == ["acme", "left", "right"]
    reasons = {fact[2]: fact[4:] for fact in told}
    assert reasons["trio"] == ["failed", "parent acme is already registered"]
    assert reasons["none"] == ["loaded", ""]


# -- allow-list and block-list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "parents", "reason"),
    [
        ({"MDEVKIT_PLUGINS": "acme-card"}, ["acme"], "not in MDEVKIT_PLUGINS"),
        ({"MDEVKIT_PLUGINS": " ACME.card , "}, ["acme"], "not in MDEVKIT_PLUGINS"),
        ({"MDEVKIT_PLUGINS": ""}, [], "not in MDEVKIT_PLUGINS"),
        ({"MDEVKIT_PLUGINS_BLOCK": f"{OURS},other_card"}, ["acme"], "blocked by MDEVKIT_PLUGINS_BLOCK"),
        ({"MDEVKIT_PLUGINS": "other-card", "MDEVKIT_PLUGINS_BLOCK": "other-card"}, [], "blocked by MDEVKIT_PLUGINS_BLOCK"),
    ],
)
def test_lists_by_environment(acme, environment, parents, reason):
    acme.add("other-card", good("other") + "\nprint('imported')\n", parents=["other = other_card:other"])
    told, found = acme.discover(**environment)
    assert found == parents
    (other,) = [fact[4:] for fact in told if fact[2] == "other-card"]
    assert other == ["blocked", reason]


def test_an_error_says_that_what_is_missing_is_blocked(acme):
    acme.add("user", good("user", bus="acme"), parents=["user = user:user"])
    error = acme.discover("say(text(registry.create, 'user-1'))", MDEVKIT_PLUGINS="user")
    assert error == [
        "ENODEV",
        "type user-1: class bus acme is not installed; plugin acme of acme-card 2.3 cannot be used: not in MDEVKIT_PLUGINS",
    ]
    acme.add("buses", good(), buses=["acme = buses:AcmeBus"])
    code = "u = '83b8f4f2-509f-382f-3c1e-e6bfe0fa1001'; say(text(registry.create, 'user-1', uuid=u))"
    assert acme.discover(code, MDEVKIT_PLUGINS="user,buses") == [
        "ENODEV",
        "device 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001: no driver for acme:c01 is installed; "
        "plugin acme_drv.acme.c01 of acme-card 2.3 cannot be used: not in MDEVKIT_PLUGINS",
    ]


def test_an_error_says_that_the_parent_of_a_type_is_broken(acme):
    acme.add("bad", "import nothing_like_this", "0.7", parents=["bad = bad:x"])
    error = acme.discover("say(text(registry.create, 'bad-1'))", MDEVKIT_PLUGINS="acme-card,bad")
    text = "there is no type 'bad-1' (there are: acme-1); plugin bad of bad 0.7 cannot be used: ModuleNotFoundError"
    assert error[0] == "ENODEV"
    assert error[1].startswith(text)


# -- late loading ------------------------------------------------------------------------------------------------------


@pytest.fixture
def late(world):
    """Parent, bus and two drivers, each in a module of its own."""
    # Long enough for other threads to come and want the same, which nothing tells of.
    slow = "import time\ntime.sleep(0.05)\n"
    world.add("card", good("card", class_id=2), parents=["card = card:card"])
    world.add("bus", slow + good(), buses=["acme = bus:AcmeBus"])
    lines = [f"acme_drv.acme.{match} = wanted:AcmeDriver" for match in ("c02", "c03")]
    world.add("wanted", slow + good(ids=["c02", "c03"]), drivers=lines)
    world.add("unwanted", good(ids=["c09"]).replace("acme_drv", "other"), drivers=["other.acme.c09 = unwanted:AcmeDriver"])
    return world


def test_a_driver_is_imported_when_a_device_of_its_alias_appears(late):
    answer = late.discover(
        """
    loaded = lambda: [name for name in ("card", "bus", "wanted", "unwanted") if name in sys.modules]
    before = loaded()
    unbound = registry.create("card-1", bind=False)
    between = loaded()
    registry.attach(unbound.uuid)
    say([before, between, loaded(), unbound.driver, [d.name for d in registry.drivers]])
    """.strip()
    )
    assert answer == [["card"], ["card", "bus"], ["card", "bus", "wanted"], "acme_drv", ["acme_drv"]]


def test_a_driver_named_by_hand_is_imported_too(late):
    answer = late.discover(
        """
    mdev = registry.create("card-1", driver_override="other")
    say([mdev.driver, "wanted" in sys.modules, text(registry.create, "card-1", driver_override="nobody")[1].split(": ", 1)[1]])
    """.strip()
    )
    assert answer == ["other", True, "there is no driver nobody on bus acme"]


def test_all_lines_of_a_driver_share_its_fate(late):
    told = late.discover("registry.create('card-1'); say(facts(registry))")
    assert [fact[4] for fact in told if fact[2] == "wanted"] == ["loaded", "loaded"]
    assert [fact[4] for fact in told if fact[2] == "unwanted"] == ["installed"]


def test_using_a_plugin_again_does_not_spoil_it(acme):
    acme.add("quota", QUOTA, wrappers=["quota = quota:Quota"])
    answer = acme.discover(
        """
    registry.create("acme-1")
    errors = [text(registry.use, plugin) for plugin in registry.catalog.plugins if plugin.status == "loaded"]
    registry.unregister_parent("acme")
    registry.use(registry.catalog.find(PARENTS)[0])
    say([errors, facts(registry), [p.name for p in registry.parents]])
    """.strip()
    )
    assert sorted(answer[0]) == [
        ["EEXIST", "bus acme is already registered"],
        ["EEXIST", "driver acme_drv is already registered on bus acme"],
        ["EEXIST", "parent acme is already registered"],
        ["EEXIST", "wrapper Quota is already registered"],
    ]
    assert {fact[4] for fact in answer[1]} == {"loaded"}
    assert answer[2] == ["acme"]


def test_many_threads_that_want_the_same_plugins_first(late):
    """The bus and the driver are loaded once; nobody takes the other thread's success for a conflict."""
    answer = late.discover(
        """
    import threading
    from concurrent.futures import ThreadPoolExecutor
    barrier = threading.Barrier(16)
    def create(_):
        barrier.wait()
        return registry.create("card-1").driver
    with ThreadPoolExecutor(16) as pool:
        say([sorted(set(pool.map(create, range(16)))), facts(registry)])
    """.strip()
    )
    assert answer[0] == ["acme_drv"]
    assert {fact[4] for fact in answer[1] if fact[2] in {"bus", "card"}} == {"loaded"}
    assert "failed" not in {fact[4] for fact in answer[1]}


def test_a_driver_that_was_unregistered_comes_back_with_the_next_device(late):
    """As a module does that was removed while its hardware is there."""
    answer = late.discover(
        """
    first = registry.create("card-1")
    registry.unregister_driver("acme", "acme_drv")
    say([first.driver, registry.create("card-1").driver])
    """.strip()
    )
    assert answer == [None, "acme_drv"]


WRONG_DRIVERS = {
    "table": (good(ids=["c01", "c02"]), ["acme_drv.acme.c01"], "its id table is c01, c02, its entry points say c01"),
    "empty": (good(ids=[]), ["acme_drv.acme.c01"], "its id table is empty, its entry points say c01"),
    "lines": (good(ids=["c01"]), ["acme_drv.acme.c01", "acme_drv.acme.c02"], "its id table is c01, its entry points say c01, c02"),
    "name": (good(), ["someone.acme.c01"], "its entry point says someone on bus acme, it says acme_drv on acme"),
    "kind": (good().replace("(Driver)", ""), ["acme_drv.acme.c01"], "lone:AcmeDriver() returned a AcmeDriver object, not a Driver"),
    "none": (
        good().replace("('c01',)", "None"),
        ["acme_drv.acme.c01"],
        "driver acme_drv: its id table None is not a sequence of strings",
    ),
    "import": ("import nothing_like_this", ["acme_drv.acme.c01"], "ModuleNotFoundError: No module named 'nothing_like_this'"),
}


@pytest.mark.parametrize("kind", sorted(WRONG_DRIVERS))
def test_a_driver_that_is_not_what_its_lines_say(world, kind):
    source, lines, reason = WRONG_DRIVERS[kind]
    world.add("card", good("card"), parents=["card = card:card"], buses=["acme = card:AcmeBus"])
    world.add("lone", source, "0.3", drivers=[f"{line} = lone:AcmeDriver" for line in lines])
    told, first, again, there = world.discover(
        """
    errors = [text(registry.create, "card-1") for _ in range(2)]
    say([facts(registry), *errors, len(registry.mdevs)])
    """.strip()
    )
    assert [fact[4:] for fact in told if fact[2] == "lone"] == [["failed", reason]] * len(lines)
    for error in (first, again):
        assert error[0] == "ENOEXEC"
        assert f": no driver for acme:c01: plugin {lines[0]} of lone 0.3 cannot be used: {reason}" in error[1], (
            "also the second time"
        )
    assert there == 0


def test_a_driver_with_a_malformed_line(world):
    world.add("card", good("card"), parents=["card = card:card"], buses=["acme = card:AcmeBus"])
    world.add("lone", good(), "0.3", drivers=["acme_drv = lone:AcmeDriver"])
    told, error, loaded = world.discover("e = text(registry.create, 'card-1'); say([facts(registry), e, 'lone' in sys.modules])")
    reasons = [fact[4:] for fact in told if fact[2] == "lone"]
    assert reasons == [["failed", "'acme_drv' is not of the form <driver>.<bus>.<match>"]]
    assert error[1].endswith(": no driver for acme:c01 is installed")
    assert not loaded


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("virtio_mdev.mdev_virtio.c01", ("virtio_mdev", "mdev_virtio", "c01")),
        ("acme_sf.vdev.acme_core.sf", ("acme_sf", "vdev", "acme_core.sf")),
    ],
)
def test_driver_lines(line, parts):
    assert driver_line(line) == parts


@pytest.mark.parametrize("line", ["", "a", "a.b", "a..c", ".b.c", "a.b.", "a b.c.d", "a.b.c*", "a.b.c\n"])
def test_lines_that_are_none(line):
    with pytest.raises(ValueError, match=r"is not of the form <driver>\.<bus>\.<match>"):
        driver_line(line)


def test_a_bus_that_is_not_what_its_line_says(world):
    world.add("card", good("card"), parents=["card = card:card"], buses=["acme = card:AcmeBus"])
    world.add("wrong", good("wrong", bus="wrong"), "0.3", parents=["wrong = wrong:wrong"], buses=["wrong = card:AcmeBus"])
    world.add("odd", good("odd", bus="odd"), "0.3", parents=["odd = odd:odd"], buses=["odd = odd:odd"])
    errors = world.discover("say([text(registry.create, name) for name in ('wrong-1', 'odd-1', 'odd-1')])")
    assert errors[0] == [
        "ENOEXEC",
        "type wrong-1: class bus wrong: plugin wrong of wrong 0.3 cannot be used: its entry point says bus wrong, it says acme",
    ]
    assert errors[1][1].endswith("plugin odd of odd 0.3 cannot be used: odd:odd() returned a odd object, not a Bus")
    assert errors[2] == errors[1], "also the second time"


# -- wrappers ----------------------------------------------------------------------------------------------------------

QUOTA = """
    import errno
    from mdevkit import MdevError, hookimpl

    class Quota:
        left = 1
        @hookimpl(wrapper=True)
        def parent_create(self, mdev):
            if not self.left:
                raise MdevError(errno.EDQUOT, f"{mdev}: the quota is used up", mdev)
            answer = yield
            self.left -= 1
            return answer

    class Meddler:
        @hookimpl
        def parent_create(self, mdev): pass
"""


def test_a_wrapper_plugin_refuses_a_create_it_does_not_own(acme):
    acme.add("quota", QUOTA, wrappers=["quota = quota:Quota"])
    answer = acme.discover("registry.create('acme-1'); say([text(registry.create, 'acme-1'), len(registry.mdevs)])")
    assert answer[0][0] == "EDQUOT"
    assert answer[0][1].endswith(": the quota is used up")
    assert answer[1] == 1


def test_a_wrapper_plugin_that_does_not_wrap_is_refused(acme):
    acme.add("quota", QUOTA, "0.2", wrappers=["quota = quota:Meddler"])
    told, parents = acme.discover()
    (reason,) = [fact[4:] for fact in told if fact[2] == "quota"]
    assert reason[0] == "failed"
    assert reason[1].startswith("quota.Meddler implements parent_create, which only an owner may do: wrap it with")
    assert parents == ["acme"]


# -- cost --------------------------------------------------------------------------------------------------------------


def test_asking_the_service_imports_little():
    """`list` and completion start with this: typing, pathlib and dataclasses would each cost as much as all the rest."""
    heavy = "{'typing', 'pathlib', 'dataclasses', 'logging', 'asyncio'}"
    code = f"import sys; wanted = {heavy} - set(sys.modules); import mdevkit.client; print(wanted & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


def test_importing_the_package_imports_nothing_of_it():
    code = """
        import sys, mdevkit
        print([name for name in sys.modules if name.startswith(("mdevkit.", "pluggy", "stevedore", "typer", "logging"))])
        print(mdevkit.Registry.__module__, all(getattr(mdevkit, name) for name in mdevkit.__all__))
        try:
            mdevkit.Registri
        except AttributeError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "mdevkit.registry True", "module 'mdevkit' has no attribute 'Registri'"]


def test_metadata_alone_imports_no_plugin(late):
    code = "say([[p.name for p in Catalog(installed()).find(PARENTS)], [m for m in ('card', 'bus') if m in sys.modules]])"
    assert late.run(code) == [["card"], []]
