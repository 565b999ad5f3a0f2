"""Loading the kernels, choosing among them, and their C++ itself under sanitizers and on ARM."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pingjia.errors import ModelError
from pingjia.quant import kernels

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "pingjia" / "quant" / "kernels"
DRIVER = Path(__file__).with_name("kernels_asan.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
ARM_COMPILER, ARM = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")

needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.why_not()}")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd=ROOT
    )


SHOW = "from pingjia.quant import kernels as k; print(k.available(), k.isa(), k.why_not())"


@needs_kernels
@pytest.mark.parametrize("name", kernels.isa_names() if kernels.available() else [])
def test_the_variable_chooses_an_instruction_set(name: str) -> None:
    assert run_python(SHOW, PINGJIA_KERNELS=name).stdout.strip() == f"True {name} None"


def test_the_variable_turns_them_off() -> None:
    assert run_python(SHOW, PINGJIA_KERNELS="off").stdout.strip() == "False off PINGJIA_KERNELS=off"


@needs_kernels
def test_an_instruction_set_that_is_not_here_is_an_error() -> None:
    wanted = f"PINGJIA_KERNELS=avx9: this processor and build have {', '.join(kernels.isa_names())}; or `off`"
    assert wanted in run_python(SHOW, PINGJIA_KERNELS="avx9").stderr
    with pytest.raises(ModelError, match="instruction set avx9: this processor and build have"):
        kernels.choose_isa("avx9")


@needs_kernels
@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"PINGJIA_THREADS": "3"}, 3),
        ({"PINGJIA_THREADS": "", "OMP_NUM_THREADS": "1"}, 1),
        ({"PINGJIA_THREADS": "2", "OMP_NUM_THREADS": "1"}, 2),
    ],
)
def test_how_many_threads(environment: dict[str, str], count: int) -> None:
    code = "from pingjia.quant import kernels as k; print(k.num_threads())"
    assert run_python(code, **environment).stdout.strip() == str(count)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks on this system")
def test_threads_stay_within_the_cores_of_the_process() -> None:
    code = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\n"
    code += "from pingjia.quant import kernels as k; print(k.num_threads())"
    environment = {"PINGJIA_THREADS": "", "OMP_NUM_THREADS": ""}
    assert run_python(code, **environment).stdout.strip() == "1"


def test_loading_them_needs_no_torch() -> None:
    code = "import sys; from pingjia.quant import kernels as k; k.available(); print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


def test_a_library_that_is_not_there_or_of_another_version_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = kernels._load.__wrapped__
    monkeypatch.delenv("PINGJIA_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "path", lambda: tmp_path / "libpingjia.so")
    assert "were not built" in load()
    assert "pip install --editable ." in load()
    (tmp_path / "libpingjia.so").write_bytes(b"no library")
    assert "do not load" in load()


@needs_kernels
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINGJIA_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_VERSION", -1)
    assert "built from other sources" in kernels._load.__wrapped__()


# ---- the C++ itself


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pingjia_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_follow_the_name_of_the_file(build_script: ModuleType) -> None:
    assert "-mavx512vnni" in build_script.flags_for("x/isa_avx512.cpp", "x86_64")
    assert build_script.flags_for("x/isa_avx2.cpp", "AMD64") == build_script.AVX2
    assert build_script.flags_for("x/isa_avx2.cpp", "arm64") == []
    assert build_script.flags_for("x/isa_neondot.cpp", "arm64") == ["-march=armv8.2-a+dotprod"]
    assert build_script.flags_for("x/matmul.cpp", "x86_64") == []


def test_sources_and_headers_go_into_a_source_distribution() -> None:
    assert "recursive-include pingjia/quant/kernels *.h *.cpp" in (ROOT / "MANIFEST.in").read_text()


def compile_driver(
    compiler: str, machine: str, build_script: ModuleType, folder: Path, flags: list[str], link: list[str]
) -> Path:
    """The driver with the sources it needs, each compiled with its instruction set's flags."""
    sources = [SOURCES / f"{name}.cpp" for name in ("team", "layout", "dispatch", "matmul")]
    sources += sorted(SOURCES.glob("isa_*.cpp"))
    common = [compiler, "-std=c++17", "-Wno-maybe-uninitialized", *flags]
    for source in sources:
        own = build_script.flags_for(str(source), machine)
        subprocess.run([*common, *own, "-c", source, "-o", folder / f"{source.stem}.o"], check=True)
    program = folder / "driver"
    objects = sorted(folder.glob("*.o"))
    subprocess.run([*common, f"-I{SOURCES}", DRIVER, *objects, "-pthread", *link, "-o", program], check=True)
    return program


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_random_shapes_under_the_sanitizers(build_script: ModuleType, tmp_path: Path) -> None:
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compile_driver(str(COMPILER), platform.machine(), build_script, tmp_path, flags, [])
    done = subprocess.run([program, "150", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: 150 cases" in done.stdout
    for name in kernels.isa_names() if kernels.available() else []:
        assert f"{name}: 150 cases" in done.stdout


@pytest.mark.skipif(
    ARM_COMPILER is None or ARM is None,
    reason="NEON NOT TESTED: apt-get install g++-aarch64-linux-gnu qemu-user-static (108 MB)",
)
def test_neon_on_an_emulated_processor(build_script: ModuleType, tmp_path: Path) -> None:
    program = compile_driver(str(ARM_COMPILER), "aarch64", build_script, tmp_path, ["-O2"], ["-static"])
    done = subprocess.run([str(ARM), program, "80", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{name}: 80 cases" for name in ("neondot", "neon", "portable")]
