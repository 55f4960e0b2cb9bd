"""The suites on mvnet, plain and with several queue pairs; compat=linux differs from the contract in what its name says."""

from __future__ import annotations

from typing import ClassVar

from mdevkit_mvnet.parent import MvnetParent
from mdevkit_testkit import ParentSuite, VirtioSuite


class TestMvnet(ParentSuite):
    factory = MvnetParent


class TestMvnetVirtio(VirtioSuite):
    factory = MvnetParent
    expected = ("traffic", "config", "packed", "kick", "log")


class TestMvnetWithPairs(TestMvnetVirtio):
    types = ("mvnet_loopback-vhost",)
    params: ClassVar = {"queues": "3", "policy": "drop", "mac": "02:00:00:00:00:01"}
