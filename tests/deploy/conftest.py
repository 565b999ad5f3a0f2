"""The gateway's test server, under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).parents[1] / "gateway" / "conftest.py"
_spec = importlib.util.spec_from_file_location("conftest_of_gateway", _file)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["conftest_of_gateway"] = _module
_spec.loader.exec_module(_module)
