"""What an operator's restart command does to a stub replica: python restart.py DIRECTORY NAME ['{"version": "2"}'].

SIGTERM, wait for its end, start it again, with other settings if they are given. Its note says who it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(directory: Path, name: str, other: dict[str, object]) -> None:
    note = directory / f"{name}.json"
    told = json.loads(note.read_text())
    _end(told["pid"])
    argument = json.dumps({**json.loads(told["told"]), **other})
    stub = Path(__file__).with_name("stub.py")
    with open(told["log"], "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(stub), argument], stdout=log, stderr=log, start_new_session=True
        )
    note.write_text(json.dumps({**told, "pid": process.pid, "told": argument}))


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":  # a zombie is its parent's to bury
            time.sleep(0.05)
    except (ProcessLookupError, FileNotFoundError):
        pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
