"""An engine behind its gateway for the length of a trial: a free port of this machine, no keys, no access log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pingjia.errors import EngineError

if TYPE_CHECKING:
    from pingjia import Engine

_START_S = 60.0


@contextmanager
def trial_server(engine: Engine, **settings: Any) -> Iterator[str]:
    """The URL. `settings` are of the gateway. Raises EngineError when it does not start.

    The engine stops with the context; the thread that listens ends with the process.
    """
    from pingjia import gateway
    from pingjia.worker import Worker

    worker = Worker(engine)
    worker.start()
    try:
        chosen = gateway.GatewaySettings(port=0, access_log=False, api_keys_env="PINGJIA_NO_KEYS", **settings)
        app = gateway.create_app(worker, engine.tokenizer, chosen)
        ready, urls = threading.Event(), list[str]()

        def up(url: str) -> None:
            urls.append(url)
            ready.set()

        threading.Thread(target=gateway.serve, args=(app, chosen), kwargs={"on_ready": up}, daemon=True).start()
        if not ready.wait(_START_S):
            raise EngineError(f"the gateway did not start within {_START_S:g} s")
        yield urls[0]
    finally:
        worker.stop()
