"""mvnet, a virtio network loopback, as an mdevkit parent."""
