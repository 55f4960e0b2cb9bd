"""The wire format: what is packed is parsed, and what is wrong is refused with a sentence that names it."""

import errno
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mdevkit.errors import MdevError
from mdevkit_vfio import proto
from mdevkit_vfio.ops import DeviceInfo, IrqInfo, Mapping, RegionInfo, SparseArea
from mdevkit_vfio.proto import Command
from mdevkit_vfio.uapi import Device, IrqFlag, RegionFlag

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
RW = RegionFlag.READ | RegionFlag.WRITE


def refused(text, function, *args):
    with pytest.raises(MdevError, match=text) as caught:
        function(*args)
    assert caught.value.errno == errno.EINVAL


# -- header


@given(u16, u16, st.binary(max_size=64))
def test_messages_and_replies_carry_id_command_and_size(ident, command, payload):
    data = proto.message(ident, command, payload, proto.NO_REPLY)
    assert proto.Header(*proto.HEADER.unpack_from(data)) == (ident, command, len(data), proto.NO_REPLY, 0)
    header = proto.Header(*proto.HEADER.unpack_from(proto.reply(ident, command, payload)))
    assert header == (ident, command, 16 + len(payload), proto.TYPE_REPLY, 0)


def test_an_error_reply_is_a_header_alone():
    data = proto.error_reply(7, Command.DMA_MAP, errno.ENOSPC)
    assert struct.unpack("=HHIII", data) == (7, 2, 16, 0x21, errno.ENOSPC)


def test_unknown_commands_have_a_name_too():
    assert proto.command_name(9) == "REGION_READ"
    assert proto.command_name(14) == "command 14"


# -- VERSION


def version(text):
    return proto.Version.parse(struct.pack("=HH", 0, 0) + text)


def capabilities(**values):
    return version(json.dumps({"capabilities": values}).encode() + b"\0").capabilities


def test_a_version_without_json_means_the_defaults_of_the_specification():
    found = version(b"")
    assert (found.major, found.minor) == (0, 0)
    assert found.capabilities == proto.Capabilities(1, 1 << 20, 65535, 4096, False, None)


@pytest.mark.parametrize("text", [b"{}\0", b'{"capabilities": {}}\0', b'{"else": 1}\0'])
def test_json_without_capabilities_means_the_same(text):
    assert version(text).capabilities == proto.Capabilities()


def test_what_qemu_sends_is_understood():
    found = capabilities(
        pgsizes=4096,
        max_msg_fds=16,
        max_dma_maps=65535,
        max_data_xfer_size=1048576,
        migration={"max_bitmap_size": 268435456, "pgsize": 4096},
        write_multiple=True,
    )
    assert found == proto.Capabilities(16, 1048576, 65535, 4096, True, 4096)
    assert found.named == {"pgsizes", "max_msg_fds", "max_dma_maps", "max_data_xfer_size", "migration", "write_multiple"}


def test_unknown_capabilities_are_ignored():
    assert capabilities(colour="red") == proto.Capabilities()


def test_a_version_ends_in_nul_and_names_no_more_than_it_should():
    payload = proto.Version(0, 0, proto.Capabilities(16)).pack(only=["max_msg_fds", "migration", "unknown"])
    assert payload[-1:] == b"\0"
    assert json.loads(payload[4:-1]) == {"capabilities": {"max_msg_fds": 16}}


@given(
    st.builds(
        proto.Capabilities,
        max_msg_fds=st.integers(0, 1024),
        max_data_xfer_size=st.integers(1, 1 << 30),
        max_dma_maps=u64,
        pgsizes=st.integers(1, 1 << 63),
        write_multiple=st.booleans(),
        migration_pgsize=st.sampled_from([None, 1, 4096, 1 << 30]),
    ),
    u16,
    u16,
)
def test_versions_go_round(caps, major, minor):
    assert proto.Version.parse(proto.Version(major, minor, caps).pack()) == (major, minor, caps)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{}", "does not end in NUL"),
        (b"{\0", "broken: JSONDecodeError"),
        (b'"\0', "broken: JSONDecodeError"),
        (b"\xff\0", "broken: UnicodeDecodeError"),
        (b"\0", "broken: JSONDecodeError"),
        (b"[" * 9000 + b"\0", "broken: RecursionError"),
        (b"[]\0", "version data is not a JSON object"),
        (b'{"capabilities": "23"}\0', "capabilities is not a JSON object"),
        (b'{"capabilities": []}\0', "capabilities is not a JSON object"),
    ],
)
def test_broken_json_is_refused(text, reason):
    refused(reason, version, text)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_msg_fds": "foo"}, "max_msg_fds 'foo' is not a number from 0 to 1024"),
        ({"max_msg_fds": -1}, "max_msg_fds -1"),
        ({"max_msg_fds": 1025}, "max_msg_fds 1025"),
        ({"max_msg_fds": True}, "max_msg_fds True"),
        ({"max_msg_fds": 1.5}, "max_msg_fds 1.5"),
        ({"max_msg_fds": None}, "max_msg_fds None"),
        ({"max_data_xfer_size": 0}, "max_data_xfer_size 0"),
        ({"max_data_xfer_size": "x" * 100}, "max_data_xfer_size 'x{39} is not"),
        ({"max_dma_maps": -1}, "max_dma_maps -1"),
        ({"pgsizes": 0}, "pgsizes 0"),
        ({"migration": "23"}, "migration is not a JSON object"),
        ({"migration": {"pgsize": "foo"}}, "pgsize 'foo'"),
        ({"migration": {"pgsize": 0}}, "pgsize 0"),
        ({"migration": {"pgsize": 4095}}, "pgsize 4095 is not a power of two"),
        ({"write_multiple": 1}, "write_multiple is not true or false"),
        ({"twin_socket": True}, "twin_socket is not a JSON object"),
    ],
)
def test_capabilities_of_the_wrong_type_or_range_are_refused(values, reason):
    refused(reason, lambda: capabilities(**values))


def test_a_version_too_short_is_refused():
    refused("3 bytes, 4 are needed", proto.Version.parse, b"\0\0\0")


# -- DMA maps

PAGES = st.integers(1, 1 << 20).map(lambda n: n * 4096)


@given(st.sampled_from([1, 2, 3, 5, 7, 9, 11]), st.integers(0, 1 << 40), st.integers(0, 1 << 40).map(lambda n: n * 4096), PAGES)
def test_dma_maps_go_round(flags, offset, iova, size):
    request = proto.DmaMap(flags, offset, iova, size)
    assert proto.DmaMap.parse(request.pack(), 1) == request


def test_a_map_may_end_at_the_end_of_the_address_space():
    assert proto.DmaMap.parse(proto.DmaMap(3, 0, (1 << 64) - 4096, 4096).pack(), 0).size == 4096


@pytest.mark.parametrize(
    ("values", "fds", "reason"),
    [
        ((31, 3, 0, 0, 4096), 0, "argsz 31 is outside 32"),
        ((32, 0, 0, 0, 4096), 0, "neither readable nor writeable"),
        ((32, 0x13, 0, 0, 4096), 0, "flags 0x13 are unknown"),
        ((32, 0xF, 0, 0, 4096), 1, "flags 0xf are unknown or contradict"),
        ((32, 7, 0, 0, 4096), 0, "0 descriptors do not fit flags 0x7"),
        ((32, 11, 0, 0, 4096), 0, "0 descriptors do not fit flags 0xb"),
        ((32, 3, 0, 0, 4096), 2, "2 descriptors do not fit"),
        ((32, 3, 0, 0, 0), 0, "is empty or not made of whole pages"),
        ((32, 3, 0, 1, 4096), 0, "not made of whole pages"),
        ((32, 3, 0, 4096, 4097), 0, "not made of whole pages"),
        ((32, 3, 0, (1 << 64) - 4096, 8192), 0, "wraps around"),
        ((32, 3, (1 << 63) - 1, 0, 4096), 1, "beyond the end of any file"),
    ],
)
def test_wrong_dma_maps_are_refused(values, fds, reason):
    refused(reason, proto.DmaMap.parse, struct.pack("=IIQQQ", *values), fds)


@pytest.mark.parametrize("size", [0, 8, 31, 33])
def test_dma_maps_of_the_wrong_length_are_refused(size):
    refused(f"{size} bytes, not 32", proto.DmaMap.parse, bytes(size), 0)


def test_dma_unmaps_go_round():
    for request in (proto.DmaUnmap(0, 4096, 8192), proto.DmaUnmap(proto.UNMAP_ALL, 0, 0)):
        assert proto.DmaUnmap.parse(request.pack()) == request
    assert request.all


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((8, 0, 4096, 4096), "argsz 8 is outside 24"),
        ((1 << 20 | 8, 0, 4096, 4096), "argsz 1048584 is outside"),
        ((24, 4, 4096, 4096), "flags 0x4 are unknown"),
        ((24, 1, 4096, 4096), "flags 0x1 are unknown"),
        ((24, 2, 4096, 0), "takes no range"),
        ((24, 2, 0, 4096), "takes no range"),
        ((24, 0, 0, 0), "is empty"),
        ((24, 0, 4097, 4096), "whole pages"),
    ],
)
def test_wrong_dma_unmaps_are_refused(values, reason):
    refused(reason, proto.DmaUnmap.parse, struct.pack("=IIQQ", *values))


def test_dma_unmaps_too_short_are_refused():
    refused("8 bytes, 24 are needed", proto.DmaUnmap.parse, bytes(8))


# -- information


def test_device_info_goes_round():
    proto.parse_device_info_request(proto.pack_device_info_request())
    info = DeviceInfo(Device.RESET | Device.PCI, 9, 5)
    assert proto.parse_device_info(proto.pack_device_info(info)) == info


def test_device_info_takes_the_argsz_of_cloud_hypervisor_but_none_too_small():
    proto.parse_device_info_request(struct.pack("=IIII", 32, 0, 0, 0))
    refused("argsz 8 is outside 16", proto.parse_device_info_request, struct.pack("=IIII", 8, 0, 0, 0))
    refused("8 bytes, 16 are needed", proto.parse_device_info_request, bytes(8))


MAPPED = Mapping(-1, 0x8000, (SparseArea(0x2000, 0x1000), SparseArea(0x4000, 0x2000)))


def test_capabilities_that_do_not_fit_are_announced_and_left_out():
    reply = proto.pack_region_info(2, RegionInfo(RW, 0x8000, MAPPED), 32)
    assert struct.unpack("=IIIIQQ", reply) == (80, 7, 2, 0, 0x8000, 0x8000)
    assert proto.pack_region_info(2, RegionInfo(RW, 0x8000, MAPPED), 79) == reply


def test_a_sparse_area_is_laid_out_as_vfio_does():
    reply = proto.pack_region_info(2, RegionInfo(RW, 0x8000, MAPPED), 200)
    assert struct.unpack_from("=IIIIQQ", reply) == (80, 15, 2, 32, 0x8000, 0x8000)
    assert struct.unpack_from("=HHIII4Q", reply, 32) == (1, 1, 0, 2, 0, 0x2000, 0x1000, 0x4000, 0x2000)
    assert len(reply) == 80


def test_a_type_follows_the_areas():
    reply = proto.pack_region_info(9, RegionInfo(RW, 0x8000, MAPPED, (5, 6)), 96)
    assert struct.unpack_from("=HHIII", reply, 32) == (1, 1, 80, 2, 0)
    assert struct.unpack_from("=HHIII", reply, 80) == (2, 1, 0, 5, 6)


def test_region_info_goes_round():
    for mapping, kind in ((None, None), (MAPPED, None), (None, (1, 2)), (MAPPED, (1, 2)), (Mapping(-1), None)):
        info = RegionInfo(RW, 0x10000, mapping, kind)
        found = proto.parse_region_info(proto.pack_region_info(4, info, 4096))
        assert (found.index, found.size, found.type) == (4, info.size, kind)
        assert found.areas == (mapping.areas if mapping else ())
        assert bool(found.flags & RegionFlag.MMAP) == (mapping is not None)
        assert found.mapping(3) == Mapping(3, found.offset, found.areas)


def test_flags_a_device_sets_without_the_thing_are_not_passed_on():
    info = RegionInfo(RW | RegionFlag.MMAP | RegionFlag.CAPS, 4096)
    assert proto.parse_region_info(proto.pack_region_info(0, info, 4096)).flags == RW


@pytest.mark.parametrize(
    ("head", "rest", "reason"),
    [
        ((32, 8, 0, 16, 0, 0), b"", "capability at 16"),
        ((32, 8, 0, 32, 0, 0), b"", "capability at 32"),
        ((48, 8, 0, 32, 0, 0), struct.pack("=HHIII", 2, 1, 32, 0, 0), "capability at 32"),
        ((48, 8, 0, 32, 0, 0), struct.pack("=HHIII", 1, 1, 0, 1 << 30, 0), "areas are not in the reply"),
    ],
)
def test_a_capability_chain_that_leaves_the_message_is_refused(head, rest, reason):
    refused(reason, proto.parse_region_info, struct.pack("=IIIIQQ", *head) + rest)


def test_region_info_requests():
    assert proto.parse_region_info_request(proto.pack_region_info_request(3, 80)) == proto.IndexRequest(80, 3)
    assert proto.parse_region_info_request(proto.pack_region_info_request(3, 80) + bytes(48)).argsz == 80
    refused("argsz 8", proto.parse_region_info_request, proto.pack_region_info_request(3, 8))
    refused("8 bytes, 32", proto.parse_region_info_request, bytes(8))


def test_io_fds_requests():
    assert proto.parse_io_fds_request(proto.pack_io_fds_request(1, 512)) == proto.IndexRequest(512, 1)
    assert proto.parse_io_fds(proto.pack_no_io_fds(1)) == 0
    for values, reason in (
        ((16, 1, 1, 0), "flags 0x1 and count 0"),
        ((16, 0, 1, 1), "flags 0x0 and count 1"),
        ((15, 0, 1, 0), "argsz 15"),
        (((1 << 20) + 1, 0, 1, 0), "argsz 1048577"),
    ):
        refused(reason, proto.parse_io_fds_request, struct.pack("=IIII", *values))


def test_irq_info_goes_round():
    assert proto.parse_irq_info_request(proto.pack_irq_info_request(2)) == proto.IndexRequest(16, 2)
    info = IrqInfo(IrqFlag.EVENTFD | IrqFlag.NORESIZE, 32)
    assert proto.parse_irq_info(proto.pack_irq_info(1, info)) == info
    refused("argsz 8", proto.parse_irq_info_request, struct.pack("=IIII", 8, 0, 0, 0))
    refused("8 bytes, 16", proto.parse_irq_info_request, bytes(8))


# -- SET_IRQS

COUNTS = (1, 4, 2048, 1, 1)


def irqs(argsz, flags, index, start, count, data=b"", fds=0):
    return proto.SetIrqs.parse(struct.pack("=IIIII", argsz, flags, index, start, count) + data, fds, COUNTS)


def test_set_irqs_goes_round():
    for request, fds in (
        (proto.SetIrqs(0x21, 0, 0, 0), 0),
        (proto.SetIrqs(0x24, 2, 2040, 8), 8),
        (proto.SetIrqs(0x24, 3, 0, 1), 0),
        (proto.SetIrqs(0x22, 1, 1, 3, (True, False, True)), 0),
        (proto.SetIrqs(0x11, 0, 0, 1), 0),
        (proto.SetIrqs(0x0A, 0, 0, 1, (True,)), 0),
    ):
        assert proto.SetIrqs.parse(request.pack(), fds, COUNTS) == request


@pytest.mark.parametrize(
    ("args", "fds", "reason"),
    [
        ((3, 0x21, 0, 0, 0), 0, "argsz 3"),
        ((20, 0x21, 5, 0, 0), 0, "index 5 does not exist"),
        ((20, 0x18, 2, 0, 0), 0, "flags 0x18"),
        ((20, 0x0B, 2, 0, 1, b"\0"), 0, "flags 0xb"),
        ((20, 0x09 | 0x40, 2, 0, 1), 0, "flags 0x49"),
        ((20, 0x01, 2, 0, 1), 0, "flags 0x1 "),
        ((20, 0x20, 2, 0, 1), 0, "flags 0x20"),
        ((20, 0, 2, 0, 0), 0, "flags 0x0"),
        ((20, 0x09, 2, 2047, 2), 0, "2 from 2047 exceed the 2048"),
        ((20, 0x09, 2, 2048, 1), 0, "1 from 2048"),
        ((20, 0x24, 2, 284, 0xFFFFFFFF), 0, "4294967295 from 284"),
        ((20, 0x21, 3, 0, 2), 0, "exceed the 1 interrupts of index 3"),
        ((20, 0x21, 2, 1, 0), 0, "count of 0 goes with start 0"),
        ((20, 0x09, 2, 0, 0), 0, "count of 0"),
        ((20, 0x22, 2, 0, 0), 0, "count of 0"),
        ((20, 0x24, 2, 0, 0), 0, "count of 0"),
        ((21, 0x22, 2, 0, 2, b"\0"), 0, "1 bytes of data for 2"),
        ((23, 0x22, 2, 0, 2, b"\0\0\0"), 0, "3 bytes of data for 2"),
        ((20, 0x22, 2, 0, 2, b"\0\0"), 0, "2 bytes of data for 2"),
        ((20, 0x22, 2, 0, 1, b"\0"), 1, "bytes of data for 1"),
        ((21, 0x22, 2, 0, 1, b"\0"), 1, "1 descriptors do not fit"),
        ((20, 0x21, 2, 0, 1), 1, "1 descriptors do not fit"),
        ((20, 0x24, 2, 0, 2), 1, "1 descriptors do not fit"),
        ((20, 0x24, 2, 0, 1), 2, "2 descriptors do not fit"),
    ],
)
def test_wrong_set_irqs_are_refused(args, fds, reason):
    refused(reason, lambda: irqs(*args, fds=fds))


@pytest.mark.parametrize("size", [0, 8, 19])
def test_set_irqs_too_short_is_refused(size):
    refused(f"{size} bytes, 20 are needed", proto.SetIrqs.parse, bytes(size), 0, COUNTS)


# -- region access


@given(u64, u32, st.binary(max_size=300))
def test_accesses_go_round(offset, region, data):
    access = proto.Access(offset, region, len(data))
    assert proto.parse_region_read(access.pack()) == access
    assert proto.parse_region_data(Command.REGION_WRITE, access.pack() + data) == (access, data)


@given(st.lists(st.builds(proto.Write, u32, u64, st.binary(min_size=1, max_size=8)), max_size=50))
def test_several_writes_go_round(writes):
    assert list(proto.parse_write_multi(proto.pack_write_multi(writes))) == writes
    assert proto.parse_write_multi_reply(proto.pack_write_multi_reply(len(writes))) == len(writes)


@pytest.mark.parametrize("size", [0, 8, 15, 17])
def test_reads_of_the_wrong_length_are_refused(size):
    refused(f"{size} bytes, not 16", proto.parse_region_read, bytes(size))


@pytest.mark.parametrize(("count", "data"), [(0, b"x"), (2, b"x"), (0xFFFFFFFF, b"")])
def test_writes_whose_count_lies_are_refused(count, data):
    payload = proto.Access(0, 0, count).pack() + data
    refused(f"{len(data)} bytes of data for a count of {count}", proto.parse_region_data, Command.REGION_WRITE, payload)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "0 bytes, 8 are needed"),
        (struct.pack("=Q", 1), "8 bytes, not 32"),
        (struct.pack("=Q", 0) + bytes(24), "32 bytes, not 8"),
        (struct.pack("=Q", 1 << 63), "8 bytes, not"),
        (struct.pack("=QQII8s", 1, 0, 0, 0, b""), "a write of 0 bytes"),
        (struct.pack("=QQII8s", 1, 0, 0, 9, b""), "a write of 9 bytes"),
    ],
)
def test_wrong_lists_of_writes_are_refused(payload, reason):
    refused(reason, lambda: list(proto.parse_write_multi(payload)))


# -- DMA by message


def test_dma_messages_carry_data_where_it_belongs():
    head = proto.DmaAccess(0x7000, 3)
    assert proto.parse_dma_access(Command.DMA_READ, head.pack(), with_data=False) == (head, b"")
    assert proto.parse_dma_access(Command.DMA_WRITE, head.pack() + b"abc", with_data=True) == (head, b"abc")
    refused("19 bytes, not 16", lambda: proto.parse_dma_access(Command.DMA_READ, head.pack() + b"abc", with_data=False))
    refused("18 bytes, not 19", lambda: proto.parse_dma_access(Command.DMA_WRITE, head.pack() + b"ab", with_data=True))
    refused("8 bytes, 16", lambda: proto.parse_dma_access(Command.DMA_READ, bytes(8), with_data=False))


# -- features and migration


def feature(flags, argsz=64, data=b""):
    return proto.FeatureRequest.parse(struct.pack("=II", argsz, flags) + data)


def test_feature_requests_go_round():
    request = proto.FeatureRequest(16, 2 << 16 | 2, b"12345678")
    assert proto.FeatureRequest.parse(request.pack()) == request
    assert request.number == 2
    assert struct.unpack("=II", proto.FeatureRequest(64, 1 << 16 | 1).answer(b"12345678")[:8]) == (16, 1 << 16 | 1)


@pytest.mark.parametrize("flags", [1, 3 << 16 | 1, 1 << 19 | 1, 1 << 31 | 1 << 16])
def test_feature_flags_that_contradict_each_other_are_refused(flags):
    refused("flags 0x", feature, flags)


def test_feature_requests_are_checked_like_the_kernels():
    refused("does not do flags", feature(2 << 16 | 1).check, 1 << 16, 8)
    refused("does not do flags", feature(6 << 16 | 1).check, 1 << 16, 8)
    refused("argsz 15", feature(1 << 16 | 1, argsz=15).check, 1 << 16, 8)
    refused("7 bytes of data, 8", feature(2 << 16 | 2, data=bytes(7)).check, 3 << 16, 8)
    feature(4 << 16 | 1, argsz=8).check(1 << 16, 8)
    feature(7 << 16 | 2, argsz=8).check(3 << 16, 8)
    refused("argsz 7", feature, 1 << 16 | 1, 7)
    refused("4 bytes, 8", proto.FeatureRequest.parse, bytes(4))


def test_migration_data_goes_round():
    assert proto.parse_mig_read(proto.pack_mig_data(100), 100) == 100
    assert proto.parse_mig_data(Command.MIG_DATA_WRITE, proto.pack_mig_data(3, b"abc"), 3) == b"abc"
    assert proto.parse_mig_state(proto.pack_mig_state(4)) == 4
    assert proto.parse_u64(proto.pack_u64(1 << 40)) == 1 << 40


@pytest.mark.parametrize(
    ("values", "data", "reason"),
    [
        ((109, 101), b"", "size 101 exceeds"),
        ((0, 0xFFFFFFFF), b"", "size 4294967295 exceeds"),
        ((107, 100), b"", "argsz 107"),
        ((4,), b"", "4 bytes, 8 are needed"),
    ],
)
def test_wrong_migration_reads_are_refused(values, data, reason):
    refused(reason, proto.parse_mig_read, struct.pack(f"={len(values)}I", *values) + data, 100)


@pytest.mark.parametrize(
    ("values", "data", "reason"),
    [
        ((109, 101), bytes(101), "size 101 exceeds"),
        ((7, 3), b"abc", "argsz 7"),
        ((11, 3), b"ab", "10 bytes, not 11"),
        ((11, 3), b"abcd", "12 bytes, not 11"),
        ((4,), b"", "4 bytes, 8 are needed"),
    ],
)
def test_wrong_migration_writes_are_refused(values, data, reason):
    payload = struct.pack(f"={len(values)}I", *values) + data
    refused(reason, proto.parse_mig_data, Command.MIG_DATA_WRITE, payload, 100)
