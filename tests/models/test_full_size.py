"""benchmarks/full_size.py on a miniature: the script runs, and its figures are about what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "full_size.py"


@pytest.mark.parametrize(("bits", "flags"), [(4, []), (8, []), (4, ["--float-tables"])])
def test_the_script_builds_runs_and_tunes(bits: int, flags: list[str], tmp_path: Path) -> None:
    out, directory = tmp_path / "result.json", tmp_path / "network"
    command = [
        sys.executable,
        SCRIPT,
        "--tiny",
        "--bits",
        str(bits),
        "--out",
        out,
        "--directory",
        directory,
        "--keep",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == json.loads(out.read_text())
    linears = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128)
    table = 130528 * 64
    assert facts["num_weights"] == pytest.approx(linears + table, rel=0.001)
    tables_bytes = table * bits / 8 + 4 * 130528 if not flags else 2 * table
    assert facts["weight_bytes"] == pytest.approx(linears * bits / 8 + tables_bytes, rel=0.005)
    assert facts["file_bytes"] == sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    assert facts["trainable"] == 2 * 16 * (64 + 192)
    assert facts["tensors_changed"] == facts["tensors_trained"] == 4
    assert facts["imports_bytes"] < facts["loaded_bytes"] <= facts["load_peak_bytes"]
