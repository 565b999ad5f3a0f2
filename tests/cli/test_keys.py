"""`pingjia keys`: a key is shown once, limits are said, usage is priced."""

from __future__ import annotations

import json

import pytest

from pingjia.cli.main import invoke
from pingjia.gateway.keys import KeyFile
from pingjia.ledger import Fact, Ledger


@pytest.fixture
def keys(tmp_path, capsys):
    """Run `pingjia keys ...` on a file of its own: (exit code, stdout, stderr)."""

    def run(*words: str):
        code = invoke(["keys", words[0], "--file", str(tmp_path / "keys.json"), *words[1:]])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    run.file = KeyFile(tmp_path / "keys.json")
    return run


def test_create_prints_the_key_and_nothing_else(keys):
    code, out, err = keys("create", "alice", "--requests-per-minute", "60", "--models", "base, shop", "--expires", "9d")
    assert code == 0
    assert keys.file.find(out.strip().encode()).models == ("base", "shop")
    assert out.strip() not in err
    assert "only time" in err


def test_list_says_limits_and_no_secret(keys):
    secret = keys("create", "爱丽丝", "--tokens-per-minute", "5000", "--monthly-budget", "12.5")[1].strip()
    code, out, _ = keys("list")
    assert code == 0
    assert "爱丽丝: 5000 tokens/min, 12.5 CNY/month" in out
    for text in (out, keys("list", "--json")[1]):
        assert secret.rpartition("-")[2] not in text
        assert keys.file.read()[0].digest not in text


def test_revoke_by_name_or_id(keys):
    keys("create", "a")
    keys("create", "b")
    assert keys("revoke", "a")[0] == 0
    assert keys("revoke", keys.file.read()[1].id)[0] == 0
    assert "revoked" in keys("list")[1]
    code, _, err = keys("revoke", "a")
    assert (code, "no key named 'a'" in err) == (2, True)


@pytest.mark.parametrize("words", [("--expires", "yesterday"), ("--max-concurrent", "0"), ("--priority", "999")])
def test_what_is_wrong_is_said(keys, words):
    code, out, err = keys("create", "a", *words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_usage_is_priced(keys, tmp_path):
    new = json.loads(keys("create", "a", "--monthly-budget", "2", "--json")[1])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(Fact("serve.request", seconds=1800, prompt_tokens=5, completion_tokens=7, who=new["id"]))
    ledger.append(Fact("serve.request", seconds=1800, who=new["id"], note={"cache": "hit"}))
    ledger.append(Fact("serve.request", seconds=1800, who="somebody"))
    ledger.append(Fact("serve", seconds=9999))
    words = ("show-usage", "a", "--ledger", str(tmp_path), "--set", "cost.price_per_hour=3")
    (row,) = json.loads(keys(*words, "--json")[1])
    assert (row["cost"], row["num_requests"], row["num_cache_hits"]) == (1.5, 2, 1)
    assert "2 requests (1 from the cache), 5 + 7 tokens, 1.500000 of 2 CNY" in keys(*words)[1]
