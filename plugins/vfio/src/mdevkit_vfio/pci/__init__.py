"""The PCI kit: what every PCI function needs, so that a vendor states registers and behaviour only.

Subclass `PciDevice`; see docs/pci-kit.md.
"""

from __future__ import annotations

from mdevkit_vfio.ops import SparseArea
from mdevkit_vfio.pci.bars import Bar
from mdevkit_vfio.pci.config import Capability, PciConfig, PciIds
from mdevkit_vfio.pci.device import PciDevice
from mdevkit_vfio.pci.msi import Msix

__all__ = ["Bar", "Capability", "Msix", "PciConfig", "PciDevice", "PciIds", "SparseArea"]
