"""The learning mask, apart from any vocabulary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pingjia.chat.tokenizer import learn_answers
from pingjia.errors import ModelError

STOP = frozenset({0})
plain = st.lists(st.integers(1, 9), max_size=5)


def test_answer_and_end_are_learnt_and_the_rest_is_read() -> None:
    encoded = learn_answers([5, 5], [[1, 2, 0, 7, 7], [3, 0, 9]], STOP, "f:1")
    assert encoded.ids == (5, 5, 1, 2, 0, 7, 7, 3, 0)
    assert encoded.learn == (False, False, True, True, True, False, False, True, True)
    assert encoded.where == "f:1"
    assert encoded.num_learnt == 5


def test_no_end_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"f:1: .*none of the stop tokens \[0\]"):
        learn_answers([5], [[1, 0], [2, 3]], STOP, "f:1")


@given(plain, st.lists(st.tuples(plain, plain), min_size=1, max_size=4))
def test_every_answer_is_learnt_once(prompt: list[int], turns: list[tuple[list[int], list[int]]]) -> None:
    encoded = learn_answers(prompt, [[*answer, 0, *between] for answer, between in turns], STOP)
    learnt = [i for i, learn in zip(encoded.ids, encoded.learn, strict=True) if learn]
    assert learnt == [i for answer, _ in turns for i in [*answer, 0]]
    assert not any(encoded.learn[: len(prompt)])
    assert encoded.ids[-1] == 0


def test_answers_that_are_not_wanted_are_read() -> None:
    encoded = learn_answers([5], [[1, 0, 7], [2, 7], [3, 0]], STOP, wanted=[True, False, True])
    assert encoded.ids == (5, 1, 0, 7, 2, 7, 3, 0)  # what is not learnt needs no end
    assert encoded.learn == (False, True, True, False, False, False, True, True)
