"""Parents that break one rule of the life cycle each. `fails`: the tests that must notice, and what they must say."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

from mdevkit import Attribute, Int, MdevError, Pool, hookimpl
from mdevkit.attributes import Kind
from mdevkit_testkit import ParentSuite
from simple import Registers, SimpleParent, fails


class OneType(SimpleParent):
    devices = (("regs", Registers),)


class Suite(ParentSuite):
    factory = OneType


# -- what is stated --------------------------------------------------------------------------------------------------------


class NoApi(OneType):
    api = ""


@fails(
    test_parent_and_type_are_stated="type simple-regs has no device_api",
)
class TestNoApi(Suite):
    factory = NoApi


class UnknownBus(OneType):
    bus = "nowhere"


@fails(
    test_bus_of_every_type_is_there="class bus nowhere is not installed",
)
class TestUnknownBus(Suite):
    factory = UnknownBus


class NoRoom(OneType):
    def __init__(self) -> None:
        super().__init__()
        self.slots.capacity = 0


@fails(
    test_fresh_parent_has_room="a fresh parent has no room for a device of type simple-regs",
)
class TestNoRoom(Suite):
    factory = NoRoom


class SharedPool(OneType):
    pool = Pool("slots", 5)

    def __init__(self) -> None:
        self.slots = self.pool
        self.types = [self.make_type("regs")]


@fails(
    test_factory_makes_parents_that_share_nothing="a device of another registry took an instance of type simple-regs",
)
class TestSharedPool(Suite):
    factory = SharedPool


class SharedTypes(OneType):
    made: Any = ()

    def __init__(self) -> None:
        super().__init__()
        SharedTypes.made = self.types = SharedTypes.made or self.types


@fails(
    test_factory_makes_parents_that_share_nothing="type regs already belongs to parent simple",
)
class TestSharedTypes(Suite):
    type_ids = classmethod(lambda cls: ["simple-regs"])
    factory = SharedTypes


# -- attributes ------------------------------------------------------------------------------------------------------------


class AnyWord(Kind[str]):
    """Raises what `Kind` does not allow."""

    def parse(self, text: str) -> str:
        return {"yes": "yes"}[text]


class SloppyInt(Int):
    """Takes values it says it does not take."""

    def parse(self, text: str) -> int:
        return int(text or "0", 16) if text != "x" else 0


class BadAttributes(OneType):
    attribute: Attribute[Any]

    def __init__(self) -> None:
        self.attributes_of_devices = (self.attribute,)
        super().__init__()


class CannotShow(BadAttributes):
    attribute = Attribute("size", Int(), "", show=lambda mdev: mdev.drvdata["size"])


@fails(
    test_attributes_can_be_read=r"attribute size of device \S+ cannot be shown: .*KeyError: 'size'",
)
class TestCannotShow(Suite):
    factory = CannotShow


class ShowsNonsense(BadAttributes):
    attribute = Attribute("size", Int(0, 9), "", show=lambda mdev: 5.5)


@fails(
    test_attributes_can_be_read="attribute size: .*a whole number is wanted, not '5.5'|5.5",
)
class TestShowsNonsense(Suite):
    factory = ShowsNonsense


class Counts(BadAttributes):
    attribute = Attribute(
        "size",
        Int(),
        "",
        show=lambda mdev: mdev.drvdata.setdefault("size", 1),
        store=lambda mdev, value: mdev.drvdata.update(size=value + 1),
    )


@fails(
    test_attribute_can_be_set_to_what_it_shows="attribute size of device .* shows 2 after it was set to 1",
)
class TestCounts(Suite):
    factory = Counts


@fails(
    test_bad_attribute_values_are_refused=r"the value '' for attribute word of device \S+ made the plugin raise KeyError",
)
class TestOddKind(Suite):
    class factory(BadAttributes):
        attribute = Attribute("word", AnyWord(), "", create=True, default="yes")


@fails(
    test_bad_attribute_values_are_refused="the value '-1' for attribute size of device .* was not refused",
    test_create_with_a_bad_parameter_consumes_nothing="a create with size='-1' was not refused",
)
class TestSloppyKind(Suite):
    class factory(BadAttributes):
        attribute = Attribute("size", SloppyInt(0, 9), "", create=True, default=0)


@fails(
    test_default_parameters_are_acceptable="attribute size: 10 is not between 0 and 9",
)
class TestBadDefault(Suite):
    class factory(BadAttributes):
        attribute = Attribute("size", Int(0, 9), "", create=True, default=10)


# -- create and remove -----------------------------------------------------------------------------------------------------


class NoOps(OneType):
    def build(self, mdev: Any, params: Any) -> None:
        pass


@fails(
    test_device_lives_and_goes="set no class and ops in its create",
)
class TestNoOps(Suite):
    factory = NoOps


class LeaksDescriptor(OneType):
    def build(self, mdev: Any, params: Any) -> None:
        super().build(mdev, params)
        os.eventfd(0)


@fails(
    test_create_and_remove_many_times_leaves_nothing=r"left behind by 10 devices: descriptor \d+ \(anon_inode:\[eventfd\]\)",
    test_create_is_undone_when_no_driver_takes_the_device=r"left behind: descriptor \d+ \(anon_inode:\[eventfd\]\)",
)
class TestLeaksDescriptor(Suite):
    factory = LeaksDescriptor


class LeaksThread(OneType):
    """Starts a thread with the first device, and does not end it when the parent leaves."""

    def __init__(self) -> None:
        super().__init__()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait, args=(30,), name="poller", daemon=True)

    def build(self, mdev: Any, params: Any) -> None:
        super().build(mdev, params)
        if not self._thread.is_alive():
            self._thread.start()


@fails(
    test_leaving_parent_removes_its_devices="left behind by a parent that was unregistered: thread 'poller'",
)
class TestLeaksThread(Suite):
    factory = LeaksThread


class KeepsDevices(OneType):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def build(self, mdev: Any, params: Any) -> None:
        super().build(mdev, params)
        self.kept.append(mdev)


@fails(
    test_removed_device_is_forgotten="the parent still refers to its removed device: .*list",
)
class TestKeepsDevices(Suite):
    factory = KeepsDevices


class HiddenLimit(OneType):
    """Counts slots of its own, beside the pool, and forgets to give them back."""

    def __init__(self) -> None:
        super().__init__()
        self.used = 0

    def build(self, mdev: Any, params: Any) -> None:
        if self.used == 5:
            raise MdevError(errno.ENOSPC, "the card is full")
        super().build(mdev, params)
        self.used += 1


@fails(
    test_instances_are_counted_exactly="available_instances of type simple-regs says 5, but create failed: .*the card is full",
)
class TestHiddenLimit(Suite):
    factory = HiddenLimit


class OneForEver(HiddenLimit):
    def __init__(self) -> None:
        super().__init__()
        self.used = 4


@fails(
    test_create_without_room_fails_cleanly="says 1, but create failed: .*the card is full",
)
class TestOneForEver(Suite):
    factory = OneForEver


class NotAtomic(OneType):
    """Opens two descriptors and closes them at remove, but not when the second cannot be had."""

    def build(self, mdev: Any, params: Any) -> None:
        first = os.eventfd(0)
        mdev_fds = [first, os.eventfd(0)]
        super().build(mdev, params)
        mdev.drvdata["fds"] = mdev_fds

    def take_down(self, mdev: Any) -> None:
        for fd in mdev.drvdata["fds"]:
            os.close(fd)


@fails(
    test_create_is_atomic_when_descriptors_run_out="after a create with 1 descriptors left: left behind: descriptor",
)
class TestNotAtomic(Suite):
    factory = NotAtomic


class RemoveRaises(OneType):
    def take_down(self, mdev: Any) -> None:
        raise RuntimeError("not now")


@fails(
    test_second_remove_is_refused="logged as errors: .*remove failed: RuntimeError: not now",
)
class TestRemoveRaises(Suite):
    factory = RemoveRaises


class LeavesFile(OneType):
    def build(self, mdev: Any, params: Any) -> None:
        super().build(mdev, params)
        Path(os.environ["XDG_RUNTIME_DIR"], f"{mdev.uuid}.ports").touch()


@fails(
    test_remove_takes_a_bound_device_from_its_driver=r"files of the endpoint are left: \S+\.ports",
)
class TestLeavesFile(Suite):
    factory = LeavesFile


class SharesOps(OneType):
    def __init__(self) -> None:
        super().__init__()
        self.device = Registers("shared")

    def build(self, mdev: Any, params: Any) -> None:
        mdev.set_ops(self.device)


@fails(
    test_many_create_and_remove_at_once="two devices were given the same ops object",
)
class TestSharesOps(Suite):
    factory = SharesOps


class RefusesSuspend(OneType):
    @hookimpl
    def parent_suspend(self, parent: Any) -> None:
        raise MdevError(errno.EBUSY, "the card is busy")


@fails(
    test_suspend_and_resume="the card is busy",
)
class TestRefusesSuspend(Suite):
    factory = RefusesSuspend


class BugInCreate(OneType):
    """Raises a bug where an error is wanted."""

    def build(self, mdev: Any, params: Any) -> None:
        try:
            os.close(os.eventfd(0))
        except OSError:
            params["no such parameter"]
        super().build(mdev, params)


@fails(
    test_create_is_atomic_when_descriptors_run_out="a create with 0 descriptors left made the plugin raise KeyError",
)
class TestBugInCreate(Suite):
    factory = BugInCreate
