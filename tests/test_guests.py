"""The guests themselves, which the other guest tests rely on: commands, failures that are told apart, nothing left."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import pytest

from tests.guests import CommandFailedError, Device, DeviceError, Guest, GuestError, MissingKitError, QmpError, frames
from tests.guests.initramfs import Initramfs, MissingModuleError, module_image, modules_in_order
from tests.guests.interpreter import add_python
from tests.guests.kit import find_kit
from tests.guests.root import RootError, make_root


@pytest.fixture
def empty_machine(monkeypatch, tmp_path):
    """A machine without a Debian root and without a single program."""
    monkeypatch.setenv("MDEVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))


def _ours(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.name.startswith("mdevkit-")}


def test_commands_files_and_modules(kit):
    data = bytes(range(256)) * 4
    with Guest(kit, modules=["virtio-net", "8250_pci"], files={"given/file": data}) as guest:
        assert guest.run("printf 'a\\nb'; printf c >&2") == "a\nbc"
        assert guest.read("/given/file") == data
        guest.write("/tmp/a file", data[::-1])
        assert guest.read("/tmp/a file") == data[::-1]
        assert "virtio_net" in guest.run("lsmod")
        guest.run("(while :; do (usleep 2000 &); usleep 1000; done) >/dev/null 2>&1 & echo $! >/orphans")
        for number in range(40):  # orphans end all the time, which must not cost a command
            assert guest.run(f"echo {number:0200}") == f"{number:0200}\n"
        guest.run("kill $(cat /orphans)")
        with pytest.raises(CommandFailedError, match="`echo why; exit 3` ended with 3: why"):
            guest.run("echo why; exit 3")
        with pytest.raises(QmpError, match="device_del: Device 'nothing' not found"):
            guest.unplug("nothing")
        with pytest.raises(GuestError, match=r"(?s)rebooted during `echo c.*sysrq triggered crash"):
            guest.run("echo c >/proc/sysrq-trigger")


def test_a_guest_leaves_nothing_behind(kit, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(Path("/proc/self/fd").iterdir())
    guest = Guest(kit)
    assert len(_ours(tmp_path)) == 1
    with pytest.raises(GuestError, match="did not finish `sleep 9` in time"):
        guest.run("sleep 9", timeout=0.2)
    guest.kill()
    with pytest.raises(GuestError, match="QEMU"):
        guest.run("true")
    guest.close()
    guest.close()
    assert not Path(f"/proc/{guest.pid}").exists()
    assert _ours(tmp_path) == set()
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_qemus_own_refusal_is_told(kit):
    with pytest.raises(GuestError, match=r"(?s)QEMU ended during its boot.*'no-such-card' is not a valid device model"):
        Guest(kit, ["-device", "no-such-card"])


def test_what_a_device_that_cannot_be_served_says_is_told():
    with pytest.raises(DeviceError, match=r"(?s)`mdevkit run` ended with 1: .*no-such-type"):
        Device("no-such-type")


def test_missing_kit_is_told_with_the_command_that_gets_it(empty_machine):
    with pytest.raises(MissingKitError, match=r"for want of QEMU 10\.1 or newer .*; get all of it with: \./dev guests"):
        find_kit.__wrapped__()


def test_missing_python_is_told_with_the_command_that_gets_it(kit):
    with pytest.raises(MissingKitError, match=r"the guest's Python is in the Debian root only; get it with: \./dev guests"):
        add_python(Initramfs(), dataclasses.replace(kit, root=None))


def _pktgen_frame(size: int, sequence: int, fill: bytes = b"\0") -> bytes:
    """A frame as pktgen makes them: Ethernet, IPv4 and UDP, its own header, zeros."""
    network = b"\x45\0" + (size - 14).to_bytes(2, "big") + bytes(16) + bytes(8)
    own = 0xBE9BE955.to_bytes(4, "big") + sequence.to_bytes(4, "big") + bytes(8)
    head = bytes(12) + b"\x08\0" + network + own
    return head + fill * (size - len(head))


@pytest.mark.parametrize(
    "wrong", [_pktgen_frame(100, 6)[:-1], _pktgen_frame(100, 5), _pktgen_frame(100, 6, b"\1"), b"\0" + _pktgen_frame(99, 6)]
)
def test_a_wrong_frame_is_found_in_the_guest(wrong):
    assert frames.check(_pktgen_frame(100, 6), 100, 5) == 6
    with pytest.raises(frames.WrongFrameError, match=r"came"):
        frames.check(wrong, 100, 5)


def test_root_needs_a_debian_machine(empty_machine):
    with pytest.raises(RootError, match=r"apt-get, dpkg-deb is missing: .*install QEMU 10\.1 or newer"):
        make_root()


@pytest.fixture
def kernel(tmp_path):
    """A kernel's module folder: `top` needs `middle` and `bottom`, `middle` needs `bottom`; `fixed` is built in."""
    (tmp_path / "modules.builtin").write_text("kernel/fixed-one.ko\n")
    (tmp_path / "modules.dep").write_text("k/top.ko: k/middle.ko k/bottom.ko\nk/middle.ko: k/bottom.ko\nk/bottom.ko:\n")
    return tmp_path


def test_modules_come_after_what_they_need_and_once(kernel):
    order = modules_in_order(kernel, ["middle", "top", "fixed_one"])
    assert [path.name for path in order] == ["bottom.ko", "middle.ko", "top.ko"]


def test_unknown_module_is_named(kernel):
    with pytest.raises(MissingModuleError, match=f"the kernel of {kernel} has no module nothing"):
        modules_in_order(kernel, ["nothing"])


def test_module_in_a_format_that_cannot_be_unpacked_is_named(tmp_path):
    path = tmp_path / "top.ko.zst"
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(MissingModuleError, match=r"top\.ko\.zst is compressed in a way"):
        module_image(path)


def test_initramfs_makes_folders_once_and_pads_to_words():
    archive = Initramfs()
    archive.add_file("a/b/one", b"1")
    archive.add_file("a/b/two", b"22", executable=True)
    image = archive.image()
    names = [image[at + 110 :].split(b"\0")[0] for at in range(0, len(image), 4) if image[at : at + 6] == b"070701"]
    assert names == [b"a", b"a/b", b"a/b/one", b"a/b/two", b"TRAILER!!!"]
