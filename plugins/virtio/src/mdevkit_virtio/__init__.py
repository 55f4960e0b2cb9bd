"""The virtio class of mdevkit: virtqueues, guest memory, and the engines that carry their traffic."""
