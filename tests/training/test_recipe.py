from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from polymodal.config import parse_config
from polymodal.errors import ConfigError
from polymodal.training.optimizer import lr_factor
from polymodal.training.recipes.load import dump_recipe, load_recipe
from polymodal.training.recipes.sft import Recipe


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_overrides_reach_nested_keys_and_list_entries(plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, plain)
    recipe = load_recipe(path, ["optim.learning_rate=3e-4", "data.mix.0.repeat=2.5", "lora.lora_r=8", "run.keep=7"])
    assert recipe.optim.learning_rate == 3e-4
    assert recipe.data.mix[0].repeat == 2.5
    assert recipe.lora is not None and recipe.lora.lora_r == 8
    assert recipe.run.keep == 7


def test_dump_reads_back_unchanged(plain: dict[str, Any], tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, plain))
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("optim.learnin_rate=1", "'learning_rate'"),
        ("optimm.learning_rate=1", "'optim'"),
        ("data.mix.3.path=x", "no index"),
        ("nonsense", "section.key=value"),
        ("run.epochs=-1", "run.epochs"),
        ("init.from=somewhere", "exactly one"),
    ],
)
def test_a_wrong_override_names_the_key(plain: dict[str, Any], tmp_path: Path, override: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle):
        load_recipe(write(tmp_path, plain), [override])


def test_an_unknown_key_in_the_file_names_the_nearest(plain: dict[str, Any]) -> None:
    plain["batch"]["micro_sise"] = 3
    with pytest.raises(ConfigError, match="'micro_size'"):
        parse_config(Recipe, plain, "recipe")


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(broken)


def test_schedule(plain: dict[str, Any]) -> None:
    optim = parse_config(Recipe, {**plain, "optim": {"warmup": 0.1, "min_lr_ratio": 0.1}}, "recipe").optim
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert 0.1 < factors[99] < 0.102
    constant = optim.model_copy(update={"schedule": "constant", "warmup": 0.0})
    assert {lr_factor(step, 7, constant) for step in range(7)} == {1.0}
    linear = optim.model_copy(update={"schedule": "linear", "min_lr_ratio": 0.0, "warmup": 0.0})
    assert lr_factor(50, 100, linear) == pytest.approx(0.5)
