"""setuptools' build backend, with one more requirement where it is needed: torch, whose headers the C++ kernels use.

pip builds in isolation from the environment that it installs into. A torch that is there is taken from there, so that
the kernels are built with the torch that will load them, and nothing is downloaded. Elsewhere (`python -m build`, uv,
an environment without torch) the build asks for one of its own. Without a compiler none is asked for.
"""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def has_torch() -> bool:
    """Also makes the torch beside an isolated build importable, behind all that the build has of its own."""
    if importlib.util.find_spec("torch") is None:
        beside = sysconfig.get_path("platlib")
        if (Path(beside) / "torch").is_dir() and beside not in sys.path:
            sys.path.append(beside)
    return importlib.util.find_spec("torch") is not None


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++", "cl"))


def _torch_if_needed() -> list[str]:
    return ["torch>=2.9", "ninja"] if has_compiler() and not has_torch() else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_needed()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_needed()
