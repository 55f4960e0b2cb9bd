"""The conformance suites on both parents, as they are by default and with everybody looking."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_mbochs.mbochs.parent import MbochsParent
from mdevkit_mbochs.mdpy.parent import MdpyParent
from mdevkit_testkit import ParentSuite, VfioSuite


class TestMbochs(ParentSuite):
    factory = MbochsParent
    most = 8


class TestMbochsVfio(VfioSuite):
    factory = MbochsParent
    expected = ("reset", "mapped")
    known_gaps: ClassVar = {
        "test_reset_restores_the_state_after_create": "a monitor stays plugged in: clients bring it once, and reset machines often"
    }


class TestMdpy(ParentSuite):
    factory = MdpyParent


class TestMdpyVfio(VfioSuite):
    factory = MdpyParent
    expected = ("reset", "mapped")


class TestMdpyWithViewers(ParentSuite):
    """Each device has a port of its own besides its socket: what is to be given back when a create fails half way."""

    factory = MdpyParent
    params: ClassVar = {"vnc": "tcp:0", "vnc_insecure": "yes"}
