"""Questions to ask and a generator that answers from a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pingjia.types import Completion, Example, Message, Prompt, Sampling, Usage

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"


class Scripted:
    """Answers the prompts with the given texts, in turn; remembers what it was asked."""

    def __init__(self, answers: Sequence[str], *, finish_reason: str = "stop") -> None:
        self.answers = list(answers)
        self.finish_reason = finish_reason
        self.prompts: list[Prompt] = []
        self.sampling: Sampling | Sequence[Sampling] | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_done: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        self.prompts, self.sampling = list(prompts), sampling
        done = [Completion(text, (), self.finish_reason, Usage(7, 3, 2)) for text in self.answers[: len(prompts)]]
        for i, completion in enumerate(done):
            if on_done is not None:
                on_done(i, completion)
        return done


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def ask() -> Callable[..., Example]:
    def make(prompt: str, response: str, **fields: object) -> Example:
        return Example((Message("user", prompt), Message("assistant", response)), **fields)

    return make


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the repository: its real texts are not here to be compared")
    return SHARED
