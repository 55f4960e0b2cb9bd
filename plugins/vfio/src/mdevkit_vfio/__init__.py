"""The VFIO class: the bus `mdev`, a kit for PCI devices, and the driver `vfio_mdev` that serves them over vfio-user."""
