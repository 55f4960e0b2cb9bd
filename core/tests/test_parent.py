"""Pools, types and parents by themselves."""

from __future__ import annotations

import errno
import threading
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mdevkit import Attribute, Int, MdevError, MdevType, Pool, Registry
from mdevkit.dispatch import ParentHooks
from mdevkit.parent import UNLIMITED, Parent, check_room, release, reserve

# -- pools -------------------------------------------------------------------------------------------------------------


def test_units_are_taken_and_given_back():
    pool = Pool("ports", 4)
    reserve({pool: 3}, "a", "type")
    assert (pool.free, pool.holders) == (1, {"a": 3})
    release({pool: 3}, "a")
    assert (pool.free, pool.holders) == (4, {})


def test_a_shortage_says_what_is_wanted_and_who_holds_it(fails):
    pool = Pool("ports", 4)
    assert fails(errno.ENOSPC, reserve, {pool: 5}, "x", "type T") == "type T: no instance available: 5 of 4 ports wanted, 4 free"
    reserve({pool: 1}, "a", None)
    reserve({pool: 2}, "b", None)
    text = fails(errno.ENOSPC, reserve, {pool: 2}, "x", "type T")
    assert text == "type T: no instance available: 2 of 4 ports wanted, 1 free (a holds 1, b holds 2)"


def test_a_shortage_names_a_few_of_many_holders(fails):
    pool = Pool("slots", 10_000)
    for number in range(10_000):
        reserve({pool: 1}, f"d{number}", None)
    text = fails(errno.ENOSPC, reserve, {pool: 1}, "x", "T")
    assert text.endswith("(d0 holds 1, d1 holds 1, d2 holds 1, d3 holds 1, and 9996 more devices hold the rest)")


def test_several_pools_all_or_none(fails):
    ports, memory = Pool("ports", 2), Pool("MiB", 10)
    reserve({ports: 1, memory: 8}, "a", None)
    assert "1 of 10" not in fails(errno.ENOSPC, reserve, {ports: 1, memory: 8}, "b", "T")
    assert (ports.free, memory.free) == (1, 2)
    release({ports: 1, memory: 8}, "a")
    assert (ports.free, memory.free) == (2, 10)


def test_room_is_looked_for_and_not_taken(fails):
    ports, memory = Pool("ports", 2), Pool("MiB", 1)
    check_room({ports: 2, memory: 1}, "type T")
    reserve({memory: 1}, "a", None)
    text = fails(errno.ENOSPC, check_room, {ports: 2, memory: 1}, "type T")
    assert text == "type T: no instance available: 1 of 1 MiB wanted, 0 free (a holds 1)"
    assert (ports.holders, memory.holders) == ({}, {"a": 1})


def test_units_set_aside_are_taken_once_and_outlive_their_device(fails):
    pool = Pool("ports", 2)
    pool.set_aside(2, "a")
    assert pool.free == 0
    reserve({pool: 2}, "a", "T")
    assert (pool.free, pool.holders) == (0, {"a": 2})
    release({pool: 2}, "a")
    assert pool.holders == {"a": 2}
    assert "a holds 2" in fails(errno.ENOSPC, reserve, {pool: 1}, "b", "T")
    pool.give_back("a")
    assert (pool.free, pool.holders) == (2, {})


def test_units_set_aside_must_suffice(fails):
    """Else devices would be made of more units than there are."""
    ports, memory = Pool("ports", 4), Pool("MiB", 4)
    ports.set_aside(2, "a")
    text = fails(errno.EINVAL, reserve, {memory: 1, ports: 3}, "a", "type T")
    assert text == "type T: 2 ports are set aside for a, 3 are wanted"
    assert (ports.holders, memory.holders) == ({"a": 2}, {})
    reserve({memory: 1, ports: 1}, "a", "type T")
    assert (ports.free, memory.free) == (2, 3)


def test_a_device_that_is_larger_than_what_was_set_aside_is_not_created(registry, card, fails):
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    card.pool.set_aside(1, uuid)
    text = fails(errno.EINVAL, registry.create, "card-2", uuid=uuid)
    assert text == f"type card-2: 1 ports are set aside for {uuid}, 2 are wanted"
    registry.create("card-1", uuid=uuid)
    registry.remove(uuid)
    card.pool.give_back(uuid)


def test_units_given_back_while_their_device_goes_are_free_once():
    pool = Pool("ports", 2)
    pool.set_aside(2, "a")
    reserve({pool: 2}, "a", "T")
    pool.give_back("a")
    release({pool: 2}, "a")
    assert (pool.free, pool.holders) == (2, {})


def test_what_cannot_be_set_aside(fails):
    pool = Pool("ports", 2)
    reserve({pool: 1}, "a", None)
    assert fails(errno.EEXIST, pool.set_aside, 1, "a") == "a already holds 1 ports"
    assert "card: no instance available: 2 of 2 ports wanted, 1 free" in fails(errno.ENOSPC, pool.set_aside, 2, "b", "card")
    assert fails(errno.EINVAL, pool.set_aside, 0, "b") == "0 ports cannot be set aside: 1 is the least"
    assert fails(errno.ENOENT, pool.give_back, "a") == "a has no ports set aside"
    assert pool.holders == {"a": 1}


class Watched:
    """A lock that notes when it is taken."""

    def __init__(self, name, order):
        self.name, self.order, self.lock = name, order, threading.Lock()

    def __enter__(self):
        self.lock.acquire()
        self.order.append(self.name)

    def __exit__(self, *error):
        self.lock.release()


def test_pools_are_locked_in_one_order_whatever_order_they_are_named_in():
    """Two types that name two pools the other way round would wait for each other."""
    first, second, orders = Pool("a", 9), Pool("b", 9), []
    for costs in ({first: 1, second: 1}, {second: 1, first: 1}):
        orders.append([])
        first._lock, second._lock = Watched("a", orders[-1]), Watched("b", orders[-1])
        reserve(costs, len(orders), None)
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == ["a", "b"]


def test_giving_back_waits_for_whoever_counts(kit, thread):
    pool = Pool("ports", 9)
    reserve({pool: 3}, "a", None)
    with pool._lock:
        giving = thread(release, {pool: 3}, "a")
        with pytest.raises(TimeoutError):
            giving.result(0.1)  # nothing tells that a thread waits for a lock
        assert pool.free == 6
    giving.result(kit.PATIENCE)
    assert pool.free == 9


def test_a_negative_pool(fails):
    assert fails(errno.EINVAL, Pool, "ports", -1) == "a pool of -1 ports cannot be"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=12))
def test_what_is_free_is_what_is_not_held(wishes):
    left, right = Pool("left", 10), Pool("right", 15)
    held = {}
    for number, (a, b) in enumerate(wishes):
        try:
            reserve({left: a, right: b}, number, None)
        except MdevError:
            assert left.free < a or right.free < b
        else:
            held[number] = (a, b)
        assert left.free == 10 - sum(a for a, _ in held.values()) >= 0
        assert right.free == 15 - sum(b for _, b in held.values()) >= 0


# -- types -------------------------------------------------------------------------------------------------------------


def test_available_instances_is_what_the_scarcest_pool_has():
    ports, memory = Pool("ports", 8), Pool("MiB", 10)
    kind = MdevType("big", "mdev", "vfio-pci", costs={ports: 2, memory: 3})
    assert kind.available_instances == 3
    reserve(kind.costs, "a", None)
    assert kind.available_instances == 2
    ports.capacity = 1  # a card that was reconfigured below what is in use
    assert kind.available_instances == 0
    assert MdevType("free", "mdev", "vfio-pci").available_instances == UNLIMITED


def test_costs_are_what_they_were_when_stated():
    costs = {Pool("ports", 8): 2}
    kind = MdevType("1", "mdev", "vfio-pci", costs=costs)
    costs.clear()
    assert kind.available_instances == 4


@pytest.mark.parametrize("units", [0, -1])
def test_a_type_that_takes_nothing_from_a_pool(units, fails):
    text = fails(errno.EINVAL, MdevType, "1", "mdev", "vfio-pci", costs={Pool("ports", 8): units})
    assert text == f"type 1 cannot take {units} ports: 1 is the least"


@pytest.mark.parametrize("group", ["", "a/b", "..", ".x", "a b", "é", "-x"])
def test_a_group_that_is_no_file_name(group, fails):
    assert fails(errno.EINVAL, MdevType, group, "mdev", "vfio-pci") == f"type group {group!r} is not a file name"


def test_an_attribute_twice(fails):
    twice = [Attribute("a", Int(), "A."), Attribute("a", Int(), "A.")]
    assert fails(errno.EEXIST, MdevType, "1", "mdev", "x", attributes=twice) == "attribute a is stated twice"
    assert fails(errno.EEXIST, MdevType, "1", "mdev", "x", device_attributes=twice) == "attribute a is stated twice"


# -- parents -----------------------------------------------------------------------------------------------------------


def parent(card):
    return Parent(card, ParentHooks(card))


def test_type_ids_begin_with_the_driver_or_the_parent(kit):
    assert list(parent(kit.Card("card")).types) == ["card-1", "card-2"]
    second = parent(kit.Card("card1", driver_name="card"))
    assert list(second.types) == ["card-1", "card-2"]
    assert str(second.types["card-1"]) == "type card-1"
    assert (second.host_key, str(second)) == ("card1", "parent card1")


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".a", "a b", "a\n", "é", "-x"])
def test_a_parents_name_is_a_file_name(name, kit, fails):
    assert fails(errno.EINVAL, parent, kit.Card(name)) == f"parent name {name!r} is not a file name"
    assert fails(errno.EINVAL, parent, kit.Card("fine", driver_name=name)) == f"parent name {name!r} is not a file name"


def test_names_as_on_real_buses(kit):
    for name in ("0000:06:00.0", "mtty", "mvnet_loopback0", "card@2"):
        assert parent(kit.Card(name)).name == name


def test_a_parent_without_name_or_types(kit, fails):
    assert fails(errno.EINVAL, parent, kit.Card("")) == "parent Card has no name"
    card = kit.Card()
    card.types = []
    assert fails(errno.EINVAL, parent, card) == "parent card has no types"


def test_types_may_be_made_as_they_are_asked_for(kit):
    card = kit.Card()
    card.types = (kind for kind in card.types)
    assert list(parent(card).types) == ["card-1", "card-2"]


def test_a_type_belongs_to_one_parent_and_a_failed_one_takes_none(kit, fails):
    first, second = kit.Card("first"), kit.Card("second")
    owner = parent(first)
    second.types = [*second.types, first.types[0]]
    assert fails(errno.EBUSY, parent, second) == "parent second: type 1 already belongs to parent first"
    assert first.types[0].parent is owner
    second.types = second.types[:2]
    assert parent(second).types, "its own are still free"


def test_a_type_twice(kit, fails):
    card = kit.Card()
    card.types = [card.types[0], MdevType("1", "bench", "x")]
    assert fails(errno.EEXIST, parent, card) == "parent card: type 1 is stated twice"


def test_parent_attributes(kit, fails):
    class Lit(kit.Card):
        light = 0
        attributes = (
            Attribute("light", Int(0, 1), "Light.", lambda me: me.ops.light, lambda me, on: setattr(me.ops, "light", on)),
        )

    with Registry([Lit()]) as registry:
        lit = registry.parent("card")
        lit.set_attribute("light", "1")
        assert lit.get_attribute("light") == 1
        assert fails(errno.EINVAL, lit.set_attribute, "light", 2) == "attribute light: 2 is not between 0 and 1"
        assert fails(errno.ENOENT, lit.get_attribute, "dark") == "parent card has no attribute 'dark' (there are: light)"


def test_entering_and_leaving(kit, fails, thread):
    owner = parent(kit.Card())
    owner.enter()
    owner.enter()
    assert fails(errno.EDEADLK, owner.leave) == "parent card cannot be unregistered from inside its own create or remove"
    leaving = thread(owner.leave)
    kit.until(lambda: owner.leaving)
    assert fails(errno.ENODEV, thread(owner.enter).result) == "parent card is being unregistered"
    assert fails(errno.ENODEV, thread(owner.leave).result) == "parent card is being unregistered"
    owner.exit()
    assert not leaving.done(), "one visit is still going on"
    owner.exit()
    leaving.result(kit.PATIENCE)
    owner.stay()
    owner.enter()
    owner.exit()


def test_leaving_that_is_interrupted_is_taken_back(kit, monkeypatch):
    owner = parent(kit.Card())

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner.lock, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        owner.leave()
    owner.enter()


def test_others_visits_are_waited_for(kit, thread):
    """Only one's own visit would be waited for in vain."""
    owner, gate = parent(kit.Card()), kit.Gate()

    def visit():
        owner.enter()
        gate()
        owner.exit()

    visiting = thread(visit)
    gate.wait()
    leaving = thread(owner.leave)
    kit.until(lambda: owner.leaving)
    assert not leaving.done()
    gate.open()
    visiting.result(kit.PATIENCE)
    leaving.result(kit.PATIENCE)


def test_one_pool_for_two_parents(kit):
    pool = Pool("ports", 3)
    with Registry([kit.Bus(), kit.Card("a", pool=pool), kit.Card("b", pool=pool)]) as registry:
        registry.create("a-1", bind=False, uuid=uuid4())
        assert [kind.available_instances for kind in registry.types] == [2, 1, 2, 1]
