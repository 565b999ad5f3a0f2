"""What can be set about a worker. Light: no torch."""

from __future__ import annotations

from pydantic import Field

from pingjia.recipe import Section


class WorkerSettings(Section):
    """When a worker counts as frozen. Times in seconds."""

    frozen_after_s: float = Field(120.0, gt=0.0)
    """A step that takes longer makes the worker not ready. A whole 2,048-token prompt of ChatGLM-6B, which cannot be
    cut, takes minutes on two CPU cores: raise this there."""
    join_s: float = Field(5.0, ge=0.0)
    """How long `stop` waits for a step that does not return before it ends the requests without it."""
