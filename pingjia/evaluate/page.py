"""What the pages of this room share: tables as Markdown and HTML, and how they look. All text is untrusted: escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; color: #1c2733; background: #fff }
table { border-collapse: collapse } th, td { border: 1px solid #c8d0d8; padding: .25rem .6rem; text-align: left }
th { background: #eef2f6 } small { color: #52606d; font-weight: normal }
section { border-top: 1px solid #c8d0d8; margin-top: 1.2rem } .asked { font-weight: 600 }
.answers { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem }
article { background: #f6f8fa; border-radius: 6px; padding: .2rem .8rem } h4 { margin: .4rem 0 0 }
.asked, .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
@media (max-width: 50rem) { .answers { grid-template-columns: 1fr } }
"""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *([markdown_text(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no second table cell."""
    marked = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(text, quote=False))
    # "://" makes a link of an answer in many viewers, and what it names was chosen by a model.
    return re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", "<br>", marked.strip()).replace("://", ":<wbr>//")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain cells."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
