"""One set of assertions, two programs: mdevctl 1.4 on the mounted tree, and mdevkit-mdevctl; the cases mdevctl's own suite has.

Where the two differ on purpose, the case says so, and docs/mdevctl.md says why.
"""

from __future__ import annotations

import json

import pytest

from tests.mdevctl import OURS, REAL, World, find_program, open_world

P, Q, T, BIG = "demo0", "demo1", "demo-small", "demo-big"
A, B, C, D = (f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "abcd")
SPEED = [{"speed": "20"}, {"note": "x"}]

_ALL = {
    "version": 2,
    "actions": ["start", "stop", "define", "undefine", "modify", "attributes", "capabilities"],
    "events": ["pre", "post", "notify", "get", "live"],
}


def versioned(body="exit 0", **changes):
    """The body of a script that says what it supports."""
    answer = json.dumps({"supports": {**_ALL, **changes}})
    return f"if [ $A = capabilities ]; then echo '{answer}'; exit 0; fi\n{body}"


def answering(attributes, code=0):
    """Part of a body: what to say when asked for attributes."""
    return f"if [ $A = attributes ]; then echo '{attributes}'; exit {code}; fi\n"


@pytest.fixture(scope="module", params=[OURS, REAL])
def shared_world(request, tmp_path_factory):
    with open_world(request.param, tmp_path_factory.mktemp("w")) as world:
        yield world


@pytest.fixture
def world(shared_world):
    shared_world.clean()
    return shared_world


@pytest.fixture
def jsonfile(tmp_path):
    """Writes a file to give to --jsonfile; text goes in as it is."""

    def write(content):
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def five(world):
    """Two running devices, one of them defined; another definition; and one UUID defined on two parents."""
    world.device(A, P, T)
    world.device(B, Q, T)
    world.define(A, P, T, "auto", SPEED)
    world.define(C, P, T, "manual", [{"note": "1"}, {"note": "2"}])
    world.define(D, P, BIG)
    world.define(D, Q, T, "auto")
    return world


def config(type_id, start="manual", attrs=()):
    return {"mdev_type": type_id, "start": start, "attrs": list(attrs)}


# -- types -----------------------------------------------------------------------------------------------------------------


def test_types_are_listed_by_parent_and_name(world):
    lines = world.ok("types").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["demo0", "demo1", "twin0", "twin1"]
    assert lines[1:6] == [
        "  demo-big",
        "    Available instances: 2",
        "    Device API: demo",
        "    Name: Big demo device",
        "    Description: Big demo device, for tests",
    ]
    assert [line for line in lines if line.startswith("  demo")][:3] == ["  demo-big", "  demo-many", "  demo-small"]


def test_types_of_one_parent_and_of_none(world):
    assert world.ok("types", "-p", Q).splitlines()[0] == Q
    assert "demo0" not in world.ok("types", "--parent", Q)
    assert world.ok("types", "-p", "nope") == ""
    assert world.ok("types", "-p", "nope", "--dumpjson") == "[]"


def test_types_as_json(world):
    [parents] = json.loads(world.ok("types", "--dumpjson"))
    assert list(parents) == ["demo0", "demo1", "twin0", "twin1"]
    assert parents[P][2] == {
        T: {
            "available_instances": 8,
            "device_api": "demo",
            "name": "Small demo device",
            "description": "Small demo device, for tests",
        }
    }
    [one] = json.loads(world.ok("types", "-p", Q, "--dumpjson"))
    assert list(one) == [Q]


def test_types_know_what_is_left(world):
    world.device(A, P, BIG)
    [parents] = json.loads(world.ok("types", "-p", P, "--dumpjson"))
    left = {name: facts["available_instances"] for type_ in parents[P] for name, facts in type_.items()}
    assert left == {BIG: 1, T: 4, "demo-many": 2**31 - 1}


def test_without_parents_there_are_no_types(shared_world, tmp_path_factory):
    with World(shared_world.name, tmp_path_factory.mktemp("e"), plugins="mdevkit-service") as empty:
        assert empty.ok("types") == ""
        assert empty.ok("types", "--dumpjson") == "[]"
        assert empty.ok("list") == ""


# -- list ------------------------------------------------------------------------------------------------------------------


def test_nothing_to_list(world):
    for words in (["list"], ["list", "-d"], ["list", "-v"]):
        assert world.ok(*words) == ""
    for words in (["list", "--dumpjson"], ["list", "-d", "--dumpjson"], ["list", "--dumpjson", "-u", A]):
        assert world.ok(*words) == "[]"


LINE_A, LINE_B = f"{A} {P} {T} auto (defined)\n", f"{B} {Q} {T} manual\n"
DEFINED_A, DEFINED_C = f"{A} {P} {T} auto (active)\n", f"{C} {P} {T} manual\n"
DEFINED_D0, DEFINED_D1 = f"{D} {P} {BIG} manual\n", f"{D} {Q} {T} auto\n"
ATTRS_A = '  Attrs:\n    @{0}: {"speed":"20"}\n    @{1}: {"note":"x"}\n'
ATTRS_C = '  Attrs:\n    @{0}: {"note":"1"}\n    @{1}: {"note":"2"}\n'


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], LINE_A + LINE_B),
        (["-v"], LINE_A + LINE_B),
        (["-u", A], LINE_A),
        (["-p", Q], LINE_B),
        (["-p", P, "-u", B], ""),
        (["-u", C], ""),
        (["-p", "nope"], ""),
        (["-d"], DEFINED_A + DEFINED_C + DEFINED_D0 + DEFINED_D1),
        (["--defined", "--verbose"], DEFINED_A + ATTRS_A + DEFINED_C + ATTRS_C + DEFINED_D0 + DEFINED_D1),
        (["-dv", "-p", P, "-u", C], DEFINED_C + ATTRS_C),
        (["-d", "-u", D], DEFINED_D0 + DEFINED_D1),
        (["-d", "-u", D, "-p", Q], DEFINED_D1),
        (["-d", "-p", Q], DEFINED_D1),
        (["-d", "-u", B], ""),
        (["-d", f"-u={A.upper()}"], DEFINED_A),
        (["-d", f"-uurn:uuid:{A}"], DEFINED_A),
        (["-d", "--uuid", A.replace("-", "")], DEFINED_A),
    ],
)
def test_list(five, words, expected):
    assert five.ok("list", *words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [{P: [{A: config(T, "auto")}], Q: [{B: config(T)}]}]),
        (["-p", Q], [{Q: [{B: config(T)}]}]),
        (["-u", A], config(T, "auto")),
        (["-u", C], []),
        (["-d", "-u", A], config(T, "auto", SPEED)),
        (["-d", "-p", Q], [{Q: [{D: config(T, "auto")}]}]),
        (["-d", "-u", D], [{P: [{D: config(BIG)}], Q: [{D: config(T, "auto")}]}]),
        (["-d", "-u", D, "-p", P], config(BIG)),
        (["-d", "-u", B], []),
    ],
)
def test_list_as_json(five, words, expected):
    text = five.ok("list", "--dumpjson", *words)
    assert text == json.dumps(expected, indent=2)


def test_list_under_its_other_name(five, tmp_path):
    if five.name == REAL:
        program = find_program(REAL, "lsmdev")
    else:
        program = [str(tmp_path / "lsmdev")]
        (tmp_path / "lsmdev").symlink_to(find_program(OURS)[0])
    assert five.run(program=program).out == LINE_A + LINE_B
    assert five.run("-d", "-p", Q, program=program).out == DEFINED_D1
    refused = five.run("list", program=program)
    assert (refused.code, "unexpected argument 'list' found" in refused.err) == (2, True)


def test_list_shows_the_attributes_a_script_knows(five):
    five.callout("x.sh", answering('[{"speed": "5"}, {"speed": "6"}]') + "exit 0")
    assert five.ok("list", "-v", "-u", A) == LINE_A + '  Attrs:\n    @{0}: {"speed":"5"}\n    @{1}: {"speed":"6"}\n'
    assert json.loads(five.ok("list", "--dumpjson", "-u", B)) == config(T, "manual", [{"speed": "5"}, {"speed": "6"}])
    assert all(call.step == ("get", "attributes", "none") and call.input == "" for call in five.calls())


@pytest.mark.parametrize("answer", [answering("{oops"), answering('[{"a": 1}]'), answering('[{"a": "1"}]', 1), "exit 3\n"])
def test_list_ignores_a_script_that_fails(five, answer):
    five.callout("x.sh", answer + "exit 0")
    assert five.ok("list", "-v", "-u", A) == LINE_A


def test_a_file_that_is_no_definition_is_skipped(five):
    (five.definitions / P / "notes.txt").write_text("nothing")
    result = five.run("list", "-d")
    assert (result.code, result.out) == (0, DEFINED_A + DEFINED_C + DEFINED_D0 + DEFINED_D1)
    assert "notes.txt" in result.err


# -- configuration files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attrs", [{}, {"attrs": None}, {"attrs": []}])
def test_a_file_without_attributes(world, jsonfile, attrs):
    world.ok("define", "-u", A, "-p", P, "--jsonfile", jsonfile({"mdev_type": T, "start": "auto", **attrs}))
    assert world.defined(A, P) == config(T, "auto")


def test_attributes_stay_in_order_and_may_repeat(world, jsonfile):
    attrs = [{"b": "1"}, {"a": "2"}, {"b": "3"}]
    world.ok("define", "-u", A, "-p", P, "--jsonfile", jsonfile(config(T, "manual", attrs)))
    assert world.defined(A, P) == config(T, "manual", attrs)
    assert (world.definitions / P / A).read_text() == json.dumps(config(T, "manual", attrs), indent=2)


@pytest.mark.parametrize(
    ("content", "saying"),
    [
        (config(T, "manual", [{"a": "1", "b": "2"}]), "invalid JSON format for attribute: too many fields"),
        (config(T, "manual", [{}]), "invalid JSON format for attribute: too many fields"),
        (config(T, "manual", ["a"]), "invalid JSON format for attribute: not an object"),
        (config(T, "manual", [{"k": 5}]), 'invalid JSON format for attribute {"k", 5}: value must be of type str'),
        ({"mdev_type": T, "start": "auto", "attrs": {"a": "1"}}, "attributes field is not an array"),
        ({"mdev_type": T}, "invalid json"),
        ({"start": "auto"}, "invalid json"),
        ([], "invalid json"),
        ("{oops", "line 1 column 2"),
        ("", "line 1 column"),
    ],
)
def test_a_file_that_is_wrong(world, jsonfile, content, saying):
    world.fails("define", "-u", A, "-p", P, "--jsonfile", jsonfile(content), saying=saying)
    assert world.defined(A, P) is None


def test_a_file_that_is_not_there(world, tmp_path):
    text = world.fails("define", "-u", A, "-p", P, "--jsonfile", tmp_path / "none", saying="Unable to read file")
    assert "No such file or directory (os error 2)" in text


# -- define ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        ([], "the following required arguments were not provided:\n  --uuid <UUID>\n  --parent <PARENT>"),
        (["-p", P, "-t", T, "--jsonfile", "f"], "the argument '--type <type>' cannot be used with '--jsonfile <JSONFILE>'"),
        (["-p", P, "-a", "--jsonfile", "f"], "the argument '--auto' cannot be used with '--jsonfile <JSONFILE>'"),
        (["-u", "xx", "-p", P], "invalid value 'xx' for '--uuid <UUID>'"),
        (["-u", "-p", P], "a value is required for '--uuid <UUID>' but none was supplied"),
        (["-p", P, "-p", Q], "the argument '--parent <PARENT>' cannot be used multiple times"),
        (["-p", P, "--what"], "unexpected argument '--what' found"),
    ],
)
def test_define_usage(world, words, saying):
    world.fails("define", *words, saying=saying, code=2)


def test_define_without_uuid_prints_the_new_one(world):
    uuid = world.ok("define", "-p", P, "-t", T).strip()
    assert world.defined(uuid, P) == config(T)


@pytest.mark.parametrize(("words", "start"), [([], "manual"), (["-a"], "auto"), (["--auto"], "auto")])
def test_define(world, words, start):
    assert world.ok("define", "-u", A, "-p", P, "-t", T, *words) == ""
    assert world.defined(A, P) == config(T, start)
    assert world.devices() == set()


def test_define_needs_neither_parent_nor_type_to_exist(world):
    world.ok("define", "-u", A, "-p", "later", "-t", "unknown")
    assert world.defined(A, "later") == config("unknown")


def test_define_from_a_file(world, jsonfile):
    assert world.ok("define", "-u", A, "-p", P, "--jsonfile", jsonfile(config(T, "auto", SPEED))) == ""
    assert world.defined(A, P) == config(T, "auto", SPEED)
    world.fails("define", "-u", A, "--jsonfile", jsonfile(config(T)), saying="Parent device required to define device via")


@pytest.mark.parametrize(
    ("words", "where", "type_id"),
    [([], P, T), (["-p", P], P, T), (["-p", P, "-t", BIG], P, BIG), (["-p", Q], Q, T), (["-p", Q, "-t", BIG], Q, BIG)],
)
def test_define_what_runs(world, words, where, type_id):
    world.device(A, P, T)
    world.ok("define", "-u", A, *words)
    assert world.defined(A, where) == config(type_id)
    assert world.devices() == {(A, P, T)}


def test_define_with_too_little(world):
    world.device(A, P, T)
    world.fails("define", "-u", A, "-t", T, saying="No parent specified")
    world.fails("define", "-u", B, saying="No parent specified")
    world.fails("define", "-u", B, "-p", P, saying="No type specified")
    world.fails("define", "-p", P, saying="No type specified")


def test_define_what_is_defined(five, jsonfile):
    five.fails("define", "-u", C, "-p", P, "-t", BIG, saying=f"Device {C} on {P} already defined")
    five.fails("define", "-u", A, saying=f"Device {A} on {P} already defined")
    path = jsonfile(config(BIG))
    five.fails("define", "-u", C, "-p", P, "--jsonfile", path, saying=f"refusing to overwrite existing config for {P}/{C}")
    assert five.defined(C, P) == config(T, "manual", [{"note": "1"}, {"note": "2"}])


def test_define_stores_the_attributes_a_script_knows(world):
    world.device(A, P, T)
    world.callout("x.sh", answering('[{"speed": "5"}]') + "exit 0")
    world.ok("define", "-u", A)
    assert world.defined(A, P) == config(T, "manual", [{"speed": "5"}])
    assert world.steps() == ["x.sh pre define none", "x.sh get attributes none", "x.sh post define success"]
    assert [call.input for call in world.calls()] == [
        '{"mdev_type":"demo-small","start":"manual","attrs":[]}',
        "",
        '{"mdev_type":"demo-small","start":"manual","attrs":[]}',
    ]


@pytest.mark.parametrize(
    ("answer", "saying"),
    [
        (answering("{oops"), "Invalid JSON received from callout script"),
        (answering('[{"a": 1}]'), "value must be of type str"),
        (answering("[]", 1), "failed with status '1'"),
    ],
)
def test_define_fails_with_a_script_that_cannot_tell(world, answer, saying):
    world.device(A, P, T)
    world.callout("x.sh", answer + "exit 0")
    world.fails("define", "-u", A, "--force", saying=saying)
    assert world.defined(A, P) is None
    assert world.steps()[-1] == "x.sh post define failure"


# -- undefine --------------------------------------------------------------------------------------------------------------


def test_undefine(five):
    five.ok("undefine", "-u", A)
    assert five.defined(A, P) is None
    assert (A, P, T) in five.devices()
    five.ok("undefine", "-u", D, "-p", P)
    assert (five.defined(D, P), five.defined(D, Q)) == (None, config(T, "auto"))


def test_undefine_all_of_a_device(five):
    five.ok("undefine", "--uuid", D)
    assert (five.defined(D, P), five.defined(D, Q)) == (None, None)


def test_undefine_what_is_not_defined(five):
    five.fails("undefine", "-u", B, saying="No devices match the specified uuid")
    five.fails("undefine", "-u", D, "-p", "nope", saying="No devices match the specified uuid")
    five.fails("undefine", "-p", P, saying="required arguments were not provided:\n  --uuid <UUID>", code=2)


def test_undefine_goes_on_after_a_failure(five):
    five.callout("x.sh", f"[ $P = {P} ] && exit 1; exit 0")
    text = five.fails("undefine", "-u", D, saying="Undefine failed")
    assert f"Undefine of {D} on parent {P} failed with error" in text
    assert (five.defined(D, P), five.defined(D, Q)) == (config(BIG), None)


# -- modify ----------------------------------------------------------------------------------------------------------------

ONE, TWO, NEW = {"note": "1"}, {"note": "2"}, {"speed": "9"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--auto"], config(T, "auto", [ONE, TWO])),
        (["--manual"], config(T, "manual", [ONE, TWO])),
        (["-a", "-t", BIG], config(BIG, "auto", [ONE, TWO])),
        (["-a", "-p", P, "--defined"], config(T, "auto", [ONE, TWO])),
        (["--addattr", "speed", "--value", "9"], config(T, "manual", [ONE, TWO, NEW])),
        (["--addattr", "speed", "--value", "9", "--index", "0"], config(T, "manual", [NEW, ONE, TWO])),
        (["--addattr", "speed", "--value=9", "-i", "1"], config(T, "manual", [ONE, NEW, TWO])),
        (["--addattr", "speed", "--value", "9", "-i", "2"], config(T, "manual", [ONE, TWO, NEW])),
        (["--delattr"], config(T, "manual", [ONE])),
        (["--delattr", "-i", "0"], config(T, "manual", [TWO])),
    ],
)
def test_modify(five, words, expected):
    assert five.ok("modify", "-u", C, *words) == ""
    assert five.defined(C, P) == expected


def test_modify_takes_a_running_device_back_to_manual(five):
    five.ok("modify", "-u", A, "-m")
    assert five.defined(A, P) == config(T, "manual", SPEED)
    assert (A, P, T) in five.devices()


def test_modify_from_a_file(five, jsonfile):
    five.ok("modify", "-u", C, "-p", P, "--jsonfile", jsonfile({"mdev_type": BIG, "start": "never"}))
    assert five.defined(C, P) == config(BIG)
    five.fails("modify", "-u", C, "--jsonfile", jsonfile(config(T)), saying="Parent device required to modify device via json file")


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["-u", B, "-a"], f"Mediated device {B} is not defined"),
        (["-u", C, "-p", Q, "-a"], f"Mediated device {Q}/{C} is not defined"),
        (["-u", D, "-a"], f"Multiple definitions found for {D}, specify a parent"),
        (
            ["-u", C, "--delattr", "-i", "2"],
            'Attribute index 2 is invalid\n  Attrs:\n    @{0}: {"note":"1"}\n    @{1}: {"note":"2"}',
        ),
        (["-u", C, "--addattr", "a", "--value", "1", "-i", "3"], "Attribute index 3 is invalid"),
        (["-u", D, "-p", Q, "--delattr", "-i", "0"], f"Attribute index 0 is invalid\nDevice {D} has no attributes"),
    ],
)
def test_modify_fails(five, words, saying):
    five.fails("modify", *words, saying=saying)
    assert five.defined(C, P) == config(T, "manual", [ONE, TWO])


def test_modify_of_one_parent_leaves_the_other(five):
    five.ok("modify", "-u", D, "-p", P, "-a")
    assert (five.defined(D, P), five.defined(D, Q)) == (config(BIG, "auto"), config(T, "auto"))
    five.ok("modify", "-u", D, "-p", Q, "--delattr")
    assert five.defined(D, Q) == config(T, "auto")


_GROUP = "<--auto|--manual|--addattr <attr_name>|--delattr|--jsonfile <JSONFILE>>"


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["-u", C], f"required arguments were not provided:\n  {_GROUP}"),
        (["-u", C, "-t", BIG], f"required arguments were not provided:\n  {_GROUP}"),
        (["-a"], "required arguments were not provided:\n  --uuid <UUID>"),
        (["-u", C, "--auto", "--manual"], "the argument '--auto' cannot be used with '--manual'"),
        (["-u", C, "--addattr", "x"], "required arguments were not provided:\n  --value <attr_value>"),
        (["-u", C, "--delattr", "--value", "x"], "the argument '--delattr' cannot be used with '--value <attr_value>'"),
        (["-u", C, "--delattr", "--addattr", "x", "--value", "1"], "the argument '--delattr' cannot be used with:\n  --addattr"),
        (["-u", C, "--auto", "--index", "1"], "the argument '--auto' cannot be used with '--index <INDEX>'"),
        (["-u", C, "-a", "--jsonfile", "f"], "the argument '--auto' cannot be used with '--jsonfile <JSONFILE>'"),
        (["-u", C, "-t", BIG, "-a", "-l"], "the argument '--type <type>' cannot be used with '--live'"),
        (["-u", C, "--delattr", "--index", "x"], "invalid value 'x' for '--index <INDEX>': invalid digit found in string"),
        (["-u", C, "--delattr", "--index=-1"], "invalid value '-1' for '--index <INDEX>': -1 is not in 0..=4294967295"),
    ],
)
def test_modify_usage(world, words, saying):
    world.fails("modify", *words, saying=saying, code=2)


# -- modify --live ---------------------------------------------------------------------------------------------------------


def test_live_is_the_scripts_business(five, jsonfile):
    five.callout("x.sh", versioned())
    five.ok("modify", "-u", A, "-p", P, "--live", "--jsonfile", jsonfile(config(T, "manual", [NEW])))
    assert five.defined(A, P) == config(T, "auto", SPEED)
    assert five.steps() == ["x.sh get attributes none", "x.sh live modify none"]
    assert json.loads(five.calls()[1].input) == config(T, "manual", [NEW])


def test_live_and_defined(five, jsonfile):
    five.callout("x.sh", versioned())
    five.notifier("n.sh")
    five.ok("modify", "-u", A, "-p", P, "--live", "--defined", "--jsonfile", jsonfile(config(T, "manual", [NEW])))
    assert five.defined(A, P) == config(T, "manual", [NEW])
    assert five.steps() == [
        "x.sh get attributes none",
        "x.sh live modify none",
        "n.sh notify modify none",
        "x.sh pre modify none",
        "x.sh post modify success",
        "n.sh notify modify success",
    ]
    assert [call.input for call in five.calls() if call.script == "n.sh"] == ["", ""]


@pytest.mark.parametrize(
    ("script", "saying"),
    [
        (None, "Live modification is not supported for this device type"),
        ("exit 0", "Live modification is not supported for this device type"),
        (versioned(events=["pre", "post", "get"]), "does not support event 'Live'"),
        (versioned(answering("[]") + "exit 1"), "failed with status '1'"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--defined"], ["--force"]])
def test_live_that_cannot_be(five, jsonfile, script, saying, words):
    if script:
        five.callout("x.sh", script)
    five.fails("modify", "-u", A, "-p", P, "--live", "--jsonfile", jsonfile(config(T, "manual", [NEW])), *words, saying=saying)
    assert five.defined(A, P) == config(T, "auto", SPEED)


def test_live_is_refused(five, jsonfile):
    five.callout("x.sh", versioned())
    path = jsonfile(config(T))
    live = ["--live", "--jsonfile", path]
    five.fails("modify", "-u", A, "--live", "--delattr", saying="'live' option must be used with 'jsonfile' option")
    five.fails("modify", "-u", A, "--live", "--auto", saying="'auto' cannot be changed on active mdev")
    five.fails("modify", "-u", A, "--live", "--manual", saying="'manual' cannot be changed on active mdev")
    five.fails("modify", "-u", C, *live, saying=f"Mediated device {C} is not active")
    five.fails("modify", "-u", A, "-p", Q, *live, saying=f"Mediated device {Q}/{A} is not active")
    five.fails("modify", "-u", B, *live, "--defined", saying=f"Mediated device {Q}/{B} is not defined")
    jsonfile(config(BIG))
    five.fails("modify", "-u", A, *live, saying="'type' cannot be changed on active mdev")


# -- start -----------------------------------------------------------------------------------------------------------------


def test_start_what_is_given(world):
    assert world.ok("start", "-u", A, "-p", P, "-t", T) == ""
    uuid = world.ok("start", "--parent", Q, "--type", BIG).strip()
    assert world.devices() == {(A, P, T), (uuid, Q, BIG)}


@pytest.mark.parametrize("words", [[], ["-p", P], ["-t", T], ["-p", P, "-t", T]])
def test_start_what_is_defined(world, words):
    world.define(A, P, T, "manual", [{"speed": "20"}, {"note": "x"}, {"speed": "30"}, {"moody": "4"}])
    assert world.ok("start", "-u", A, *words) == ""
    assert world.devices() == {(A, P, T)}
    assert [world.attribute(A, name) for name in ("speed", "note", "moody")] == ["30", "x", "4"]


def test_start_from_a_file(world, jsonfile):
    path = jsonfile(config(T, "auto", [{"speed": "20"}]))
    assert world.ok("start", "-u", A, "-p", P, "--jsonfile", path) == ""
    assert world.attribute(A, "speed") == "20"
    uuid = world.ok("start", "-p", P, "--jsonfile", path).strip()
    assert world.devices() == {(A, P, T), (uuid, P, T)}
    assert world.defined(A, P) is None
    world.fails("start", "-u", B, "--jsonfile", path, saying="Parent device required to start device via json file")


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["-p", P], "Device is insufficiently specified"),
        (["-u", B], "Device is insufficiently specified"),
        (["-u", B, "-p", P], "Device is insufficiently specified"),
        (["-u", B, "-t", T], "can't provide type without parent"),
        (["-u", D], f"Multiple definitions found for device {D}. Please specify a parent."),
        (["-u", C, "-p", P, "-t", BIG], f"Device {C} already exists on parent {P} with type {T}"),
        (["-u", B, "-p", "nope", "-t", T], "Unable to find parent device 'nope'\n"),
        (["-u", B, "-p", "DEMO0", "-t", T], "Unable to find parent device 'DEMO0'. Did you mean 'demo0'?"),
        (["-u", B, "-p", P, "-t", "nope"], f"Parent {P} does not support mdev type nope"),
    ],
)
def test_start_fails(world, words, saying):
    world.define(C, P, T)
    world.define(D, P, BIG)
    world.define(D, Q, T)
    world.fails("start", *words, saying=saying)
    assert world.devices() == set()


def test_start_usage(world):
    world.fails("start", saying="were not provided:\n  --uuid <UUID>\n  --parent <PARENT>", code=2)
    world.fails("start", "-p", P, "-t", T, "--jsonfile", "f", saying="'--type <type>' cannot be used with '--jsonfile", code=2)


def test_start_of_one_parents_definition(five):
    five.ok("start", "-u", D, "-p", Q)
    assert (D, Q, T) in five.devices()


def test_start_what_runs(five):
    five.fails("start", "-u", A, saying="Device already exists")
    five.fails("start", "-u", A, "-p", Q, "-t", T, saying="Device exists under different parent")
    five.fails("start", "-u", B, "-p", Q, "-t", BIG, saying="Device exists with different type")
    assert five.devices() == {(A, P, T), (B, Q, T)}


def test_start_when_nothing_is_left(world):
    for uuid in (A, B):
        world.device(uuid, P, BIG)
    world.fails("start", "-u", C, "-p", P, "-t", T, saying=f"No available instances of {T} on {P}")
    assert len(world.devices()) == 2


def test_start_that_the_vendor_refuses(world):
    world.client.put(f"/v1/parents/{P}/attributes/label", {"value": "x"})
    world.define(A, P, T, "manual", [{"speed": "20"}, {"speed": "2000"}])
    world.fails("start", "-u", A, saying="Failed to")
    assert world.devices() == set()
    world.define(A, P, T, "manual", [{"moody": "3"}])
    assert "moody" in world.fails("start", "-u", A, saying="Failed to write 3 to attribute")
    assert world.devices() == set()


def test_start_with_an_attribute_there_is_not(world):
    world.define(A, P, T, "manual", [{"speed": "20"}, {"nope": "1"}])
    assert "'nope'" in world.fails("start", "-u", A)
    assert world.devices() == set()


def test_start_with_the_parent(five):
    five.define(B, P, BIG, "auto")  # its UUID is taken on another parent
    result = five.run("start-parent-mdevs", Q)
    assert (result.code, result.out) == (0, "")
    assert five.devices() == {(A, P, T), (B, Q, T), (D, Q, T)}
    result = five.run("start-parent-mdevs", P)
    assert (result.code, result.out) == (0, "")
    assert "Device already exists" in result.err
    assert "Device exists under different parent" in result.err
    assert five.run("start-parent-mdevs", "nope").code == 0


# -- stop ------------------------------------------------------------------------------------------------------------------


def test_stop(five):
    assert five.ok("stop", "-u", A) == ""
    assert five.devices() == {(B, Q, T)}
    assert five.defined(A, P) == config(T, "auto", SPEED)
    five.fails("stop", "-u", A, saying=f"Device {A} is not an active mdev")
    five.fails("stop", saying="were not provided:\n  --uuid <UUID>", code=2)
    five.fails("stop", "-p", P, saying="unexpected argument '-p' found", code=2)


# -- the program -----------------------------------------------------------------------------------------------------------


def test_the_program_itself(world):
    assert world.ok("--version").startswith("mdevctl 1.4.0")
    assert world.ok("list", "-V") == "mdevctl-list 1.4.0\n"
    for words in (["--help"], ["help"]):
        assert "Usage: " in world.ok(*words)
    for name in ("define", "undefine", "modify", "start", "stop", "list", "types"):
        assert "Options:" in world.ok(name, "--help")
        assert "--help" in world.ok("help", name)
    world.fails("foo", saying="unrecognized subcommand 'foo'", code=2)
    world.fails("--foo", saying="unexpected argument '--foo' found", code=2)
    world.fails("list", "word", saying="unexpected argument 'word' found", code=2)
    assert world.run().code == 2
