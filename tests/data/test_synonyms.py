"""Questions worded with synonyms: what may be replaced is, the rest stands, and it is the same every time."""

from pathlib import Path

import pytest

from pingjia.data.augment import Refusal, Task, normal
from pingjia.data.read import read_examples
from pingjia.data.spans import breach, protected_spans
from pingjia.data.synonyms import Synonyms, load_thesaurus
from pingjia.errors import UserError
from pingjia.script import count_han

LISTS = sorted((Path(__file__).resolve().parents[2] / "pingjia" / "data").glob("synonyms_*.tsv"))


@pytest.fixture(scope="module")
def synonyms() -> Synonyms:
    return Synonyms(1.0)


def _worded(synonyms: Synonyms, text: str, *facts: str, copy: int = 1, key: str = "k") -> str | Refusal:
    return synonyms.make([Task(text, facts, key, copy)])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("冰箱保修多久？", "冰箱保修多长时间？"),
        ("安装怎么改约？", {"安装如何改约？", "安装怎样改约？"}),
        ("咋办", "怎么办"),
        ("Can I return it?", "Could I return it?"),
        ("can I return it?", "could I return it?"),
        ("I want to pay", {"I would like to pay", "I'd like to pay"}),
        ("Where is the fridge?", "Where is the refrigerator?"),
        ("It’s delicious", "It’s tasty"),
    ],
)
def test_a_synonym_takes_the_place(synonyms: Synonyms, text: str, expected: str | set[str]) -> None:
    assert _worded(synonyms, text) in ({expected} if isinstance(expected, str) else expected)


@pytest.mark.parametrize(
    "text",
    [
        "它怎么变白了？",  # why, not how
        "怎么不行",  # no full verb follows
        "你怎么了",
        "我叫番茄，《多久》怎么样",
        "“多久”",
        "型号KX-200",
        "She had an additional egg and ate not often",
        "I bought a huge, tastier one",
        "冰箱：保修多久",  # what stands after the colon is material
        "",
        "？",
        "12345",
    ],
)
def test_what_must_stay_stays(synonyms: Synonyms, text: str) -> None:
    worded = _worded(synonyms, text)
    if isinstance(worded, str):
        assert breach(text, protected_spans(text), worded) is None
        assert not {"如何变白", "如何不行", "多长时间", "a enormous"} & {p for p in _pieces(worded)}
    else:
        assert worded.rule == "no_synonym"


def _pieces(text: str) -> list[str]:
    return [text[i : i + n] for n in (4, 10) for i in range(len(text))]


def test_the_article_still_fits(synonyms: Synonyms) -> None:
    assert isinstance(_worded(synonyms, "a huge box"), Refusal)  # "a enormous box"
    assert _worded(synonyms, "the huge box") == "the enormous box"


def test_no_negation_is_strengthened(synonyms: Synonyms) -> None:
    assert isinstance(_worded(synonyms, "almost never"), Refusal)
    assert _worded(synonyms, "almost done") == "nearly done"


def test_a_fact_is_not_replaced(synonyms: Synonyms) -> None:
    assert _worded(synonyms, "运费多少", "运费") == Refusal(
        "no_synonym", "no word of the thesaurus can be replaced in it"
    )
    assert _worded(synonyms, "运费多少") == "邮费多少"


def test_the_longest_phrase_wins(synonyms: Synonyms) -> None:
    assert _worded(synonyms, "会员积分怎么用") == "会员积分如何使用"


def test_no_new_word_arises_at_the_seam(tmp_path: Path) -> None:
    """北京 before 大学 would be read as a university."""
    words = tmp_path / "words.tsv"
    words.write_text("起身\t北京\n", encoding="utf-8")
    assert _worded(Synonyms(1.0, words), "起身吃饭") == "北京吃饭"
    assert isinstance(_worded(Synonyms(1.0, words), "起身大学"), Refusal)


def test_the_same_seed_the_same_words() -> None:
    text = "请问您好，目前购买的商品因为故障，怎么办理退货，多久能退款？"
    tasks = [Task(text, (), f"{i}", 1) for i in range(20)]
    first, second = Synonyms(0.3).make(tasks), Synonyms(0.3).make(tasks)
    assert first == second
    assert len(set(first)) > 3


def test_copies_of_one_row_differ(synonyms: Synonyms) -> None:
    text = "您好，请问怎么办理退货，多久能退款？"
    copies = [_worded(Synonyms(0.3), text, copy=n) for n in range(1, 6)]
    assert len(set(map(str, copies))) == 5
    assert all(isinstance(c, str) and c != text for c in copies)


def test_it_gives_up_when_the_wordings_are_used_up(synonyms: Synonyms) -> None:
    refusal = _worded(synonyms, "冰箱保修多久？", copy=2)
    assert isinstance(refusal, Refusal)
    assert refusal.rule == "no_variant"
    assert "fewer than 2" in refusal.reason


def test_share_says_how_many_words_change() -> None:
    text = "您好，请问商品多久发货，运费多少，怎么退货？"
    num_changed = [
        sum(old != new for old, new in zip(_marks(text), _marks(str(_worded(Synonyms(share), text))), strict=False))
        for share in (0.0, 1.0)
    ]
    assert num_changed[0] < num_changed[1]


def _marks(text: str) -> list[str]:
    return text.replace("，", "|").replace("？", "|").split("|")


def test_samples_keep_every_protected_span(synonyms: Synonyms) -> None:
    problems: list[object] = []
    names = [f"samples:{n}.jsonl" for n in ("customer_service", "tutoring", "writing")]
    examples = list(read_examples(names, on_problem=problems.append))
    tasks = [Task(e.messages[-2].content, e.facts, e.where) for e in examples]
    worded = [(t, w) for t, w in zip(tasks, synonyms.make(tasks), strict=True) if isinstance(w, str)]
    assert len(worded) > len(tasks) * 0.4
    for task, text in worded:
        assert normal(text) != normal(task.text)
        assert breach(task.text, protected_spans(task.text, task.facts), text) is None


# ---- the lists


def test_the_lists_are_clean() -> None:
    """Every word has a line that says it, no line twice, and no word is its own synonym."""
    for file in LISTS:
        lines = [x for x in file.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
        assert len(lines) > 200
        assert len(set(lines)) == len(lines), [x for x in lines if lines.count(x) > 1]
        words = load_thesaurus(file)
        assert all(count_han(w) > 0 for w in words) == (file.stem == "synonyms_zh")
        for word, rules in words.items():
            targets = [t for rule in rules for t in rule.targets]
            assert targets
            assert word not in targets
            assert len(set(targets)) == len(targets), f"{word}: {targets}"


def test_no_list_touches_what_is_protected() -> None:
    for word, rules in load_thesaurus(*LISTS).items():
        for target in (t for rule in rules for t in rule.targets):
            assert breach(word, protected_spans(word), target) is None, (word, target)


def test_a_file_of_your_own(tmp_path: Path) -> None:
    words = tmp_path / "words.tsv"
    words.write_text("\ufeff# mine\n发票\t单据\nwidget, gadget\n", encoding="utf-8")
    mine = Synonyms(1.0, words)
    assert _worded(mine, "发票抬头") == "单据抬头"
    assert _worded(mine, "my widget") == "my gadget"
    assert _worded(mine, "冰箱保修多久？") == "冰箱保修多长时间？"


@pytest.mark.parametrize(
    ("content", "message"),
    [("孤单\n", "words.tsv:1: '孤单': needs two words"), ("\n买\t购\n", "words.tsv:2: '买': words of one character")],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    words = tmp_path / "words.tsv"
    words.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Synonyms(thesaurus=words)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no thesaurus that can be read"):
        Synonyms(thesaurus=tmp_path)
    (tmp_path / "gbk.tsv").write_bytes("滤芯, 过滤芯".encode("gbk"))
    with pytest.raises(UserError, match="must be a UTF-8"):
        Synonyms(thesaurus=tmp_path / "gbk.tsv")
