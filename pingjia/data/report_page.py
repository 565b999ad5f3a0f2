"""The report of a data set as one HTML page: no request to anywhere, Chinese and English, light and dark, any width.

Pure functions from a `DataReport` to text. Every text that comes from users is escaped where it is put in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from pingjia.data.histogram import Histogram
from pingjia.data.report import DataReport, Piece, Rule, Scores, Share, Stage, shorten

_RULES: Mapping[str, tuple[str, str]] = {
    "json": ("不是合法的 JSON", "not valid JSON"),
    "row": ("字段缺失或有误", "fields missing or wrong"),
    "encoding": ("编码错误", "broken encoding"),
    "line": ("行太长", "line too long"),
    "length": ("超过长度上限", "too long"),
    "template": ("对话模板不接受", "refused by the template"),
    "repeated": ("答案循环重复", "answer runs in circles"),
    "refusal": ("套话式拒答", "stock refusal"),
    "markup": ("标记损坏", "broken mark-up"),
    "echo": ("答案等于问题", "answer equals question"),
    "language": ("问答语言不一致", "languages differ"),
    "language_kept": ("不在保留的语言中", "language not kept"),
    "personal": ("个人信息", "personal data"),
    "duplicate": ("完全重复", "duplicate"),
    "near_duplicate": ("近似重复", "near duplicate"),
    "leak": ("与留出集泄漏", "leaks into held-out rows"),
    "quality.reference": ("与参考答案不符", "unlike its reference"),
    "quality.augmented": ("改写偏离原文", "reworded too far"),
    "quality.relevance": ("答非所问", "off the subject"),
    "zh_share": ("为中文占比舍去", "left out for the Chinese share"),
    "balance": ("为领域平衡舍去", "left out for the balance"),
    "truncated": ("问题被截短", "question shortened"),
    "split": ("按轮次拆分", "split by turns"),
}
_STAGES: Mapping[str, tuple[str, str]] = {
    "read": ("读取", "read"),
    "rows": ("逐行检查", "checks on each row"),
    "duplicates": ("去重与防泄漏", "duplicates and leaks"),
    "quality": ("质量", "quality"),
    "augment": ("增广", "augmentation"),
    "shares": ("语言与领域配比", "languages and domains"),
}
_COMPARED: Mapping[str, tuple[str, str]] = {
    "reference": ("答案与参考", "answer against reference"),
    "augmented": ("改写与原文", "reworded against original"),
    "relevance": ("答案与问题（主题相关，不代表质量）", "answer against question (subject, not quality)"),
}
_KINDS: Mapping[str, tuple[str, str]] = {
    "phone": ("电话", "phone"),
    "id_card": ("身份证", "identity card"),
    "bank_card": ("银行卡", "bank card"),
    "email": ("邮箱", "e-mail"),
    "order_number": ("订单号", "order number"),
}


def render_page(report: DataReport) -> str:
    """The whole page."""
    sections = [
        _headline(report),
        _funnel(report.stages),
        _lengths(report),
        _shares(("语言", "Languages"), report.languages, report),
        _shares(("领域", "Domains"), report.domains, None),
        _quality(report.quality),
        _rules(("舍去的数据", "Left out"), report.rejects, "rejected.jsonl"),
        _rules(("改动的数据", "Changed"), report.changes, "changed.jsonl"),
        _personal(report),
        _augmentation(report),
        _examples(report.examples),
        _details(report),
    ]
    title = escape(shorten(report.title or "pingjia", 80))
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return _PAGE.format(title=title, style=style, script=_SCRIPT, body="\n".join(filter(None, sections)))


# ---- small parts


def _both(names: tuple[str, str]) -> str:
    return f'<span class="zh" lang="zh">{escape(names[0])}</span><span class="en" lang="en">{escape(names[1])}</span>'


def _named(name: str, known: Mapping[str, tuple[str, str]]) -> str:
    return _both(known[name]) if name in known else f"<span>{escape(shorten(name, 60))}</span>"


def _section(names: tuple[str, str], content: str, *, lead: str = "") -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{_both(names)}</h2>{lead}{content}</section>"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _bar(share: float, kind: str = "") -> str:
    width = max(0.0, min(1.0, share)) * 100
    return f'<span class="bar {kind}" aria-hidden="true"><i style="width:{width:.2f}%"></i></span>'


def _table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{_both(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


# ---- sections


def _headline(report: DataReport) -> str:
    total = report.num_rows + report.num_made
    kept = report.num_kept / total if total else 0.0
    cards = [
        (("读入", "rows read"), _number(report.num_rows), ""),
        (("保留", "kept"), _number(report.num_kept), f"{kept:.1%}"),
        (("舍去", "left out"), _number(report.num_rejected), ""),
        (("写出", "written"), _number(report.num_written), ""),
        (("中文占比", "Chinese letters"), _percent(report.zh_after), _wanted(report)),
    ]
    if report.num_made:
        cards.insert(3, (("增广", "made"), _number(report.num_made), ""))
    items = "".join(
        f'<li><span class="what">{_both(names)}</span><strong>{value}</strong><small>{small}</small></li>'
        for names, value, small in cards
    )
    return (
        f'<header><div class="brand">pingjia · {_both(("数据报告", "data report"))}</div>'
        '<button type="button" id="language" aria-label="中文 / English">中文 / EN</button>'
        f"<h1>{escape(shorten(report.title or 'pingjia', 80))}</h1>"
        f'<p class="lead">{escape(report.created[:16].replace("T", " "))} UTC</p>'
        f'<ul class="cards">{items}</ul></header>'
    )


def _wanted(report: DataReport) -> str:
    if report.min_zh_share is None:
        return ""
    return _both((f"要求 ≥ {report.min_zh_share:.0%}", f"wanted ≥ {report.min_zh_share:.0%}"))


def _funnel(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    most = max((max(s.num_in, s.num_out) for s in stages), default=1) or 1
    rows = [
        (
            _named(s.name, _STAGES),
            _bar(s.num_out / most),
            _number(s.num_out),
            f'<span class="{"more" if s.num_out > s.num_in else "less"}">{s.num_out - s.num_in:+,}</span>'
            if s.num_out != s.num_in
            else "",
        )
        for s in stages
    ]
    heads = [("阶段", "stage"), ("", ""), ("剩余", "left"), ("变化", "change")]
    return _section(("从读入到写出", "From file to training set"), _table(heads, rows, "bars"))


def _lengths(report: DataReport) -> str:
    if report.lengths is None or not report.lengths.num:
        return ""
    h = report.lengths
    quantiles = [(f"{int(q * 100)} %", h.quantile(q)) for q in (0.5, 0.9, 0.99)]
    told = " · ".join(f"{name}: <b>{_number(value or 0)}</b>" for name, value in quantiles)
    told += f" · {_both(('最长', 'longest'))}: <b>{_number(h.high or 0)}</b>"
    lead = _both(
        (
            f"以 {report.model} 的词元计，上限 {report.cutoff_len:,}",
            f"in tokens of {report.model}, limit {report.cutoff_len:,}",
        )
    )
    return _section(("长度", "Length"), _chart(h, report.cutoff_len, ("词元", "tokens")) + f"<p>{told}</p>", lead=lead)


_WIDTH, _HEIGHT, _FOOT = 720, 180, 26


def _chart(h: Histogram, mark: float | None, unit: tuple[str, str]) -> str:
    """Bars of a histogram, and a line at `mark`."""
    last = max((i for i, count in enumerate(h.counts) if count), default=0)
    first = min((i for i, count in enumerate(h.counts) if count), default=0)
    if mark is not None:
        above = next((i for i, edge in enumerate(h.edges[1:]) if edge >= mark), last)
        last, first = max(last, above), min(first, above)
    counts, edges = h.counts[first : last + 1], h.edges[first : last + 2]
    most, step = max(counts, default=0) or 1, _WIDTH / max(1, len(counts))
    bars = "".join(
        f'<rect x="{i * step + 0.5:.1f}" y="{_HEIGHT * (1 - count / most):.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{_HEIGHT * count / most:.1f}"><title>{edges[i]:g}–{edges[i + 1]:g}: {count:,}</title></rect>'
        for i, count in enumerate(counts)
        if count
    )
    line = ""
    if mark is not None and edges[0] <= mark <= edges[-1]:
        x = _place(mark, edges, step)
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>'
    ticks = "".join(_tick(edges, i, step) for i in range(0, len(edges) - 1, max(1, len(edges) // 6)))
    label = escape(f"{unit[0]} / {unit[1]}: {h.num:,}, max {most:,}")
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" '
        f'preserveAspectRatio="none"><g class="bars">{bars}</g><g class="mark">{line}</g></svg>'
        f'<div class="ticks" aria-hidden="true">{ticks}</div>'
    )


def _place(value: float, edges: Sequence[float], step: float) -> float:
    for i in range(len(edges) - 1):
        if edges[i] <= value <= edges[i + 1]:
            return (i + (value - edges[i]) / (edges[i + 1] - edges[i])) * step
    return 0.0


def _tick(edges: Sequence[float], index: int, step: float) -> str:
    return f'<span style="left:{index * step / _WIDTH * 100:.2f}%">{edges[index]:g}</span>'


def _shares(names: tuple[str, str], shares: Sequence[Share], report: DataReport | None) -> str:
    if not shares or (report is None and len(shares) == 1 and shares[0].name == "-"):
        return ""
    before, after = sum(s.num_before for s in shares) or 1, sum(s.num_after * s.weight for s in shares) or 1
    weighted = any(s.weight != 1 for s in shares)
    rows = []
    for s in sorted(shares, key=lambda s: -s.num_before)[:40]:
        cells = [
            escape(shorten(s.name, 40)) if s.name != "-" else _both(("无", "none")),
            f"{_number(s.num_before)} <small>{s.num_before / before:.1%}</small>",
            f"{_number(s.num_after)} <small>{s.num_after * s.weight / after:.1%}</small>",
            _bar(s.num_before / before, "before") + _bar(s.num_after * s.weight / after),
        ]
        rows.append([*cells, f"×{s.weight:.2f}"] if weighted else cells)
    heads = [names, ("之前", "before"), ("之后", "after"), ("", "")]
    lead = ""
    if report is not None and report.zh_after is not None:
        lead = _both(
            (
                f"汉字占全部字母文字的 {_percent(report.zh_before)}，整理后为 {_percent(report.zh_after)}",
                f"Chinese characters among the letters: {_percent(report.zh_before)}, then {_percent(report.zh_after)}",
            )
        )
    return _section(names, _table([*heads, ("权重", "weight")] if weighted else heads, rows, "bars"), lead=lead)


def _quality(quality: Mapping[str, Scores]) -> str:
    parts = [
        f"<h3>{_named(name, _COMPARED)}</h3>{_chart(s.histogram, s.threshold, ('F1', 'F1'))}<p>{_compared(s)}</p>"
        for name, s in quality.items()
    ]
    return _section(("BERTScore", "BERTScore"), "".join(parts)) if parts else ""


def _compared(scores: Scores) -> str:
    num, below, limit = scores.histogram.num, scores.num_below, scores.threshold
    return _both((f"比较 {num:,} 条，低于 {limit:g} 的 {below:,} 条", f"{num:,} compared, {below:,} below {limit:g}"))


def _rules(names: tuple[str, str], rules: Mapping[str, Rule], file: str) -> str:
    if not rules:
        return ""
    most = max(rule.count for rule in rules.values()) or 1
    ordered = sorted(rules.items(), key=lambda item: -item[1].count)
    parts = "".join(
        f"<details><summary>{_named(name, _RULES)}{_bar(rule.count / most, 'bad')}"
        f"<b>{_number(rule.count)}</b></summary>"
        f"<ol>{''.join(_sample(s.where, s.reason, s.text) for s in rule.samples)}</ol></details>"
        for name, rule in ordered
    )
    lead = _both((f"逐行的原因在 {file} 中", f"every row and its reason: {file}"))
    return _section(names, f'<div class="rules">{parts}</div>', lead=lead)


def _sample(where: str, reason: str, text: str) -> str:
    return (
        f"<li><code>{escape(shorten(where, 120))}</code> {escape(shorten(reason, 200))}"
        f"<blockquote>{escape(shorten(text))}</blockquote></li>"
    )


def _personal(report: DataReport) -> str:
    if not report.personal:
        return ""
    rows = [(_named(kind, _KINDS), _number(count)) for kind, count in sorted(report.personal.items())]
    action = str(report.settings.get("personal", {}).get("action", ""))
    done = {
        "mask": ("已遮盖", "masked"),
        "drop": ("相应的行已舍去", "their rows were left out"),
        "report": ("只报告，数据仍在训练集中", "reported only: it is still in the training set"),
    }
    lead = _both(done[action]) if action in done else ""
    return _section(("个人信息", "Personal data"), _table([("种类", "kind"), ("数量", "count")], rows), lead=lead)


def _augmentation(report: DataReport) -> str:
    if not report.made and not report.refused:
        return ""
    rows = [(escape(name), _number(count)) for name, count in report.made.items()]
    rows += [
        (_both(("未采用：", "not made: ")) + escape(name), _number(count)) for name, count in report.refused.items()
    ]
    pairs = "".join(
        f"<li>{escape(shorten(old, 160))}<br>→ {escape(shorten(new, 160))}</li>" for old, new in report.made_samples[:5]
    )
    return _section(
        ("增广", "Augmentation"), _table([("方式", "by"), ("数量", "count")], rows) + f'<ul class="pairs">{pairs}</ul>'
    )


def _examples(examples: Sequence[Sequence[Piece]]) -> str:
    if not examples:
        return ""
    blocks = "".join(f'<pre class="example">{"".join(map(_piece, pieces))}</pre>' for pieces in examples[:3])
    lead = _both(("模型实际读到的样子；绿色部分计入损失", "as the model reads it; the loss is taken on what is green"))
    return _section(("样例", "Examples"), blocks, lead=lead)


def _piece(piece: Piece) -> str:
    kind = " ".join(k for k, on in (("learnt", piece.learnt), ("special", piece.special)) if on)
    text = escape(shorten(piece.text, 1500)).replace("\n", '<i class="newline">↵</i>\n')
    return f'<span class="{kind}">{text}</span>' if kind else f"<span>{text}</span>"


def _details(report: DataReport) -> str:
    rows = [(escape(shorten(name, 120)), f"{size:,}") for name, size in report.files[:50]]
    speed = report.num_rows / report.seconds if report.seconds else 0
    took = _both(
        (f"用时 {report.seconds:.1f} 秒，每秒 {speed:,.0f} 行", f"took {report.seconds:.1f} s, {speed:,.0f} rows/s")
    )
    notes = "".join(f"<li>{escape(shorten(note, 200))}</li>" for note in report.notes[:50])
    return _section(
        ("来源", "Sources"),
        _table([("文件", "file"), ("字节", "bytes")], rows) + (f"<ul>{notes}</ul>" if notes else "") + f"<p>{took}</p>",
    )


_SCRIPT = """
(function () {
  var root = document.documentElement;
  function set(lang) { root.className = lang; root.lang = lang; }
  set((navigator.language || "zh").toLowerCase().indexOf("zh") === 0 ? "zh" : "en");
  document.getElementById("language").addEventListener("click", function () {
    set(root.className === "zh" ? "en" : "zh");
  });
})();
"""

_PAGE = """<!doctype html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} · pingjia</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
