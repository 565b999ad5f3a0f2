"""What is known of one row before it is compared with others. The same function in one process, in many, and on Ray.

Order: parse, domain, mask personal data, cheap rules, language, length, signature. Not here: what needs other rows
(duplicates, shares) or a network (BERTScore); `prepared.py` does that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pingjia.chat import load_tokenizer
from pingjia.chat.tokenizer import Tokenizer
from pingjia.data.domains import DomainRules
from pingjia.data.duplicates import Signature, signature
from pingjia.data.layouts import parse_row
from pingjia.data.length import Fitted, fit
from pingjia.data.personal import find_personal, mask_example, mask_row
from pingjia.data.problems import Finding
from pingjia.data.rules import check_rules
from pingjia.data.settings import PersonalSettings, PrepareSettings
from pingjia.data.write import row_of
from pingjia.language import identify
from pingjia.script import count_han, count_letters
from pingjia.types import Example

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read: its object, or the text and the fault of one that is no object."""

    where: str
    value: Row | None = None
    text: str = ""
    fault: Finding | None = None


@dataclass(slots=True)
class Record:
    """What became of a row, or of a part of it. It is kept as long as `faults` is empty.

    `row`: what training will read; `original`: what the file holds, None for a row that was made. `changes`: how the
    row differs from the one in the file. `remarks`: what does not change it. `num_han`, `num_letters`: over questions
    and answers.
    """

    where: str
    row: Row | str
    original: Row | None = None
    faults: list[Finding] = field(default_factory=list)
    changes: list[Finding] = field(default_factory=list)
    remarks: list[Finding] = field(default_factory=list)
    personal: dict[str, int] = field(default_factory=dict)
    layout: str | None = None
    example: Example | None = None
    lang: str = "und"
    domain: str | None = None
    num_tokens: int = 0
    num_chars: int = 0
    num_han: int = 0
    num_letters: int = 0
    signature: Signature | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything `Inspector` needs, small and picklable. `lenient`: rows that parse are signed as they are, no more."""

    model: str
    cutoff_len: int
    settings: PrepareSettings
    domains: tuple[str, ...] | None = None
    rules: DomainRules | None = None
    lenient: bool = False

    def inspector(self) -> Inspector:
        return Inspector(self, load_tokenizer(self.model))


class Inspector:
    """Turns raw rows into records."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        self._skip = frozenset(plan.settings.rules.skip)
        self._personal = plan.settings.personal

    def inspect(self, raw: RawRow) -> list[Record]:
        """One record, or several for a row that was split. None are lost: what is left out has faults."""
        if raw.value is None:
            assert raw.fault is not None
            return [Record(raw.where, raw.text, faults=[raw.fault])]
        parsed = parse_row(raw.value, raw.where)
        if parsed.example is None:
            faults = [Finding("row", name, why) for name, why in parsed.faults]
            return [Record(raw.where, raw.value, faults=faults)]
        record = Record(raw.where, raw.value, raw.value, layout=parsed.layout)
        if self._plan.lenient:
            return [self._measured(record, parsed.example)]
        return self._judge(record, self._with_domain(parsed.example))

    def inspect_example(self, example: Example) -> list[Record]:
        """As `inspect`, for an example that was made and stands in no file."""
        return self._judge(Record(example.where, row_of(example)), example)

    def _with_domain(self, example: Example) -> Example:
        if example.domain is not None or self._plan.rules is None:
            return example
        return replace(example, domain=self._plan.rules.domain_of(example))

    def _judge(self, record: Record, example: Example) -> list[Record]:
        if self._plan.domains is not None and example.domain not in self._plan.domains:
            record.faults.append(Finding("other_domain", "domain", f"{example.domain or 'none'}: not in domains"))
            record.domain = example.domain
            return [record]
        example = self._treat_personal(record, example)
        record.lang = identify(_text_of(example)).lang
        record.faults += check_rules(example, self._skip)
        keep = self._plan.settings.languages.keep
        if keep is not None and record.lang not in keep:
            record.faults.append(Finding("language_kept", "lang", f"{record.lang}: not in prepare.languages.keep"))
        if record.faults:
            return [self._measured(record, example)]
        fitted = fit(example, self._tokenizer, self._plan.cutoff_len, self._plan.settings.length_policy)
        return self._fitted(record, example, fitted)

    def _treat_personal(self, record: Record, example: Example) -> Example:
        if self._personal.action == "off":
            return example
        masked, found = mask_example(example, self._personal.kinds)
        if not found:
            return example
        record.personal = dict(found)
        finding = _personal_finding(found, self._personal)
        if self._personal.action == "mask":
            record.changes.append(finding)
            record.row = mask_row(record.row, self._personal.kinds) if isinstance(record.row, dict) else record.row
            return masked
        (record.faults if self._personal.action == "drop" else record.remarks).append(finding)
        return example

    def _fitted(self, record: Record, example: Example, fitted: Fitted) -> list[Record]:
        """The record of each part that is kept, and one for what is left out."""
        records = []
        for part, num_tokens in fitted.kept:
            one = replace(record, num_tokens=num_tokens, changes=[*record.changes, *fitted.changes])
            if fitted.changes:
                one.row = row_of(part)
            one.where = part.where
            records.append(self._measured(one, part))
        if fitted.lost:
            left_out = replace(record, faults=list(fitted.lost), personal={} if records else record.personal)
            records.append(self._measured(left_out, example))
        return records

    def _measured(self, record: Record, example: Example) -> Record:
        text = _text_of(example)
        record.example = example
        record.domain = example.domain
        record.num_chars, record.num_han, record.num_letters = len(text), count_han(text), count_letters(text)
        if not record.faults:
            record.signature = signature(example, near=self._plan.settings.duplicates.near is not None)
            if example.domain is not None and isinstance(record.row, dict) and "domain" not in record.row:
                record.row = {**record.row, "domain": example.domain}
        return record


def _text_of(example: Example) -> str:
    return "\n".join(m.text for m in example.messages if m.role in ("user", "assistant"))


def _personal_finding(found: Counter[str], settings: PersonalSettings) -> Finding:
    done = {"mask": "masked", "drop": "the row is left out", "report": "reported only; see prepare.personal.action"}
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(found.items()))
    return Finding("personal", "messages", f"personal data ({counts}): {done[settings.action]}")


def personal_kinds(texts: Sequence[str], settings: PersonalSettings) -> Counter[str]:
    """How often each kind of personal data stands in the texts."""
    return Counter(p.kind for text in texts for p in find_personal(text, settings.kinds))
