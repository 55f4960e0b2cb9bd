"""How the C engine is compiled, by setuptools when the package is installed or by `python -m mdevkit_virtio.engine.build`.

Never imported while devices run. `optional` is what makes an installation without a compiler succeed: the Python engine
then does the work. The flags may be extended by MDEVKIT_ENGINE_CFLAGS, e.g. for sanitizers.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Final

from cffi import FFI  # type: ignore[import-untyped]  # cffi ships no type information

_HERE: Final = Path(__file__).parent

#: The module that is built; its name is what `mdevkit_virtio.engine.native` imports.
MODULE: Final = "mdevkit_virtio.engine._native"

_FLAGS: Final = ["-std=gnu11", "-O3", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-clobbered"]
if platform.machine() == "x86_64":
    # The instruction that fetches a line in order to write it. Processors older than it take it for none at all.
    _FLAGS.append("-mprfchw")


def _relative(path: Path) -> str:
    """Return a path as setuptools wants sources to be named: relative to the folder of setup.py, if that is where we are."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _builder() -> FFI:
    builder = FFI()
    builder.cdef((_HERE / "api.h").read_text(encoding="utf-8"))
    builder.set_source(
        MODULE,
        '#include "engine.c"',
        include_dirs=[_relative(_HERE)],
        depends=[_relative(path) for path in sorted(_HERE.glob("*.[ch]"))],
        extra_compile_args=[*_FLAGS, *os.environ.get("MDEVKIT_ENGINE_CFLAGS", "").split()],
        extra_link_args=os.environ.get("MDEVKIT_ENGINE_LDFLAGS", "").split(),
        optional=True,
    )
    return builder


#: What setup.py names in `cffi_modules`.
ffibuilder: Final = _builder()


def main() -> None:
    """Compile the engine in place, into the folder this package is imported from, under the name an installation gives it."""
    ffibuilder.compile(tmpdir=str(_HERE.parents[1]), target="_native.abi3.so", verbose=True)


if __name__ == "__main__":
    main()
