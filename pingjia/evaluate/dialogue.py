"""Open questions of one or several turns, and what an assistant says to them. Nothing here says how good it is.

Facts that can be checked word for word are `run.py`'s; here are questions that only a reader can mark.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pingjia.errors import DataError
from pingjia.types import Generator, Message, Sampling, Usage

BUILTIN = "dialogue_80"
OnAnswer = Callable[[], None]
_KEYS = {"id", "category", "lang", "system", "turns", "guide"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: the user's `turns`, one after another, each after the answer to the one before.

    `guide`: what a good answer has, for whoever marks it. `where` is "file:line".
    """

    id: str
    turns: tuple[str, ...]
    category: str = "general"
    lang: str = "zh"
    system: str = ""
    guide: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question with one answer to each of its turns. `num_cut`: answers that ran into the limit of tokens."""

    question: Question
    answers: tuple[str, ...]
    num_cut: int = 0
    usage: Usage = Usage()  # noqa: RUF009  frozen

    @property
    def num_chars(self) -> int:
        """Characters of all answers, whitespace left out."""
        return sum(len("".join(answer.split())) for answer in self.answers)

    def with_answers(self, answers: Sequence[str]) -> Dialogue:
        """The same question, answered otherwise."""
        return Dialogue(self.question, tuple(answers))


def read_questions(name: str = BUILTIN) -> list[Question]:
    """The questions of a JSONL file, or the packaged 80. Raises DataError naming the line."""
    if name == BUILTIN:
        text = resources.files("pingjia.evaluate").joinpath(f"{BUILTIN}.jsonl").read_text(encoding="utf-8")
    else:
        text = _read(name)
    questions = [_question(raw, where) for raw, where in _rows(text, name)]
    _check(questions, name)
    return questions


def ask(
    questions: Sequence[Question], assistant: Generator, sampling: Sampling, on_answer: OnAnswer = lambda: None
) -> list[Dialogue]:
    """Put every question, turn by turn; the n-th turns of all questions are asked together."""
    done = [Dialogue(question, ()) for question in questions]
    for turn in range(max((len(question.turns) for question in questions), default=0)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        prompts = [_prompt(done[i]) for i in asked]
        answers = assistant.generate(prompts, sampling, on_done=lambda index, answer: on_answer())
        for i, answer in zip(asked, answers, strict=True):
            old = done[i]
            cut = old.num_cut + (answer.finish_reason != "stop")
            usage = _added(old.usage, answer.usage)
            done[i] = Dialogue(old.question, (*old.answers, answer.text), cut, usage)
    return done


def read_answers(path: str | os.PathLike[str], questions: Sequence[Question]) -> list[Dialogue]:
    """Answers given elsewhere: JSONL rows {"id", "answers": [...]}, one for each question, in any order.

    Raises DataError for a question without its answers: a quality over the rest would be another quality.
    """
    found = {str(raw.get("id")): (raw.get("answers"), where) for raw, where in rows_of_file(path)}
    missing = [question.id for question in questions if question.id not in found]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(questions)} questions have no answers, first {missing[0]!r}; "
            'each needs a line {"id": ..., "answers": [one per turn]}'
        )
    return [Dialogue(question, _answers(question, *found[question.id])) for question in questions]


def answer_lines(dialogues: Iterable[Dialogue]) -> str:
    """Dialogues as `read_answers` reads them."""
    rows = ({"id": d.question.id, "answers": list(d.answers)} for d in dialogues)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of_file(path: str | os.PathLike[str]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The JSON objects of a JSONL file, each with its "file:line". Raises DataError for a line that is none."""
    return _rows(_read(path), str(path))


def _prompt(dialogue: Dialogue) -> list[Message]:
    question = dialogue.question
    messages = [Message("system", question.system)] if question.system else []
    for turn, answer in zip(question.turns, dialogue.answers, strict=False):
        messages += [Message("user", turn), Message("assistant", answer)]
    return [*messages, Message("user", question.turns[len(dialogue.answers)])]


def _added(one: Usage, other: Usage) -> Usage:
    return Usage(
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        completion_tokens=one.completion_tokens + other.completion_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
    )


def _read(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from None


def _rows(text: str, name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: not JSON ({e})") from None
        if not isinstance(raw, dict):
            raise DataError(f"{where}: a line is one JSON object, not a {type(raw).__name__}")
        yield raw, where


def _question(raw: Mapping[str, Any], where: str) -> Question:
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; a question has {', '.join(sorted(_KEYS))}")
    turns = raw.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise DataError(f"{where}: turns: a list of at least one text that is not blank")
    words = {key: raw[key] for key in _KEYS - {"turns"} if key in raw}
    for key, value in words.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key}: a text, not a {type(value).__name__}")
    return Question(turns=tuple(turns), where=where, **{"id": where, **words})


def _check(questions: Sequence[Question], name: str) -> None:
    if not questions:
        raise DataError(f"{name}: no questions; each line is one question with its turns")
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(f"{question.where}: id {question.id!r} is also that of {seen[question.id]}; name it anew")
        seen[question.id] = question.where


def _answers(question: Question, answers: Any, where: str) -> tuple[str, ...]:
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{where}: answers: a list of texts, one per turn")
    if len(answers) != len(question.turns):
        raise DataError(f"{where}: {len(answers)} answer(s) to the {len(question.turns)} turn(s) of {question.id!r}")
    return tuple(answers)
