"""Builds the C engine where a compiler is; what cannot be said in pyproject.toml. Without one the install still succeeds."""

from setuptools import setup

setup(cffi_modules=["src/mdevkit_virtio/engine/build.py:ffibuilder"])
