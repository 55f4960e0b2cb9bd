"""A vhost-user frontend: use a device the way a hypervisor does, from a test, a notebook or a tool.

    with VhostUserFrontend("/run/user/1000/mdevkit/....sock") as frontend:
        frontend.negotiate()
        memory = GuestMemory(1 << 22)
        frontend.share(memory)
        pair = NetPair(memory, frontend.features)
        frontend.start(*pair.queues)
        assert pair.exchange([b"hello" * 20]) == [b"hello" * 20]    # a loopback
        frontend.stop(*pair.queues)

Messages and their order are QEMU's (virtio-net over vhost-user). A queue that was stopped goes on where it was, on
this connection or another: start it there. `Channel.send` sends whatever bytes a test wants to.

Requests that need no reply are sent with NEED_REPLY where REPLY_ACK was negotiated, so that a refusal raises: EREMOTEIO, naming the
request. Any call raises ENOTCONN if the backend is gone, ETIMEDOUT if it does not answer in time, EPROTO for an
answer that fits no question. One thread at a time uses a frontend.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mdevkit.errors import MdevError

from mdevkit_virtio.driverside import GuestMemory
from mdevkit_virtio.layout import Feature
from mdevkit_virtio.netspec import NetFeature
from mdevkit_virtio.ops import RESET, Status
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.frontend_channel import Channel, Message
from mdevkit_virtio.vhost.frontend_memory import PageLog, SharedMemory
from mdevkit_virtio.vhost.frontend_queue import FrontendQueue, NetPair
from mdevkit_virtio.vhost.proto import ProtocolFeature, Request

__all__ = ["Channel", "FrontendQueue", "GuestMemory", "Message", "NetPair", "PageLog", "SharedMemory", "VhostUserFrontend"]

#: What `negotiate` accepts by default: what this frontend and its queues can do.
FEATURES: Final = (
    Feature.VERSION_1
    | Feature.NET_MRG_RXBUF
    | Feature.EVENT_IDX
    | Feature.INDIRECT_DESC
    | Feature.RING_PACKED
    | NetFeature.MQ
    | proto.F_PROTOCOL_FEATURES
)
PROTOCOL: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
_NO_PROTOCOL: Final = ProtocolFeature(0)
_DRIVER: Final = Status.ACKNOWLEDGE | Status.DRIVER


class VhostUserFrontend:
    """A connection to a backend at `where`: a socket's path, or a channel that is connected and becomes ours.

    Leaving the context, or `close`, vanishes: whoever wants to leave in order calls `stop` and `set_status` before.
    """

    def __init__(self, where: str | Path | Channel, *, timeout: float = 10.0) -> None:
        self.channel: Final = where if isinstance(where, Channel) else Channel.connect(where, timeout)
        #: What was negotiated.
        self.features = 0
        self.protocol = _NO_PROTOCOL
        self.shared: SharedMemory | None = None
        #: The queues that run, by index.
        self.running: dict[int, FrontendQueue] = {}
        self.log: PageLog | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, without a word to the backend. Queues and memory are the caller's. Closing twice is harmless."""
        self.channel.close()

    # -- messages ---------------------------------------------------------------------------------------------------------

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """Send a request that has a reply of its own, and return that."""
        self.channel.send(proto.message(request, payload), fds)
        return self._reply(request)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has none, and where REPLY_ACK was negotiated wait until it is done."""
        acknowledged = ProtocolFeature.REPLY_ACK in self.protocol
        self.channel.send(proto.message(request, payload, proto.NEED_REPLY * acknowledged), fds)
        if acknowledged:
            self._check_done(request, self._reply(request))

    def _reply(self, request: int) -> Message:
        reply = self.channel.receive()
        if reply.request != request or not reply.flags & proto.REPLY:
            reply.close()
            name = proto.request_name(request)
            raise MdevError(errno.EPROTO, f"the backend answered {name} with {proto.request_name(reply.request)}")
        return reply

    def _check_done(self, request: int, reply: Message) -> None:
        reply.close()
        result = proto.parse_u64(request, reply.payload)
        if result:
            raise MdevError(errno.EREMOTEIO, f"the backend refused {proto.request_name(request)} ({result:#x})")

    def _get(self, request: int) -> int:
        return proto.parse_u64(request, self.ask(request).payload)

    def _put(self, request: int, number: int) -> None:
        self.tell(request, proto.pack_u64(number))

    # -- negotiation --------------------------------------------------------------------------------------------------------

    def negotiate(self, features: int = FEATURES, protocol: ProtocolFeature = PROTOCOL) -> None:
        """Accept what of these the backend offers, own the device, and tell it the status up to FEATURES_OK.

        EREMOTEIO if the device does not keep FEATURES_OK.
        """
        offered = self.get_features()
        if offered & proto.F_PROTOCOL_FEATURES and features & proto.F_PROTOCOL_FEATURES:
            self.set_protocol_features(self.get_protocol_features() & protocol)
        self.tell(Request.SET_OWNER)
        if ProtocolFeature.STATUS in self.protocol:
            for status in (RESET, Status.ACKNOWLEDGE, _DRIVER):
                self.set_status(status)
        self.set_features(offered & features)
        self._confirm_features()

    def _confirm_features(self) -> None:
        if ProtocolFeature.STATUS not in self.protocol:
            return
        self.set_status(_DRIVER | Status.FEATURES_OK)
        if Status.FEATURES_OK not in Status(self.get_status()):
            raise MdevError(errno.EREMOTEIO, f"the device refused the features {self.features:#x}")

    def get_features(self) -> int:
        """Return what the device and its backend offer."""
        return self._get(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        """Accept these. Bit 26 (F_LOG_ALL) turns the log on and off."""
        self._put(Request.SET_FEATURES, features)
        self.features = features

    def get_protocol_features(self) -> ProtocolFeature:
        """Return what the backend offers."""
        return ProtocolFeature(self._get(Request.GET_PROTOCOL_FEATURES))

    def set_protocol_features(self, protocol: ProtocolFeature) -> None:
        """Accept these."""
        self._put(Request.SET_PROTOCOL_FEATURES, protocol)
        self.protocol = protocol

    def get_queue_num(self) -> int:
        """Return how many queue pairs there can be; 1 where MQ was not negotiated."""
        return self._get(Request.GET_QUEUE_NUM) if ProtocolFeature.MQ in self.protocol else 1

    def get_status(self) -> int:
        """Return the device status."""
        return self._get(Request.GET_STATUS)

    def set_status(self, status: int) -> None:
        """Set the device status; 0 resets the device, and then no queue runs any more."""
        self._put(Request.SET_STATUS, status)
        if not status:
            self.running.clear()

    def reset_device(self) -> None:
        """Reset the device."""
        self.tell(Request.RESET_DEVICE)
        self.running.clear()

    def get_config(self, offset: int, size: int) -> bytes:
        """Read the configuration space; EREMOTEIO if the backend refuses."""
        reply = self.ask(Request.GET_CONFIG, proto.Config(offset, bytes(size)).pack())
        if not reply.payload:
            raise MdevError(errno.EREMOTEIO, f"the backend refused GET_CONFIG of {size} bytes at {offset}")
        return proto.Config.parse(Request.GET_CONFIG, reply.payload).data

    def set_config(self, offset: int, data: bytes) -> None:
        """Write the configuration space."""
        self.tell(Request.SET_CONFIG, proto.Config(offset, data).pack())

    def set_mtu(self, mtu: int) -> None:
        """Tell the device the MTU in bytes."""
        self._put(Request.NET_SET_MTU, mtu)

    def send_rarp(self, mac: bytes) -> None:
        """Ask the backend to announce this address (6 bytes)."""
        self.tell(Request.SEND_RARP, mac.ljust(8, b"\0"))

    def open_backend_channel(self) -> Channel:
        """Give the backend a connection to speak first on, and return our end of it; the caller closes that."""
        ours, theirs = Channel.pair()
        try:
            self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs])
        except MdevError:
            ours.close()
            raise
        finally:
            os.close(theirs)
        return ours

    # -- memory ---------------------------------------------------------------------------------------------------------------

    def share(self, memory: GuestMemory, regions: Sequence[tuple[int, int]] | None = None, *, table: bool = False) -> SharedMemory:
        """Share `memory` in regions, as `SharedMemory` has them, instead of what was shared before.

        One message per region (ADD_MEM_REG); with `table`, or where CONFIGURE_MEM_SLOTS was not negotiated, one for all
        (SET_MEM_TABLE).
        """
        shared = SharedMemory(memory, regions)
        if table or ProtocolFeature.CONFIGURE_MEM_SLOTS not in self.protocol:
            fds = [memory.fd] * len(shared.regions)
            self.tell(Request.SET_MEM_TABLE, proto.pack_mem_table(shared.regions), fds)
        else:
            for region in list(self.shared.regions) if self.shared is not None else []:
                self._remove(region)
            for region in shared.regions:
                self._add(shared, region)
        self.shared = shared
        return shared

    def add_region(self, guest: int, size: int) -> None:
        """Share one region more of the memory."""
        shared = self._shared()
        self._add(shared, shared.add(guest, size))

    def remove_region(self, guest: int) -> None:
        """Share the region at `guest` no more; ENOENT if there is none."""
        shared = self._shared()
        found = next((region for region in shared.regions if region.guest == guest), None)
        if found is None:
            raise MdevError(errno.ENOENT, f"no region is shared at {guest:#x}")
        self._remove(found)
        shared.regions.remove(found)

    def get_max_mem_slots(self) -> int:
        """Return how many regions the backend takes."""
        return self._get(Request.GET_MAX_MEM_SLOTS)

    def _shared(self) -> SharedMemory:
        if self.shared is None:
            raise MdevError(errno.EINVAL, "the frontend shares no memory yet")
        return self.shared

    def _add(self, shared: SharedMemory, region: proto.MemRegion) -> None:
        self.tell(Request.ADD_MEM_REG, region.pack(), [shared.memory.fd])

    def _remove(self, region: proto.MemRegion) -> None:
        self.tell(Request.REM_MEM_REG, region.pack())

    # -- queues ---------------------------------------------------------------------------------------------------------------

    def start(self, *queues: FrontendQueue) -> None:
        """Start queues where they were left, enable them, and tell the device that the driver is ready."""
        for queue in queues:
            self._set_up(queue)
        for queue in queues:
            self.enable(queue, True)
        if ProtocolFeature.STATUS in self.protocol:
            self.set_status(_DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    def _set_up(self, queue: FrontendQueue) -> None:
        index = queue.index
        self.set_fd(Request.SET_VRING_CALL, index, queue.call)
        self.set_fd(Request.SET_VRING_ERR, index, queue.err)
        self.tell(Request.SET_VRING_NUM, proto.VringState(index, queue.ring.num).pack())
        self.tell(Request.SET_VRING_BASE, proto.VringState(index, queue.base).pack())
        self.set_addresses(queue)
        self.set_fd(Request.SET_VRING_KICK, index, queue.kick)
        self.running[index] = queue

    def set_addresses(self, queue: FrontendQueue, *, logged: bool | None = None) -> None:
        """Tell where a queue's ring is, and whether the device logs what it writes there; by default as the log is on."""
        shared, ring = self._shared(), queue.ring
        logged = self.log is not None if logged is None else logged
        flags = proto.VRING_F_LOG if logged else 0
        desc, avail, used = (shared.user(at) for at in (ring.desc, ring.driver, ring.device))
        self.tell(Request.SET_VRING_ADDR, proto.VringAddr(queue.index, desc, used, avail, flags, ring.device).pack())

    def set_fd(self, request: int, index: int, fd: int) -> None:
        """Send SET_VRING_KICK, _CALL or _ERR with an eventfd, or with none for -1."""
        self.tell(request, proto.VringFd(index, fd >= 0).pack(), [fd] if fd >= 0 else [])

    def enable(self, queue: FrontendQueue, enabled: bool) -> None:
        """Let a queue carry frames, or not; where there are no protocol features it does from its start."""
        if self.features & proto.F_PROTOCOL_FEATURES:
            self.tell(Request.SET_VRING_ENABLE, proto.VringState(queue.index, int(enabled)).pack())

    def stop(self, *queues: FrontendQueue) -> None:
        """Stop queues and keep where they were in `FrontendQueue.base`; without arguments all that run."""
        for queue in queues or tuple(self.running.values()):
            reply = self.ask(Request.GET_VRING_BASE, proto.VringState(queue.index).pack())
            queue.base = proto.VringState.parse(Request.GET_VRING_BASE, reply.payload).num
            self.running.pop(queue.index, None)

    # -- the dirty log --------------------------------------------------------------------------------------------------------

    def start_log(self, log: PageLog, *, rings: bool = True) -> None:
        """Let the device mark every page it writes, also what it writes of the rings that run; as QEMU does to migrate."""
        self.set_log_base(log)
        self.set_features(self.features | proto.F_LOG_ALL)
        self.log = log
        for queue in self.running.values():
            self.set_addresses(queue, logged=rings)

    def stop_log(self) -> None:
        """End the marking."""
        self.set_features(self.features & ~proto.F_LOG_ALL)
        self.log = None
        for queue in self.running.values():
            self.set_addresses(queue)

    def set_log_base(self, log: PageLog) -> None:
        """Tell where the log is. The backend answers when it uses this one, and none before."""
        reply = self.ask(Request.SET_LOG_BASE, proto.LogBase(log.size, 0).pack(), [log.fd])
        reply.close()
        if reply.payload:
            self._check_done(Request.SET_LOG_BASE, Message(reply.request, reply.flags, reply.payload))
