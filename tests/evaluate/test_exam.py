"""Multiple choice: both layouts, choosing by likelihood and by answer, and what is wrong with a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pingjia.cli.main import invoke
from pingjia.errors import DataError
from pingjia.evaluate.exam import (
    Exam,
    difference,
    prompt_of,
    read_letter,
    read_papers,
    sit_by_answer,
    sit_by_likelihood,
)
from pingjia.evaluate.lm_eval import _pieces
from pingjia.types import Completion, Likelihood, Prompt, Usage

CEVAL = "id,question,A,B,C,D,answer,explanation\n"
CMMLU = ",Question,A,B,C,D,Answer\n"


@pytest.fixture
def ceval(tmp_path: Path) -> Path:
    for part, rows in (
        ("dev", '0,一加一等于几？,一,二,三,四,B,"因为"\n'),
        ("val", '0,"首都是哪里，在中国？",上海,北京,广州,深圳,B\n1,二加二等于几？,一,二,三,四,D\n'),
        ("test", "0,没有答案的题,一,二,三,四\n"),
    ):
        (tmp_path / part).mkdir()
        header = CEVAL if part != "test" else "id,question,A,B,C,D\n"
        for subject in ("logic", "law"):
            (tmp_path / part / f"{subject}_{part}.csv").write_text(header + rows, encoding="utf-8")
    return tmp_path


@pytest.fixture
def cmmlu(tmp_path: Path) -> Path:
    for part, answer in (("dev", "A"), ("test", "C")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "anatomy.csv").write_text(
            "\ufeff" + CMMLU + f"0,题目,甲,乙,丙,丁,{answer}\n", encoding="utf-8"
        )
    return tmp_path


class Knows:
    """A Scorer and Generator that prefers the choice whose text is among what it knows."""

    def __init__(self, known: Sequence[str], says: str = "答案是{}。") -> None:
        self.known, self.says = known, says
        self.prompts: list[Prompt] = []

    def likelihoods(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        with_end: bool = True,
        on_done: Callable[[int, Likelihood], None] | None = None,
    ) -> list[Likelihood]:
        assert not with_end
        self.prompts += prompts
        found = [
            Likelihood(math.log(0.7 if self._is_known(p, a) else 0.1), 1, False)
            for p, a in zip(prompts, answers, strict=True)
        ]
        for i, one in enumerate(found):
            if on_done is not None:
                on_done(i, one)
        return found

    def generate(self, prompts: Any, sampling: Any = None, *, on_done: Any = None) -> list[Completion]:
        self.prompts += prompts
        letters = [next((a for a in "ABCD" if self._is_known(p, a)), "?") for p in prompts]
        return [Completion(self.says.format(letter), (), "stop", Usage()) for letter in letters]

    def _is_known(self, prompt: Any, letter: str) -> bool:
        return any(f"{letter}. {text}\n" in prompt[-1].content for text in self.known)


def test_the_layout_of_c_eval(ceval: Path) -> None:
    papers = read_papers(ceval)
    assert [paper.subject for paper in papers] == ["law", "logic"]
    (first, second), (example,) = papers[0].items, papers[0].examples
    assert first.question == "首都是哪里，在中国？"
    assert first.choices == ("上海", "北京", "广州", "深圳")
    assert (first.answer, second.answer, example.answer) == ("B", "D", "B")
    assert first.where.endswith("law_val.csv:2")
    assert len(read_papers(ceval, ["logic"], limit=1)[0].items) == 1


def test_the_layout_of_cmmlu(cmmlu: Path) -> None:
    (paper,) = read_papers(cmmlu)
    assert paper.subject == "anatomy"
    assert [item.answer for item in (*paper.items, *paper.examples)] == ["C", "A"]
    (alone,) = read_papers(cmmlu / "test" / "anatomy.csv")
    assert alone.items[0].question == "题目"


def test_the_prompt_shows_examples_as_turns(ceval: Path) -> None:
    paper = read_papers(ceval)[0]
    turns = prompt_of(paper.items[0], paper.examples)
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[2].content == "B"
    assert turns[3].content == "首都是哪里，在中国？\nA. 上海\nB. 北京\nC. 广州\nD. 深圳\n答案："


@pytest.mark.parametrize("way", [sit_by_likelihood, sit_by_answer])
def test_what_is_known_is_right(ceval: Path, way: Callable[..., Exam]) -> None:
    papers = read_papers(ceval)
    found = way(papers, Knows(["北京"]), 1)
    assert found.chosen[::2] == ("B", "B")
    overall = found.overall()
    assert (overall.mean, overall.count) == (0.5, 4)
    assert found.chance() == 0.25
    assert set(found.subjects()) == {"law", "logic"}
    assert found.mean_of_subjects == 0.5
    everything = way(papers, Knows(["北京", "四"]), 1)
    assert everything.overall().mean == 1
    assert difference(found, everything).mean == 0.5
    with pytest.raises(DataError, match="same questions"):
        difference(found, way(papers, Knows([]), 0))


def test_an_answer_without_a_letter_is_wrong_and_counted(ceval: Path) -> None:
    found = sit_by_answer(read_papers(ceval), Knows(["北京"], says="我不知道"), 0)
    assert found.chosen == ("",) * 4
    assert found.num_unread == 4
    assert found.overall().mean == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("答案：C", "C"), ("选D。", "D"), ("A和B都像，但答案是C", "C"), ("The answer is (D).", "D"),
        ("Apple", ""), ("", ""), ("B. 北京", "B"), ("我认为应该是E", ""), ("答案", ""),
    ],
)  # fmt: skip
def test_the_letter_of_an_answer(answer: str, letter: str) -> None:
    assert read_letter(answer, "ABCD") == letter


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,question,A,B\n0,a,b,c\n", "no column 'answer'"),
        (CEVAL + "0,题,一,二,三,四,E\n", "answer 'E' is none of ABCD"),
        (CEVAL + "0,题,一,,三,四,A\n", "at least two choices"),
        (CEVAL + "0,,一,二,三,四,A\n", "needs a text"),
        ("", "no column 'question'"),
    ],
)
def test_a_file_that_is_no_exam(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_papers(file)
    with pytest.raises(DataError, match=r"no \.csv files"):
        read_papers(tmp_path / "nothing")


def test_the_verb_on_a_real_model(ceval: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["exam", "smollm2", str(ceval), "--out", str(tmp_path / "out"), "--shots", "1", "--subject", "law"]
    assert invoke([*line, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["way"] == "likelihood"
    assert found["overall"]["count"] == 2
    assert all(row["chosen"] in "ABCD" for row in found["questions"])
    assert json.loads((tmp_path / "out" / "exam.json").read_text(encoding="utf-8"))["overall"] == found["overall"]
    assert invoke([*line, "--subject", "nothing"]) == 2
    assert "no subject 'nothing'" in capfd.readouterr().err


@pytest.mark.parametrize("longest", [8, 20, 50, 1000])
def test_a_long_text_is_read_once_in_pieces_that_fit(longest: int) -> None:
    text = "The quick brown fox jumps over the lazy dog and 今天天气很好我们去公园散步吧" * 3
    pieces = _pieces(text, longest)
    assert "".join(piece for _, piece in pieces) == text
    assert all(len(before) + len(piece) <= longest - 2 for before, piece in pieces)
    read = 0
    for before, piece in pieces:
        assert text[:read].endswith(before)
        assert bool(before) == bool(read)
        read += len(piece)


def test_the_harness_reads_our_models() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; the bridge to it is not tried")
    from lm_eval.api.instance import Instance

    from pingjia import Engine
    from pingjia.evaluate.lm_eval import as_harness_model

    engine = Engine("smollm2")
    model = as_harness_model(engine, max_model_len=100)
    asked = [("The capital of France is", " Paris"), ("The capital of France is", " Berlin")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    (paris, _), (berlin, _) = model.loglikelihood(requests)
    assert paris > berlin
    text = "The quick brown fox jumps over the lazy dog and runs away into the forest."
    rolled = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    (rolling,) = model.loglikelihood_rolling(rolled)
    whole = engine.likelihoods([""], [text], with_end=False)[0].logprob
    assert rolling == pytest.approx(whole)
    (in_pieces,) = as_harness_model(engine, max_model_len=40).loglikelihood_rolling(rolled)
    assert in_pieces == pytest.approx(whole, rel=0.4)  # less is known before each piece
    until = Instance("generate_until", {}, ("Count: one, two,", {"until": ["\n"], "max_gen_toks": 5}), 0)
    (said,) = model.generate_until([until])
    assert said
    assert "\n" not in said
