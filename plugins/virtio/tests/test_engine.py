"""Which engine runs, how that is told, and that memory which goes away kills nobody."""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from mdevkit.errors import MdevError
from mdevkit_virtio import access
from mdevkit_virtio.driverside import Segment
from mdevkit_virtio.engine import VARIABLE, load
from mdevkit_virtio.layout import Fault, MoveOptions, RingError

PACKAGE = Path(importlib.util.find_spec("mdevkit_virtio").origin).parent

#: Python warns since 3.12.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")


def _python(program, **environment):
    """Run a program in a child with warnings shown; its environment has no choice of engine unless one is given."""
    clean = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-W", "always", "-c", textwrap.dedent(program)]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False, timeout=60)


# -- selection -------------------------------------------------------------------------------------------------------------

WITHOUT_C = """
    import sys
    sys.modules["mdevkit_virtio.engine._native"] = None
"""


def test_the_c_engine_is_the_first_choice(c_engine):
    done = _python("from mdevkit_virtio.engine import load; print(load().name)")
    assert (done.stdout, done.stderr) == ("c\n", "")
    assert c_engine is load("c")


def test_the_environment_chooses():
    done = _python("from mdevkit_virtio.engine import load; print(load().name)", MDEVKIT_ENGINE="python")
    assert (done.stdout, done.stderr) == ("python\n", "")


def test_an_engine_there_is_none_of(monkeypatch):
    monkeypatch.setenv(VARIABLE, "rust")
    with pytest.raises(MdevError) as caught:
        load()
    assert (caught.value.errno, str(caught.value)) == (
        errno.ENOENT,
        "there is no engine 'rust' (MDEVKIT_ENGINE may be c or python)",
    )


def test_without_c_one_warning_says_how_to_build_it():
    program = (
        WITHOUT_C
        + """
    import threading
    from mdevkit_virtio.engine import load
    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(load().name)
    """
    )
    done = _python(program)
    assert done.stdout == "python\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "the C engine of mdevkit-virtio is not built" in done.stderr
    assert "apt-get install gcc python3-dev" in done.stderr
    assert "python -m mdevkit_virtio.engine.build" in done.stderr


def test_demanding_c_where_it_is_not_built():
    program = (
        WITHOUT_C
        + """
    from mdevkit.errors import MdevError
    from mdevkit_virtio.engine import load
    try:
        load()
    except MdevError as error:
        print(error.name, error)
    """
    )
    done = _python(program, MDEVKIT_ENGINE="c")
    assert done.stdout.startswith("EOPNOTSUPP the C engine of mdevkit-virtio is not built (")


def test_the_command_in_the_warning_builds_it(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("no compiler: apt-get install gcc python3-dev")
    copy = tmp_path / "mdevkit_virtio"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_native*", "__pycache__"))
    program = f"""
    import runpy, sys
    sys.path.insert(0, {str(tmp_path)!r})
    runpy.run_module("mdevkit_virtio.engine.build", run_name="__main__")
    from mdevkit_virtio.engine import load, native
    print(load("c").name, native.__file__)
    """
    done = _python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"c {copy}/engine/native.py"


def test_installing_without_a_compiler_succeeds(tmp_path):
    source = PACKAGE.parents[1]
    copy = tmp_path / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_native*", "__pycache__", "*.egg-info", "build", "tests", "bench"))
    target = tmp_path / "lib"
    program = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    environment = os.environ | {"CC": "/nonexistent/cc", "PATH": os.fspath(Path(sys.executable).parent)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.splitlines()[-1]
    shutil.unpack_archive(wheel, target, "zip")
    names = {path.name for path in (target / "mdevkit_virtio" / "engine").iterdir()}
    assert "_native.abi3.so" not in names
    assert {"api.h", "engine.c", "native.py", "build.py"} <= names


def test_the_engine_is_small():
    """What the design allows: under 800 lines of C."""
    lines = 0
    for path in (PACKAGE / "engine").glob("*.[ch]"):
        if not path.name.startswith("_native"):
            lines += _code_lines(path.read_text(encoding="utf-8"))
    assert 400 < lines < 800


def _code_lines(text):
    count, comment = 0, False
    for line in text.splitlines():
        stripped = line.strip()
        comment = comment or stripped.startswith("/*")
        count += bool(stripped) and not comment
        if comment and "*/" in stripped:
            comment = False
    return count


def test_nobody_packs_into_guest_memory():
    """struct.pack_into clears a field before it writes it, which a driver on another processor sees."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if ".pack_into(" in line]
        assert code == [], path


# -- memory that goes away -------------------------------------------------------------------------------------------------


def _truncated_take(rigs, engine):
    rig = rigs(engine, sealed=False)
    ring, queue = rig.pair()
    ring.add([Segment(rig.place(b"abc"), 3)], [Segment(rig.place(b"abc"), 3)], 0)
    return rig, ring, queue


def _assert_gone(function, *arguments):
    with pytest.raises(RingError) as caught:
        function(*arguments)
    assert (caught.value.fault, caught.value.errno) == (Fault.MEMORY, errno.EFAULT)
    assert str(caught.value) == "queue 0 is broken by its driver: the memory it shared has been truncated"


def test_every_way_in_survives_truncation(rigs, engine, features):
    """Under pytest, whose faulthandler has taken SIGBUS before us."""
    assert faulthandler.is_enabled()
    for call in ("take", "notify", "complete"):
        rig = rigs(engine, sealed=False)
        ring, queue = rig.pair(features=features)
        ring.add([Segment(rig.place(b"abc"), 3)], [Segment(rig.place(b"abc"), 3)], 0)
        (buffer,) = queue.take()
        ring.add([Segment(rig.place(b"abc"), 3)], [], 0)
        os.ftruncate(rig.memory.fd, 0)
        if call == "complete":
            _assert_gone(buffer.read)
            _assert_gone(buffer.write, b"x")
            _assert_gone(queue.complete, (buffer, 0))
        else:
            _assert_gone(getattr(queue, call), 1)


def test_a_queue_on_truncated_memory_does_not_start(rigs, engine):
    rig = rigs(engine, sealed=False)
    ring = rig.ring()
    os.ftruncate(rig.memory.fd, 0)
    _assert_gone(rig.queue, ring)


def test_the_guard_comes_back_when_faulthandler_takes_the_signal(rigs, engine):
    rig, _, queue = _truncated_take(rigs, engine)
    faulthandler.disable()
    faulthandler.enable()
    try:
        os.ftruncate(rig.memory.fd, 0)
        _assert_gone(queue.take)
    finally:
        faulthandler.enable(file=sys.__stderr__)


def test_many_threads_lose_their_memory_at_once(rigs, engine):
    failures = []

    def work():
        try:
            for _ in range(30):
                rig, _, queue = _truncated_take(rigs, engine)
                os.ftruncate(rig.memory.fd, 0)
                _assert_gone(queue.take)
        except BaseException as error:  # noqa: BLE001  # reported on the main thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_truncation_while_frames_are_moved(rigs, engine, features):
    """At a moment of its own choosing, again and again; the ring breaks and the process lives."""
    for number in range(40):
        rig = rigs(engine, sealed=False)
        tx_ring, tx = rig.pair(256, features)
        rx_ring, rx = rig.pair(256, features)
        mover = engine.mover(tx.ring, rx.ring, MoveOptions())
        at = rig.place(bytes(1500))
        for _ in range(200):
            tx_ring.add([Segment(at, 1500)], [], 0)
            rx_ring.add([], [Segment(at, 1500)], 0)
        killer = threading.Timer(number * 0.00005, os.ftruncate, (rig.memory.fd, 0))
        killer.start()
        while not tx.ring.fault:
            mover.move(4)
        killer.join()
        assert {tx.broken.fault, rx.broken.fault} == {Fault.MEMORY}


CRASH = """
    import ctypes, faulthandler, mmap, os, signal
    from mdevkit_virtio.driverside import GuestMemory, make_driver_ring
    from mdevkit_virtio.engine import load
    from mdevkit_virtio.layout import RingError
    from mdevkit_virtio.memory import MemoryTable, Region
    from mdevkit_virtio.queue import QueueConfig, Virtqueue

    {before}
    memory = GuestMemory(1 << 16, sealed=False)
    ring = make_driver_ring(memory, 16)
    queue = Virtqueue("queue 0", load("c"))
    queue.start(MemoryTable([Region(memory.fd, 0, 1 << 16)]), QueueConfig(16, ring.desc, ring.driver, ring.device))
    queue.take()
    {after}
    os.ftruncate(memory.fd, 0)
    try:
        queue.take()
    except RingError as error:
        print(error, flush=True)
    {again}
    memory.bytes[0]  # not through the engine: this must end the process as it would without us
"""


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [
        ("", "", ""),
        ("faulthandler.enable()", "", ""),
        ("", "faulthandler.enable()", ""),
        ("faulthandler.enable()", "faulthandler.disable(); faulthandler.enable()", "faulthandler.enable()"),
    ],
)
def test_faults_that_are_not_ours_end_the_process_once(c_engine, before, after, again):
    done = _python(CRASH.format(before=before, after=after, again=again))
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "queue 0 is broken by its driver: the memory it shared has been truncated\n"
    if before or after:
        assert done.stderr.count("Fatal Python error: Bus error") == 1
        assert 'File "<string>"' in done.stderr
    else:
        assert done.stderr == ""


@FORKS
def test_a_child_opens_its_own_memory():
    """/proc/self/mem names the process that opened it."""
    word = memoryview(bytearray(b"parent"))
    import ctypes

    host = ctypes.addressof(ctypes.c_char.from_buffer(word))
    assert access.read(host, 6) == b"parent"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            word[:] = b"child!"
            os.write(writer, access.read(host, 6))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 6) == b"child!"
    os.close(reader)
    os.close(writer)


@FORKS
def test_nobody_stores_the_word_of_another():
    """Several threads at once, each of its own numbers, and a child; they share a file and its position."""
    import ctypes

    words = (ctypes.c_uint32 * 4)()
    mixed = []

    def store(index):
        for value in (0, 1, 0x1234_5678, 0x8000_0000, 0xFFFF_FFFF) * 200:
            access.store_word(ctypes.addressof(words) + 4 * index, (value ^ index).to_bytes(4, sys.byteorder))
            if words[index] != value ^ index:
                mixed.append((index, value, words[index]))

    threads = [threading.Thread(target=store, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if not child:
        code = 2
        try:
            store(0)
            code = len(mixed) > 0
        finally:
            os._exit(code)
    for thread in threads:
        thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not mixed


def test_what_a_queue_used_goes_with_it(rigs, engine, features):
    """At once, without the garbage collector."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    rig = rigs(engine)
    _, tx = rig.pair(features=features)
    _, rx = rig.pair(features=features)
    loop = engine.loop([engine.mover(tx.ring, rx.ring, MoveOptions())])
    loop.close()
    rig.table = None
    del tx, rx, loop
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2, "the memory of the rig itself: a file and its mapping"


def test_a_buffer_outlives_its_ring_without_harm(rigs, engine, features):
    """A vendor that keeps one too long gets an error, and reads no memory that has gone."""
    old, new = rigs(engine), rigs(engine)
    ring, queue = old.pair(features=features)
    assert ring.add([Segment(old.place(b"before"), 6)], [], 0)
    (buffer,) = queue.take()
    queue.stop()
    old.table = None
    queue.start(new.table, new.config(new.ring(features=features)))
    assert buffer.read() == b"before"
    with pytest.raises(MdevError, match="queue 0: a buffer of another queue, or taken before it was stopped") as caught:
        queue.complete((buffer, 0))
    assert caught.value.errno == errno.EINVAL
