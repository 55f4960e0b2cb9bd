"""What vhost-user messages do to a device: the state machine between a frontend and `VirtioOps`.

The rules are those of vhost-mdev, with vhost-user in the place of its ioctls: open and release reset the device, features
outside what is offered are EINVAL and EBUSY after FEATURES_OK, a queue that does not exist is ENOBUFS, configuration ranges
are EINVAL, and what a queue runs on cannot change while it runs (EBUSY). Where vhost-user's frontends need it the rules
give way:

- vhost-mdev takes ring messages between FEATURES_OK and DRIVER_OK only. Here they are taken at any time, and a queue runs once
  it has been started (SET_VRING_KICK), enabled, and set up: QEMU enables queues before anything else and sets up a second pair
  while the first one runs, DPDK sends descriptors first, and asks a new connection for the bases of an old one.
- SET_VRING_ADDR reaches a running queue, to switch the logging of its ring on and off; nothing of the ring is reset.
- SET_FEATURES with the bit for logging alone changed, or nothing, is for live devices too.
- Frontends without the STATUS protocol feature do not write the device status. Then it is written for them: up to FEATURES_OK
  with SET_FEATURES, DRIVER_OK with the first queue that runs, and a reset before different features. QEMU, which does
  write it, leaves out ACKNOWLEDGE and DRIVER at first: whoever sets a later bit sets those before it.
- A disabled queue stands still. vhost-user wants one that transmits to be drained, but no device has such a state, and Linux's
  vhost does not do it either.

Everything here runs on the server's thread for the device, except `Backend.notify`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Final

from mdevkit.errors import MdevError

from mdevkit_virtio.layout import Feature
from mdevkit_virtio.memory import MAX_REGIONS, DirtyLog, MemoryTable, Region, check_total
from mdevkit_virtio.netspec import MAX_MTU, MIN_MTU, NetFeature
from mdevkit_virtio.ops import RESET, Callback, Status, VirtioOps, drain_eventfd
from mdevkit_virtio.vhost import proto
from mdevkit_virtio.vhost.descriptors import check_eventfd, take_socket
from mdevkit_virtio.vhost.features import Traits
from mdevkit_virtio.vhost.proto import BackendRequest, ProtocolFeature, Request, VringState
from mdevkit_virtio.vhost.vring import Vring

log = logging.getLogger("mdevkit.virtio")

#: Where the MTU is in struct virtio_net_config, and its bytes.
_MTU_AT: Final = (10, 2)
#: The status bits in the order in which a driver sets them.
_STEPS: Final = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK, Status.FAILED)
_READY: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
#: A number: the complement of a flag has no unknown bits.
_KNOWN: Final = int(_READY | Status.DRIVER_OK | Status.FAILED | Status.NEEDS_RESET)

#: Carry out a request and return the payload of its own reply, None where it has none: a request without a payload, one with,
#: and one with descriptors. That one takes what it keeps out of the list; the caller closes what is left.
Bare = Callable[[], bytes | None]
Plain = Callable[[bytes], bytes | None]
Carrying = Callable[[bytes, list[int]], bytes | None]


class Backend:
    """One frontend's use of the device `ops`, from its first message to the end of its connection.

    `changed` is called, on any thread, when the device has something to tell; then call `notify` on the backend's.
    """

    def __init__(self, ops: VirtioOps, traits: Traits, changed: Callable[[], None]) -> None:
        self.vrings: Final = [Vring(ops, index) for index in range(traits.queues)]
        self._ops: Final = ops
        self._traits: Final = traits
        self._changed: Final = changed
        self._table = MemoryTable()
        #: SET_FEATURES as the frontend sent it, and what the device was told; None before.
        self._acked = 0
        self._features: int | None = None
        self._protocol = ProtocolFeature(0)
        self._log: DirtyLog | None = None
        #: What the device was told of logging.
        self._logging: tuple[DirtyLog | None, frozenset[int]] = (None, frozenset())
        self._channel: socket.socket | None = None
        self._suspended = False
        self._broken = False
        self._bare: Final = self._bare_requests()
        self._plain: Final = self._plain_requests()
        self._carrying: Final = self._carrying_requests()

    # -- for the session ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the device: it is reset."""
        self._reset()

    def close(self) -> None:
        """Give the device back, reset, without anything of the client's."""
        self._table, self._log, self._logging = MemoryTable(), None, (None, frozenset())
        with contextlib.ExitStack() as stack:
            # Each of these is done, whatever becomes of the others.
            stack.callback(self._close_channel)
            stack.callback(self._ops.set_map, MemoryTable())
            stack.callback(self._ops.set_log, None)
            stack.callback(self._ops.set_config_cb, None)
            for vring in self.vrings:
                stack.callback(vring.close)
            stack.callback(self._ops.set_status, int(RESET))

    def execute(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        """Carry out a request; return the payload of its own reply, None where it has none.

        Descriptors it keeps are taken out of `fds`. Raises MdevError with the reason of a failure: EINVAL for a message that cannot
        be right, ENOTSUP for a request that is not supported, ENOBUFS for a queue there is none of, else as the device.
        """
        carrying = self._carrying.get(request)
        if carrying is not None:
            return carrying(payload, fds)
        if fds:
            raise proto.invalid(request, f"it came with {len(fds)} descriptors")
        plain = self._plain.get(request)
        if plain is not None:
            return plain(payload)
        bare = self._bare.get(request)
        if bare is None:
            raise MdevError(errno.ENOTSUP, f"{proto.request_name(request)} is not supported")
        proto.parse_empty(request, payload)
        return bare()

    @property
    def acknowledges(self) -> bool:
        """Whether a message that needs a reply gets one (REPLY_ACK)."""
        return ProtocolFeature.REPLY_ACK in self._protocol

    @property
    def kicks(self) -> Mapping[int, Vring]:
        """Kick descriptors the device does not wait for itself, with their queues: see `kicked`."""
        return {vring.kick: vring for vring in self.vrings if vring.running and vring.kicked_here and vring.kick >= 0}

    def kicked(self, vring: Vring) -> None:
        """Tell the device of a kick."""
        drain_eventfd(vring.kick)
        self._ops.kick_vq(vring.index)

    def notify(self) -> None:
        """Tell the frontend that configuration or status have changed."""
        broken = bool(self._ops.get_status() & Status.NEEDS_RESET)
        if broken and not self._broken:
            log.warning("the device needs a reset: a ring of it is broken")
            for vring in self.vrings:
                if vring.running:
                    vring.report_error()
        self._broken = broken
        if self._channel is not None and ProtocolFeature.CONFIG in self._protocol:
            with contextlib.suppress(OSError):
                # A frontend that does not read these will find the configuration changed when it looks.
                self._channel.send(proto.message(BackendRequest.CONFIG_CHANGE_MSG), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def suspend(self) -> None:
        """Stop the queues, keeping everything."""
        self._suspended = True
        self._update()

    def resume(self) -> None:
        """Go on where `suspend` stopped."""
        self._suspended = False
        self._update()

    # -- features, status, reset ----------------------------------------------------------------------------------------

    def _get_features(self) -> bytes:
        return proto.pack_u64(self._traits.offered)

    def _set_features(self, payload: bytes) -> None:
        acked = proto.parse_u64(Request.SET_FEATURES, payload)
        features = self._traits.for_device(acked)
        if not self._status_is_ours or not self._negotiated:
            self._tell_features(features)
        elif features != self._features or self._needs_reset:
            self._start_over(features)
        self._acked = acked
        self._update()

    def _tell_features(self, features: int) -> None:
        if self._negotiated:
            if features != self._features:
                raise MdevError(errno.EBUSY, "features cannot change after FEATURES_OK, before a reset")
            return
        self._ops.set_features(features)
        self._features = features
        if self._status_is_ours:
            self._agree()

    def _start_over(self, features: int) -> None:
        """Set features a second time for a frontend that cannot reset the device itself."""
        if any(vring.running for vring in self.vrings):
            if features != self._features:
                raise MdevError(errno.EBUSY, "features cannot change while queues run")
            return
        started = [(vring, vring.started) for vring in self.vrings]
        self._reset()
        for vring, was in started:
            vring.started = was
        self._ops.set_features(features)
        self._features = features
        self._agree()

    def _agree(self) -> None:
        self._climb(_READY)
        if not self._negotiated:
            raise MdevError(errno.EINVAL, f"the device refuses features {self._features:#x}")

    def _get_protocol_features(self) -> bytes:
        return proto.pack_u64(self._traits.protocol)

    def _set_protocol_features(self, payload: bytes) -> None:
        asked = proto.parse_u64(Request.SET_PROTOCOL_FEATURES, payload)
        extra = asked & ~self._traits.protocol
        if extra:
            raise MdevError(errno.EINVAL, f"protocol features {extra:#x} are not offered")
        if asked != self._protocol and any(vring.running for vring in self.vrings):
            raise MdevError(errno.EBUSY, "protocol features cannot change while queues run")
        self._protocol = ProtocolFeature(asked)

    def _get_status(self) -> bytes:
        return proto.pack_u64(self._ops.get_status())

    def _set_status(self, payload: bytes) -> None:
        asked = proto.parse_u64(Request.SET_STATUS, payload)
        if self._status_is_ours:
            raise MdevError(errno.EINVAL, "SET_STATUS without the STATUS protocol feature")
        if asked & ~_KNOWN:
            raise MdevError(errno.EINVAL, f"{asked:#x} is no device status")
        if not asked:
            self._reset()
            return
        # Frontends add bits to what they have read, where NEEDS_RESET may be among them; it is the device's to set.
        self._climb(Status(asked) & ~Status.NEEDS_RESET)
        self._update()

    def _climb(self, wanted: Status) -> None:
        """Set the status bits of `wanted` one after the other, as a driver does, with those before them."""
        if wanted & (Status.FEATURES_OK | Status.DRIVER_OK):
            wanted |= Status.ACKNOWLEDGE | Status.DRIVER
        current = Status(self._ops.get_status()) & ~Status.NEEDS_RESET
        if current & ~wanted:
            raise MdevError(errno.EINVAL, f"a status of {wanted:#x} lacks bits of {int(current):#x}, which is set")
        for bit in _STEPS:
            if wanted & bit & ~current:
                current |= bit
                self._ops.set_status(int(current))
                if bit is Status.FEATURES_OK and not self._negotiated:
                    # The frontend sees that when it reads the status back.
                    return

    def _reset(self) -> None:
        self._ops.set_status(int(RESET))
        self._ops.set_config_cb(Callback(function=self._changed))
        for vring in self.vrings:
            vring.forget()
        self._features, self._acked, self._broken = None, 0, False
        if self._logging[0] is not None:
            self._ops.set_log(None)
        self._logging = (None, frozenset())

    def _reset_device(self) -> None:
        self._disable()
        self._reset()

    def _reset_owner(self) -> None:
        """Disable the queues, which is what the specification makes of this old message."""
        self._disable()
        self._update()

    def _disable(self) -> None:
        for vring in self.vrings:
            vring.enabled = False

    @property
    def _status_is_ours(self) -> bool:
        return ProtocolFeature.STATUS not in self._protocol

    @property
    def _packed(self) -> bool:
        return bool((self._features or 0) & Feature.RING_PACKED)

    @property
    def _negotiated(self) -> bool:
        return bool(self._ops.get_status() & Status.FEATURES_OK)

    @property
    def _needs_reset(self) -> bool:
        return bool(self._ops.get_status() & Status.NEEDS_RESET)

    # -- memory and its log ---------------------------------------------------------------------------------------------

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        regions = proto.parse_mem_table(payload)
        if len(regions) != len(fds):
            raise proto.invalid(Request.SET_MEM_TABLE, f"{len(regions)} regions with {len(fds)} descriptors")
        check_total(region.size for region in regions)
        self._set_table(MemoryTable(_mapped(region, fd) for region, fd in zip(regions, fds, strict=True)))

    def _get_max_mem_slots(self) -> bytes:
        return proto.pack_u64(MAX_REGIONS)

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        region = proto.MemRegion.parse(Request.ADD_MEM_REG, payload)
        if len(fds) != 1:
            raise proto.invalid(Request.ADD_MEM_REG, f"a region with {len(fds)} descriptors")
        check_total([region.size, *(other.size for other in self._table.regions)])
        self._set_table(self._table.plus(_mapped(region, fds[0])))

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        if len(fds) > 1:
            # One is right: some frontends send the region's descriptor here too. Nobody needs it.
            raise proto.invalid(Request.REM_MEM_REG, f"a region with {len(fds)} descriptors")
        region = proto.MemRegion.parse(Request.REM_MEM_REG, payload)
        self._set_table(self._table.minus(region.guest, region.size, region.user))

    def _set_table(self, table: MemoryTable) -> None:
        self._table = table
        try:
            for vring in self.vrings:
                vring.make_way(table, packed=self._packed)
            self._ops.set_map(table)
        finally:
            self._update()

    def _set_log_base(self, payload: bytes, fds: list[int]) -> bytes:
        place = proto.LogBase.parse(payload)
        if ProtocolFeature.LOG_SHMFD not in self._protocol or len(fds) != 1:
            raise proto.invalid(Request.SET_LOG_BASE, f"{len(fds)} descriptors, or no LOG_SHMFD protocol feature")
        check_total([place.size])
        self._log = DirtyLog(fds[0], place.size, place.offset)
        self._update()
        # QEMU wants a reply and does not care for what is in it.
        return proto.pack_u64(0)

    def _set_log_fd(self, payload: bytes, fds: list[int]) -> None:
        """Take an eventfd for logged writes, and drop it: whoever migrates reads the log when it wants to, as QEMU does."""
        if len(payload) not in (0, 8) or len(fds) != 1:
            raise proto.invalid(Request.SET_LOG_FD, f"{len(payload)} bytes and {len(fds)} descriptors")
        check_eventfd(fds[0])

    def _update_log(self) -> None:
        wanted = self._log if self._acked & proto.F_LOG_ALL else None
        rings = frozenset(vring.index for vring in self.vrings if vring.logged) if wanted is not None else frozenset()
        if (wanted, rings) == self._logging:
            return
        if not self._ops.set_log(wanted, rings):
            raise MdevError(errno.ENOTSUP, "the device cannot log what it writes")
        self._logging = (wanted, rings)

    # -- queues ---------------------------------------------------------------------------------------------------------

    def _set_vring_num(self, payload: bytes) -> None:
        state = VringState.parse(Request.SET_VRING_NUM, payload)
        self._vring(state.index).set_num(state.num)
        self._update()

    def _set_vring_base(self, payload: bytes) -> None:
        state = VringState.parse(Request.SET_VRING_BASE, payload)
        self._vring(state.index).set_base(state.num)

    def _set_vring_addr(self, payload: bytes) -> None:
        addr = proto.VringAddr.parse(payload)
        self._vring(addr.index).set_addr(addr)
        self._update()

    def _get_vring_base(self, payload: bytes) -> bytes:
        state = VringState.parse(Request.GET_VRING_BASE, payload)
        base = self._vring(state.index).end()
        self._update()
        return VringState(state.index, base).pack()

    def _set_vring_enable(self, payload: bytes) -> None:
        state = VringState.parse(Request.SET_VRING_ENABLE, payload)
        vring = self._vring(state.index)
        if state.num > 1:
            raise proto.invalid(Request.SET_VRING_ENABLE, f"{state.num} is neither 0 nor 1")
        vring.enabled = bool(state.num)
        self._update()

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        vring = self._vring_of_fd(Request.SET_VRING_KICK, payload, fds)
        vring.set_kick(fds.pop() if fds else -1)
        self._update()

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        vring = self._vring_of_fd(Request.SET_VRING_CALL, payload, fds)
        vring.set_call(fds.pop() if fds else -1)

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        vring = self._vring_of_fd(Request.SET_VRING_ERR, payload, fds)
        vring.set_error(fds.pop() if fds else -1)

    def _vring_of_fd(self, request: Request, payload: bytes, fds: list[int]) -> Vring:
        asked = proto.VringFd.parse(request, payload)
        vring = self._vring(asked.index)
        if len(fds) != asked.has_fd:
            raise proto.invalid(request, f"{len(fds)} descriptors, {int(asked.has_fd)} announced")
        if fds:
            check_eventfd(fds[0])
        return vring

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise MdevError(errno.ENOBUFS, f"there is no queue {index}, the last one is {len(self.vrings) - 1}")
        return self.vrings[index]

    def _update(self) -> None:
        """Start and stop queues and logging as all that is known now says. The first failure is raised, after the rest is done."""
        failure: MdevError | None = None
        packed = self._packed
        negotiated = self._negotiated
        for vring in self.vrings:
            wanted = vring.started and vring.configured and self._enabled(vring) and negotiated and not self._suspended
            try:
                vring.update(self._table, packed=packed, wanted=wanted)
            except MdevError as error:
                # It has to be started again; until then it is not tried with every message.
                vring.started = False
                vring.stop()
                failure = failure or error
        self._update_log()
        if failure is not None:
            raise failure
        if self._status_is_ours and any(vring.running for vring in self.vrings):
            self._climb(_READY | Status.DRIVER_OK)

    def _enabled(self, vring: Vring) -> bool:
        return vring.enabled or not self._acked & proto.F_PROTOCOL_FEATURES

    # -- the rest -------------------------------------------------------------------------------------------------------

    def _set_owner(self) -> None:
        """Nothing to do: whoever is connected owns the device."""

    def _get_queue_num(self) -> bytes:
        """Return the number of queue pairs, which is what QEMU and DPDK take it for."""
        return proto.pack_u64(len(self.vrings) // 2)

    def _send_rarp(self, payload: bytes) -> None:
        """Accept it, at any time: a mediated device has no network of its own to announce the guest's new place on."""
        proto.parse_u64(Request.SEND_RARP, payload)

    def _net_set_mtu(self, payload: bytes) -> None:
        mtu = proto.parse_u64(Request.NET_SET_MTU, payload)
        most = MAX_MTU
        if self._traits.features & NetFeature.MTU:
            most = int.from_bytes(self._ops.get_config(*_MTU_AT), "little")
        if not MIN_MTU <= mtu <= most:
            raise proto.invalid(Request.NET_SET_MTU, f"an MTU of {mtu} is outside {MIN_MTU} to {most}")

    def _get_config(self, payload: bytes) -> bytes:
        asked = proto.Config.parse(Request.GET_CONFIG, payload)
        return proto.Config(asked.offset, self._ops.get_config(asked.offset, len(asked.data)), asked.flags).pack()

    def _set_config(self, payload: bytes) -> None:
        asked = proto.Config.parse(Request.SET_CONFIG, payload)
        self._ops.set_config(asked.offset, asked.data)

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        if payload or len(fds) != 1:
            raise proto.invalid(Request.SET_BACKEND_REQ_FD, f"{len(payload)} bytes and {len(fds)} descriptors")
        channel = take_socket(fds[0])
        fds.clear()
        self._close_channel()
        self._channel = channel

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _bare_requests(self) -> dict[int, Bare]:
        return {
            Request.GET_FEATURES: self._get_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.GET_STATUS: self._get_status,
        }

    def _plain_requests(self) -> dict[int, Plain]:
        return {
            Request.SET_FEATURES: self._set_features,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SEND_RARP: self._send_rarp,
            Request.NET_SET_MTU: self._net_set_mtu,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.SET_STATUS: self._set_status,
        }

    def _carrying_requests(self) -> dict[int, Carrying]:
        return {
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: self._set_log_base,
            Request.SET_LOG_FD: self._set_log_fd,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
        }


def _mapped(region: proto.MemRegion, fd: int) -> Region:
    return Region(fd, region.guest, region.size, offset=region.offset, user=region.user)
