"""The configuration space: ranges, widths, what can be written, and the generation (virtio 1.2, section 2.5)."""

from __future__ import annotations

import errno

from mdevkit_virtio.ops import VirtioOps

from mdevkit_testkit.suites.base import refused, tolerated
from mdevkit_testkit.suites.virtio.base import VirtioBase, config_size, needs, writable
from mdevkit_testkit.suites.virtio.guest import Guest

_WIDTHS = (1, 2, 4, 8)


class Configuration(VirtioBase):
    """get_config, set_config, get_generation."""

    @needs("config")
    def test_configuration_reads_the_same_in_every_width(self, ops: VirtioOps) -> None:
        """Checks that every range of the configuration space can be read, and reads what its bytes read."""
        size = config_size(ops)
        whole = b"".join(ops.get_config(offset, 1) for offset in range(size))
        assert ops.get_config(0, size) == whole
        for width in _WIDTHS:
            for offset in range(size - width + 1):
                found = ops.get_config(offset, width)
                assert found == whole[offset : offset + width], f"{width} bytes at {offset} read {found.hex()}"

    def test_ranges_outside_are_refused(self, ops: VirtioOps) -> None:
        """Checks that reads and writes not wholly inside the configuration space are refused with EINVAL."""
        size = config_size(ops)
        for offset, length in ((size, 1), (size - 1, 2), (0, size + 1), (size + 4096, 4), (-1, 1), (1 << 32, 4)):
            where = f"of {length} bytes at {offset} of {size}"
            with refused(f"a read {where}", errno.EINVAL):
                ops.get_config(offset, length)
            with refused(f"a write {where}", errno.EINVAL):
                ops.set_config(offset, bytes(length))

    @needs("config")
    def test_bytes_are_written_or_refused(self, ops: VirtioOps) -> None:
        """Checks that a write is refused with EACCES and changes nothing, or is made, wherever it is."""
        may = writable(ops)
        for offset in range(config_size(ops)):
            before = ops.get_config(offset, 1)
            with tolerated(f"a write at {offset}") as refusals:
                ops.set_config(offset, bytes([before[0] ^ 0xFF]))
            assert bool(refusals) == (offset not in may), f"the byte at {offset} can be written at times"
            if refusals:
                assert refusals[0].errno == errno.EACCES, f"a write at {offset} was refused: {refusals[0]!r}"
                assert ops.get_config(offset, 1) == before, f"a write at {offset} was refused, and made"

    @needs("writable")
    def test_generation_counts_changes(self, guest: Guest) -> None:
        """Checks that the generation is another one after each change, as a driver reads it, and stays without one."""
        ops = guest.ops
        guest.start()
        for offset in writable(ops):
            before, old = ops.get_generation(), ops.get_config(offset, 1)
            assert ops.get_generation() == before, "the generation changes by itself"
            ops.set_config(offset, bytes([old[0] ^ 0xFF]))
            changed = ops.get_config(offset, 1) != old
            assert (ops.get_generation() != before) == changed, f"generation {before} after a change: {changed}"

    def test_generation_is_a_number_of_32_bits(self, guest: Guest) -> None:
        """Checks that the generation is a u32, also after resets."""
        for _ in range(3):
            guest.start()
            guest.ops.set_status(0)
            generation = guest.ops.get_generation()
            assert 0 <= generation < 1 << 32, f"generation {generation}"
