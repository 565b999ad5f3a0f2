"""Writing HTML so that nothing is forgotten: tags close themselves, and text is escaped unless it says it is HTML.

Words of the page are in Chinese and English at once; the page shows one of them, or both where it cannot choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from pingjia.data.report import clean, percent, shorten

_VOID = frozenset({"br", "input", "link", "meta"})
MAX_NAME = 80


class Html(str):
    """Text that is HTML already. Only this file and constants make it."""

    __slots__ = ()


NOTHING = Html("")
Child = str | Iterable[str]
Words = tuple[str, str]
"""Chinese and English. A plain pair is escaped like any text."""


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """An element. A str child is escaped, an `Html` one is not; None and False attributes are left out.

    `class_` is class, `aria_label` is aria-label.
    """
    given = "".join(f' {_attribute(key)}="{_escaped(str(value))}"' for key, value in attributes.items() if _is(value))
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def _is(value: object) -> bool:
    return value is not None and value is not False


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def join(*children: Child) -> Html:
    """The children one after the other, escaped as in `tag`."""
    return Html("".join(_one(c) if isinstance(c, str) else join(*c) for c in children))


def _one(child: str) -> str:
    return child if isinstance(child, Html) else _escaped(child)


def _escaped(text: str) -> str:
    return escape(clean(text))


# ---- the small parts that are everywhere


def both(words: Words | tuple[Child, Child]) -> Html:
    """The same in Chinese and in English."""
    return join(tag("span", words[0], class_="zh", lang="zh-CN"), tag("span", words[1], class_="en", lang="en"))


def user(text: str, limit: int = MAX_NAME) -> Html:
    """A text of the user, on one line."""
    return tag("bdi", shorten(text, limit).replace("\n", "⏎"))


def named(name: str, known: Mapping[str, Words]) -> Html:
    """A name of ours in words, with the name itself; any other as it is."""
    if name not in known:
        return user(name)
    return join(both(known[name]), " ", tag("code", name, class_="key"))


def num(value: float, digits: int = 0) -> Html:
    """A number of the report, as people read it and, in `value`, as it is."""
    return tag("data", f"{value:,.{digits}f}", value=repr(value))


def share(value: float | None, least: float | None = None) -> Html:
    return tag("span", percent(value, least), class_="share")


def table(heads: Iterable[Html], rows: Iterable[Iterable[Html]], caption: Words, kind: str | None = None) -> Html:
    """A table whose first column names the row. Scrolls where it does not fit."""
    head = tag("tr", [tag("th", h, scope="col") for h in heads])
    body = [tag("tr", _cells(list(row))) for row in rows]
    title = tag("caption", both(caption), class_="unseen")
    content = tag("table", title, tag("thead", head), tag("tbody", body), class_=kind)
    return tag("div", content, class_="scroll", tabindex=0, role="group", aria_label=" / ".join(caption))


def _cells(row: list[Html]) -> list[Html]:
    return [tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])]
