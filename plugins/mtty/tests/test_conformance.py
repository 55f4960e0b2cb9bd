"""The conformance suite on cards as Linux has them; those of our own are suite and example in the kit's own tests."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_mtty.parent import MttyParent
from mdevkit_testkit import VfioSuite


class TestSample(VfioSuite):
    factory = MttyParent
    params: ClassVar = {"compat": "linux"}
    expected = ("intx", "msi", "migration", "precopy")
    known_gaps: ClassVar = {
        "test_configuration_space_has_a_known_size": "the sample's has 255 bytes",
        "test_absent_interrupts_are_refused": "the sample tells of INTx and MSI alone, and takes an eventfd for the others too",
    }
