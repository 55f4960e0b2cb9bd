"""``mdevkit pktgen``: sends numbered frames through a virtio network device and checks what comes back."""
