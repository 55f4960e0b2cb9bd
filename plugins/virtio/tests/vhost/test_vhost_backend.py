"""What messages do to the device, sent by a real frontend over a real socket."""

from __future__ import annotations

import errno
import os
import select
import socket

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.ops import Status
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend import FEATURES, PROTOCOL, NetPair
from mdevkit_virtio.vhost.proto import BackendRequest, ProtocolFeature, Request, VringAddr, VringState

NONE = ProtocolFeature(0)
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
RUNNING = READY | Status.DRIVER_OK
MTU, MAC, MQ, ACCESS_PLATFORM = 1 << 3, 1 << 5, 1 << 22, 1 << 33
VERSION_1 = int(Feature.VERSION_1)


@pytest.fixture
def told(serve, client):
    """A served device and a frontend that has negotiated all there is, without memory and queues."""
    served = serve()
    frontend = client(served)
    frontend.negotiate()
    return served, frontend


def refuses(served, words, call, *arguments, **more):
    """Expect that a message is refused, and why."""
    with pytest.raises(MdevError) as caught:
        call(*arguments, **more)
    assert caught.value.errno == errno.EREMOTEIO
    assert words in served.refusals()[-1]


def u64(number):
    return proto.pack_u64(number)


# -- traffic under every kind of negotiation ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    "protocol",
    [PROTOCOL, PROTOCOL & ~ProtocolFeature.STATUS, PROTOCOL & ~ProtocolFeature.REPLY_ACK, NONE],
    ids=["all", "no-status", "no-acks", "none"],
)
def test_frames_come_back(serve, connect, packed, protocol):
    features = FEATURES if packed else FEATURES & ~Feature.RING_PACKED
    connect(serve(), features=features, protocol=protocol).check()


def test_frames_come_back_without_protocol_features(serve, connect):
    served = serve()
    connect(served, features=FEATURES & ~proto.F_PROTOCOL_FEATURES).check()
    assert Request.SET_VRING_ENABLE not in {exchange.request for exchange in served.exchanges}
    assert served.ops.get_status() == RUNNING


def test_one_message_shares_all_memory(serve, connect):
    connect(serve(), table=True).check()


def test_two_pairs_carry_frames(serve, connect):
    net = connect(serve(pairs=2), pairs=2)
    assert net.frontend.get_queue_num() == 2
    net.check(pair=0)
    net.check(pair=1)


def test_a_second_pair_is_set_up_while_the_first_runs(serve, connect):
    """As QEMU does: the handshake and SET_FEATURES again, the second pair started and enabled later."""
    served = serve(pairs=2)
    net = connect(served, pairs=2, started=False)
    frontend, (first, second) = net.frontend, net.pairs
    frontend.start(*first.queues)
    net.check()
    for queue in second.queues:
        frontend.enable(queue, False)
    frontend.set_protocol_features(frontend.protocol)
    frontend.set_features(frontend.features)
    net.check()
    frontend.start(*second.queues)
    net.check(pair=0)
    net.check(pair=1)


def test_enable_and_descriptors_may_come_before_anything_else(serve, connect):
    served = serve()
    net = connect(served, started=False)
    frontend, queues = net.frontend, net.queues
    frontend.reset_device()
    for queue in queues:
        frontend.enable(queue, True)
        frontend.set_fd(Request.SET_VRING_KICK, queue.index, queue.kick)
        frontend.set_fd(Request.SET_VRING_CALL, queue.index, queue.call)
    frontend.set_features(frontend.features)
    frontend.set_status(RUNNING)
    for queue in queues:
        frontend.tell(Request.SET_VRING_NUM, VringState(queue.index, queue.ring.num).pack())
        frontend.set_addresses(queue)
    net.check()


def test_dpdk_asks_for_bases_on_a_new_connection(serve, connect, client):
    """What virtio_user sends when its backend comes back, garbage included: the rings go on where their memory says."""
    served = serve()
    net = connect(served, features=FEATURES & ~Feature.RING_PACKED)
    net.check(100)
    net.frontend.close()
    frontend = net.frontend = client(served)
    for queue in net.queues:
        frontend.channel.send(proto.message(Request.SET_VRING_ENABLE, VringState(queue.index, 0).pack()))
        garbage = VringState(queue.index, 0x5558).pack()
        assert frontend.ask(Request.GET_VRING_BASE, garbage).payload == VringState(queue.index, 0).pack()
        queue.base = 0
    frontend.negotiate(FEATURES & ~Feature.RING_PACKED)
    frontend.share(net.memory, table=True)
    net.start()
    net.check(100)


def test_a_queue_without_a_kick_descriptor_is_polled(serve, connect):
    net = connect(serve())
    for queue in net.queues:
        net.frontend.set_fd(Request.SET_VRING_KICK, queue.index, -1)
    net.check()


def test_descriptors_change_on_live_queues(serve, connect, later):
    net = connect(serve())
    net.check(20)
    for queue in net.queues:
        for request, fd in ((Request.SET_VRING_KICK, queue.kick), (Request.SET_VRING_CALL, queue.call)):
            other = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            later(lambda fd=other: os.close(fd))
            net.frontend.set_fd(request, queue.index, other)
            net.frontend.set_fd(request, queue.index, fd)
    net.check(20)


def test_a_device_that_does_not_wait_for_kicks_is_told_of_them(serve, connect, loopback):
    class Told(loopback):
        """Ignores kick descriptors."""

        def set_vq_kick(self, index, fd):
            del index, fd
            return False

    connect(serve(Told())).check()


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_are_the_devices_whitelisted_and_the_transports(serve, client):
    offered = VERSION_1 | MAC | ACCESS_PLATFORM | 1 << 17
    frontend = client(serve(features=offered))
    assert frontend.get_features() == VERSION_1 | MAC | proto.F_PROTOCOL_FEATURES | proto.F_LOG_ALL


def test_mq_is_offered_for_several_pairs_and_never_reaches_the_device(serve, connect):
    served = serve(pairs=2)
    net = connect(served, pairs=2)
    assert net.frontend.features & MQ
    assert not served.ops.accepted & MQ


def test_a_device_that_needs_access_platform_gets_it(serve, connect):
    served = serve(features=FEATURES & ~MQ & ~proto.F_PROTOCOL_FEATURES | ACCESS_PLATFORM)
    connect(served).check()
    assert served.ops.accepted & ACCESS_PLATFORM


def test_a_device_that_cannot_log_is_not_offered_for_migration(serve, client, loopback):
    class Silent(loopback):
        """Cannot log."""

        def set_log(self, log, rings=()):
            del rings
            return log is None

    served = serve(Silent())
    frontend = client(served)
    assert not frontend.get_features() & proto.F_LOG_ALL
    assert ProtocolFeature.LOG_SHMFD not in frontend.get_protocol_features()


def test_features_that_were_not_offered_are_refused(told):
    served, frontend = told
    refuses(served, "features 0x8000000000000 are not offered", frontend.set_features, 1 << 51)
    refuses(served, "protocol features 0x1000 are not offered", frontend.set_protocol_features, ProtocolFeature.INFLIGHT_SHMFD)


def test_features_cannot_change_after_features_ok(told):
    served, frontend = told
    frontend.set_features(frontend.features)
    words = "features cannot change after FEATURES_OK, before a reset"
    refuses(served, words, frontend.set_features, VERSION_1 | proto.F_PROTOCOL_FEATURES)


def test_protocol_features_cannot_change_while_queues_run(serve, connect):
    served = serve()
    net = connect(served)
    refuses(served, "protocol features cannot change while queues run", net.frontend.set_protocol_features, NONE)


def test_without_status_features_start_the_device_over(serve, connect):
    served = serve()
    net = connect(served, protocol=PROTOCOL & ~ProtocolFeature.STATUS)
    refuses(served, "features cannot change while queues run", net.frontend.set_features, proto.F_PROTOCOL_FEATURES)
    net.frontend.stop()
    net.frontend.set_features(VERSION_1 | proto.F_PROTOCOL_FEATURES)
    assert served.ops.accepted == Feature.VERSION_1
    assert served.ops.get_status() == READY


def test_features_the_device_refuses(serve, client, loopback):
    class Choosy(loopback):
        """Works with event indexes only."""

        def check_features(self, features):
            if not features & Feature.EVENT_IDX:
                raise MdevError(errno.EINVAL, "no event indexes")

    served = serve(Choosy())
    frontend = client(served)
    refuses(served, "no event indexes", frontend.negotiate, VERSION_1 | proto.F_PROTOCOL_FEATURES)
    # The frontend reads back what became of FEATURES_OK.
    frontend.set_status(READY)
    assert frontend.get_status() == READY & ~Status.FEATURES_OK


# -- status and reset --------------------------------------------------------------------------------------------------


def test_status_bits_imply_those_before_them(told):
    """QEMU sets FEATURES_OK alone."""
    served, frontend = told
    frontend.set_status(0)
    assert served.ops.get_status() == 0
    frontend.set_features(frontend.features)
    frontend.set_status(Status.FEATURES_OK)
    assert frontend.get_status() == READY


@pytest.mark.parametrize(
    ("status", "words"), [(0x10, "0x10 is no device status"), (0x103, "0x103 is no"), (1, "a status of 0x1 lacks bits of 0xb")]
)
def test_statuses_that_are_refused(told, status, words):
    served, frontend = told
    refuses(served, words, frontend.set_status, status)


def test_status_needs_its_protocol_feature(serve, client):
    served = serve()
    frontend = client(served)
    frontend.negotiate(protocol=PROTOCOL & ~ProtocolFeature.STATUS)
    refuses(served, "SET_STATUS without the STATUS protocol feature", frontend.set_status, 1)


def test_a_guest_reboot_starts_new_rings(serve, connect):
    net = connect(serve())
    net.check()
    frontend = net.frontend
    frontend.stop()
    frontend.set_status(0)
    frontend.set_features(frontend.features)
    frontend.set_status(Status.FEATURES_OK)
    net.pairs[0].close()
    net.pairs = [NetPair(net.memory, frontend.features, num=16)]
    net.start().check()


def test_stopped_queues_go_on(serve, connect):
    net = connect(serve())
    for _ in range(3):
        net.check(90)
        net.frontend.stop()
        net.start()


def test_reset_device_stops_and_disables(serve, connect):
    served = serve()
    net = connect(served)
    net.check(5)
    net.frontend.reset_device()
    assert served.ops.get_status() == 0
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)
    net.frontend.set_features(net.frontend.features)
    for queue in net.queues:
        net.frontend.set_fd(Request.SET_VRING_KICK, queue.index, queue.kick)
    net.frontend.set_status(RUNNING)
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)


def test_reset_owner_disables(serve, connect):
    served = serve()
    net = connect(served)
    net.frontend.tell(Request.RESET_OWNER)
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)
    for queue in net.queues:
        net.frontend.enable(queue, True)
    net.check()


def test_a_client_finds_and_leaves_the_device_reset(serve, connect, until):
    served = serve()
    served.ops.set_status(Status.ACKNOWLEDGE)
    net = connect(served)
    generation = served.ops.get_generation()
    net.frontend.close()
    until(lambda: served.server.client is None)
    assert served.ops.get_status() == 0
    assert served.ops.get_generation() != generation


# -- queues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE])
def test_queues_that_do_not_exist(told, request_):
    served, frontend = told
    refuses(served, "there is no queue 2, the last one is 1", frontend.tell, request_, VringState(2, 1).pack())
    assert served.exchanges[-1].error.errno == errno.ENOBUFS


def test_descriptors_for_queues_that_do_not_exist(told, later):
    served, frontend = told
    fd = os.eventfd(0)
    later(lambda: os.close(fd))
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        refuses(served, "there is no queue 255", frontend.set_fd, request, 255, fd)
    refuses(served, "there is no queue 7", frontend.tell, Request.SET_VRING_ADDR, VringAddr(7, 0, 0, 0).pack())


def test_the_base_of_a_queue_that_does_not_exist_ends_the_connection(told):
    served, frontend = told
    with pytest.raises(MdevError, match="closed"):
        frontend.ask(Request.GET_VRING_BASE, VringState(9).pack())
    assert "there is no queue 9" in served.refusals()[-1]


def test_a_running_queue_keeps_what_it_runs_on(serve, connect):
    served = serve()
    net = connect(served)
    tell, addr = net.frontend.tell, VringAddr(0, 0, 0, 0)
    refuses(served, "queue 0 runs, its size cannot change", tell, Request.SET_VRING_NUM, VringState(0, 64).pack())
    refuses(served, "queue 0 runs, its base cannot change", tell, Request.SET_VRING_BASE, VringState(0, 1).pack())
    refuses(served, "queue 0 runs, its place cannot change", tell, Request.SET_VRING_ADDR, addr.pack())
    assert served.exchanges[-1].error.errno == errno.EBUSY
    net.check()


@pytest.mark.parametrize(
    ("num", "words"), [(0, "a ring of 0"), (1 << 31, "a ring of 2147483648"), (512, "has 256 descriptors at most, not 512")]
)
def test_ring_sizes_that_are_refused(told, num, words):
    served, frontend = told
    refuses(served, words, frontend.tell, Request.SET_VRING_NUM, VringState(1, num).pack())


def test_a_ring_outside_shared_memory_does_not_start(serve, connect):
    served = serve()
    net = connect(served, started=False)
    queue = net.queues[0]
    tell = net.frontend.tell
    net.frontend.enable(queue, True)
    tell(Request.SET_VRING_NUM, VringState(0, 64).pack())
    tell(Request.SET_VRING_ADDR, VringAddr(0, 0x1000, 0x2000, 0x3000).pack())
    words = "at frontend address 0x1000 are not in one shared region"
    refuses(served, words, net.frontend.set_fd, Request.SET_VRING_KICK, 0, queue.kick)
    net.start().check()


def test_a_ring_whose_memory_is_taken_away_stops(serve, connect, until):
    served = serve()
    net = connect(served)
    refuses(served, "", net.frontend.remove_region, 0)
    until(lambda: served.ops.get_status() & Status.NEEDS_RESET)
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)


def test_rings_go_on_where_their_memory_moves_to(serve, connect, until):
    """The frontend shares the same memory at other guest addresses: nothing is looked for at the old ones."""
    served = serve()
    net = connect(served, features=FEATURES & ~Feature.RING_PACKED)
    net.check(10)
    pair, distance = net.pairs[0], 1 << 32
    receive = pair.rx.ring
    for index in range(receive.num):
        at = receive.desc + 16 * index
        address = int.from_bytes(net.memory.map[at : at + 8], "little") + distance
        net.memory.map[at : at + 8] = address.to_bytes(8, "little")
    (old,) = net.frontend.shared.regions
    new = proto.MemRegion(old.guest + distance, old.size, old.user, old.offset)
    net.frontend.tell(Request.SET_MEM_TABLE, proto.pack_mem_table([new]), [net.memory.fd])
    assert net.frontend.get_status() == RUNNING
    frame = bytes(12) + b"moved" * 20
    at = net.memory.allocate(len(frame))
    net.memory.map[at : at + len(frame)] = frame
    assert pair.tx.ring.add([Segment(at + distance, len(frame))], [], 0)
    os.eventfd_write(pair.tx.kick, 1)
    came = []
    until(lambda: came.extend(pair.receive()) or came)
    assert came == [frame[12:]]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_base_of_a_queue_that_never_ran_is_the_beginning(serve, client, packed):
    frontend = client(serve())
    frontend.negotiate(FEATURES if packed else FEATURES & ~Feature.RING_PACKED)
    reply = VringState.parse(Request.GET_VRING_BASE, frontend.ask(Request.GET_VRING_BASE, VringState(0).pack()).payload)
    assert reply.num == (0x8000_8000 if packed else 0)


def test_enable_is_0_or_1(told):
    served, frontend = told
    refuses(served, "SET_VRING_ENABLE: 2 is neither 0 nor 1", frontend.tell, Request.SET_VRING_ENABLE, VringState(0, 2).pack())


def test_memory_is_shared_and_removed_exactly(told, connect):
    served, frontend = told
    assert frontend.get_max_mem_slots() == 1024
    region = proto.MemRegion(0, 4096, 0x10000)
    refuses(served, "there is no guest memory region of 0x1000 bytes at 0x0", frontend.tell, Request.REM_MEM_REG, region.pack())
    refuses(served, "a region with 0 descriptors", frontend.tell, Request.ADD_MEM_REG, region.pack())
    words = "SET_MEM_TABLE: 1 regions with 0 descriptors"
    refuses(served, words, frontend.tell, Request.SET_MEM_TABLE, proto.pack_mem_table([region]))


# -- logging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_logging_comes_and_goes_on_live_rings(serve, connect, page_log, packed):
    served = serve()
    net = connect(served, features=FEATURES if packed else FEATURES & ~Feature.RING_PACKED)
    net.check(100)
    log = page_log(net.memory.size)
    net.frontend.start_log(log)
    rings = {queue.ring.device // 4096 for queue in net.queues}
    # A device that goes to sleep writes to its rings.
    assert log.pages() <= rings
    net.check(100)
    assert log.pages() >= rings | {net.pairs[0].rx_buffers[0] // 4096}
    net.frontend.stop_log()
    log.take()
    net.check(100)
    assert not log.pages()


def test_a_log_needs_its_descriptor(told):
    served, frontend = told
    with pytest.raises(MdevError, match="closed"):
        frontend.ask(Request.SET_LOG_BASE, proto.LogBase(4096, 0).pack())
    assert "SET_LOG_BASE: 0 descriptors, or no LOG_SHMFD" in served.refusals()[-1]


def test_a_log_descriptor_is_taken_and_dropped(told, later):
    served, frontend = told
    fd = os.eventfd(0)
    later(lambda: os.close(fd))
    frontend.tell(Request.SET_LOG_FD, b"", [fd])
    refuses(served, "SET_LOG_FD: 8 bytes and 0 descriptors", frontend.tell, Request.SET_LOG_FD, u64(0))


# -- configuration, MTU, RARP, requests of ours ------------------------------------------------------------------------


def test_configuration_is_read_within_its_range(told):
    served, frontend = told
    assert frontend.get_config(0, 6) == bytes.fromhex("020000000001")
    assert frontend.get_config(10, 2) == (1500).to_bytes(2, "little")
    for payload in (proto.Config(0, bytes(13)), proto.Config(12, bytes(1)), proto.Config(0xFFFFFFFF, bytes(1))):
        assert frontend.ask(Request.GET_CONFIG, payload.pack()).payload == b""
    assert "13 bytes at 0 are not in the configuration space of 12 bytes" in served.refusals()[0]
    assert frontend.ask(Request.GET_CONFIG, bytes(12)).payload == b""
    assert "0 bytes of configuration are outside 1 to 256" in served.refusals()[-1]


def test_configuration_that_is_the_devices_to_write(told):
    served, frontend = told
    refuses(served, "2 bytes at 10 of the configuration space are read-only", frontend.set_config, 10, b"\0\0")


@pytest.mark.parametrize(("mtu", "good"), [(67, False), (68, True), (1500, True), (1501, False), (1 << 40, False)])
def test_mtus(told, mtu, good):
    served, frontend = told
    if good:
        frontend.set_mtu(mtu)
    else:
        refuses(served, f"NET_SET_MTU: an MTU of {mtu} is outside 68 to 1500", frontend.set_mtu, mtu)


def test_rarp_is_taken_at_any_time(serve, client, connect):
    served = serve()
    frontend = client(served)
    frontend.send_rarp(bytes(6))
    frontend.negotiate()
    frontend.send_rarp(bytes.fromhex("020000000001"))
    assert not served.refusals()


def test_changes_of_configuration_are_told(serve, connect):
    served = serve()
    net = connect(served)
    channel = net.frontend.open_backend_channel()
    try:
        served.ops.update_config(mtu=1400, status=0)
        message = channel.receive()
        assert (message.request, message.payload) == (BackendRequest.CONFIG_CHANGE_MSG, b"")
        assert net.frontend.get_config(6, 2) == b"\0\0"
    finally:
        channel.close()


def test_a_channel_must_be_a_socket(told, later):
    served, frontend = told
    fd = os.eventfd(0)
    later(lambda: os.close(fd))
    words = "the descriptor for the backend's requests is not a UNIX stream socket but anon_inode:[eventfd]"
    refuses(served, words, frontend.tell, Request.SET_BACKEND_REQ_FD, b"", [fd])
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with left, right:
        refuses(served, "not a UNIX stream socket but socket:", frontend.tell, Request.SET_BACKEND_REQ_FD, b"", [left.fileno()])


def test_requests_nobody_knows(told):
    served, frontend = told
    refuses(served, "GET_INFLIGHT_FD is not supported", frontend.tell, Request.GET_INFLIGHT_FD)
    refuses(served, "request 99 is not supported", frontend.tell, 99)
    refuses(served, "SET_OWNER: the payload has 1 bytes, not 0", frontend.tell, Request.SET_OWNER, b"x")
    refuses(served, "SET_OWNER: it came with 1 descriptors", frontend.tell, Request.SET_OWNER, b"", [frontend.channel.fileno()])


# -- suspend -----------------------------------------------------------------------------------------------------------


def test_suspended_queues_stand_still_and_go_on(serve, connect):
    served = serve()
    net = connect(served)
    net.check(50)
    served.server.suspend()
    net.pairs[0].send([b"x" * 60])
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)
    assert net.frontend.get_status() == RUNNING
    served.server.resume()
    assert net.pairs[0].exchange([b"y" * 60]) == [b"x" * 60]


def test_a_client_that_comes_to_a_suspended_device_waits(serve, connect):
    served = serve()
    served.server.suspend()
    net = connect(served)
    assert not any(served.ops.get_vq_ready(queue.index) for queue in net.queues)
    served.server.resume()
    net.check()


# -- what breaks -------------------------------------------------------------------------------------------------------


def test_a_broken_ring_is_reported(serve, connect):
    """Every way a driver can break a ring is the engines' test; here one of them, and who hears of it."""
    served = serve()
    net = connect(served, features=FEATURES & ~Feature.RING_PACKED)
    channel = net.frontend.open_backend_channel()
    try:
        ring = net.pairs[0].tx.ring
        net.memory.bytes[ring.driver + 2 : ring.driver + 4].cast("H")[0] = 0x7777
        os.eventfd_write(net.pairs[0].tx.kick, 1)
        assert channel.receive().request == BackendRequest.CONFIG_CHANGE_MSG
        assert select.select([net.pairs[0].tx.err], [], [], 10)[0]
        assert net.frontend.get_status() == RUNNING | Status.NEEDS_RESET
    finally:
        channel.close()
    # NEEDS_RESET may come back with the next status; only a reset helps.
    net.frontend.set_status(RUNNING | Status.NEEDS_RESET)
    net.frontend.set_status(0)
    assert net.frontend.get_status() == 0
