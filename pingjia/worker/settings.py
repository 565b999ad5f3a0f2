"""The recipe section `worker:`. Light: no torch."""

from __future__ import annotations

from pydantic import Field

from pingjia.recipe import Section


class WorkerSettings(Section):
    """When a worker counts as frozen. Times in seconds."""

    frozen_after_s: float = Field(2.0, gt=0.0)
    """A step that takes longer than this, and longer than twenty times what it should at the measured pace, makes the
    worker not ready."""
    unmeasured_s: float = Field(120.0, gt=0.0)
    """What a step may take before any like it was measured, and an adapter to be loaded. A first prompt of 2,048 tokens
    takes ChatGLM-6B minutes on two CPU cores: raise this there."""
    join_s: float = Field(5.0, ge=0.0)
    """How long `stop` waits for a step that does not return before it ends the requests without it."""
