"""Short runs on a tiny network."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import PreTrainedModel

from pingjia.data.settings import DataSettings
from pingjia.models.chatglm import ChatGLMForCausalLM
from pingjia.models.chatglm2 import ChatGLM2ForCausalLM
from pingjia.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from pingjia.models.settings import ModelSettings
from pingjia.tune import Hooks, TrainResult, train
from pingjia.tune.settings import TuneSettings

ROWS = [
    {"prompt": "冰箱保修多久？", "response": "整机保修三十六个月。"},
    {"prompt": "你们的客服电话是多少？", "response": "400-820-1234，早九点到晚九点。"},
    {"prompt": "How much is the kettle?", "response": "129 yuan."},
    {"prompt": "可以开发票吗？", "response": "可以，下单时填写抬头即可，电子发票当天发到邮箱。"},
    {"prompt": "How long does delivery take?", "response": "Two days in the city, four days elsewhere."},
    {"prompt": "怎么退货？", "response": "签收后七天内在订单页申请。"},
    {"prompt": "Is it dishwasher safe?", "response": "No."},
]
SETTINGS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "lora_target": "all",
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "seed": 7,
    "report_to": ["none"],
}


@pytest.fixture(scope="session")
def settings() -> dict[str, Any]:
    """TuneSettings of the room's runs, but output_dir."""
    return dict(SETTINGS)


SILENT = Hooks()
Train = Callable[..., TrainResult]


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def killed() -> Callable[..., int]:
    """killed(job, output_dir, seed, max_kills=8): train by killed_run.py; how often it was killed on the way."""

    def train_and_kill(job: dict[str, Any], output_dir: Path, seed: int, max_kills: int = 8) -> int:
        job = job | {"tune": job["tune"] | {"output_dir": str(output_dir)}, "seed": seed, "max_kills": max_kills}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("killed_run.py")), json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return train_and_kill


@pytest.fixture(scope="session")
def contradiction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out answers unlike the training rows: their loss rises as soon as those are learnt."""
    rows = [
        {"prompt": "冰箱保修多久？", "response": "不知道，请看说明书。"},
        {"prompt": "怎么退货？", "response": "No."},
    ]
    file = tmp_path_factory.mktemp("held_out") / "held_out.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def over_fitting(contradiction: Path) -> dict[str, Any]:
    """Arguments of `tune` for a run that gets worse on the held-out rows."""
    data = {"eval_dataset": [str(contradiction)]}
    return {"data": data, "learning_rate": 0.03, "num_train_epochs": 12, "lora_dropout": 0.0}


def for_type(changed: dict[str, Any]) -> dict[str, Any]:
    """The room's settings, without those of an adapter where there is none."""
    is_adapter = changed.get("finetuning_type", "lora") == "lora"
    return {key: value for key, value in SETTINGS.items() if is_adapter or not key.startswith("lora_")}


@pytest.fixture
def tune(tmp_path: Path, tiny_llama: Path, rows_file: Path) -> Train:
    """tune(hooks, model, quantization_bit, dtype, dataset, data={...}, **TuneSettings): train into tmp_path / "out".

    quantization: keys of ModelSettings about packing, beside quantization_bit. With a finetuning_type that has no
    adapter the room's lora_* keys are left out.
    """

    def run(
        *,
        hooks: Hooks = SILENT,
        model: Path = tiny_llama,
        quantization_bit: int | None = None,
        dtype: str = "auto",
        dataset: Path = rows_file,
        data: dict[str, Any] | None = None,
        ledger: Any = None,
        quantization: dict[str, Any] | None = None,
        **changed: Any,
    ) -> TrainResult:
        settings = {"output_dir": str(tmp_path / "out"), **for_type(changed), **changed}
        return train(
            ModelSettings(
                model_name_or_path=str(model),
                dtype=dtype,
                device="cpu",
                **{"quantization_bit": quantization_bit, **(quantization or {})},
            ),
            DataSettings(dataset=[str(dataset)], **(data or {})),
            TuneSettings(**settings),
            ledger=ledger,
            hooks=hooks,
        )

    return run


# ---- several processes


@pytest.fixture(scope="session")
def fork_ranks() -> Iterator[Callable[[dict[str, Any], int], list[list[Any]]]]:
    """fork_ranks(job, count): train in so many processes by rank_server.py; [exit code, what was said] of each."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def run(job: dict[str, Any], count: int) -> list[list[Any]]:
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps({"job": job, "count": count}) + "\n")
        server.stdin.flush()
        answer: list[list[Any]] = json.loads(server.stdout.readline())
        return answer

    yield run
    server.stdin.close()  # type: ignore[union-attr]
    server.wait(20)


@pytest.fixture
def train_in(tmp_path: Path, tiny_llama: Path, rows_file: Path, fork_ranks: Any) -> Callable[..., Path]:
    """train_in(name, strategy, count, **TuneSettings): train in forked processes; with strategy none in this one, or in
    one that is forked where rank.py is asked for something.

    What rank.py can do (kill_at, out_of_memory, ...) is taken out of the settings; model={...} and data={...} add to
    those sections.
    Where they do not all end well: ChildProcessError([[exit code, what was said], ...]).
    """
    more = (
        *("out_of_memory", "overflow", "kill_at", "kill_rank"),
        *("holdings", "dtypes", "memory_file", "kept_file"),
    )

    def start(name: str, strategy: str = "none", count: int = 1, **changed: Any) -> Path:
        job = {key: changed.pop(key) for key in more if key in changed}
        model = {"model_name_or_path": str(tiny_llama), "device": "cpu"} | changed.pop("model", {})
        data = {"dataset": [str(rows_file)]} | changed.pop("data", {})
        tune = for_type(changed) | changed | {"output_dir": str(tmp_path / name)}
        if strategy == "none" and not job:
            train(ModelSettings(**model), DataSettings(**data), TuneSettings(**tune))
            return tmp_path / name
        tune["distributed"] = {"strategy": strategy, "processes": count, "timeout_s": 60}
        ended = fork_ranks(job | {"model": model, "data": data, "tune": tune}, count)
        if any(code for code, _ in ended):
            raise ChildProcessError(ended)
        return tmp_path / name

    return start


# ---- ChatGLM in small

LINES = [
    "冰箱保修多久？整机保修三十六个月。",
    "How much is the kettle? 129 yuan.",
    "可以开发票吗？可以，下单时填写抬头即可。",
] * 8


def vocabulary(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return model.getvalue()


def save(network: PreTrainedModel, directory: Path) -> Path:
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:  # the embeddings so large that the head can be sure of a token
            parameter.data *= 5 if "layers" in name else 25
    network.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatGLM-6B in small: two-way prompts, two-dimensional positions."""
    directory = tmp_path_factory.mktemp("chatglm")
    content = vocabulary(
        model_type="unigram", vocab_size=500, pad_id=3, unk_id=0, bos_id=1, eos_id=2,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))],
    )  # fmt: skip
    (directory / "ice_text.model").write_bytes(content)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
    torch.manual_seed(1)
    config = ChatGLMConfig(
        vocab_size=len(pieces), hidden_size=32, num_layers=3, num_attention_heads=4, inner_hidden_size=48,
        max_sequence_length=256, mask_token_id=pieces["[MASK]"], gmask_token_id=pieces["[gMASK]"],
        bos_token_id=pieces["<sop>"], eos_token_id=pieces["<eop>"], pad_token_id=3,
        tie_word_embeddings=False,  # a random network with one table for both can hardly say anything but its input
    )  # fmt: skip
    return save(ChatGLMForCausalLM(config), directory)


@pytest.fixture(scope="session")
def chatglm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatGLM2-6B in small."""
    directory = tmp_path_factory.mktemp("chatglm2")
    content = vocabulary(model_type="bpe", vocab_size=400, normalization_rule_name="identity")
    (directory / "tokenizer.model").write_bytes(content)
    torch.manual_seed(2)
    config = ChatGLM2Config(
        padded_vocab_size=512, hidden_size=32, num_layers=3, num_attention_heads=4, multi_query_group_num=2,
        kv_channels=8, ffn_hidden_size=24, seq_length=256,
    )  # fmt: skip
    return save(ChatGLM2ForCausalLM(config), directory)
