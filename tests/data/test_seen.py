"""Rows that say what an earlier row says."""

from hypothesis import given
from hypothesis import strategies as st

from pingjia.data.seen import Repeat, Seen
from pingjia.types import Example, Message


def _example(text: str, where: str) -> Example:
    return Example((Message("user", text), Message("assistant", "a")), where=where)


def _repeats(rows: list[tuple[str, str]]) -> list[Repeat]:
    seen = Seen()
    for text, where in rows:
        seen.add(_example(text, where))
    return list(seen.repeats())


def test_no_rows_and_one() -> None:
    assert _repeats([]) == []
    assert _repeats([("x", "a:1")]) == []


def test_the_first_is_named_and_the_order_kept() -> None:
    rows = [("x", "a:1"), ("y", "a:2"), ("x", "b:c:7"), ("y", "a:9"), ("x", "b:c:8")]
    assert _repeats(rows) == [Repeat("b:c:7", "a:1"), Repeat("a:9", "a:2"), Repeat("b:c:8", "a:1")]


def test_what_belongs_to_a_row() -> None:
    seen = Seen()
    seen.add(Example((Message("user", "a"), Message("assistant", "b"))[:2], where="f:1", domain="x"))
    seen.add(Example((Message("user", "a"), Message("assistant", "b")), where="f:2", domain="y"))
    seen.add(Example((Message("system", "a"), Message("user", "b")), where="f:3"))
    assert list(seen.repeats()) == [Repeat("f:2", "f:1")]


@given(st.lists(st.sampled_from("abcdefgh"), max_size=60))
def test_the_same_as_a_dictionary(texts: list[str]) -> None:
    rows = [(text, f"f:{number}") for number, text in enumerate(texts)]
    first: dict[str, str] = {}
    expected = [Repeat(where, first[text]) for text, where in rows if first.setdefault(text, where) != where]
    assert _repeats(rows) == expected


def test_a_row_takes_16_bytes() -> None:
    import tracemalloc

    seen = Seen()
    seen.add(_example("0", "f:1"))
    tracemalloc.start()
    for number in range(20_000):
        seen.add(_example(str(number), f"f:{number}"))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 20_000 * 20  # arrays keep some room to grow
