from __future__ import annotations

import asyncio
import errno
import traceback

import pytest
from mdevkit import EPROBE_DEFER, MdevError, ProbeDeferredError
from mdevkit.errors import Guard, brief, describe, errno_name, shown, wrap


def test_an_error_is_an_oserror_with_a_sentence_and_a_subject():
    error = MdevError(errno.ENOSPC, "no port is left", "card")
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, error.subject, error.name) == (errno.ENOSPC, "no port is left", "card", "ENOSPC")
    assert str(error) == "no port is left"
    assert str(MdevError(errno.EIO, "")) == "EIO"


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EBUSY, "EBUSY"), (EPROBE_DEFER, "EPROBE_DEFER"), (9999, "errno 9999"), (None, "errno None")]
)
def test_names_of_errnos(number, name):
    assert errno_name(number) == name


def test_deferral_has_the_kernels_number():
    error = ProbeDeferredError("the clock is not there yet", "device")
    assert (error.errno, error.name, error.subject) == (517, "EPROBE_DEFER", "device")


def test_an_mdev_error_is_wrapped_by_itself_and_learns_its_subject():
    bare, told = MdevError(errno.EPERM, "no"), MdevError(errno.EPERM, "no", "its own")
    assert wrap(bare, "creating", "device") is bare
    assert bare.subject == "device"
    assert wrap(told, "creating", "device").subject == "its own"


def test_an_oserror_keeps_errno_reason_and_file():
    error = wrap(FileNotFoundError(errno.ENOENT, "No such file", "/dev/card"), "device X: create failed", "device")
    assert (error.errno, str(error)) == (errno.ENOENT, "device X: create failed: No such file: /dev/card")
    assert isinstance(error.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (ValueError("bad\n  number"), "doing: ValueError: bad number"),
        (KeyError("x"), "doing: KeyError: 'x'"),
        (ZeroDivisionError(), "doing: ZeroDivisionError"),
        (OSError("without errno"), "doing: OSError: without errno"),
        (SystemExit(3), "doing: SystemExit: 3"),
    ],
)
def test_anything_else_is_the_plugins_bug_in_one_line(raised, text):
    error = wrap(raised, "doing")
    assert (error.errno, str(error)) == (errno.EIO, text)


def test_an_exception_that_cannot_say_what_it_is():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError("not even that")

    assert describe(MuteError()) == "MuteError"
    assert str(wrap(MuteError(), "doing")) == "doing: MuteError"


def test_guard_wraps_what_leaves_the_block():
    with pytest.raises(MdevError, match=r"^card: probing: ValueError: odd$") as caught, Guard("card: probing", "card"):
        raise ValueError("odd")
    assert caught.value.subject == "card"


def test_guard_does_not_make_an_error_its_own_cause():
    """Such a ring would keep every frame the error passed alive until the garbage collector comes."""
    with pytest.raises(MdevError) as caught, Guard("doing"):
        raise MdevError(errno.EPERM, "no")
    assert caught.value.__cause__ is None
    assert "".join(traceback.format_exception(caught.value)).count("no") >= 1


@pytest.mark.parametrize(
    ("raised", "text"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (asyncio.CancelledError("the loop was stopped"), "CancelledError: the loop was stopped"),
        (GeneratorExit(), "GeneratorExit"),
        (pytest.fail.Exception("odd"), "Failed: odd"),
    ],
)
def test_guard_wraps_what_is_no_exception_in_pythons_sense(raised, text):
    with pytest.raises(MdevError) as caught, Guard("doing"):
        raise raised
    assert (str(caught.value), caught.value.__cause__) == (f"doing: {text}", raised)


def test_guard_lets_the_users_interrupt_pass():
    with pytest.raises(KeyboardInterrupt), Guard("doing"):
        raise KeyboardInterrupt


def test_brief_says_the_same_without_holding_on_to_frames():
    try:
        raise MdevError(errno.EPERM, "no", "card") from ValueError("why")
    except MdevError as error:
        short = brief(error)
    assert (short.errno, str(short), short.subject) == (errno.EPERM, "no", "card")
    assert short.__traceback__ is None
    assert short.__cause__ is None


@pytest.mark.parametrize("value", ["x" * 10_000_000, b"x" * 10_000_000, list(range(100_000))])
def test_what_a_user_gave_is_shown_cut_short(value):
    assert len(shown(value)) == 80
    assert shown(value).endswith("...")
    assert shown("a\nb") == r"'a\nb'"
