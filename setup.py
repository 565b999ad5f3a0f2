"""Builds the CPU kernels with pyproject.toml's setuptools: one shared library with a plain C interface.

No Python or torch header is used, so one build serves every version of both. A file whose name ends in an instruction
set (`*_avx2.cpp`) is compiled with that set's flags; which one runs is decided when the program starts. Without a
compiler the installation goes on: the package then computes in plain torch and says so.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = Path("pingjia/quant/kernels")
COMMON = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "x86_64": {
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    },
    "aarch64": {"neondot": ["-march=armv8.2-a+dotprod"]},
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def flags_for(source: str, machine: str = platform.machine()) -> list[str]:
    """Flags of the instruction set that the file's name ends in; none for every other file."""
    machine = machine.lower()
    sets = FLAGS.get(MACHINES.get(machine, machine), {})
    return sets.get(Path(source).stem.rpartition("_")[2], [])


class BuildKernels(build_ext):
    """Compile each file with its own flags and link them to `libpingjia`."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + (sysconfig.get_config_var("SHLIB_SUFFIX") or ".so")

    def build_extension(self, ext: Extension) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, ext.sources))
        target = self.get_ext_fullpath(ext.name)
        self.mkpath(str(Path(target).parent))
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")

    def _compile(self, source: str) -> str:
        flags = flags_for(source)
        try:
            return self._object(source, flags)
        except CompileError:
            if not flags:
                raise
        # An old compiler does not know the set: without its flags the file compiles to "not built".
        return self._object(source, [])

    def _object(self, source: str, flags: list[str]) -> str:
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=COMMON + flags)[0]


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": BuildKernels},
        ext_modules=[
            Extension(
                "pingjia.quant.kernels.libpingjia",
                sources=sorted(str(path) for path in KERNELS.glob("*.cpp")),
                depends=sorted(str(path) for path in KERNELS.glob("*.h")),
                language="c++",
                optional=True,
            )
        ],
    )
