"""What a person should look at first in a report: few sentences, each with its number."""

from __future__ import annotations

from pingjia.data.report import DataReport, Rule, percent, shorten
from pingjia.data.report_html import Words
from pingjia.data.report_words import RULES

_MUCH = 0.2  # of all rows, for one rule
_APART = 0.02  # from the share that was asked for


def remarks(report: DataReport) -> list[Words]:
    """In Chinese and in English, the gravest first. Plain text."""
    if not report.num_rows:
        return [("没有读到任何行：请检查文件与 domains。", "No row was read: check the files, and domains.")]
    found = [_nothing_left(report), _too_little_chinese(report), _personal(report), _leaks(report)]
    return [one for one in found if one is not None] + _greedy_rules(report) + _missed_shares(report)


def _nothing_left(report: DataReport) -> Words | None:
    if report.num_kept:
        return None
    return (f"{report.num_rows:,} 行全部舍去，没有可训练的数据。", f"All {report.num_rows:,} rows were left out.")


def _too_little_chinese(report: DataReport) -> Words | None:
    after, least = report.zh_after, report.min_zh_share
    if after is None or least is None or after >= least:
        return None
    shown = percent(after, least)
    return f"中文占比 {shown}，低于要求的 {least:.0%}。", f"Chinese is {shown} of the letters, below {least:.0%}."


def _personal(report: DataReport) -> Words | None:
    total = sum(report.personal.values())
    settings = report.settings.get("personal")
    if not total or not isinstance(settings, dict) or settings.get("action") != "report":
        return None
    return (
        f"{total:,} 处个人信息仍在训练集中；prepare.personal.action=mask 会遮盖它们。",
        f"Personal data is still in the training set, {total:,} times; prepare.personal.action=mask masks it.",
    )


def _leaks(report: DataReport) -> Words | None:
    leak = report.rejects.get("leak")
    if leak is None:
        return None
    return (
        f"{leak.count:,} 行与留出集重合，已舍去；不舍去的话，评测分数会虚高。",
        f"{leak.count:,} rows repeated held-out rows and were left out: with them, scores would look too good.",
    )


def _greedy_rules(report: DataReport) -> list[Words]:
    greedy = [(name, rule.count) for name, rule in _judging(report).items() if rule.count > _MUCH * report.num_rows]
    return [_greedy(*RULES.get(name, (name, name)), percent(count / report.num_rows)) for name, count in greedy[:3]]


def _judging(report: DataReport) -> dict[str, Rule]:
    """The rules that say something about a row: the others leave out as many as they were asked to."""
    return {name: rule for name, rule in report.rejects.items() if name not in ("zh_share", "balance")}


def _greedy(zh: str, en: str, share: str) -> Words:
    return (
        f"「{shorten(zh, 40)}」舍去了 {share} 的行：请看样例，是否都该舍去。",
        f"“{shorten(en, 40)}” left out {share} of the rows: look at its samples.",
    )


def _missed_shares(report: DataReport) -> list[Words]:
    total = sum(s.num_after * s.weight for s in report.domains) or 1
    shares = [(s, s.num_after * s.weight / total) for s in report.domains if s.wanted is not None]
    return [
        (
            f"领域「{shorten(s.name, 40)}」占 {percent(share)}，要求 {percent(s.wanted)}。",
            f"Domain “{shorten(s.name, 40)}” has {percent(share)}, wanted {percent(s.wanted)}.",
        )
        for s, share in shares
        if abs(share - (s.wanted or 0)) > _APART
    ][:3]
