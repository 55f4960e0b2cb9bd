"""The class bus ``vdev``: see `mdevkit_vdev.bus`."""
