"""A gateway process over a tokenizer of bytes: `python scripted_gateway.py URL PORT LEASE_S`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from pingjia.gateway import create_app, serve
from pingjia.gateway.settings import GatewaySettings

_spec = importlib.util.spec_from_file_location("gateway_fakes", Path(__file__).parents[1] / "gateway" / "fakes.py")
assert _spec is not None
assert _spec.loader is not None
fakes = importlib.util.module_from_spec(_spec)
sys.modules["gateway_fakes"] = fakes
_spec.loader.exec_module(fakes)

if __name__ == "__main__":
    url, port, lease_s = sys.argv[1:]
    settings = GatewaySettings(
        port=int(port), redis_url=url, queue_lease_s=float(lease_s), access_log=False, drain_s=5.0, max_concurrent=2000
    )
    serve(create_app(None, fakes.ByteTokenizer(), settings), settings, on_ready=lambda at: print(at, flush=True))
    assert "torch" not in sys.modules, "the gateway loaded torch"
