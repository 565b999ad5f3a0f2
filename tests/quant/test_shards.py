"""Shards: all or nothing, an index with checksums, and a flipped bit that is named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from pingjia.errors import ModelError
from pingjia.quant import shards
from pingjia.quant.shards import ShardWriter, read_digests, read_shard, require_digest, tensor_digest

TENSORS = {"a.weight": torch.arange(6, dtype=torch.uint8).view(2, 3), "a.weight_scale": torch.ones(2, 1).half()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 2)
    writer.write(1, TENSORS, note=["n"])
    assert writer.is_done(1)
    assert not writer.is_done(2)
    writer.write(2, {"b": torch.zeros(3)})
    total = writer.finish()
    writer.clean()
    names = sorted(f.name for f in tmp_path.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert total == sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    digests = read_digests(tmp_path)
    assert set(digests) == {*TENSORS, "b"}
    for name, tensor in read_shard(writer.file(1)).items():
        assert torch.equal(tensor, TENSORS[name])
        require_digest(tmp_path, name, tensor, digests[name])


def test_a_note_is_kept_until_it_is_cleaned(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1)
    writer.write(1, TENSORS, note=[{"name": "a", "bits": 4}])
    assert ShardWriter(tmp_path, 1).note(1) == [{"name": "a", "bits": 4}]


@pytest.mark.parametrize("changed", [{"b": TENSORS["a.weight"]}, {"a.weight": TENSORS["a.weight"].view(3, 2)}])
def test_a_digest_is_of_name_and_shape_too(changed: dict[str, torch.Tensor]) -> None:
    ((name, tensor),) = changed.items()
    assert tensor_digest(name, tensor) != tensor_digest("a.weight", TENSORS["a.weight"])


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    tensor = TENSORS["a.weight"].clone()
    wanted = tensor_digest("a.weight", tensor)
    tensor[1, 2] ^= 1
    with pytest.raises(ModelError, match=r"a\.weight is not as it was written"):
        require_digest(tmp_path, "a.weight", tensor, wanted)


def test_a_full_disk_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        (tmp_path / "shard-1.tmp").write_bytes(b"half")
        raise shards.SafetensorError("Error while serializing: IoError(Os { code: 28, message: No space left })")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        ShardWriter(tmp_path, 1).write(1, TENSORS)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [None, "{", "{}", '{"sha256": {"a": "1"}, "weight_map": {}}', "[]"])
def test_an_index_that_says_nothing(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / shards.INDEX).write_text(index)
    with pytest.raises(ModelError, match="no index with checksums"):
        read_digests(tmp_path)


def test_the_index_is_one_that_transformers_reads(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 1)
    writer.write(1, TENSORS)
    writer.finish()
    index = json.loads((tmp_path / shards.INDEX).read_text())
    assert index["weight_map"]["a.weight"] == writer.file(1).name
