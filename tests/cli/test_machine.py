"""Facts about a machine, with vendors' commands and cgroup files put in place by the tests."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pingjia.cli import machine

NVIDIA = "NVIDIA GeForce RTX 4090, 24564, 23456, 550.54.14"
NPU_TABLE = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.1                   Version: 24.1.1                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B4               | OK            | 88.2        30                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          26838/ 32768         |
+===========================+===============+====================================================+
| 7     310P3               | OK            | NA          41                0    / 0             |
| 0     3                   | 0000:81:00.0  | 0           1600 / 21527                           |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| 0       0                 | 3621          | python                   | 26838                   |
+===========================+===============+====================================================+
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script on a PATH that holds nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)

    def make(name: str, script: str) -> Path:
        file = folder / name
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return file

    return make


def test_this_machine_is_described() -> None:
    found = machine.describe()
    assert found.python == platform.python_version()
    assert found.cpu_model
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.memory_bytes > 0
    assert found.memory_available_bytes is None or 0 <= found.memory_available_bytes <= found.memory_bytes
    assert found.packages["numpy"] is not None
    assert json.loads(json.dumps(found.to_dict()))["packages"]["pydantic"] == found.packages["pydantic"]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells its facts in /proc")
def test_linux_figures_are_the_kernels_own() -> None:
    found = machine.describe()
    assert found.cpu_model in Path("/proc/cpuinfo").read_text() or found.cpu_model == platform.machine()
    total_kb = int(Path("/proc/meminfo").read_text().split()[1])
    assert found.memory_bytes <= total_kb * 1024
    assert found.usable_cores <= len(os.sched_getaffinity(0))


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    found = machine.describe(tmp_path / "runs" / "new")
    assert found.disk_path == str(tmp_path)
    assert found.disk_free_bytes > 0


def test_nothing_it_names_is_imported() -> None:
    code = "import sys; from pingjia.cli.machine import describe; describe(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "fastapi", "jieba", "matplotlib"} & set(done.stdout.split())


def test_read_bandwidth_is_a_plausible_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROBE_BYTES", 64 * 2**20)
    assert 0.05 < machine.measure_read_bandwidth(repeats=3) < 20_000


# --- instruction sets


@pytest.mark.parametrize(
    ("text", "architecture", "expected"),
    [
        ("flags: fpu avx2 avx512f avx512_vnni amx_tile\n", "x86_64", ("avx2", "avx512f", "avx512_vnni", "amx")),
        ("flags\t\t: fpu avx avx2 avx_vnni\n", "x86_64", ("avx2", "avx_vnni")),
        ("flags\t\t: fpu sse2 avx\n", "x86_64", ()),
        ("Features\t: fp asimd evtstrm aes asimddp\n", "aarch64", ("neon",)),
        ("Features\t: half thumb fastmult vfp neon\n", "armv7l", ("neon",)),
        ("", "arm64", ("neon",)),
    ],
)  # fmt: skip
def test_instruction_sets(monkeypatch, command, text: str, architecture: str, expected: tuple[str, ...]) -> None:
    read = machine._read
    monkeypatch.setattr(machine, "_read", lambda path: text if path == Path("/proc/cpuinfo") else read(path))
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert machine.instruction_sets() == expected


def test_instruction_sets_and_cpu_of_an_intel_mac(monkeypatch, command) -> None:
    monkeypatch.setattr(machine, "_read", lambda path: "")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    command(
        "sysctl",
        'case "$2" in *brand_string) echo "Intel Core i7";; *leaf7_features) echo "BMI1 AVX2 AVX512F";; '
        "*cpu.features) echo SSE AVX1.0;; hw.physicalcpu) echo 4;; esac",
    )
    assert machine.instruction_sets() == ("avx2", "avx512f")
    assert machine.cpu_model() == "Intel Core i7"


# --- accelerators


def test_no_accelerator_commands(command) -> None:
    assert machine.nvidia_gpus() == []
    assert machine.ascend_npus() == []


def test_nvidia(command) -> None:
    command("nvidia-smi", f'echo "{NVIDIA}, 8.9"; echo "{NVIDIA}, 8.9"')
    first, second = machine.nvidia_gpus()
    assert first == second
    assert first == machine.Gpu(
        "nvidia", "NVIDIA GeForce RTX 4090", 24564 * 2**20, 23456 * 2**20, "550.54.14", "8.9"
    )  # fmt: skip


def test_an_old_nvidia_driver_that_refuses_a_field(command) -> None:
    command("nvidia-smi", f'case "$1" in *compute_cap*) exit 2;; esac; echo "{NVIDIA}"')
    (gpu,) = machine.nvidia_gpus()
    assert (gpu.driver, gpu.compute_capability) == ("550.54.14", None)


def test_nvidia_memory_that_is_not_told(command) -> None:
    command("nvidia-smi", 'echo "GB10, [N/A], [N/A], 580.95.05, [N/A]"')
    (gpu,) = machine.nvidia_gpus()
    assert (gpu.name, gpu.memory_bytes, gpu.free_bytes, gpu.compute_capability) == ("GB10", None, None, None)


@pytest.mark.parametrize("script", ["exit 9", 'echo "Failed to initialize NVML: Driver/library version mismatch"', ""])
def test_a_broken_driver_is_no_gpu(command, script: str) -> None:
    command("nvidia-smi", script)
    command("npu-smi", script)
    assert machine.nvidia_gpus() == []
    assert machine.ascend_npus() == []


def test_a_driver_that_hangs_is_no_gpu(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_COMMAND_TIMEOUT_S", 0.2)
    command("nvidia-smi", "exec /bin/sleep 30")
    assert machine.nvidia_gpus() == []


def test_ascend(command, tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.write_text(NPU_TABLE)
    command("npu-smi", f'exec /bin/cat "{table}"')
    assert machine.ascend_npus() == [
        machine.Gpu("ascend", "910B4", 32768 * 2**20, (32768 - 26838) * 2**20, "24.1.1"),
        machine.Gpu("ascend", "310P3", 21527 * 2**20, (21527 - 1600) * 2**20, "24.1.1"),
    ]


# --- compiler


def test_no_compiler(command) -> None:
    assert machine.compiler() is None


def test_the_compiler_found_first(command, monkeypatch: pytest.MonkeyPatch) -> None:
    command("clang++", 'echo "clang 17"')
    assert machine.compiler() == "clang 17"
    command("g++", 'echo "g++ 12.2.0"; echo "Copyright"')
    assert machine.compiler() == "g++ 12.2.0"
    command("mine", 'test "$1 $2" = "--wrap --version" && echo "mine 1"')
    monkeypatch.setenv("CXX", "mine --wrap")
    assert machine.compiler() == "mine 1"


@pytest.mark.parametrize("value", ["no-such-compiler", "'unclosed", "", " "])
def test_a_cxx_that_names_nothing_is_passed_over(command, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CXX", value)
    command("g++", 'echo "g++ 12.2.0"')
    assert machine.compiler() == "g++ 12.2.0"


# --- cgroups


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        pytest.param(
            "0::/a/b",
            {"a/b/memory.max": "max", "a/memory.max": "1000", "a/memory.current": "600",
             "a/memory.stat": "anon 1\ninactive_file 200"},
            [(1000, 400)],
            id="v2, a limit on the group above, file cache not counted",
        ),
        pytest.param("0::/a", {"a/memory.max": "1000", "a/memory.current": "0"}, [(1000, 0)], id="v2, nothing used"),
        pytest.param(
            "0::/host/path", {"memory.max": "500", "memory.current": "100"}, [(500, 100)], id="v2, path of the host"
        ),
        pytest.param(
            "5:cpu,cpuacct:/\n4:memory:/docker/x",
            {"memory/docker/x/memory.limit_in_bytes": "2000", "memory/docker/x/memory.usage_in_bytes": "900",
             "memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 300",
             "memory/memory.limit_in_bytes": "9223372036854771712"},
            [(2000, 600)],
            id="v1",
        ),
        pytest.param("4:cpuset:/", {}, [], id="no memory controller"),
        pytest.param("", {}, [], id="no cgroups"),
    ],
)  # fmt: skip
def test_memory_limits(tmp_path: Path, membership: str, files: dict[str, str], expected: list) -> None:
    root = write(tmp_path / "cgroup", {"x": "", **files})
    (tmp_path / "self").write_text(membership)
    assert list(machine.memory_limits(root, tmp_path / "self")) == expected


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a", {"a/cpu.max": "150000 100000", "cpu.max": "max 100000"}, [1.5]),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, [4.0]),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, []),
        ("0::/", {}, []),
    ],
)
def test_cpu_quotas(tmp_path: Path, membership: str, files: dict[str, str], expected: list[float]) -> None:
    root = write(tmp_path / "cgroup", {"x": "", **files})
    (tmp_path / "self").write_text(membership)
    assert list(machine.cpu_quotas(root, tmp_path / "self")) == expected


def test_limits_shrink_what_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limits", lambda: iter([(10**9, 9 * 10**8), (2 * 10**9, 0)]))
    monkeypatch.setattr(machine, "cpu_quotas", lambda: iter([0.5]))
    if machine.memory()[1] is not None:
        assert machine.memory() == (10**9, 10**8)
    assert machine.usable_cores() == 1
