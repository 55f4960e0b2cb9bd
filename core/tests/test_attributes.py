from __future__ import annotations

import errno
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit import Attribute, Bool, Choice, Int, MdevError, Text
from mdevkit.attributes import AttributeTable, Kind


class Thing(SimpleNamespace):
    def __str__(self):
        return "thing"


THING = Thing(value=4)


def attribute(name="value", kind=None, **more):
    return Attribute(name, kind or Int(0, 9), "For tests.", **more)


def sentence(kind, value, fails):
    return fails(errno.EINVAL, attribute(kind=kind).parse, value)


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (Int(0, 255), "17", 17),
        (Int(0, 255), "0x1F", 31),
        (Int(0, 255), "0b11", 3),
        (Int(0, 255), "0o17", 15),
        (Int(-8, 8), "-8", -8),
        (Int(0, 255), "7\n", 7),
        (Int(0, 255), 255, 255),
        (Int(), 2**64 - 1, 2**64 - 1),
        (Bool(), "Yes", True),
        (Bool(), "off", False),
        (Bool(), True, True),
        (Bool(), 0, False),
        (Choice(("fast", "slow")), "slow", "slow"),
        (Text(), "", ""),
        (Text(), "tty Σ", "tty Σ"),
        (Text(r"[a-z]+", "lower-case letters"), "abc", "abc"),
    ],
)
def test_values_that_are_right(kind, value, result):
    parsed = attribute(kind=kind).parse(value)
    assert (parsed, type(parsed)) == (result, type(result))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Int(0, 255), "256", "256 is not between 0 and 255"),
        (Int(0, 255), -1, "-1 is not between 0 and 255"),
        (Int(0, 255), "ten", "a whole number is wanted, not 'ten'"),
        (Int(0, 255), "", "a whole number is wanted, not ''"),
        (Int(0, 255), "010", "a whole number is wanted, not '010'"),
        (Int(0, 255), 1.5, "a whole number is wanted, not '1.5'"),
        (Int(0, 255), True, "a whole number is wanted, not 'True'"),
        (Int(0, 255), None, "a whole number is wanted, not 'None'"),
        (Bool(), "maybe", "yes or no is wanted, not 'maybe'"),
        (Bool(), 2, "yes or no is wanted, not '2'"),
        (Bool(), None, "yes or no is wanted, not 'None'"),
        (Bool(), [1], "yes or no is wanted, not '[1]'"),
        (Choice(("fast", "slow")), "Slow", "one of fast, slow is wanted, not 'Slow'"),
        (Text(), "a\x1b[2J", r"text without control characters is wanted, not 'a\x1b[2J'"),
        (Text(), "a\n", r"text without control characters is wanted, not 'a\n'"),
        (Text(), None, "text is wanted, not None"),
        (Text(), ["a"], "text is wanted, not ['a']"),
        (Text(longest=3), "abcd", "at most 3 characters are allowed, not 4"),
        (Text(r"[a-z]+", "lower-case letters"), "ABC", "lower-case letters is wanted, not 'ABC'"),
    ],
)
def test_values_that_are_wrong_are_told_what_is_accepted(kind, value, text, fails):
    assert sentence(kind, value, fails) == f"attribute value: {text}"


@pytest.mark.parametrize("ways", [{}, {"show": int, "store": print}])
def test_a_counter_is_there_to_be_read(ways):
    with pytest.raises(ValueError, match="attribute frames: a counter is there to be read"):
        Attribute("frames", Int(), "Frames sent.", counter=True, **ways)


@pytest.mark.parametrize("value", ["9" * 10_000, "0x" + "f" * 1_000_000, "x" * 10_000_000])
@pytest.mark.parametrize("kind", [Int(0, 9), Bool(), Choice(("fast",)), Text(longest=9)])
def test_a_huge_value_makes_a_short_error(kind, value, fails):
    assert len(sentence(kind, value, fails)) < 200


@settings(deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(-(2**65), 0), st.integers(0, 2**65))
def test_a_number_is_accepted_exactly_within_its_range(number, low, high):
    kind = Int(low, high)
    if low <= number <= high:
        assert kind.check(kind.format(number)) == kind.check(hex(number)) == number
    else:
        with pytest.raises(ValueError, match="is not between"):
            kind.check(number)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_parsed_or_refused_and_nothing_else(text):
    for kind in (Int(), Bool(), Choice(("a",)), Text()):
        try:
            value = attribute(kind=kind).parse(text)
        except MdevError as error:
            value = error
        assert getattr(value, "errno", None) == errno.EINVAL or kind.check(kind.format(value)) == value


def test_what_is_shown_can_be_set():
    assert [Bool().format(True), Bool().format(False), Int().format(7), Text().format("x")] == ["1", "0", "7", "x"]


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "a/", "..", ".", "a/..", "../a", "a b", "a\n", "é"])
def test_a_name_is_a_file_or_a_folder_and_a_file(name):
    with pytest.raises(ValueError, match="is not a file name"):
        attribute(name)


def test_a_wrong_pattern_is_found_where_it_is_stated():
    with pytest.raises(re.error, match=r"unterminated"):
        Text(pattern="(")


def test_a_kind_of_a_vendors_making_that_fails_otherwise(fails):
    class Odd(Kind):
        def parse(self, text):
            return {}[text]

    assert fails(errno.EIO, attribute(kind=Odd()).parse, "x") == "attribute value: KeyError: 'x'"
    assert sentence(Kind(), "x", fails) == "attribute value: x"


def test_modes():
    show, store = (lambda thing: thing.value), (lambda thing, value: None)
    assert attribute(show=show).mode == "r"
    assert attribute(store=store).mode == "w"
    assert attribute(show=show, store=store).mode == "rw"
    assert attribute(create=True).mode == "c"


def test_a_name_twice(fails):
    assert fails(errno.EEXIST, AttributeTable, [attribute(), attribute()]) == "attribute value is stated twice"


@pytest.fixture
def table():
    def wrong(*arguments):
        raise ZeroDivisionError("division by zero")

    def refuse(*arguments):
        raise OSError(errno.EBUSY, "the port is open")

    return AttributeTable(
        [
            attribute("value", show=lambda thing: thing.value, store=lambda thing, value: setattr(thing, "value", value)),
            attribute("constant", show=lambda thing: 1),
            attribute("secret", store=lambda thing, value: None),
            attribute("broken", show=wrong, store=wrong),
            attribute("busy", show=refuse, store=refuse),
            attribute("quits", show=lambda thing: exit(3)),
            attribute("made", create=True, default=5),
            attribute("also/made", create=True),
        ]
    )


def test_reading_and_writing(table, fails):
    thing = Thing(value=4)
    table.write("value", "0x8", thing)
    assert (table.read("value", thing), thing.value) == (8, 8)
    assert fails(errno.EINVAL, table.write, "value", 10, thing) == "attribute value: 10 is not between 0 and 9"
    assert thing.value == 8, "the vendor is not called for a wrong value"


def test_errors_name_object_and_attribute(table, fails):
    known = "value, constant, secret, broken, busy, quits, made, also/made"
    assert fails(errno.ENOENT, table.read, "speed", THING) == f"thing has no attribute 'speed' (there are: {known})"
    assert fails(errno.ENOENT, AttributeTable([]).read, "x", THING) == "thing has no attribute 'x' (there are: none)"
    assert fails(errno.EACCES, table.read, "secret", THING) == "attribute secret of thing cannot be read"
    assert fails(errno.EACCES, table.write, "constant", 1, THING) == "attribute constant of thing is read-only"
    assert fails(errno.EIO, table.read, "broken", THING) == "thing: reading broken: ZeroDivisionError: division by zero"
    assert fails(errno.EIO, table.write, "broken", 1, THING) == "thing: setting broken: ZeroDivisionError: division by zero"
    assert fails(errno.EBUSY, table.read, "busy", THING) == "thing: reading busy: the port is open"
    assert fails(errno.EIO, table.read, "quits", THING) == "thing: reading quits: SystemExit: 3"


def test_reading_all_shows_an_errno_where_one_fails(table):
    assert table.read_all(Thing(value=4)) == {"value": "4", "constant": "1", "broken": "<EIO>", "busy": "<EBUSY>", "quits": "<EIO>"}


def test_reading_all_survives_a_value_of_the_wrong_kind():
    class Fussy(Int):
        def format(self, value):
            return f"{value:d}"

    assert AttributeTable([attribute(kind=Fussy(), show=lambda thing: "text")]).read_all(THING) == {"value": "<EIO>"}


def test_create_parameters(table, fails):
    assert table.parameters({}, THING) == {"made": 5, "also/made": None}
    assert table.parameters({"also/made": "3", "made": 0}, THING) == {"made": 0, "also/made": 3}
    assert fails(errno.ENOENT, table.parameters, {"x": 1}, THING) == "thing has no attribute 'x' (there are: made, also/made)"
    assert fails(errno.EACCES, table.parameters, {"value": 1}, THING) == "attribute value of thing cannot be set at creation"
    assert fails(errno.EINVAL, table.parameters, {"made": "99"}, THING) == "attribute made: 99 is not between 0 and 9"


def test_a_table_is_a_mapping(table):
    assert len(table) == 8
    assert next(iter(table)) == "value"
    assert table["constant"].mode == "r"
