"""The driver's side of virtio: the ``virtio`` bus, the driver ``virtio_net``, and what leads from its netdev to the outside."""
