"""An example as the model reads it: every token, whole characters, and what is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pingjia.chat import load_tokenizer
from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.rendered import Piece, render_example
from pingjia.errors import ModelError
from pingjia.types import Encoded, Example, Message


def learnt_text(pieces: list[Piece]) -> str:
    return "".join(p.text for p in pieces if p.learnt and not p.special)


def test_what_is_learnt_is_marked_and_special_tokens_have_names(smollm2: Tokenizer) -> None:
    encoded = smollm2.encode_example(
        Example((Message("user", "冰箱🧊保修多久？"), Message("assistant", "整机\n三年。龘")))
    )
    pieces = render_example(encoded, smollm2)
    assert learnt_text(pieces) == "整机\n三年。龘"
    assert "".join(p.text for p in pieces if not p.special) == smollm2.decode(encoded.ids)
    assert pieces[0] == Piece("<|im_start|>", False, special=True)
    assert pieces[-1] == Piece("<|im_end|>", True, special=True)  # that it ends is learnt, too


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.text(st.characters(codec="utf-8"), min_size=1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_token_is_lost_and_no_character_broken(smollm2: Tokenizer, question: str, answer: str) -> None:
    encoded = smollm2.encode_example(Example((Message("user", question), Message("assistant", answer))))
    pieces = render_example(encoded, smollm2)
    assert sum(p.num_tokens for p in pieces) == len(encoded.ids)
    assert sum(p.num_tokens for p in pieces if p.learnt) == encoded.num_learnt
    assert "".join(p.text for p in pieces if not p.special) == smollm2.decode(encoded.ids)
    assert learnt_text(pieces) == smollm2.decode([i for i, on in zip(encoded.ids, encoded.learn, strict=True) if on])


def test_a_box_is_a_token_or_a_character(smollm2: Tokenizer) -> None:
    ids = tuple(smollm2.encode("opening hours 🧊"))
    pieces = render_example(Encoded(ids, (True,) * len(ids)), smollm2)
    assert [p.text for p in pieces[:2]] == ["opening", " hours"]
    assert pieces[-1].text.endswith("🧊")
    assert pieces[-1].num_tokens > 1


def test_no_box_reaches_into_what_is_learnt(smollm2: Tokenizer) -> None:
    first, *rest = smollm2.encode("龘")
    assert rest
    pieces = render_example(Encoded((first, *rest), (False, *(True for _ in rest))), smollm2)
    assert {p.learnt for p in pieces} == {False, True}
    assert [p.num_tokens for p in pieces if not p.learnt] == [1]
    assert "\ufffd" in pieces[0].text


def test_half_a_character_at_the_end_is_shown_as_broken(smollm2: Tokenizer) -> None:
    ids = tuple(smollm2.encode("龘"))[:-1]
    (piece,) = render_example(Encoded(ids, (True,) * len(ids)), smollm2)
    assert piece.text.startswith("\ufffd")
    assert piece.num_tokens == len(ids)


def test_nothing_is_nothing(smollm2: Tokenizer) -> None:
    assert render_example(Encoded((), ()), smollm2) == []


@pytest.mark.parametrize(("name", "opening"), [("tiny_v1_chat", "[gMASK]<sop>"), ("tiny_v2", "[gMASK]<sop>")])
def test_sentencepiece_keeps_its_spaces(name: str, opening: str) -> None:
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "chatglm" / name
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as e:
        pytest.skip(f"public model files are needed: {e}")
    example = Example((Message("user", "How are you?"), Message("assistant", "I am fine, 谢谢。\n再见")))
    encoded = tokenizer.encode_example(example)
    pieces = render_example(encoded, tokenizer)
    assert learnt_text(pieces) == tokenizer.decode([i for i, on in zip(encoded.ids, encoded.learn, strict=True) if on])
    assert "I am fine" in learnt_text(pieces)
    assert "".join(p.text for p in pieces if p.special).startswith(opening)
    assert sum(p.num_tokens for p in pieces) == len(encoded.ids)
