"""mtty, the mediated serial card of the Linux samples, as an mdevkit parent. Users need nothing from here."""
