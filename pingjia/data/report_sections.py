"""The sections of the page, each a function of the report; empty where there is nothing to show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from pingjia.data.histogram import Histogram
from pingjia.data.rendered import Piece
from pingjia.data.report import MAX_SAMPLES, DataReport, Repeat, Rule, Sample, Scores, Share, Stage, percent, shorten
from pingjia.data.report_charts import MAX_BARS, Chart, Line, bar, funnel_step, gauge, histogram
from pingjia.data.report_html import NOTHING, Html, Words, both, join, named, num, share, table, tag, user
from pingjia.data.report_words import COMPARED, KINDS, LANGUAGES, MAKERS, MEANT, REFUSED, RULES, STAGES, TREATED, Known

# Together they keep a page of the worst texts under 1 MB; what is beyond them stands in report.json.
_MAX_ROWS, _MAX_CHANGES, _MAX_SCORES = 24, 8, 4
_MAX_WHERE, _MAX_REASON, _MAX_TEXT = 80, 120, 200
_MAX_PIECES, _MAX_PIECE = 480, 24
_NUM_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Section:
    """`content` gives "" where the section has nothing to say."""

    id: str
    title: Words
    content: Callable[[DataReport], Html]


def _lead(*words: Words | tuple[Iterable[str], Iterable[str]]) -> Html:
    return tag("p", [join(both(one), " ") for one in words], class_="lead")


# ---- funnel


def _funnel(report: DataReport) -> Html:
    most = max((max(s.num_in, s.num_out) for s in report.stages), default=0) or 1
    return tag("ol", [_step(s, most) for s in report.stages[:_MAX_ROWS]], class_="steps") if report.stages else NOTHING


def _step(stage: Stage, most: int) -> Html:
    change = stage.num_out - stage.num_in
    moved = tag("span", f"{change:+,}", class_="minus" if change < 0 else "plus") if change else NOTHING
    name = tag("h3", both(STAGES[stage.name]) if stage.name in STAGES else user(stage.name))
    counts = tag("p", num(stage.num_out), " ", moved, class_="counts")
    return tag("li", name, funnel_step(stage.num_in / most, stage.num_out / most), counts)


# ---- lengths


def _lengths(report: DataReport) -> Html:
    h, limit = report.lengths, report.cutoff_len
    if h is None or not h.num:
        return NOTHING
    lead: tuple[Iterable[str], Iterable[str]] = (
        ["保留的行各有多少词元；上限 ", num(limit), "。"],
        ["How many tokens the kept rows have; the limit is ", num(limit), "."],
    )
    return join(_lead(lead), histogram(_length_chart(h, limit)), _quantiles(h))


def _length_chart(h: Histogram, limit: int) -> Chart:
    longest = h.high or 0
    upto = min(limit + 1, 2 * longest)  # a limit that is far away would leave no room for the rows
    values = [(name, h.quantile(q) or 0) for q, name in _QUANTILES]
    lines = [Line(value, f"{name} · {value:,.0f}") for name, value in values]
    if limit:
        lines.append(Line(limit + 1, f"≤ {limit:,}" + (" →" if upto <= limit else ""), "limit"))
    return Chart(h.coarser(MAX_BARS), ("长度分布，单位词元", "Lengths in tokens"), lines, upto=upto)


_QUANTILES = ((0.5, "50%"), (0.9, "90%"), (0.99, "99%"))


def _quantiles(h: Histogram) -> Html:
    told: list[tuple[Words, float]] = [
        (("一半不超过", "Half have at most"), h.quantile(0.5) or 0),
        (("90% 不超过", "90% have at most"), h.quantile(0.9) or 0),
        (("99% 不超过", "99% have at most"), h.quantile(0.99) or 0),
        (("最长", "Longest"), h.high or 0),
        (("共", "Together"), h.total),
    ]
    return tag("dl", [tag("div", tag("dt", both(w)), tag("dd", f"{v:,.0f}")) for w, v in told], class_="facts")


# ---- languages and domains


def _languages(report: DataReport) -> Html:
    if not report.languages and report.zh_after is None:
        return NOTHING
    return join(_chinese(report), _shares(report.languages, ("语言", "Language"), LANGUAGES))


def _chinese(report: DataReport) -> Html:
    before, after, least = report.zh_before, report.zh_after, report.min_zh_share
    if after is None:
        return NOTHING
    told: Words = (
        f"汉字在全部字母文字中占 {percent(after, least)}，整理前 {percent(before, least)}。",
        f"Chinese characters are {percent(after, least)} of the letters; before, {percent(before, least)}.",
    )
    return join(_lead(told), gauge(before, after, least, told))


def _domains(report: DataReport) -> Html:
    if not any(s.name != "-" for s in report.domains):
        return NOTHING
    return _shares(report.domains, ("领域", "Domain"), {})


def _shares(shares: Sequence[Share], what: Words, known: Known) -> Html:
    """Before and after, as a picture in a table."""
    if not shares:
        return NOTHING
    before = sum(s.num_before for s in shares) or 1
    after = sum(s.num_after * s.weight for s in shares) or 1
    most = max(max(s.num_before / before, s.num_after * s.weight / after, s.wanted or 0) for s in shares) or 1
    columns = _Columns(before, after, most, known, shares)
    ordered = sorted(shares, key=lambda s: (-s.num_before, -s.num_after, s.name))
    rows = [columns.row(s) for s in ordered[:_MAX_ROWS]]
    return join(_legend(), table(columns.heads(what), rows, what, "shares"), _more(ordered[_MAX_ROWS:]))


def _legend() -> Html:
    kinds = [("pale", ("整理前", "before")), ("solid", ("整理后", "after"))]
    return tag("ul", [tag("li", tag("i", class_=f"dot {kind}"), both(words)) for kind, words in kinds], class_="keys")


def _more(rest: Sequence[Share]) -> Html:
    if not rest:
        return NOTHING
    rows = sum(s.num_before for s in rest)
    return tag(
        "p",
        both(
            (
                f"另有 {len(rest):,} 项，共 {rows:,} 行，见 report.json。",
                f"{len(rest):,} more with {rows:,} rows: see report.json.",
            )
        ),
        class_="more",
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns such a table has: those that have something to say."""

    before: float
    after: float
    most: float
    known: Known
    shares: Sequence[Share]

    def heads(self, what: Words) -> list[Html]:
        words: list[Words] = [what, ("行，之前", "Rows before"), ("行，之后", "Rows after")]
        words += [("字符，之前", "Chars. before"), ("字符，之后", "Chars. after")] if self._has_chars else []
        words += [("要求", "Wanted")] if self._has_wanted else []
        words += [("权重", "Weight")] if self._has_weights else []
        words += [("倍数", "Times")] if self._has_repeats else []
        return [both(w) for w in words]

    def row(self, s: Share) -> list[Html]:
        was, now = s.num_before / self.before, s.num_after * s.weight / self.after
        cells = [
            join(self._name(s.name), self._bars(was, now)),
            _counted(s.num_before, was),
            _counted(s.num_after, now),
        ]
        cells += [num(s.chars_before), num(s.chars_after)] if self._has_chars else []
        cells += [share(s.wanted)] if self._has_wanted else []
        cells += [num(s.weight, 2)] if self._has_weights else []
        cells += (
            [tag("span", f"×{s.num_after / s.num_before:.2f}" if s.num_before else "–")] if self._has_repeats else []
        )
        return cells

    def _name(self, name: str) -> Html:
        if name == "-":
            return both(("未标明", "not given"))
        return both(self.known[name]) if name in self.known else user(name, 48)

    def _bars(self, was: float, now: float) -> Html:
        return join(bar([("pale", was / self.most)], height=6), bar([("solid", now / self.most)], height=10))

    @property
    def _has_chars(self) -> bool:
        return any(s.chars_before or s.chars_after for s in self.shares)

    @property
    def _has_wanted(self) -> bool:
        return any(s.wanted is not None for s in self.shares)

    @property
    def _has_weights(self) -> bool:
        return any(s.weight != 1 for s in self.shares)

    @property
    def _has_repeats(self) -> bool:
        return any(s.num_after > s.num_before for s in self.shares)


def _counted(count: int, of_all: float) -> Html:
    return join(num(count), " ", tag("small", share(of_all)))


# ---- quality


def _quality(report: DataReport) -> Html:
    compared = [(name, scores) for name, scores in report.quality.items() if scores.histogram.num]
    return join(_scores(name, scores) for name, scores in compared[:_MAX_SCORES])


def _scores(name: str, scores: Scores) -> Html:
    h, limit = scores.histogram, scores.threshold
    label = (f"BERTScore F1 分布，门槛 {limit:g}", f"BERTScore F1, threshold {limit:g}")
    line = Line(limit, f"≥ {limit:g}", "limit")
    chart = Chart(h.coarser(MAX_BARS, limit), label, [line], bad_to=limit, whole=False)
    told = both(
        (
            ["比较 ", num(h.num), " 条，", num(scores.num_below), f" 条低于 {limit:g}。"],
            [num(h.num), " compared, ", num(scores.num_below), f" below {limit:g}."],
        )
    )
    meant = both(MEANT[name]) if name in MEANT else NOTHING
    return tag("div", tag("h3", named(name, COMPARED)), tag("p", told, " ", meant, class_="lead"), histogram(chart))


# ---- rules


def _rejects(report: DataReport) -> Html:
    return _rules(report.rejects, "rejected.jsonl", "bad", _MAX_ROWS)


def _changes(report: DataReport) -> Html:
    return _rules(report.changes, "changed.jsonl", "solid", _MAX_CHANGES)


def _rules(rules: Mapping[str, Rule], file: str, kind: str, max_rules: int) -> Html:
    if not rules:
        return NOTHING
    most = max(rule.count for rule in rules.values()) or 1
    ordered = sorted(rules.items(), key=lambda item: -item[1].count)
    shown = [_rule(name, rule, most, kind, i == 0) for i, (name, rule) in enumerate(ordered[:max_rules])]
    lead = _lead(
        (f"每行及其原因都在 {file} 里；点开看样例。", f"Every row and its reason: {file}. Open a rule for samples.")
    )
    return join(lead, tag("div", shown, class_="rules"))


def _rule(name: str, rule: Rule, most: int, kind: str, is_open: bool) -> Html:
    head = [tag("span", named(name, RULES), class_="name"), bar([(kind, rule.count / most)]), tag("b", num(rule.count))]
    samples = tag("ol", [_sample(s) for s in rule.samples[:MAX_SAMPLES]], class_="samples")
    return tag("details", tag("summary", head), samples, open=is_open)


def _sample(sample: Sample) -> Html:
    where = tag("code", user(sample.where, _MAX_WHERE), class_="where")
    reason = tag("span", user(sample.reason, _MAX_REASON), class_="reason")
    return tag("li", where, " ", reason, tag("blockquote", user(sample.text, _MAX_TEXT)))


# ---- personal data


def _personal(report: DataReport) -> Html:
    if not report.personal:
        return NOTHING
    settings = report.settings.get("personal")
    action = str(settings.get("action", "")) if isinstance(settings, Mapping) else ""
    most = max(report.personal.values()) or 1
    rows = [
        (join(both(KINDS[kind]) if kind in KINDS else user(kind), bar([("solid", count / most)])), num(count))
        for kind, count in sorted(report.personal.items(), key=lambda item: -item[1])[:_MAX_ROWS]
    ]
    heads = [both(("种类", "Kind")), both(("处", "Found"))]
    lead = _lead(TREATED[action]) if action in TREATED else NOTHING
    return join(lead, table(heads, rows, ("个人信息", "Personal data"), "shares"))


# ---- duplicates


def _repeats(report: DataReport) -> Html:
    found = [(name, report.rejects[name]) for name in ("duplicate", "near_duplicate", "leak") if name in report.rejects]
    if not found:
        return NOTHING
    counts = [tag("div", tag("dt", both(RULES[name])), tag("dd", num(rule.count))) for name, rule in found]
    pairs = tag("ol", [_repeat(pair) for pair in report.repeats[: 2 * MAX_SAMPLES]], class_="pairs")
    return join(tag("dl", counts, class_="facts"), pairs if report.repeats else NOTHING)


def _repeat(pair: Repeat) -> Html:
    name = tag("p", named(pair.rule, RULES))
    first, second = (tag("code", user(w, _MAX_WHERE), class_="where") for w in (pair.where, pair.other_where))
    left, right = _compared(pair.text, pair.other_text)
    if pair.text == pair.other_text:
        return tag("li", name, tag("p", first, " = ", second), tag("blockquote", left))
    sides = [tag("div", first, tag("blockquote", left)), tag("div", second, tag("blockquote", right))]
    return tag("li", name, tag("div", sides, class_="sides"))


def _compared(old: str, new: str) -> tuple[Html, Html]:
    """Both texts, what differs marked in each."""
    old, new = (shorten(text, _MAX_TEXT).replace("\n", "⏎") for text in (old, new))
    left: list[str] = []
    right: list[str] = []
    words = _WORD.findall(old), _WORD.findall(new)
    for kind, a, b, c, d in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        was, now = "".join(words[0][a:b]), "".join(words[1][c:d])
        left += [was if kind == "equal" else tag("del", was)] if was else []
        right += [now if kind == "equal" else tag("ins", now)] if now else []
    return tag("bdi", left), tag("bdi", right)


_WORD = re.compile(r"[A-Za-z0-9'’]+|\s+|.")  # a Chinese character is a word


# ---- augmentation


def _augmentation(report: DataReport) -> Html:
    if not report.made and not report.refused:
        return NOTHING
    rows = [
        (both(MAKERS[name]) if name in MAKERS else user(name), num(count))
        for name, count in [*report.made.items()][:_MAX_ROWS]
    ]
    made = table([both(("方式", "By")), both(("造出", "Made"))], rows, ("造出的行", "Rows made"), "plain")
    pairs = tag("ol", [_reworded(*pair) for pair in report.made_samples[:MAX_SAMPLES]], class_="pairs")
    return join(made if rows else NOTHING, _refused(report.refused), pairs if report.made_samples else NOTHING)


def _refused(refused: Mapping[str, int]) -> Html:
    if not refused:
        return NOTHING
    ordered = sorted(refused.items(), key=lambda item: -item[1])[:_MAX_ROWS]
    heads = [both(("未采用的改写", "Not made")), both(("次数", "Times"))]
    return table(heads, [(_refusal(key), num(count)) for key, count in ordered], ("未采用", "Not made"), "plain")


def _refusal(key: str) -> Html:
    maker, _, rule = key.partition(": ")
    who = both(MAKERS[maker]) if maker in MAKERS else user(maker)
    return join(who, " · ", both(REFUSED[rule]) if rule in REFUSED else user(rule)) if rule else who


def _reworded(old: str, new: str) -> Html:
    left, right = _compared(old, new)
    return tag("li", tag("div", tag("blockquote", left), tag("blockquote", right), class_="sides"))


# ---- examples


def _examples(report: DataReport) -> Html:
    if not report.examples:
        return NOTHING
    kinds = [
        ("read", ("只读", "only read")),
        ("learnt", ("计入损失", "learnt")),
        ("special", ("特殊词元", "special token")),
    ]
    keys = tag("ul", [tag("li", tag("i", class_=f"dot {kind}"), both(words)) for kind, words in kinds], class_="keys")
    lead = _lead(
        (
            "模型实际读到的样子，一格一个词元（由几个词元拼成的字合为一格）。",
            "As the model reads it, a box for each token; tokens that make up one character share a box.",
        )
    )
    return join(lead, keys, [_example(pieces) for pieces in report.examples[:_NUM_EXAMPLES]])


def _example(pieces: Sequence[Piece]) -> Html:
    learnt = sum(p.num_tokens for p in pieces if p.learnt)
    total = sum(p.num_tokens for p in pieces)
    count = both((f"{total:,} 个词元，学 {learnt:,} 个", f"{total:,} tokens, {learnt:,} learnt"))
    return tag("figure", tag("div", _shown(pieces), class_="tokens", dir="auto"), tag("figcaption", count))


def _shown(pieces: Sequence[Piece]) -> list[Html]:
    """All of them, or the first and the last ones."""
    if len(pieces) <= _MAX_PIECES:
        return [_piece(p) for p in pieces]
    half = _MAX_PIECES // 2
    gap = tag("span", f"… {len(pieces) - 2 * half:,} …", class_="gap")
    return [*map(_piece, pieces[:half]), gap, *map(_piece, pieces[-half:])]


def _piece(piece: Piece) -> Html:
    kind = " ".join(name for name, on in (("learnt", piece.learnt), ("special", piece.special)) if on)
    lines = shorten(piece.text, _MAX_PIECE).split("\n")
    text = [lines[0], *(part for line in lines[1:] for part in (_BREAK, line))]
    return tag("b" if piece.learnt else "i", text, class_=kind or None)


_BREAK = Html("<u>⏎</u>\n")


SECTIONS = (
    Section("funnel", ("从文件到训练集", "From file to training set"), _funnel),
    Section("length", ("长度", "Length"), _lengths),
    Section("languages", ("语言", "Languages"), _languages),
    Section("domains", ("领域", "Domains"), _domains),
    Section("quality", ("质量：BERTScore", "Quality: BERTScore"), _quality),
    Section("rejects", ("舍去的行", "Left out"), _rejects),
    Section("changes", ("改动的行", "Changed"), _changes),
    Section("repeats", ("重复与泄漏", "Duplicates and leaks"), _repeats),
    Section("personal", ("个人信息", "Personal data"), _personal),
    Section("augmentation", ("增广", "Augmentation"), _augmentation),
    Section("examples", ("模型学的是什么", "What the model learns"), _examples),
)
