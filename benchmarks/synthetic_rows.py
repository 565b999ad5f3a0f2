"""Synthetic rows for throughput benchmarks: Chinese and English, with planted duplicates, the same for the same seed.

Row i is a function of (seed, i) alone, so any number of rows takes no memory and a copy can be of any earlier row.
Words are drawn at random. Measured on the first 30,000 rows with shingles of 5 characters: planted near duplicates
have a Jaccard similarity of 0.90 or more, any two other rows at most 0.25; so what a detector finds can be held against
`plan`.

Usage: python benchmarks/synthetic_rows.py OUT.jsonl [--rows 1000000] [--seed 7]
The last line is JSON: rows, rows of each kind and language, bytes, seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EXACT_SHARE = 0.02  # copies of an earlier row
NEAR_SHARE = 0.03  # copies of an earlier row with another end of the answer (two Chinese characters, four letters)
ZH_SHARE = 0.75  # of the rows that are no copies
DOMAINS = ("support", "tutoring", "writing", "coding", "travel", "health")

_HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"
    "十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把性好应开它合还因由其些然前外天政四日那社义事平形"
    "相全表间样与关各重新线内数正心反你明看原又么利比或但质气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展"
)
_LATIN = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea body information
back parent face others level office door health person art war history party result change morning reason
research girl guy moment air teacher force education order device refund parcel invoice warranty battery screen
repair address delivery price
""".split()  # noqa: SIM905

Kind = Literal["base", "exact", "near"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What row `index` is: its own (`of` is itself), or a copy of row `of`, which is a base row."""

    index: int
    kind: Kind
    of: int


def plan(index: int, seed: int = 7) -> Plan:
    """What is planted at `index` (from 0; its line in a file is one more)."""
    rng = _rng(seed, index, "plan")
    draw = rng.random()
    if draw >= EXACT_SHARE + NEAR_SHARE or index == 0:
        return Plan(index, "base", index)
    of = plan(rng.randrange(index), seed).of  # a copy of a copy is a copy of its origin
    return Plan(index, "exact" if draw < EXACT_SHARE else "near", of)


def row_at(index: int, seed: int = 7) -> dict[str, Any]:
    """The row at `index`: prompt, response, domain, lang."""
    planned = plan(index, seed)
    row = _base(planned.of, seed)
    if planned.kind == "near":
        row["response"] = _changed(row["response"], row["lang"], _rng(seed, index, "change"))
    return row


def rows(num_rows: int, seed: int = 7) -> Iterator[dict[str, Any]]:
    """Rows 0 to num_rows - 1."""
    return (row_at(index, seed) for index in range(num_rows))


def write(path: Path, num_rows: int, seed: int = 7) -> dict[str, int]:
    """Write JSON Lines; how many rows there are of each kind and language."""
    counts: Counter[str] = Counter()
    with open(path, "w", encoding="utf-8") as file:
        for index, row in enumerate(rows(num_rows, seed)):
            counts[plan(index, seed).kind] += 1
            counts[row["lang"]] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {"rows": num_rows, **counts}


def _base(index: int, seed: int) -> dict[str, Any]:
    rng = _rng(seed, index, "base")
    is_zh = rng.random() < ZH_SHARE
    ask, tell = (_zh(rng, 12, 40), _zh(rng, 50, 120)) if is_zh else (_en(rng, 6, 16), _en(rng, 20, 50))
    domain = DOMAINS[int(len(DOMAINS) * rng.random() ** 2)]  # uneven shares, as found
    mark, stop = ("？", "。") if is_zh else ("?", ".")
    return {"prompt": ask + mark, "response": tell + stop, "domain": domain, "lang": "zh" if is_zh else "en"}


def _changed(answer: str, lang: str, rng: random.Random) -> str:
    """The answer with other characters before its full stop: few shingles differ, and two copies are never equal."""
    if lang == "zh":
        return answer[:-3] + "".join(rng.choices(_HAN, k=2)) + answer[-1]
    return answer[:-5] + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4)) + answer[-1]


def _zh(rng: random.Random, low: int, high: int) -> str:
    text = rng.choices(_HAN, k=rng.randint(low, high))
    text[9::10] = "，" * len(text[9::10])
    return "".join(text)


def _en(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(_LATIN, k=rng.randint(low, high))).capitalize()


_USES = ("base", "plan", "change")


def _rng(seed: int, index: int, use: str) -> random.Random:
    return random.Random((seed << 66) | (_USES.index(use) << 64) | index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = write(options.out, options.rows, options.seed)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({**counts, "bytes": options.out.stat().st_size, "seconds": seconds}))


if __name__ == "__main__":
    main()
