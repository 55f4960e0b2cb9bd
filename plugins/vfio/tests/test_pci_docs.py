"""The manual's page about the kit: its example runs as it is printed."""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mdevkit_vfio.ops import IrqRequest, PowerManaged
from mdevkit_vfio.pci import PciDevice
from mdevkit_vfio.uapi import Irq, IrqSet, MigrationState

PAGE = Path(__file__).parents[3] / "docs" / "pci-kit.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """The names the page's blocks define, executed in order in one module."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "pci_kit_example"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_example_runs(example: dict[str, Any]) -> None:
    card = example["card"]
    assert isinstance(card, PciDevice)
    assert card.dma.maps == 0, "the page's last lines have run"


def test_the_example_migrates_while_busy(example: dict[str, Any]) -> None:
    """What the page says of `save`, `load`, `stop` and `resume` holds for the card it shows."""
    source, target = example["SumCard"](), example["SumCard"]()
    source.open(example["NoMessages"]())
    target.open(example["NoMessages"]())
    source.migration.set_state(MigrationState.STOP_COPY)
    source.write(0, 0, (0xBAD000).to_bytes(8, "little") + (4).to_bytes(4, "little") + b"\1\0\0\0")
    assert source.regs.status == example["BUSY"]
    target.migration.set_state(MigrationState.RESUMING)
    target.migration.write(source.bytes.tobytes())
    target.migration.set_state(MigrationState.RUNNING)
    _fails_as_it_must(target, example)
    assert source.regs.status == example["BUSY"], "stopped, so nothing changes"
    source.release()
    target.release()


def test_a_job_goes_on_in_the_process_that_follows(example: dict[str, Any]) -> None:
    """The page says nothing of `device_restore`, because a device that can migrate needs none."""

    class Dying(example["SumCard"]):
        def defer(self, job: Callable[[], None]) -> None:
            """Be killed before the job runs."""

    source, target = Dying(), example["SumCard"]()
    source.open(example["NoMessages"]())
    target.open(example["NoMessages"]())
    source.write(0, 0, (0xBAD000).to_bytes(8, "little") + (4).to_bytes(4, "little") + b"\1\0\0\0")
    with source.lock:
        state = source.checkpoint()
    target.restore(state)
    _fails_as_it_must(target, example)
    source.release()
    target.release()


#: Milliseconds to the alarm: long enough for a busy machine to do something before it.
SOON = 700


class Alarm:
    """The page's card that does something by itself, and its interrupt."""

    def __init__(self, example: dict[str, Any]) -> None:
        self.card = example["AlarmCard"]()
        self.card.open(example["NoMessages"]())
        self.interrupt = os.eventfd(0, os.EFD_NONBLOCK)
        arm = IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER
        self.card.set_irqs(IrqRequest(arm, Irq.MSI, 0, 1, fds=[os.dup(self.interrupt)]))

    def set(self, milliseconds: int) -> None:
        self.card.write(0, 0, milliseconds.to_bytes(4, "little"))

    def fires(self, seconds: float = 5) -> bool:
        return bool(select.select([self.interrupt], [], [], seconds)[0]) and os.eventfd_read(self.interrupt) == 1

    def close(self) -> None:
        self.card.release()
        os.close(self.interrupt)


@pytest.fixture
def alarms(example: dict[str, Any], no_leaks: object) -> Iterator[Callable[[], Alarm]]:
    made: list[Alarm] = []

    def make() -> Alarm:
        made.append(Alarm(example))
        return made[-1]

    yield make
    for alarm in made:
        alarm.close()


def test_the_alarm_fires(alarms: Callable[[], Alarm]) -> None:
    alarm = alarms()
    alarm.set(20)
    assert alarm.fires()
    assert alarm.card.read(0, 4, 4) == b"\1\0\0\0"
    alarm.set(SOON)
    alarm.set(0)
    assert not alarm.fires(1.5 * SOON / 1e3), "it was called off"


def test_the_alarm_stands_still_while_it_is_suspended_or_migrates(alarms: Callable[[], Alarm]) -> None:
    alarm = alarms()
    assert isinstance(alarm.card, PowerManaged)
    alarm.set(SOON)
    alarm.card.suspend()
    alarm.card.migration.set_state(MigrationState.STOP)
    assert not alarm.fires(1.5 * SOON / 1e3)
    alarm.card.resume()
    assert not alarm.fires(1.5 * SOON / 1e3), "migration still holds it"
    alarm.card.migration.set_state(MigrationState.RUNNING)
    assert alarm.fires()


def _migrating(alarms: Callable[[], Alarm]) -> tuple[Alarm, Alarm]:
    """A card whose alarm is set, and one that has got all of its stream and not been started yet."""
    source, target = alarms(), alarms()
    source.set(SOON)
    source.card.migration.set_state(MigrationState.STOP_COPY)
    target.card.migration.set_state(MigrationState.RESUMING)
    target.card.migration.write(source.card.migration.read(100))
    return source, target


def test_the_alarm_fires_where_it_has_migrated_to(alarms: Callable[[], Alarm]) -> None:
    source, target = _migrating(alarms)
    target.card.migration.set_state(MigrationState.RUNNING)
    assert target.fires()
    assert not source.fires(0.2)


def _successor(alarms: Callable[[], Alarm], source: Alarm) -> Alarm:
    """What the next process makes of it, after some time in which nobody counted."""
    target = alarms()
    with source.card.lock:
        state = source.card.checkpoint()
    source.set(0)
    time.sleep(SOON / 1e3)
    target.card.restore(state)
    return target


def test_the_alarm_fires_in_the_process_that_follows(alarms: Callable[[], Alarm]) -> None:
    source = alarms()
    source.set(SOON)
    target = _successor(alarms, source)
    began = time.monotonic()
    assert target.fires()
    assert time.monotonic() - began < 0.9 * SOON / 1e3, "it was due already"


def test_the_alarm_stands_still_in_the_process_that_follows(alarms: Callable[[], Alarm]) -> None:
    source = alarms()
    source.set(60_000)
    source.card.suspend()
    left = source.card.left
    source.card.migration.set_state(MigrationState.STOP)
    target = _successor(alarms, source)
    assert target.card.left == left, "neither the death nor a second reason costs time"
    target.card.migration.set_state(MigrationState.RUNNING)
    assert (target.card.due, target.card.left) == (0, left), "it is suspended yet"
    target.card.resume()
    assert 0 < target.card.due - time.monotonic_ns() <= left


def test_an_alarm_that_has_come_by_migration_survives_too(alarms: Callable[[], Alarm]) -> None:
    _, target = _migrating(alarms)
    target.card.migration.set_state(MigrationState.STOP)
    last = _successor(alarms, target)
    assert not last.fires(0.2)
    last.card.migration.set_state(MigrationState.RUNNING)
    assert last.fires()


def _fails_as_it_must(card: Any, example: dict[str, Any]) -> None:
    """The job that was under way is done again, and has a bad address."""
    interrupt = os.eventfd(0, os.EFD_NONBLOCK)
    card.set_irqs(IrqRequest(IrqSet.DATA_EVENTFD | IrqSet.ACTION_TRIGGER, Irq.INTX, 0, 1, fds=[os.dup(interrupt)]))
    assert select.select([interrupt], [], [], 5)[0]
    assert card.regs.status == example["FAULT"]
    os.close(interrupt)


def test_every_name_of_the_tables_exists() -> None:
    tables = re.findall(r"^\| `(.*?)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = {name for cell in tables for name in re.findall(r"(?:^|`)([a-z_]+)(?=\(|`|$)", cell)}
    assert {"bar_read", "interrupt", "defer", "region_info"} <= names
    assert [name for name in names if not hasattr(PciDevice, name)] == []
