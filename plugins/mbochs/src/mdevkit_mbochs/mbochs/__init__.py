"""mbochs: a display with the registers of Bochs' VBE extension, as QEMU's bochs-display has them."""
