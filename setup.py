"""Builds the C++ kernels ahead of time, once for every instruction set that they are specialised for. The processor
chooses between them at run time, so a wheel built here runs on the next machine; ctypes loads them, so it serves every
Python 3. Without torch or a compiler the install succeeds all the same, says so, and the `torch` backend serves.

RMSD_BUILD_CAPABILITIES=avx2 builds that instruction set alone, in a third of the time."""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import has_torch

FOLDER = "rmsd_kernels/cpu"
SOURCES = [f"{FOLDER}/scores.cpp", f"{FOLDER}/divergence.cpp"]
HEADERS = [f"{FOLDER}/common.h", f"{FOLDER}/scan.h", f"{FOLDER}/topk.h"]
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "default": [],
}


def warn(reason):
    bar = "*" * 78
    message = f"rmsd-kernels: the C++ kernels are NOT built ({reason}).\nCPU tensors take the slower torch backend."
    print(f"\n{bar}\n{message}\n{bar}\n", file=sys.stderr)


def capabilities():
    """The instruction sets to build for."""
    known = list(FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["default"]
    wanted = os.environ.get("RMSD_BUILD_CAPABILITIES", ",".join(known)).split(",")
    if unknown := set(wanted) - set(known):
        raise SystemExit(f"RMSD_BUILD_CAPABILITIES: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return wanted


def extensions():
    """(ext_modules, cmdclass); none where torch is not importable."""
    try:
        if not has_torch():
            raise ImportError("there is none")
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if {"egg_info", "dist_info", "sdist"}.isdisjoint(sys.argv):  # those build nothing
            warn(f"torch cannot be imported: {error}")
        return [], {}

    class BuildOrWarn(BuildExtension):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, no_python_abi_suffix=True)

        def run(self):
            try:
                super().run()
            except Exception as error:
                warn(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                self.extensions = self.distribution.ext_modules = []
            # Python would prefer a build of before, when their names held its version.
            for old in Path(FOLDER).glob("_*.cpython-*.so") if self.inplace else ():
                old.unlink()

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    modules = [
        CppExtension(
            f"rmsd_kernels.cpu._{name}",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                *openmp,
                *FLAGS[name],
                f"-DCPU_CAPABILITY={name.upper()}",
                f"-DCPU_CAPABILITY_{name.upper()}",
            ],
            extra_link_args=openmp,
        )
        for name in capabilities()
    ]
    return modules, {"build_ext": BuildOrWarn}


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2] if self.distribution.ext_modules else "any"


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass={**cmdclass, "bdist_wheel": Wheel})
