"""Builds the C++ kernels ahead of time, once for every instruction set that they are specialised for. The processor
chooses between them at run time, so a wheel built here runs on the next machine. Without torch or a compiler the
install succeeds all the same, says so, and the `torch` backend serves."""

import platform
import sys

from setuptools import setup

SOURCES = ["rmsd_kernels/cpu/scores.cpp", "rmsd_kernels/cpu/divergence.cpp"]
HEADERS = ["rmsd_kernels/cpu/common.h", "rmsd_kernels/cpu/scan.h", "rmsd_kernels/cpu/topk.h"]
FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "default": [],
}


def warn(reason):
    bar = "*" * 78
    message = f"rmsd-kernels: the C++ kernels are NOT built ({reason}).\nCPU tensors take the slower torch backend."
    print(f"\n{bar}\n{message}\n{bar}\n", file=sys.stderr)


def extensions():
    """(ext_modules, cmdclass); none where torch is not importable, as under build isolation."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        warn("torch is not importable: install it first, then use --no-build-isolation")
        return [], {}

    class BuildOrWarn(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                warn(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
                self.extensions = []

    is_x86 = platform.machine() in ("x86_64", "AMD64")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    modules = [
        CppExtension(
            f"rmsd_kernels.cpu._{name}",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[
                "-O3", "-std=c++20", *openmp, *flags,
                f"-DCPU_CAPABILITY={name.upper()}", f"-DCPU_CAPABILITY_{name.upper()}",
            ],
            extra_link_args=openmp,
        )
        for name, flags in FLAGS.items()
        if is_x86 or name == "default"
    ]  # fmt: skip
    return modules, {"build_ext": BuildOrWarn}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
