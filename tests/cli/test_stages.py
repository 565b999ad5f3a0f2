"""When a stage counts as done."""

from __future__ import annotations

from pathlib import Path

import pytest

import pingjia
from pingjia.cli import stages as module
from pingjia.cli.schema import load_recipe
from pingjia.cli.stages import Stages, digest
from pingjia.errors import StorageError

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPO / "recipes").rglob("*.y*ml"))


def test_a_stage_is_done_while_its_inputs_are_what_they_were(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    assert stages.result("train", "a") is None
    stages.finish("train", "a", {"loss": 1.5})
    assert Stages(tmp_path).result("train", "a") == {"loss": 1.5}
    assert stages.result("train", "b") is None
    assert stages.result("check", "a") is None
    stages.finish("train", "b", {})
    assert stages.result("train", "a") is None
    assert stages.result("train", "b") == {}, "an empty result is a result"


def test_a_torn_record_is_not_done(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    stages.finish("train", "a", {"loss": 1.5})
    file = tmp_path / "stages" / "train.json"
    file.write_text(file.read_text(encoding="utf-8")[:20], encoding="utf-8")
    assert stages.result("train", "a") is None


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "stages").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match=r"train\.json: not written .*; make room"):
        Stages(tmp_path).finish("train", "a", {})


def test_the_digest_knows_parts_rooms_and_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy of the sources: a byte changed in a room or the base counts, one in another room does not."""
    root = tmp_path / "pingjia"
    for name in [*module.BASE, "data/a.py", "data/deep/b.py", "tune/c.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(pingjia, "__file__", str(root / "__init__.py"))
    before = digest(["data"], {"x": 1}, "y")
    assert digest(["data"], {"x": 1}, "y") == before
    assert digest(["data"], {"x": 2}, "y") != before
    assert digest(["data"], {"x": 1}) != before
    assert digest(["data", "tune"], {"x": 1}, "y") != before
    (root / "tune/c.py").write_text("changed", encoding="utf-8")
    assert digest(["data"], {"x": 1}, "y") == before
    for name in ("data/deep/b.py", module.BASE[0]):
        (root / name).write_text("changed", encoding="utf-8")
        after = digest(["data"], {"x": 1}, "y")
        assert after != before
        before = after


def test_the_base_files_exist() -> None:
    assert all((Path(pingjia.__file__).parent / name).is_file() for name in module.BASE)


def test_there_are_recipes() -> None:
    assert REPO / "recipes" / "demo.yaml" in RECIPES


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.relative_to(REPO).as_posix())
def test_every_recipe_loads(file: Path) -> None:
    """Strictly; and the packaged samples it names exist."""
    from pingjia.data import resolve

    recipe = load_recipe(file)
    for name in [*recipe.data.dataset, *recipe.data.eval_dataset, *(recipe.eval.questions if recipe.eval else [])]:
        if name.startswith("samples:"):
            assert resolve(name).is_file()
    assert recipe.tune.output_dir
