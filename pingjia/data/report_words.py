"""What the report calls things, in Chinese and in English. A name that is not here is shown as it is."""

from __future__ import annotations

from collections.abc import Mapping

Known = Mapping[str, tuple[str, str]]

RULES: Known = {
    "json": ("不是合法的 JSON", "Not valid JSON"),
    "row": ("字段缺失或有误", "Fields missing or wrong"),
    "encoding": ("编码错误", "Broken encoding"),
    "line": ("行太长", "Line too long"),
    "length": ("超过长度上限", "Too long"),
    "template": ("对话模板不接受", "Refused by the template"),
    "repeated": ("答案循环重复", "Answer runs in circles"),
    "refusal": ("套话式拒答", "Stock refusal"),
    "markup": ("标记损坏", "Broken mark-up"),
    "echo": ("答案等于问题", "Answer equals question"),
    "language": ("问答语言不一致", "Question and answer differ in language"),
    "language_kept": ("不在保留的语言中", "Language not kept"),
    "personal": ("含个人信息", "Personal data"),
    "duplicate": ("完全重复", "Duplicate"),
    "near_duplicate": ("近似重复", "Near duplicate"),
    "leak": ("与留出集重合", "Leaks into held-out rows"),
    "quality.reference": ("与参考答案不符", "Unlike its reference"),
    "quality.augmented": ("改写偏离原文", "Reworded too far"),
    "quality.relevance": ("答案与问题无关", "Off the subject"),
    "zh_share": ("为中文占比舍去", "Left out for the Chinese share"),
    "balance": ("为领域配比舍去", "Left out for the balance of domains"),
    "truncated": ("问题被截短", "Question shortened"),
    "split": ("按轮次拆分", "Split by turns"),
}
STAGES: Known = {
    "read": ("读取", "Read"),
    "rows": ("逐行检查", "Checks on each row"),
    "duplicates": ("去重与防泄漏", "Duplicates and leaks"),
    "quality": ("质量", "Quality"),
    "augment": ("增广", "Augmentation"),
    "shares": ("语言与领域配比", "Language and domain shares"),
}
COMPARED: Known = {
    "reference": ("答案与参考答案", "Answer against reference"),
    "augmented": ("改写与原文", "Reworded against original"),
    "relevance": ("答案与问题", "Answer against question"),
}
MEANT: Known = {
    "reference": ("越高，答案与参考答案说的越接近。", "The higher, the more answer and reference say the same."),
    "augmented": ("越高，改写越忠于原文。", "The higher, the closer the new wording is to the old one."),
    "relevance": (
        "只说明话题相同，不说明答案好。",
        "Says that both are about one subject, not that the answer is good.",
    ),
}
KINDS: Known = {
    "phone": ("电话号码", "Phone numbers"),
    "id_card": ("身份证号", "Identity cards"),
    "bank_card": ("银行卡号", "Bank cards"),
    "email": ("电子邮箱", "E-mail addresses"),
    "order_number": ("订单号", "Order numbers"),
}
TREATED: Known = {
    "mask": ("已遮盖，训练集中不再有。", "Masked: it is no longer in the training set."),
    "drop": ("含有它们的行已舍去。", "The rows that held it were left out."),
    "report": ("只报告：这些数据仍在训练集中。", "Reported only: it is still in the training set."),
}
LANGUAGES: Known = {
    "zh": ("中文", "Chinese"),
    "en": ("英文", "English"),
    "mixed": ("中英混合", "Mixed"),
    "und": ("无法判断", "Undetermined"),
    "ja": ("日文", "Japanese"),
    "ko": ("韩文", "Korean"),
    "ru": ("俄文", "Russian"),
    "fr": ("法文", "French"),
    "de": ("德文", "German"),
    "es": ("西班牙文", "Spanish"),
}
MAKERS: Known = {
    "synonyms": ("同义词替换", "Synonyms"),
    "back_translation": ("回译", "Back-translation"),
}
REFUSED: Known = {
    "about_words": ("问的就是词语本身", "Asks about words themselves"),
    "unchanged": ("没有变化", "Nothing changed"),
    "held_out": ("与留出集的问题相同", "Is a held-out question"),
    "quality": ("偏离原意", "Too far from the original"),
    "duplicate": ("已有同样的问题", "Asked already"),
    "no_synonym": ("没有可替换的词", "No word to replace"),
    "no_variant": ("没有新的说法", "No new wording"),
}
