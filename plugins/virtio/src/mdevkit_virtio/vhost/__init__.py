"""vhost-user: a device at a socket (`mdevkit_virtio.vhost.driver`), and its peer (`mdevkit_virtio.vhost.frontend`)."""
