"""The parent `acme`: a card with 8 checksum engines, given out as devices with one engine or four."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdevkit import Attribute, Int, Mdev, MdevType, ParentOps, Pool, hookimpl
from mdevkit_vfio.bus import VfioMdev

from mdevkit_acme.model import AcmeDevice

ENGINES = 8
LIMIT = 64 * 1024

SERIAL = Attribute("serial", Int(0, 2**32 - 1), "serial number", show=lambda mdev: mdev.drvdata.serial, create=True, default=0)
JOBS = Attribute("jobs", Int(), "checksums computed so far", show=lambda mdev: mdev.drvdata.jobs)


class AcmeParent(ParentOps):
    """The parent driver. Each object is one card."""

    name = "acme"

    def __init__(self) -> None:
        self._engines = Pool("engines", ENGINES)
        self.types = (self._type(1, "One engine"), self._type(4, "Four engines"))

    def _type(self, engines: int, name: str) -> MdevType:
        return MdevType(
            group=str(engines),
            bus="mdev",
            device_api="vfio-pci",
            name=name,
            description=f"checksums of up to {self._limit(engines) // 1024} KiB",
            costs={self._engines: engines},
            device_attributes=(SERIAL, JOBS),
        )

    @staticmethod
    def _limit(engines: int) -> int:
        return LIMIT * engines**2

    @hookimpl
    def parent_create(self, mdev: Mdev, params: Mapping[str, Any]) -> None:
        """Build the device; its instance is accounted for already."""
        engines = mdev.type.costs[self._engines]
        device = AcmeDevice(self._limit(engines), params["serial"], f"acme {mdev.uuid}")
        mdev.drvdata = device
        VfioMdev.from_device(mdev).set_ops(device)

    @hookimpl
    def parent_remove(self, mdev: Mdev) -> None:
        """Nothing to free: the device holds no file, no thread and no socket once its client is gone."""
