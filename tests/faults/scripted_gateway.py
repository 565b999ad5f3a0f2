"""A gateway process over a tokenizer of bytes: `python scripted_gateway.py URL PORT LEASE_S [LEDGER [MAX_FILE_BYTES]]`.

MAX_FILE_BYTES: no file may grow larger, as on a disk that is full.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path

from pingjia.gateway import create_app, serve
from pingjia.gateway.settings import GatewaySettings
from pingjia.ledger import Ledger

_spec = importlib.util.spec_from_file_location("gateway_fakes", Path(__file__).parents[1] / "gateway" / "fakes.py")
assert _spec is not None
assert _spec.loader is not None
fakes = importlib.util.module_from_spec(_spec)
sys.modules["gateway_fakes"] = fakes
_spec.loader.exec_module(fakes)

if __name__ == "__main__":
    url, port, lease_s, ledger, limit, *_ = [*sys.argv[1:], "", ""]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    settings = GatewaySettings(
        port=int(port), redis_url=url, queue_lease_s=float(lease_s), access_log=False, drain_s=5.0, max_concurrent=2000
    )
    app = create_app(None, fakes.ByteTokenizer(), settings, ledger=Ledger(ledger) if ledger else None)
    serve(app, settings, on_ready=lambda at: print(at, flush=True))
    assert "torch" not in sys.modules, "the gateway loaded torch"
