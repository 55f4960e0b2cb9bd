"""Makes the Debian roots of the tests: what guests boot from (QEMU 11 from trixie-backports, the stock kernel, a static
busybox, a Python), and the tools that manage mediated devices (mdevctl, libvirt).

The packages are downloaded by the machine's own apt, with its proxies and from its Debian mirror, but into a state of
their own, and unpacked, not installed: no root rights, nothing of the machine changes. QEMU then runs in place through
the root's own dynamic loader. About 20 s, 160 MB of download and 360 MB of disk for guests, 10 s, 40 MB and 150 MB for the tools.
``./dev guests`` does it.

Roots live in ``$MDEVKIT_CACHE``, else ``/var/cache/mdevkit`` (root) or ``~/.cache/mdevkit``, in a folder named by the
recipe's hash, so that a changed recipe makes a new one. A lock makes one process at a time build.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """What is in a root. Packages come from the last suite where it has them, `PACKAGE/SUITE` from that one."""

    suites: tuple[str, ...]
    packages: tuple[str, ...]
    #: Raise it when this module changes in a way that makes older roots unusable.
    revision: int = 1

    @property
    def key(self) -> str:
        """The name of the root's folder."""
        return "root-" + hashlib.sha256(repr((self.suites, self.packages, self.revision)).encode()).hexdigest()[:12]


#: The guest's kernel is the stable one; its Python is for what busybox cannot do, such as raw sockets.
GUEST = Recipe(
    ("trixie", "trixie-backports"),
    ("qemu-system-x86", "busybox-static", "linux-image-amd64/trixie", "python3-minimal/trixie", "libdrm-tests/trixie"),
)
#: With the shell and the tools that libvirt and scripts of mdevctl need to run in a root of their own.
MANAGEMENT = Recipe(
    ("trixie",),
    ("mdevctl", "libvirt-daemon", "libvirt-daemon-driver-nodedev", "libvirt-clients", "dash", "coreutils", "mount", "libc-bin"),
)
#: A testpmd of today beside the one of Debian 12.
DPDK = Recipe(("trixie",), ("dpdk-dev",))

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_APT_CONFIG = """\
Dir::Etc::sourcelist "{work}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{work}/state";
Dir::State::status "{work}/status";
Dir::Cache "{work}/cache";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
"""


class RootError(Exception):
    """The root cannot be made here; the text says what is missing and what to do."""


def cache_folders() -> list[Path]:
    """Return the folders that may hold a root; the first is where a new one is made."""
    if chosen := os.environ.get("MDEVKIT_CACHE"):
        return [Path(chosen)]
    everybody = Path("/var/cache/mdevkit")
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdevkit"
    return [everybody, own] if os.geteuid() == 0 else [own, everybody]


def find_root(recipe: Recipe = GUEST) -> Path | None:
    """Return the finished root, or None."""
    return next((root for root in (folder / recipe.key for folder in cache_folders()) if root.is_dir()), None)


def make_root(recipe: Recipe = GUEST) -> Path:
    """Return the root, made if there is none yet; RootError says why it cannot be."""
    if root := find_root(recipe):
        return root
    _require_tools()
    cache = cache_folders()[0]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root := find_root(recipe):  # another process made it while we waited
            return root
        with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as work:
            _make(Path(work), recipe)
            return (Path(work) / "root").rename(cache / recipe.key)


def _require_tools() -> None:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing or not _KEYRING.exists():
        raise RootError(
            f"{', '.join(missing) or _KEYRING} is missing: a Debian machine is needed, or apt-get install "
            "apt dpkg debian-archive-keyring; elsewhere install QEMU 10.1 or newer and a static busybox instead"
        )


def _make(work: Path, recipe: Recipe) -> None:
    _write_apt_configuration(work, recipe)
    _apt(work, "update")
    _apt(work, "install", "--download-only", "--yes", "--target-release", recipe.suites[-1], *recipe.packages)
    root = work / "root"
    for folder in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / folder).mkdir(parents=True)
        (root / folder).symlink_to(f"usr/{folder}")
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    for kernel in (root / "lib/modules").glob("*"):
        _run([*loader(root, "depmod"), str(root / "bin/kmod"), "-b", str(root), kernel.name])
    for image in (root / "boot").glob("vmlinuz-*"):
        image.chmod(0o644)
    root.chmod(0o755)


def loader(root: Path, name: str) -> list[str]:
    """Return the command line that runs the program that follows it, with the root's own libraries, under `name`."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    return [str(root / "lib64/ld-linux-x86-64.so.2"), "--argv0", name, "--library-path", str(libraries)]


def _write_apt_configuration(work: Path, recipe: Recipe) -> None:
    for folder in ("state/lists/partial", "cache/archives/partial", "root"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    (work / "apt.conf").write_text(_APT_CONFIG.format(work=work))
    lines = [f"deb [signed-by={_KEYRING}] {_mirror()} {suite} main\n" for suite in recipe.suites]
    (work / "sources.list").write_text("".join(lines))


def _mirror() -> str:
    """Return the machine's own Debian mirror: apt knows it once its lists are there."""
    if chosen := os.environ.get("MDEVKIT_DEBIAN_MIRROR"):
        return chosen
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    if mirrors := _run(command).split():
        return mirrors[0]
    raise RootError("apt knows no Debian mirror: run `apt-get update` first, or name one in the environment: MDEVKIT_DEBIAN_MIRROR")


def _apt(work: Path, *arguments: str) -> None:
    _run(["apt-get", "--quiet", *arguments], {"APT_CONFIG": str(work / "apt.conf")})


def _run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Run a tool and return what it prints; RootError with its last lines if it fails."""
    done = subprocess.run(
        command,
        env=os.environ | (environment or {}) | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise RootError(f"{command[0]} ended with {done.returncode}: {last}")
    return done.stdout
