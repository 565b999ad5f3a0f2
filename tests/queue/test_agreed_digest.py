"""Workers with other weights under one name: nobody may take the answer of one for that of the other."""

from __future__ import annotations

from pingjia.queue.backend import _agreed
from pingjia.types import ModelCard


def test_a_digest_stands_only_where_all_workers_have_it() -> None:
    old, new = (ModelCard("shop", "/a", "base", digest=digest) for digest in ("s1", "s2"))
    assert _agreed(old, [[old], [old]]).digest == "s1"
    assert _agreed(old, [[old], [new]]).digest == ""
    assert _agreed(new, [[ModelCard("shop", "/a", "base")], [new]]).digest == ""
