"""The suites on the parent that is there: mtty, with its far ends looped back, and with terminals behind them."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_mtty.parent import MttyParent
from mdevkit_testkit import ParentSuite, VfioSuite


class TestMtty(ParentSuite):
    factory = MttyParent


class TestMttyVfio(VfioSuite):
    factory = MttyParent
    expected = ("reset", "intx", "migration", "precopy")


class TestMttyWithTerminals(ParentSuite):
    """Each device holds descriptors: what is to be counted, and given back when a create fails half way."""

    factory = MttyParent
    params: ClassVar = {"port0": "pty"}


class TestMttyVfioWithTerminals(TestMttyVfio):
    params: ClassVar = {"port0": "pty"}
