"""POST /: the API of ChatGLM-6B's own demo server, so that what was written for it goes on working."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from pingjia.gateway.ask import Ask
from pingjia.gateway.bodies import DemoBody
from pingjia.gateway.responses import DemoAnswer
from pingjia.gateway.service import Service
from pingjia.types import Completion, Message, Sampling, Usage

# The defaults of the published demo and of the model's chat function.
_MAX_LENGTH = 2048
_TOP_P = 0.7
_TEMPERATURE = 0.95
_TOP_K = 50


def understand(body: DemoBody, service: Service) -> Ask:
    """The body as an Ask. Raises RequestError naming the field."""
    turns = [
        Message(role, text)
        for pair in body.history or ()
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return Ask(
        id=f"demo-{uuid.uuid4().hex}",
        card=service.card(body.model),
        prompts=((*turns, Message("user", body.prompt)),),
        sampling=Sampling(
            temperature=_TEMPERATURE if body.temperature is None else body.temperature,
            top_p=_TOP_P if body.top_p is None else body.top_p,
            top_k=_TOP_K,
        ),
        max_total=body.max_length or _MAX_LENGTH,
        prompt_field="prompt",
        max_field="max_length",
    )


class DemoShape:
    """Writes one answer of the demo API."""

    def __init__(self, body: DemoBody) -> None:
        self._body = body

    def whole(self, completions: Sequence[Completion], usage: Usage) -> DemoAnswer:
        text = completions[0].text
        return DemoAnswer(
            response=text,
            history=[*(self._body.history or []), [self._body.prompt, text]],
            status=200,
            time=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
