"""The contract between core and a plugin: what is refused and how it is told, and that a wrapper cannot break an owner."""

from __future__ import annotations

import asyncio
import errno
import logging
from types import ModuleType, SimpleNamespace

import pytest
from mdevkit import Bus, Driver, MdevError, ParentOps, Registry, hookimpl
from mdevkit.dispatch import BusHooks, DriverHooks, ParentHooks, check_wrapper, implementations


class Device:
    """As much of a device as a hook needs here."""

    endpoint = None

    def __str__(self):
        return "device D"


DEVICE = Device()


class Good(ParentOps):
    name = "good"

    def __init__(self):
        self.done = []

    @hookimpl
    def parent_create(self, mdev, params):
        self.done.append("create")

    @hookimpl
    def parent_remove(self, mdev):
        self.done.append("remove")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_class_instead_of_an_instance(fails):
    assert fails(errno.EINVAL, ParentHooks, Good) == "Good is a class; an instance is wanted"
    assert fails(errno.EINVAL, check_wrapper, Good) == "Good is a class; an instance is wanted"


def test_a_required_hook_is_missing(fails):
    class Half(ParentOps):
        @hookimpl
        def parent_create(self, mdev, params): ...

    assert fails(errno.EINVAL, ParentHooks, Half()) == f"{__name__}.{Half.__qualname__} does not implement parent_remove"
    text = fails(errno.EINVAL, DriverHooks, Driver())
    assert text == "mdevkit.driver.Driver does not implement driver_probe, driver_remove"


def test_a_wrong_signature(fails):
    class Wrong(Good):
        @hookimpl
        def parent_create(self, mdev, options): ...

    text = fails(errno.EINVAL, ParentHooks, Wrong())
    assert f"{__name__}.{Wrong.__qualname__}: " in text
    assert "options" in text
    assert "parent_create(mdev, options)" in text


def test_fewer_arguments_than_the_contract_has_are_fine():
    class Lazy(Good):
        @hookimpl
        def parent_create(self, mdev): ...

    ParentHooks(Lazy()).create(DEVICE, {})


def test_a_misspelt_hook(fails):
    class Misspelt(Good):
        @hookimpl
        def parent_susspend(self, parent): ...

    text = fails(errno.EINVAL, ParentHooks, Misspelt())
    assert "parent_susspend" in text
    assert Misspelt.__qualname__ in text


def test_a_hook_that_is_not_marked_would_never_be_called(fails):
    class Unmarked(Good):
        def parent_suspend(self, parent): ...

    class Overridden(Bus):
        name = "b"

        def bus_match(self, device, driver): ...

    name = f"{__name__}.{Unmarked.__qualname__}"
    assert fails(errno.EINVAL, ParentHooks, Unmarked()) == f"{name}: parent_suspend must be marked with @hookimpl"
    assert "bus_match must be marked with @hookimpl" in fails(errno.EINVAL, BusHooks, Overridden())


def test_a_hook_of_somebody_elses_family(fails):
    class Greedy(Good):
        @hookimpl
        def driver_probe(self, device): ...

    assert "Greedy implements driver_probe, which it does not own" in fails(errno.EINVAL, ParentHooks, Greedy())


def test_a_non_owner_that_implements_without_wrapping(fails):
    class Quota:
        @hookimpl
        def parent_create(self, mdev): ...

    text = fails(errno.EINVAL, check_wrapper, Quota())
    assert text.startswith(f"{__name__}.{Quota.__qualname__} implements parent_create, which only an owner may do: ")
    assert "@hookimpl(wrapper=True)" in text


def test_an_old_style_wrapper_is_no_wrapper(fails):
    class Old:
        @hookimpl(hookwrapper=True)
        def parent_create(self, mdev):
            yield

    assert "which only an owner may do" in fails(errno.EINVAL, check_wrapper, Old())


def test_a_wrapper_that_is_no_generator_or_wraps_nothing(fails):
    class Plain:
        @hookimpl(wrapper=True)
        def parent_create(self, mdev): ...

    assert "generator" in fails(errno.EINVAL, check_wrapper, Plain())
    assert fails(errno.EINVAL, check_wrapper, object()) == "builtins.object implements no hook"


def test_a_wrapper_of_an_unknown_hook_or_with_a_wrong_signature(fails):
    class Unknown:
        @hookimpl(wrapper=True)
        def parent_creates(self, mdev):
            return (yield)

    class Wrong:
        @hookimpl(wrapper=True)
        def parent_create(self, device):
            return (yield)

    assert "parent_creates" in fails(errno.EINVAL, check_wrapper, Unknown())
    assert "device" in fails(errno.EINVAL, check_wrapper, Wrong())


def test_a_module_may_be_a_wrapper():
    module = ModuleType("audit")

    @hookimpl(wrapper=True)
    def parent_create(mdev):
        module.seen = mdev
        return (yield)

    module.parent_create = parent_create
    check_wrapper(module)
    ParentHooks(Good(), [module]).create(DEVICE, {})
    assert module.seen is DEVICE


def test_properties_of_a_plugin_are_not_evaluated():
    class Shy(Good):
        @property
        def secret(self):
            raise AssertionError("core looked")

    assert set(implementations(Shy())) == {"parent_create", "parent_remove"}
    ParentHooks(Shy()).create(DEVICE, {})


# -- calls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "number", "text"),
    [
        (ValueError("odd"), errno.EIO, "device D: create failed: ValueError: odd"),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, "device D: create failed: full"),
        (MdevError(errno.EPERM, "not you"), errno.EPERM, "not you"),
        (SystemExit(1), errno.EIO, "device D: create failed: SystemExit: 1"),
        (StopIteration(), errno.EIO, "device D: create failed: StopIteration"),
        (asyncio.CancelledError("stopped"), errno.EIO, "device D: create failed: CancelledError: stopped"),
        (GeneratorExit(), errno.EIO, "device D: create failed: GeneratorExit"),
        (pytest.fail.Exception("odd"), errno.EIO, "device D: create failed: Failed: odd"),
    ],
)
def test_what_a_hook_raises(raised, number, text, fails):
    class Raises(Good):
        @hookimpl
        def parent_create(self, mdev):
            raise raised

    assert fails(number, ParentHooks(Raises()).create, DEVICE, {}) == text
    assert fails(number, ParentHooks(Raises(), [Everything()]).create, DEVICE, {}) == text


def test_a_vendors_cancelled_error_does_not_stop_the_registry_half_way(kit, taker):
    """It is no `Exception`: the parents registered before would be left as they are."""

    def cancelled(mdev):
        raise asyncio.CancelledError("the vendor's loop was stopped")

    good, bad = kit.Card("good"), kit.Card("bad")
    bad.on_remove = cancelled
    with Registry([kit.Bus(), taker, good, bad]) as registry:
        registry.create("good-1")
        registry.create("bad-1")
    assert (good.alive, taker.held, registry.parents) == ({}, {}, [])


def test_an_error_is_not_its_own_cause():
    class Raises(Good):
        @hookimpl
        def parent_create(self, mdev):
            raise MdevError(errno.EPERM, "no")

    with pytest.raises(MdevError) as caught:
        ParentHooks(Raises()).create(DEVICE, {})
    assert caught.value.__cause__ is None


def test_an_interrupt_is_the_users():
    class Interrupted(Good):
        @hookimpl
        def parent_create(self, mdev):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ParentHooks(Interrupted()).create(DEVICE, {})


@pytest.mark.parametrize(("answer", "env"), [(None, {}), ({"A": 1}, {"A": "1"})])
def test_a_bus_may_tell_nothing(answer, env):
    class Quiet(Bus):
        name = "quiet"

        @hookimpl
        def bus_uevent(self, device):
            return answer

    assert BusHooks(Quiet()).uevent(DEVICE) == env


def test_a_bus_that_tells_nonsense(fails):
    class Odd(Bus):
        name = "odd"

        @hookimpl
        def bus_uevent(self, device):
            return 5

    assert fails(errno.EIO, BusHooks(Odd()).uevent, DEVICE) == "device D: uevent failed: TypeError: 'int' object is not iterable"


def test_two_owners_do_not_hear_each_other():
    first, second = Good(), Good()
    hooks, _ = ParentHooks(first), ParentHooks(second)
    hooks.create(DEVICE, {})
    assert (first.done, second.done) == (["create"], [])


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Everything:
    """Wraps every hook that has an opposite, and fails before or after the owner when told to."""

    def __init__(self, before=None, after=None, swallow=False):
        self.before, self.after, self.swallow = before, after, swallow

    def _around(self):
        if self.before:
            raise self.before
        try:
            answer = yield
        except OSError:
            if not self.swallow:
                raise
            answer = None
        if self.after:
            raise self.after
        return answer

    @hookimpl(wrapper=True)
    def parent_create(self):
        return (yield from self._around())

    parent_suspend = bus_probe = bus_suspend = driver_probe = driver_suspend = parent_create
    parent_remove = parent_unregister = parent_resume = bus_remove = bus_resume = parent_create
    driver_remove = driver_resume = parent_create


def owner(family, refuse=None):
    """Return (done, hooks) of an owner of a family; `refuse` is raised by every hook but those that undo another."""
    done = []

    def hook(name):
        def call(self, **arguments):
            done.append(name)
            if refuse and not (name.endswith(("remove", "resume")) and len(done) > 1):
                raise refuse
            return "answer" if name == "driver_probe" else None

        argument = (
            "parent"
            if name in {"parent_suspend", "parent_resume", "parent_unregister"}
            else "mdev"
            if family is ParentHooks
            else "device"
        )
        scope = {"call": call}
        exec(f"def {name}(self, {argument}): return call(self, {argument}={argument})", scope)  # pluggy reads the argument names
        return hookimpl(scope[name])

    base = {ParentHooks: ParentOps, BusHooks: Bus, DriverHooks: Driver}[family]
    prefix = {ParentHooks: "parent", BusHooks: "bus", DriverHooks: "driver"}[family]
    first = "create" if family is ParentHooks else "probe"
    last = ["unregister"] if family is ParentHooks else []
    hooks = {f"{prefix}_{what}": hook(f"{prefix}_{what}") for what in (first, "remove", "suspend", "resume", *last)}
    return done, type("Made", (base,), {"name": "made", **hooks})()


PAIRS = [
    (ParentHooks, "create", (DEVICE, {}), "parent_create", "parent_remove"),
    (ParentHooks, "suspend", (DEVICE,), "parent_suspend", "parent_resume"),
    (BusHooks, "probe", (DEVICE, None), "bus_probe", "bus_remove"),
    (BusHooks, "suspend", (DEVICE,), "bus_suspend", "bus_resume"),
    (DriverHooks, "probe", (DEVICE,), "driver_probe", "driver_remove"),
    (DriverHooks, "suspend", (DEVICE,), "driver_suspend", "driver_resume"),
]


@pytest.mark.parametrize(("family", "call", "arguments", "hook", "opposite"), PAIRS)
class TestPairs:
    def test_a_wrapper_that_refuses_keeps_the_owner_out_of_it(self, family, call, arguments, hook, opposite, fails):
        done, plugin = owner(family)
        hooks = family(plugin, [Everything(before=MdevError(errno.EDQUOT, "quota"))])
        assert fails(errno.EDQUOT, getattr(hooks, call), *arguments) == "quota"
        assert done == []

    def test_a_wrapper_that_fails_afterwards_has_the_owner_undo_it(self, family, call, arguments, hook, opposite, fails):
        done, plugin = owner(family)
        inner, outer = Everything(), Everything(after=MdevError(errno.EDQUOT, "quota"))
        for wrappers in ([outer], [outer, inner], [inner, outer]):
            done.clear()
            assert fails(errno.EDQUOT, getattr(family(plugin, wrappers), call), *arguments) == "quota"
            assert done == [hook, opposite]
        assert DEVICE.endpoint is None

    def test_a_wrapper_cannot_pass_off_a_failure_as_a_success(self, family, call, arguments, hook, opposite, fails):
        done, plugin = owner(family, refuse=OSError(errno.ENOSPC, "full"))
        text = fails(errno.EIO, getattr(family(plugin, [Everything(swallow=True)]), call), *arguments)
        assert text.endswith("a wrapper hid the failure, or did not make the call")
        assert text.startswith("device D: ")
        assert done == [hook]

    def test_an_owner_that_fails_is_not_undone(self, family, call, arguments, hook, opposite, fails):
        done, plugin = owner(family, refuse=OSError(errno.ENOSPC, "full"))
        assert fails(errno.ENOSPC, getattr(family(plugin, [Everything()]), call), *arguments).endswith("full")
        assert done == [hook]

    def test_an_interrupt_after_the_owner_has_it_undone_too(self, family, call, arguments, hook, opposite):
        done, plugin = owner(family)
        with pytest.raises(KeyboardInterrupt):
            getattr(family(plugin, [Everything(after=KeyboardInterrupt())]), call)(*arguments)
        assert done == [hook, opposite]


SURE = [
    (ParentHooks, "remove", "parent_remove"),
    (ParentHooks, "unregister", "parent_unregister"),
    (ParentHooks, "resume", "parent_resume"),
    (BusHooks, "remove", "bus_remove"),
    (BusHooks, "resume", "bus_resume"),
    (DriverHooks, "remove", "driver_remove"),
    (DriverHooks, "resume", "driver_resume"),
]


@pytest.mark.parametrize(("family", "call", "hook"), SURE)
class TestWhatNobodyCanRefuse:
    """Core goes on as if it were done, so the owner gets the call, once, whatever its wrappers do."""

    @pytest.mark.parametrize("raised", [RuntimeError("down"), asyncio.CancelledError("down")])
    def test_a_wrapper_that_fails_before_the_owner(self, family, call, hook, raised, fails):
        done, plugin = owner(family)
        broken = Everything(before=raised)
        for wrappers in ([broken], [Everything(), broken], [broken, Everything()]):
            done.clear()
            text = fails(errno.EIO, getattr(family(plugin, wrappers), call), DEVICE)
            assert text.endswith(f"{type(raised).__name__}: down")
            assert done == [hook]

    def test_a_wrapper_that_fails_after_the_owner(self, family, call, hook, fails):
        done, plugin = owner(family)
        assert (
            fails(errno.EDQUOT, getattr(family(plugin, [Everything(after=MdevError(errno.EDQUOT, "quota"))]), call), DEVICE)
            == "quota"
        )
        assert done == [hook]

    def test_a_wrapper_that_hides_that_the_call_was_not_made(self, family, call, hook, fails):
        for refuse in (None, OSError(errno.ENOSPC, "full")):
            done, plugin = owner(family, refuse)
            # The first to be registered is the innermost.
            hooks = family(plugin, [Everything(before=MdevError(errno.EDQUOT, "quota")), Everything(swallow=True)])
            if refuse:
                assert fails(errno.ENOSPC, getattr(hooks, call), DEVICE).endswith(": full")
            else:
                getattr(hooks, call)(DEVICE)
            assert done == [hook]

    def test_an_owner_that_fails_is_not_called_again(self, family, call, hook, fails):
        done, plugin = owner(family, OSError(errno.ENOSPC, "full"))
        assert fails(errno.ENOSPC, getattr(family(plugin, [Everything()]), call), DEVICE).endswith(": full")
        assert done == [hook]

    def test_when_both_fail_the_owners_failure_is_logged(self, family, call, hook, fails, caplog):
        done, plugin = owner(family, OSError(errno.ENOSPC, "full"))
        with caplog.at_level(logging.ERROR):
            assert fails(errno.EDQUOT, getattr(family(plugin, [Everything(before=OSError(errno.EDQUOT, "quota"))]), call), DEVICE)
        assert caplog.text.rstrip().endswith(": full")
        assert done == [hook]

    def test_an_interrupt_before_the_owner(self, family, call, hook):
        done, plugin = owner(family)
        with pytest.raises(KeyboardInterrupt):
            getattr(family(plugin, [Everything(before=KeyboardInterrupt())]), call)(DEVICE)
        assert done == [hook]


def test_an_undo_that_a_wrapper_stops_reaches_the_owner_all_the_same(fails):
    class Broken:
        @hookimpl(wrapper=True)
        def parent_create(self):
            yield
            raise MdevError(errno.EDQUOT, "quota")

        @hookimpl(wrapper=True)
        def parent_remove(self):
            raise RuntimeError("down")
            yield

    plugin = Good()
    assert fails(errno.EDQUOT, ParentHooks(plugin, [Broken()]).create, DEVICE, {}) == "quota"
    assert plugin.done == ["create", "remove"]


def test_a_device_whose_removal_a_wrapper_stops_is_gone_for_its_vendor_too(kit, card, taker):
    """Otherwise its socket and threads live on, and its UUID cannot be used again."""
    with Registry([kit.Bus(), taker, card, Everything(before=None)]) as registry:
        wrapper = registry._wrappers[0]
        mdev = registry.create("card-1")
        wrapper.before = RuntimeError("the audit server cannot be reached")
        registry.remove(mdev.uuid)
        assert (card.alive, taker.held, registry.mdevs) == ({}, {}, [])
        wrapper.before = None
        registry.create("card-1", uuid=mdev.uuid)
        wrapper.before = RuntimeError("the audit server cannot be reached")
    assert (card.alive, taker.held) == ({}, {})
    assert card.calls[-1] == ("unregister", "card")


def test_a_driver_that_is_undone_finds_its_endpoint():
    found = []

    class Serves(Driver):
        name, bus = "serves", "b"

        @hookimpl
        def driver_probe(self, device):
            return "socket"

        @hookimpl
        def driver_remove(self, device):
            found.append(device.endpoint)

    device = SimpleNamespace(endpoint=None)
    with pytest.raises(MdevError):
        DriverHooks(Serves(), [Everything(after=MdevError(errno.EDQUOT, "quota"))]).probe(device)
    assert (found, device.endpoint) == (["socket"], None)


def test_a_wrapper_that_calls_the_hook_again_inside():
    """A nested call of the same owner on the same thread must not be taken for the outer one."""
    plugin = Good()
    calls = []

    class Nested:
        @hookimpl(wrapper=True)
        def parent_create(self, mdev):
            calls.append(mdev)
            if len(calls) == 1:
                hooks.create(mdev, {})
                raise MdevError(errno.EDQUOT, "quota")
            return (yield)

    hooks = ParentHooks(plugin, [Nested()])
    with pytest.raises(MdevError, match="quota"):
        hooks.create(DEVICE, {})
    assert plugin.done == ["create"], "the inner call stands, the outer one never reached the owner"


@pytest.mark.parametrize("body", ["return\n yield", "yield\n yield"])
def test_a_wrapper_that_is_no_proper_one_is_reported(body, fails):
    scope = {"hookimpl": hookimpl}
    exec(f"class Bad:\n @hookimpl(wrapper=True)\n def parent_create(self):\n  {body.replace(chr(10), chr(10) + ' ')}\n", scope)
    plugin = Good()
    text = fails(errno.EIO, ParentHooks(plugin, [scope["Bad"]()]).create, DEVICE, {})
    assert "RuntimeError" in text
    assert plugin.done in ([], ["create", "remove"])
