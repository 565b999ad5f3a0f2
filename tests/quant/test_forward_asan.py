"""The compiled forward pass under sanitizers: every buffer exactly as large as its header says."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "pingjia" / "quant" / "kernels"
DRIVER = Path(__file__).with_name("forward_asan.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-g", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]


def flags_for(source: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As setup.py has them, which must not build anything when it is only asked."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: list[str] = module.flags_for(str(source), platform.machine())
    return found


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_prompt_in_pieces_gives_the_bits_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    jobs = [(source, flags_for(source, monkeypatch)) for source in sorted(SOURCES.glob("*.cpp"))]

    def compiled(job: tuple[Path, list[str]]) -> Path:
        target = tmp_path / f"{job[0].stem}.o"
        subprocess.run([str(COMPILER), *FLAGS, *job[1], "-c", job[0], "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, jobs))
    program = tmp_path / "driver"
    subprocess.run([str(COMPILER), *FLAGS, f"-I{SOURCES}", DRIVER, *objects, "-o", program], check=True)
    done = subprocess.run([program, "40", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable done" in done.stdout
