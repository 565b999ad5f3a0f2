"""The report of a data set as one HTML page: no request to anywhere, Chinese and English, light and dark, any width.

Pure functions from a `DataReport` to text. Here: the frame, the headline and the sources; what is between stands in
`report_sections.py`, pictures in `report_charts.py`, colours and sizes in `report.css`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pingjia.data.report import DataReport, percent, shorten
from pingjia.data.report_charts import bar
from pingjia.data.report_html import NOTHING, Html, Words, both, join, num, share, table, tag, user
from pingjia.data.report_remarks import remarks
from pingjia.data.report_sections import SECTIONS, Section

_MAX_FILES, _MAX_SETTINGS, _MAX_NOTES = 50, 80, 30

# Without it, both languages are shown. The buttons are radio buttons, and the style sheet obeys them.
_SCRIPT = """(function () {
  var root = document.documentElement;
  function show(id) {
    document.getElementById(id).checked = true;
    root.lang = id === "en" ? "en" : "zh-CN";
  }
  show(/^zh/i.test(navigator.language || "zh") ? "zh" : "en");
  document.getElementById("language").addEventListener("change", function (event) { show(event.target.id); });
  addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (one) { one.open = true; });
  });
})();"""


def render_page(report: DataReport) -> str:
    """The whole page. Nothing in it is fetched, and only its own script runs, whatever stands in the report."""
    style = Html((Path(__file__).parent / "report.css").read_text(encoding="utf-8"))
    script = tag("script", Html(_SCRIPT))
    head = tag("head", _meta(), tag("title", f"{_title(report)} · pingjia"), tag("style", style))
    shown = [(s, content) for s in (*SECTIONS, _SOURCES) if (content := s.content(report))]
    main = tag("main", [_section(s, content) for s, content in shown])
    body = tag("body", _header(report), _contents([s for s, _ in shown]), main, script)
    return f"<!doctype html>\n{tag('html', head, body, lang='zh-CN')}\n"


def _meta() -> Html:
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
    )


def _section(section: Section, content: Html) -> Html:
    return tag("section", tag("h2", both(section.title)), content, id=section.id)


def _contents(sections: list[Section]) -> Html:
    links = [tag("li", tag("a", both(s.title), href=f"#{s.id}")) for s in sections]
    return tag("nav", tag("ol", links), aria_label="目录 / Contents")


# ---- the headline


def _title(report: DataReport) -> str:
    names = ", ".join(_file_name(name) for name, _ in report.files[:3])
    return shorten(report.title or names or "pingjia", 80)


def _file_name(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _header(report: DataReport) -> Html:
    brand = tag("p", "pingjia · ", both(("数据报告", "data report")), class_="brand")
    parts = [tag("h1", user(_title(report))), _about(report), _verdict(report), _tiles(report), _remarks(report)]
    return tag("header", _languages(), brand, parts)


def _languages() -> Html:
    """A choice that works without script too."""
    choices = [("zh", "中文", "zh-CN"), ("en", "English", "en"), ("zh-en", "中 / EN", None)]
    radios = [
        tag("label", tag("input", type="radio", name="language", id=key, checked=key == "zh-en"), name, lang=lang)
        for key, name, lang in choices
    ]
    return tag("fieldset", tag("legend", "语言 / Language", class_="unseen"), radios, id="language")


def _about(report: DataReport) -> Html:
    told = [user(report.created[:16].replace("T", " "))] if report.created else []
    if report.model:
        told.append(join(both(("词元：", "Tokens of ")), user(report.model.rsplit("/", 1)[-1])))
    return tag("p", [tag("span", one) for one in told], class_="about") if told else NOTHING


def _verdict(report: DataReport) -> Html:
    """The one thing to know, in a sentence and a bar."""
    if not report.num_rows:
        return NOTHING
    total = report.num_kept + report.num_rejected + report.num_other_domains or 1
    parts = [("solid", report.num_kept), ("bad", report.num_rejected), ("other", report.num_other_domains)]
    shown = percent(report.num_kept / total)
    label = (f"保留 {shown}", f"{shown} kept")
    words = ("保留", "kept"), ("舍去", "left out"), ("其他领域，未用", "other domains, not used")
    keys = [
        tag("li", tag("i", class_=f"dot {kind}"), both(word), " ", num(count))
        for (kind, count), word in zip(parts, words, strict=True)
        if count
    ]
    picture = bar([(kind, count / total) for kind, count in parts], label, height=14)
    return tag("div", picture, tag("ul", keys, class_="keys"), class_="verdict")


def _tiles(report: DataReport) -> Html:
    total = report.num_rows + report.num_made
    kept = share(report.num_kept / total) if total else NOTHING
    tiles = [
        _tile(("读入", "Rows read"), num(report.num_rows)),
        _tile(("保留", "Kept"), num(report.num_kept), kept, "good"),
        _tile(("舍去", "Left out"), num(report.num_rejected), kind="poor"),
    ]
    if report.num_changed:
        tiles.append(_tile(("改动", "Changed"), num(report.num_changed)))
    if report.num_made:
        tiles.append(_tile(("新造", "Made"), num(report.num_made)))
    tiles.append(_tile(("写出", "Written"), num(report.num_written), both(("重复计入", "repeats counted"))))
    tiles.append(_chinese_tile(report))
    return tag("dl", tiles, class_="tiles")


def _tile(words: Words, value: Html, small: Html = NOTHING, kind: str | None = None) -> Html:
    note = tag("dd", small, class_="small") if small else NOTHING
    return tag("div", tag("dt", both(words)), tag("dd", value, class_="big"), note, class_=kind)


def _chinese_tile(report: DataReport) -> Html:
    least = report.min_zh_share
    wanted = both((f"要求 ≥ {least:.0%}", f"wanted ≥ {least:.0%}")) if least is not None else NOTHING
    return _tile(("中文占比", "Chinese"), share(report.zh_after, least), wanted)


def _remarks(report: DataReport) -> Html:
    found = remarks(report)
    if not found:
        return NOTHING
    items = [tag("li", both(words)) for words in found]
    return tag("aside", tag("h2", both(("值得一看", "Worth a look"))), tag("ul", items), class_="remarks")


# ---- where it comes from


def _sources(report: DataReport) -> Html:
    speed = report.num_rows / report.seconds if report.seconds else 0.0
    took = tag("p", _took(report.seconds, speed)) if report.seconds else NOTHING
    return join(_files(report), _settings(report.settings), _notes(report.notes), took)


def _took(seconds: float, speed: float) -> Html:
    return both(
        (
            ["用时 ", num(seconds, 1), f" 秒，每秒 {speed:,.0f} 行。"],
            ["Took ", num(seconds, 1), f" s, {speed:,.0f} rows/s."],
        )
    )


def _files(report: DataReport) -> Html:
    rows = [(user(name, 120), num(size)) for name, size in report.files[:_MAX_FILES]]
    heads = [both(("文件", "File")), both(("字节", "Bytes"))]
    more = len(report.files) - _MAX_FILES
    rest = tag("p", both((f"另有 {more:,} 个文件。", f"And {more:,} more files."))) if more > 0 else NOTHING
    return join(table(heads, rows, ("文件", "Files"), "plain"), rest) if rows else NOTHING


def _settings(settings: Mapping[str, Any]) -> Html:
    rows = [(user(key), user(str(value), 120)) for key, value in _flat(settings)][:_MAX_SETTINGS]
    if not rows:
        return NOTHING
    heads = [both(("设置", "Setting")), both(("值", "Value"))]
    inside = table(heads, rows, ("设置", "Settings"), "plain")
    return tag("details", tag("summary", both(("全部设置", "All settings"))), inside)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value and before.count(".") < 4:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _notes(notes: list[str]) -> Html:
    if not notes:
        return NOTHING
    items = [tag("li", user(note, 240)) for note in notes[:_MAX_NOTES]]
    words = tag("summary", both(("读取时的备注", "Notes from reading")), " ", num(len(notes)))
    return tag("details", words, tag("ul", items, class_="notes"))


_SOURCES = Section("sources", ("来源与用时", "Sources and time"), _sources)
