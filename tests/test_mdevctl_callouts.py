"""Callout and notifier scripts, as mdevctl 1.4 and mdevkit-mdevctl run them: the same assertions on both."""

from __future__ import annotations

import json

import pytest

from tests.mdevctl import OURS, REAL, open_world

P, Q, T, BIG, MANY = "demo0", "demo1", "demo-small", "demo-big", "demo-many"
A, B = (f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "ab")
ATTRS = [{"note": "x"}]

_ALL = {
    "version": 2,
    "actions": ["start", "stop", "define", "undefine", "modify", "attributes", "capabilities"],
    "events": ["pre", "post", "notify", "get", "live"],
}
_OFFER = json.dumps({"provides": _ALL}, separators=(",", ":"))

#: Action to its command line, after `ready`.
COMMANDS = {
    "define": ["define", "-u", B, "-p", P, "-t", T],
    "undefine": ["undefine", "-u", A],
    "modify": ["modify", "-u", A, "--addattr", "speed", "--value", "9"],
    "start": ["start", "-u", A],
    "stop": ["stop", "-u", B],
}


def capabilities(answer, code=0):
    """Part of a body: what to say when asked for capabilities."""
    text = answer if isinstance(answer, str) else json.dumps({"supports": answer})
    return f"if [ $A = capabilities ]; then printf '{text}'; exit {code}; fi\n"


def versioned(body="exit 0", **changes):
    """The body of a script that says what it supports."""
    return capabilities({**_ALL, **changes}) + body


@pytest.fixture(scope="module", params=[OURS, REAL])
def shared_world(request, tmp_path_factory):
    with open_world(request.param, tmp_path_factory.mktemp("w")) as world:
        yield world


@pytest.fixture
def world(shared_world):
    shared_world.clean()
    return shared_world


@pytest.fixture
def ready(world):
    """A is defined, and B runs when it is to be stopped."""

    def prepare(action):
        world.define(A, P, T, "auto", ATTRS)
        if action == "stop":
            world.device(B, P, T)
        return COMMANDS[action]

    return prepare


def done(world, action):
    """Whether the action has happened."""
    if action == "define":
        return world.defined(B, P) is not None
    if action == "undefine":
        return world.defined(A, P) is None
    if action == "modify":
        return len(world.defined(A, P)["attrs"]) == 2
    uuids = {uuid for uuid, _, _ in world.devices()}
    return A in uuids if action == "start" else B not in uuids


every_action = pytest.mark.parametrize("action", COMMANDS)


# -- one script ------------------------------------------------------------------------------------------------------------


@every_action
def test_a_script_is_asked_and_told(world, ready, action):
    words = ready(action)
    world.callout("x.sh")
    world.notifier("n.sh", "exit 1")
    world.ok(*words)
    assert done(world, action)
    assert world.steps() == [f"x.sh pre {action} none", f"x.sh post {action} success", f"n.sh notify {action} success"]
    first = world.calls(capabilities=True)[0]
    assert (first.step, first.input) == (("get", "capabilities", "none"), _OFFER)


@every_action
def test_a_script_learns_which_device(world, ready, action):
    words = ready(action)
    world.callout("x.sh")
    world.ok(*words)
    uuid = B if action in {"define", "stop"} else A
    attrs = {"modify": [*ATTRS, {"speed": "9"}], "start": ATTRS, "undefine": ATTRS}.get(action, [])
    start = "manual" if uuid == B else "auto"
    wanted = json.dumps({"mdev_type": T, "start": start, "attrs": attrs}, separators=(",", ":"))
    for call in world.calls():
        assert [call.options[name] for name in ("-t", "-u", "-p")] == [T, uuid, P]
        assert list(call.options) == ["-t", "-e", "-a", "-s", "-u", "-p"]
        assert call.input == wanted


@every_action
def test_a_script_objects(world, ready, action):
    words = ready(action)
    script = world.callout("x.sh", "echo not today >&2; exit 1")
    world.notifier("n.sh")
    text = world.fails(*words)
    assert "x.sh: not today\n" in text
    assert f"Script '\"{script}\"' failed with status '1'" in text
    assert not done(world, action)
    assert world.steps() == [f"x.sh pre {action} none", f"n.sh notify {action} none"]


@every_action
@pytest.mark.parametrize("body", ["exit 1", versioned("exit 1"), versioned("exit 2"), versioned(actions=[])])
def test_force_goes_on(world, ready, action, body):
    words = ready(action)
    world.callout("x.sh", body)
    result = world.run(*words, "--force")
    assert (result.code, result.out) == (0, "")
    assert f"Forcing operation '{action}' despite callout failure. Error was: Script " in result.err
    assert done(world, action)


@every_action
def test_a_script_of_another_type(world, ready, action):
    words = ready(action)
    world.callout("x.sh", "exit 2")
    world.ok(*words)
    assert done(world, action)
    assert world.steps() == [f"x.sh pre {action} none", f"x.sh post {action} success"]


@every_action
def test_what_a_script_answers_afterwards_is_of_no_matter(world, ready, action):
    words = ready(action)
    world.callout("x.sh", "[ $E = post ] && exit 1; exit 0")
    world.ok(*words)
    assert done(world, action)


def test_a_script_is_told_of_a_failure(world):
    world.define(A, P, T, "manual", [{"nope": "1"}])
    world.callout("x.sh")
    world.notifier("n.sh")
    world.fails("start", "-u", A)
    assert world.steps() == ["x.sh pre start none", "x.sh post start failure", "n.sh notify start failure"]
    assert world.calls()[-1].input == ""


def test_a_script_that_is_killed_is_skipped(world, ready):
    words = ready("define")
    world.callout("1.sh", "kill -9 $$")
    world.callout("2.sh")
    result = world.run(*words)
    assert result.code == 0
    assert "terminated by a signal" in result.err
    assert world.steps() == ["1.sh pre define none", "2.sh pre define none", "2.sh post define success"]


def test_a_script_need_not_read_nor_end_its_words(world, ready):
    path = world.root / "usr/lib/mdevctl/scripts.d/callouts/x.sh"
    path.write_text("#!/bin/sh\nexec <&-\nprintf 'no end of line' >&2\nexit 0\n")
    path.chmod(0o755)
    result = world.run(*ready("define"))
    assert (result.code, "x.sh: no end of line" in result.err) == (0, True)


def test_each_definition_of_a_device_has_its_script(world):
    world.define(A, P, T)
    world.define(A, Q, BIG)
    world.callout("x.sh")
    world.ok("undefine", "-u", A)
    assert [call.options["-p"] for call in world.calls()] == [P, P, Q, Q]
    assert [call.options["-t"] for call in world.calls()] == [T, T, BIG, BIG]


# -- several scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("type_id", "script"), [(T, "1.sh"), (BIG, "2.sh"), (MANY, "3.sh"), ("other", "")])
def test_each_type_has_its_script(world, type_id, script):
    for number, mine in enumerate((T, BIG, MANY), 1):
        world.callout(f"{number}.sh", f"[ $T = {mine} ] || exit 2; exit 0")
    world.ok("define", "-u", B, "-p", P, "-t", type_id)
    asked = ["1.sh", "2.sh", "3.sh"][: int(script[0]) if script else 3]
    told = [script] if script else asked
    assert world.steps() == [f"{name} pre define none" for name in asked] + [f"{name} post define success" for name in told]


@pytest.mark.parametrize(("first", "second", "works"), [(1, 0, False), (0, 1, True), (2, 1, False), (2, 0, True), (2, 2, True)])
def test_scripts_are_asked_by_name(world, first, second, works):
    world.callout("99.sh", f"exit {second}")
    world.callout("00.sh", f"exit {first}")
    assert world.run("define", "-u", B, "-p", P, "-t", T).code == (0 if works else 1)
    assert done(world, "define") == works


@pytest.mark.parametrize(("packaged", "local", "works"), [(0, 1, True), (1, 0, False), (2, 1, False), (2, 0, True)])
def test_scripts_of_packages_come_first(world, packaged, local, works):
    world.callout("99.sh", f"exit {packaged}")
    world.callout("00.sh", f"exit {local}", "etc/mdevctl.d")
    assert world.run("define", "-u", B, "-p", P, "-t", T).code == (0 if works else 1)
    assert done(world, "define") == works


def test_every_notifier_is_told(world):
    for name in ("2.sh", "1.sh"):
        world.notifier(name, "exit 1")
    world.notifier("0.sh", "kill -9 $$", "etc/mdevctl.d")
    world.ok("define", "-u", B, "-p", P, "-t", T)
    told = [call.script for call in world.calls()]
    assert (sorted(told[:2]), told[2:]) == (["1.sh", "2.sh"], ["0.sh"])  # within a folder, mdevctl's order is the folder's


def test_what_is_no_script_is_passed_over(world, ready):
    words = ready("define")
    folder = world.root / "usr/lib/mdevctl/scripts.d/callouts"
    (folder / "0.d").mkdir()
    (folder / "1.sh").write_text("#!/bin/sh\nexit 1\n")  # nobody may execute it
    (folder / "2.sh").write_text("garbage")
    (folder / "2.sh").chmod(0o755)
    world.callout("3.sh")
    world.ok(*words)
    assert world.steps() == ["3.sh pre define none", "3.sh post define success"]


# -- versioned scripts -----------------------------------------------------------------------------------------------------


@every_action
@pytest.mark.parametrize(("code", "works"), [(0, True), (1, False), (2, False)])
def test_a_versioned_script(world, ready, action, code, works):
    words = ready(action)
    world.callout("x.sh", versioned(f"exit {code}"))
    result = world.run(*words)
    assert (result.code == 0) == works
    assert done(world, action) == works
    if not works:
        assert f"failed with status '{code}'" in result.err


@every_action
@pytest.mark.parametrize(("versioned_code", "other", "works"), [(0, 1, True), (1, 0, False)])
def test_a_versioned_script_goes_before_others(world, ready, action, versioned_code, other, works):
    words = ready(action)
    world.callout("00.sh", f"exit {other}")
    world.callout("99.sh", versioned(f"exit {versioned_code}"))
    assert (world.run(*words).code == 0) == works
    assert done(world, action) == works
    assert {call.script for call in world.calls()} == {"99.sh"}


@every_action
def test_a_versioned_script_that_does_not_know_the_action(world, ready, action):
    words = ready(action)
    script = world.callout("x.sh", versioned(actions=[name for name in _ALL["actions"] if name != action]))
    world.notifier("n.sh")
    world.fails(*words, saying=f"Script \"{script}\" does not support action '{action.capitalize()}'")
    assert not done(world, action)
    assert world.steps() == [f"n.sh notify {action} none"]


def test_a_versioned_script_that_knows_some_actions(world, ready):
    world.callout("x.sh", versioned(actions=["start"]))
    world.ok(*ready("start"))
    world.fails(*COMMANDS["modify"], saying="does not support action 'Modify'")


@pytest.mark.parametrize(
    ("events", "saying", "steps"),
    [(["post"], "does not support event 'Pre'", []), (["pre"], "", ["x.sh pre define none"])],
)
def test_a_versioned_script_that_knows_some_events(world, ready, events, saying, steps):
    words = ready("define")
    world.callout("x.sh", versioned(events=events))
    result = world.run(*words)
    assert (result.code, saying in result.err) == (1 if saying else 0, True)
    assert world.steps() == steps


def test_actions_and_events_nobody_knows(world, ready):
    words = ready("define")
    world.callout("x.sh", versioned(actions=["define", "frobnicate"], events=["pre", "post", "party"]))
    result = world.run(*words)
    assert result.code == 0
    assert "provides unknown Action type" in result.err
    assert "provides unknown Event type" in result.err
    assert done(world, "define")


@pytest.mark.parametrize(
    ("answer", "is_versioned"),
    [
        (capabilities(_ALL), True),
        (capabilities(_ALL, 1), True),
        (capabilities(_ALL, 2), False),
        (capabilities({**_ALL, "version": 9}), True),
        (capabilities({**_ALL, "version": "2"}), False),
        (capabilities(json.dumps({"provides": {}, "supports": _ALL})), True),
        (capabilities(json.dumps({"supports": _ALL}) + "\\0"), True),
        (capabilities("garbage"), False),
        (capabilities('{"supports": {"version": 2}}'), False),
        (capabilities('{"supports": {"version": 2, "actions": "define", "events": ["pre"]}}'), False),
        (capabilities('{"nothing": 1}'), False),
        (capabilities("[]"), False),
        ("", False),
    ],
)
def test_what_makes_a_script_versioned(world, answer, is_versioned):
    """A versioned script's 2 is a failure, another's means that the device is not its own."""
    world.callout("x.sh", answer + "exit 2")
    assert world.run("define", "-u", B, "-p", P, "-t", T).code == (1 if is_versioned else 0)


@pytest.mark.parametrize("answer", ["", "[]", '[{"speed": "5"}]\\0'])
def test_attributes_may_be_none_or_end_with_nul(world, answer):
    world.device(B, P, T)
    world.callout("x.sh", f"if [ $A = attributes ]; then printf '{answer}'; exit 0; fi; exit 0")
    world.ok("define", "-u", B)
    assert world.defined(B, P)["attrs"] == ([{"speed": "5"}] if "5" in answer else [])


def test_attributes_of_the_script_that_has_them(world):
    world.device(B, P, T)
    world.callout("1.sh", "[ $A = attributes ] && exit 2; exit 2")
    world.callout("2.sh", """[ $A = attributes ] && echo '[{"speed": "5"}]'; exit 0""")
    world.ok("define", "-u", B)
    assert world.defined(B, P)["attrs"] == [{"speed": "5"}]


def test_a_versioned_script_that_knows_no_attributes(world):
    world.device(B, P, T)
    world.callout("x.sh", versioned(actions=["define"]))
    world.fails("define", "-u", B, saying="does not support action 'Attributes'")
    assert world.ok("list", "-v") == f"{B} {P} {T} manual\n"


def test_starting_with_the_parent_asks_too(world):
    world.define(A, P, T, "auto")
    world.define(B, P, T, "auto")
    world.callout("x.sh", f"[ $U = {A} ] && exit 1; exit 0")
    result = world.run("start-parent-mdevs", P)
    assert (result.code, result.out) == (0, "")
    assert "failed with status '1'" in result.err
    assert world.devices() == {(B, P, T)}
