"""The public HTTP API: OpenAI's endpoints, the ChatGLM-6B demo's endpoint, health and metrics. Never imports torch.

One request goes app (middleware) -> chat/completions/demo (what was asked) -> reply (while the client stays) ->
service (slot, prompt, account) -> answer (the backend's chunks) -> sse or JSON. `docs/serve.md` is the user's side.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["GatewaySettings", "check_port", "create_app", "hash_key", "preflight", "serve"]

if TYPE_CHECKING:
    from pingjia.gateway.app import create_app
    from pingjia.gateway.auth import hash_key
    from pingjia.gateway.server import check_port, preflight, serve
    from pingjia.gateway.settings import GatewaySettings

_HOMES = {
    "GatewaySettings": "settings",
    "check_port": "server",
    "create_app": "app",
    "hash_key": "auth",
    "preflight": "server",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that reading the settings (every `pingjia --help`) does not import FastAPI.
    if name not in _HOMES:
        raise AttributeError(f"module 'pingjia.gateway' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pingjia.gateway.{_HOMES[name]}"), name)
