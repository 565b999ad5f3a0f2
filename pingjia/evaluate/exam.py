"""Multiple choice: questions from local files as C-Eval and CMMLU lay them out, and how many a model gets right.

A model that says how likely answers are (Scorer) chooses the likeliest letter; a server is asked for the letter.
Figures compare with figures of the same prompt and way alone: `words` below, and `Exam.way`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pingjia.errors import DataError
from pingjia.evaluate.bootstrap import mean_interval
from pingjia.evaluate.report import Score
from pingjia.evaluate.store import write_whole
from pingjia.types import Generator, Message, Sampling, Scorer

Way = Literal["likelihood", "answer"]
LETTERS = "ABCDEFGH"
_PARTS = ("val", "test")  # of C-Eval the test part has no answers, of CMMLU it is the only one beside dev
_ASK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its choices; `answer` is the letter of the right one."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: str
    where: str

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]


@dataclass(frozen=True, slots=True)
class Paper:
    """The questions of one subject, and those whose answers may be shown first (dev)."""

    subject: str
    items: tuple[Item, ...]
    examples: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Exam:
    """What was chosen. `chosen[i]` is the letter for `items[i]`, "" where none could be read: that counts as wrong."""

    name: str
    way: Way
    shots: int
    items: tuple[Item, ...]
    chosen: tuple[str, ...]

    @property
    def rights(self) -> list[float]:
        return [float(item.answer == letter) for item, letter in zip(self.items, self.chosen, strict=True)]

    @property
    def num_unread(self) -> int:
        return self.chosen.count("")

    def overall(self) -> Score:
        """Share of all questions that are right, with its 95 % bootstrap interval."""
        return Score(*mean_interval(self.rights), len(self.items))

    def subjects(self) -> dict[str, Score]:
        """The same by subject, names sorted."""
        found: dict[str, list[float]] = {}
        for item, right in zip(self.items, self.rights, strict=True):
            found.setdefault(item.subject, []).append(right)
        return {name: Score(*mean_interval(rights), len(rights)) for name, rights in sorted(found.items())}

    @property
    def mean_of_subjects(self) -> float:
        """Each subject counts alike, as the published tables have it."""
        scores = self.subjects().values()
        return sum(score.mean for score in scores) / len(scores)

    def chance(self) -> float:
        """What guessing would get right."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: figures, then every question's id with what was chosen and what is right."""
        rows = [
            {"where": i.where, "chosen": c, "answer": i.answer} for i, c in zip(self.items, self.chosen, strict=True)
        ]
        return {
            "v": 1,
            "name": self.name,
            "way": self.way,
            "shots": self.shots,
            "overall": dataclasses.asdict(self.overall()),
            "mean_of_subjects": self.mean_of_subjects,
            "chance": self.chance(),
            "num_unread": self.num_unread,
            "subjects": {name: dataclasses.asdict(score) for name, score in self.subjects().items()},
            "questions": rows,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as JSON, whole or not at all. Raises StorageError."""
        return write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")


def difference(before: Exam, after: Exam) -> Score:
    """after - before, paired by question. Raises DataError where they did not answer the same questions alike."""
    if before.items != after.items or (before.way, before.shots) != (after.way, after.shots):
        raise DataError("two exams compare only with the same questions, examples, and way of answering")
    gained = [b - a for a, b in zip(before.rights, after.rights, strict=True)]
    return Score(*mean_interval(gained), len(gained))


def sit_by_likelihood(
    papers: Sequence[Paper], scorer: Scorer, shots: int, name: str = "", on_done: Callable[[], None] = lambda: None
) -> Exam:
    """The likeliest letter after the question; the first of equals."""
    items = [(paper, item) for paper in papers for item in paper.items]
    prompts = [prompt_of(item, paper.examples[:shots]) for paper, item in items for _ in item.letters]
    letters = [letter for _, item in items for letter in item.letters]
    found = scorer.likelihoods(prompts, letters, with_end=False, on_done=lambda i, one: on_done())
    logprobs = iter([one.logprob for one in found])
    chosen = [max((next(logprobs), -i) for i in range(len(item.letters))) for _, item in items]
    return Exam(name, "likelihood", shots, _only(items), tuple(LETTERS[-i] for _, i in chosen))


def sit_by_answer(
    papers: Sequence[Paper],
    generator: Generator,
    shots: int,
    name: str = "",
    on_done: Callable[[], None] = lambda: None,
) -> Exam:
    """The letter that the answer names first."""
    items = [(paper, item) for paper in papers for item in paper.items]
    prompts = [prompt_of(item, paper.examples[:shots]) for paper, item in items]
    sampling = Sampling(max_tokens=_ASK_TOKENS, temperature=0.0)
    answers = generator.generate(prompts, sampling, on_done=lambda i, one: on_done())
    chosen = tuple(read_letter(a.text, item.letters) for a, (_, item) in zip(answers, items, strict=True))
    return Exam(name, "answer", shots, _only(items), chosen)


def prompt_of(item: Item, examples: Sequence[Item] = ()) -> list[Message]:
    """The question after its examples, each a turn of a conversation."""
    rule = f"下面是关于“{item.subject}”的单项选择题。请只回答正确选项的字母。"
    turns = [Message("system", rule)]
    for example in examples:
        turns += [Message("user", _text(example)), Message("assistant", example.answer)]
    return [*turns, Message("user", _text(item))]


def read_letter(answer: str, letters: str) -> str:
    """The first of `letters` in an answer that stands alone; after 答案 or answer where one of these is said."""
    spoken = re.search(r"(?:答案|选|answer)\D{0,6}?", answer, re.IGNORECASE)
    alone = re.compile(rf"(?<![A-Za-z])([{letters}])(?![A-Za-z])")
    found = (alone.search(answer, spoken.end()) if spoken else None) or alone.search(answer)
    return found[1] if found else ""


def _only(items: Sequence[tuple[Paper, Item]]) -> tuple[Item, ...]:
    return tuple(item for _, item in items)


def _text(item: Item) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(item.letters, item.choices, strict=True)]
    return "\n".join([item.question, *lines, "答案："])


# --- Files


def read_papers(folder: str | os.PathLike[str], subjects: Sequence[str] = (), limit: int | None = None) -> list[Paper]:
    """The papers of a folder with dev/ and val/ or test/, or of a folder of .csv files, or of one such file.

    subjects: these alone. limit: at most so many questions of each, from the first. Raises DataError naming file and
    line, or saying what was found instead.
    """
    files = _files(Path(folder))
    unknown = sorted(set(subjects) - set(files))
    if unknown:
        raise DataError(f"{folder}: no subject {unknown[0]!r}; there are {', '.join(sorted(files)[:8])} ...")
    chosen = {name: files[name] for name in sorted(files) if not subjects or name in subjects}
    return [_paper(name, file, examples, limit) for name, (file, examples) in chosen.items()]


def _files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """By subject: the file of questions, and that of the examples."""
    if folder.is_file():
        return {folder.stem: (folder, None)}
    part = next((folder / name for name in _PARTS if (folder / name).is_dir()), folder)
    dev = folder / "dev"
    found = {_subject(file): file for file in sorted(part.glob("*.csv"))}
    if not found:
        raise DataError(
            f"{folder}: no .csv files here, nor in val/ or test/; give a folder laid out as C-Eval or CMMLU"
        )
    examples = {_subject(file): file for file in dev.glob("*.csv")} if dev.is_dir() and part != folder else {}
    return {name: (file, examples.get(name)) for name, file in found.items()}


def _subject(file: Path) -> str:
    return re.sub(r"_(?:dev|val|test)$", "", file.stem)


def _paper(subject: str, file: Path, examples: Path | None, limit: int | None) -> Paper:
    shown = tuple(_items(subject, examples)) if examples is not None else ()
    return Paper(subject, tuple(_items(subject, file))[:limit], shown)


def _items(subject: str, file: Path) -> Iterator[Item]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            _check_columns(file, names)
            reader.fieldnames = names
            for row in reader:
                yield _item(subject, row, f"{file}:{reader.line_num}")
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: not UTF-8 at byte {e.start}; save it as UTF-8") from None
    except (OSError, csv.Error) as e:
        raise DataError(f"{file}: cannot be read: {e}") from None


def _check_columns(file: Path, names: Sequence[str]) -> None:
    missing = [name for name in ("question", "a", "b", "answer") if name not in names]
    if missing:
        hint = "; C-Eval's test part holds no answers, use val/" if missing == ["answer"] else ""
        raise DataError(f"{file}: no column {missing[0]!r} (found: {', '.join(names) or 'nothing'}){hint}")


def _item(subject: str, row: Mapping[str, Any], where: str) -> Item:
    choices = [str(row.get(letter.lower()) or "").strip() for letter in LETTERS]
    choices = choices[: next((i for i, text in enumerate(choices) if not text), len(choices))]
    answer = str(row.get("answer") or "").strip().upper()
    question = str(row.get("question") or "").strip()
    if not question or len(choices) < 2:
        raise DataError(f"{where}: a question needs a text and at least two choices")
    if answer not in LETTERS[: len(choices)] or len(answer) != 1:
        raise DataError(f"{where}: answer {answer!r} is none of {LETTERS[: len(choices)]}")
    return Item(subject, question, tuple(choices), answer, where)
