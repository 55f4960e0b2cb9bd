"""The store of definitions: mdevctl's format, several writers at once, files that are wrong, disks that are full."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_service import definitions as module
from mdevkit_service.definitions import BadDefinition, Definition, Definitions, uuid_of

A, B = (f"0a2f9f7c-1c1b-4a58-9c67-6a6d6ff1a00{digit}" for digit in "ab")
ATTRS = [{"b": "1"}, {"a": "2"}, {"b": "3"}]


@pytest.fixture
def store(tmp_path):
    return Definitions(tmp_path / "state" / "mdevctl.d")


@pytest.fixture
def write(store):
    """Writes a file as somebody else would."""

    def write(name, content, parent="card0"):
        path = Path(store.root, parent, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    return write


def refuses(number, call, *words):
    with pytest.raises(MdevError) as caught:
        call()
    assert caught.value.name == number, caught.value
    for word in words:
        assert word in str(caught.value)


def files(store):
    return sorted(str(path.relative_to(store.root)) for path in Path(store.root).rglob("*") if not path.is_dir())


def test_no_root_is_no_definitions(store):
    assert store.entries() == []
    assert store.entries("card0") == []
    assert store.find(A) == []
    refuses("ENODEV", lambda: store.get("card0", A), f"Mediated device card0/{A} is not defined")


def test_what_is_stored_is_what_mdevctl_writes(store):
    stored = store.put(Definition("card0", A, "kind-1", "auto", ATTRS))
    text = f'{{\n  "mdev_type": "kind-1",\n  "start": "auto",\n  "attrs": {json.dumps(ATTRS, indent=2)}\n}}'
    assert Path(store.root, "card0", A).read_text() == json.dumps(json.loads(text), indent=2) == stored.text
    assert files(store) == [f"card0/{A}"]
    assert stored.text == store.get("card0", A).text
    assert stored.path == str(Path(store.root, "card0", A))
    assert stored.auto
    assert not store.put(Definition("card0", A, "kind-1")).auto


def test_what_cannot_be_read_is_not_called_defined(store):
    """Whether there is one nobody can tell."""
    parent = "x" * 300
    refuses("ENAMETOOLONG", lambda: store.put(Definition(parent, A, "kind-1"), create=True), "File name too long")
    (found,) = store.find(A, parent)
    refused = module.already_defined(parent, A, found)
    assert (refused.name, "it cannot be read: File name too long" in str(refused)) == ("ENAMETOOLONG", True)
    refuses("ENAMETOOLONG", lambda: store.get(parent, A), "it cannot be read")


def test_keys_we_do_not_know_stay(store, write):
    write(A, {"mdev_type": "kind-1", "start": "later", "owner": "me", "more": [1, {"x": None}], "attrs": None})
    found = store.get("card0", A)
    assert (found.start, found.attrs, found.owner) == ("manual", [], "me")
    changed = store.put(found.changed(start="auto"))
    assert changed.extra == {"owner": "me", "more": [1, {"x": None}]}
    assert store.get("card0", A).owner == "me"


def test_order_is_by_parent_and_uuid(store):
    for parent, uuid in (("b", A), ("a", B), ("a", A), ("B", A)):
        store.put(Definition(parent, uuid, "kind-1"))
    assert [(entry.parent, entry.uuid) for entry in store.entries()] == [("B", A), ("a", A), ("a", B), ("b", A)]
    assert [entry.parent for entry in store.find(A)] == ["B", "a", "b"]
    assert [entry.uuid for entry in store.entries("a")] == [A, B]


# -- changing --------------------------------------------------------------------------------------------------------------


def test_create_only(store):
    store.put(Definition("card0", A, "kind-1"), create=True)
    refuses("EEXIST", lambda: store.put(Definition("card0", A, "kind-2"), create=True), f"Device {A} on card0 already defined")
    assert store.get("card0", A).mdev_type == "kind-1"


def test_a_change_of_something_else_is_refused(store):
    first = store.put(Definition("card0", A, "kind-1"))
    second = store.put(first.changed(start="auto"), tag=first.tag)
    refuses("EAGAIN", lambda: store.put(first.changed(mdev_type="kind-2"), tag=first.tag), "changed by somebody else")
    refuses("EAGAIN", lambda: store.remove("card0", A, tag=first.tag), "changed by somebody else")
    refuses("EAGAIN", lambda: store.put(Definition("card0", B, "kind-1"), tag="1234"), "changed by somebody else")
    store.remove("card0", A, tag=second.tag)
    assert store.entries() == []


def test_remove(store):
    refuses("ENODEV", lambda: store.remove("card0", A), "is not defined")
    assert not Path(store.root).exists()
    store.put(Definition("card0", A, "kind-1"))
    store.remove("card0", A)
    refuses("ENODEV", lambda: store.remove("card0", A), "is not defined")


def test_an_update_that_fails_changes_nothing(store):
    store.put(Definition("card0", A, "kind-1"))

    def fail(_current):
        raise MdevError(errno.EPERM, "no")

    refuses("EPERM", lambda: store.update("card0", A, fail), "no")
    assert files(store) == [f"card0/{A}"]
    assert store.get("card0", A).mdev_type == "kind-1"


@pytest.mark.parametrize("parent", ["", ".", "..", "../x", "a/b", ".hidden", "scripts.d", "a\0b"])
def test_parents_that_are_no_folders(store, parent):
    refuses("EINVAL", lambda: store.put(Definition(parent, A, "kind-1")), "is not the name of a parent")
    refuses("EINVAL", lambda: store.get(parent, A), "is not the name of a parent")
    refuses("EINVAL", lambda: store.remove(parent, A), "is not the name of a parent")
    assert not Path(store.root).exists()


@pytest.mark.parametrize("uuid", ["", "x", "../card1/x", A.upper(), A.replace("-", "")])
def test_names_that_are_no_uuids(store, uuid):
    refuses("EINVAL", lambda: store.put(Definition("card0", uuid, "kind-1")), "is not a UUID in its usual form")


def test_text_that_no_file_can_hold(store):
    refuses("EINVAL", lambda: store.put(Definition("card0", A, "\ud800")), "UTF-8")
    assert store.entries() == []


# -- what is wrong with files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{oops", "invalid JSON: "),
        ("", "invalid JSON: "),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "an object with mdev_type and start"),
        ({"mdev_type": "x"}, "an object with mdev_type and start"),
        ({"mdev_type": 5, "start": "auto"}, "mdev_type must be text, not 5"),
        ({"mdev_type": "x", "start": True}, "start must be text, not True"),
        ({"mdev_type": "x", "start": "auto", "attrs": "a"}, "attributes field is not an array"),
        ({"mdev_type": "x", "start": "auto", "attrs": ["a"]}, "not an object"),
        ({"mdev_type": "x", "start": "auto", "attrs": [{"a": "1", "b": "2"}]}, "too many fields"),
        ({"mdev_type": "x", "start": "auto", "attrs": [{"a": None}]}, '{"a", null}: value must be of type str'),
        ("x" * (module.SIZE_LIMIT + 1), "it is larger than"),
    ],
)
def test_a_bad_file_is_named_and_hides_nothing(store, write, content, words):
    store.put(Definition("card0", B, "kind-1"))
    store.put(Definition("card1", A, "kind-1"))
    write(A, content)
    bad, *good = store.entries()
    assert isinstance(bad, BadDefinition)
    assert (bad.parent, bad.uuid, bad.path) == ("card0", A, str(Path(store.root, "card0", A)))
    assert words in bad.error
    assert [(entry.parent, entry.uuid) for entry in good] == [("card0", B), ("card1", A)]
    refuses("EINVAL", lambda: store.get("card0", A), bad.path, words)


def test_a_bad_file_can_be_replaced_and_removed(store, write):
    write(A, "{oops")
    refuses("EEXIST", lambda: store.put(Definition("card0", A, "kind-1"), create=True), "already defined")
    store.put(Definition("card0", A, "kind-1"))
    assert store.get("card0", A).mdev_type == "kind-1"
    write(A, "{oops")
    store.remove("card0", A)
    assert store.entries() == []


def test_names_that_are_not_what_they_should_be(store, write):
    write("notes.txt", "x")
    write(A.upper(), {"mdev_type": "x", "start": "auto"})
    write(".hidden", "x")
    root = Path(store.root)
    (root / "card0" / "folder").mkdir()
    (root / "scripts.d" / "callouts").mkdir(parents=True)
    (root / "stray").touch()
    errors = {entry.uuid: entry.error for entry in store.entries()}
    assert errors == {
        "notes.txt": "its name is not a UUID",
        A.upper(): f"its name is not the UUID's usual form; rename it to {A}",
    }


def test_what_is_no_file_is_not_waited_for(store):
    folder = Path(store.root, "card0")
    folder.mkdir(parents=True)
    os.mkfifo(folder / A)
    (folder / B).symlink_to("nowhere")
    [entry] = store.entries()
    assert (entry.uuid, entry.error) == (A, "it is not a file")


@pytest.mark.parametrize(
    ("text", "uuid"),
    [
        (A, A),
        (A.upper(), A),
        (f"urn:uuid:{A}", A),
        (f"{{{A}}}", A),
        (A.replace("-", ""), A),
        (A[:-1], ""),
        (A + "0", ""),
        (f"{{{A}", ""),
        (A.replace("a", "g"), ""),
        (A.replace("-", "", 1), ""),
        (A + "\n", ""),
    ],
)
def test_uuids(text, uuid):
    assert uuid_of(text) == uuid


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=200, deadline=None)
@given(json_values | st.fixed_dictionaries({"mdev_type": json_values, "start": json_values, "attrs": json_values}))
def test_any_json_is_a_definition_or_a_sentence(value):
    try:
        found = module.from_config("card0", A, value)
    except MdevError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert (refusal.name, bool(str(refusal))) == ("EINVAL", True)
    else:
        again = module.parse("card0", A, json.dumps(found.config | found.extra).encode())
        assert (again.config, again.extra) == (found.config, found.extra)


# -- looking again ---------------------------------------------------------------------------------------------------------


def test_files_are_read_again_when_they_change(store, write):
    write(A, {"mdev_type": "one", "start": "auto"})
    assert store.get("card0", A).mdev_type == "one"
    write(A, {"mdev_type": "two", "start": "auto"})  # in place, same size, within one tick of the clock
    assert store.get("card0", A).mdev_type == "two"
    assert [entry.mdev_type for entry in store.entries()] == ["two"]


def test_files_that_do_not_change_are_read_once(store):
    store.put(Definition("card0", A, "kind-1"))
    path = Path(store.root, "card0", A)
    os.utime(path, (1, 1))
    first = store.get("card0", A)
    assert store.entries() == [first]
    assert store.get("card0", A) is first
    os.utime(path, (2, 2))
    assert store.get("card0", A) is not first


# -- several at once -------------------------------------------------------------------------------------------------------


def _append(root, uuid, word, times):
    store = Definitions(root)
    for number in range(times):
        store.update("card0", uuid, lambda current, n=number: current.changed(attrs=[*current.attrs, {word: str(n)}]))


def test_processes_lose_no_update(store):
    store.put(Definition("card0", A, "kind-1"))
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append, args=(store.root, A, f"w{number}", 25)) for number in range(4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        count = len(store.get("card0", A).attrs)  # a reader never sees half of one
        assert count >= seen
        seen = count
        time.sleep(0.001)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    attrs = store.get("card0", A).attrs
    for number in range(4):
        assert [value for attribute in attrs for name, value in attribute.items() if name == f"w{number}"] == [
            str(n) for n in range(25)
        ]
    assert files(store) == [f"card0/{A}"]


_WRITER = """
import sys
from mdevkit_service.definitions import Definition, Definitions
store, uuid = Definitions(sys.argv[1]), sys.argv[2]
for number in range(10**9):
    store.put(Definition("card0", uuid, f"kind-{number}", attrs=[{"fill": "x" * 20000}]))
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_killed_writer_leaves_a_whole_file(store, delay):
    with subprocess.Popen([sys.executable, "-c", _WRITER, store.root, A], stdout=subprocess.PIPE) as writer:
        for _ in range(20):
            told = int(writer.stdout.readline())
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()
    told = int(rest[-1]) if rest else told
    number = int(re.fullmatch(r"kind-(\d+)", store.get("card0", A).mdev_type)[1])
    assert number in {told, told + 1}
    store.put(Definition("card0", A, "kind-x"))
    assert files(store) == [f"card0/{A}"]


# -- disks -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 64 KiB, and a way to make it read-only; needs root."""
    if os.geteuid():
        pytest.skip("mounting needs root: sudo ./dev test service/tests/test_definitions.py")
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(flags, options):
        if libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, options):
            pytest.skip(f"tmpfs cannot be mounted here ({os.strerror(ctypes.get_errno())}): run in a container with CAP_SYS_ADMIN")

    mount(0, b"size=64k")
    # MS_REMOUNT | MS_RDONLY (mount(2)).
    yield folder, lambda: mount(32 | 1, b"size=64k")
    libc.umount2(os.fsencode(folder), 2)


def test_a_full_disk_loses_nothing(small_disk):
    folder, _ = small_disk
    store = Definitions(folder / "mdevctl.d")
    store.put(Definition("card0", A, "kind-1"))
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * (1 << 20))
    big = Definition("card0", A, "kind-2", attrs=[{"a": "x" * 8000}])
    refuses(
        "ENOSPC", lambda: store.put(big), f"definition card0/{A} cannot be stored", "mdevctl.d/card0", "No space left on device"
    )
    refuses("ENOSPC", lambda: store.put(Definition("card1", B, "kind-1")), "card1", "No space left on device")
    assert store.get("card0", A).mdev_type == "kind-1"
    assert [name for name in files(store) if "tmp" in name] == []
    filler.unlink()
    store.put(big)
    assert store.get("card0", A).mdev_type == "kind-2"


def test_a_read_only_folder_says_so(small_disk):
    folder, make_read_only = small_disk
    store = Definitions(folder / "mdevctl.d")
    store.put(Definition("card0", A, "kind-1"))
    make_read_only()
    refuses("EROFS", lambda: store.put(Definition("card0", A, "kind-2")), "cannot be stored", "Read-only file system")
    refuses("EROFS", lambda: store.put(Definition("card1", A, "kind-2")), "card1", "Read-only file system")
    refuses("EROFS", lambda: store.remove("card0", A), "cannot be removed", "Read-only file system")
    assert store.get("card0", A).mdev_type == "kind-1"
