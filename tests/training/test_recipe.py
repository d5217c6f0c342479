from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from polymodal.config import parse_config
from polymodal.errors import ConfigError
from polymodal.training.optimizer import lr_factor
from polymodal.training.recipes.load import dump_recipe, load_recipe
from polymodal.training.recipes.pipeline import load_pipeline
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


@pytest.mark.parametrize(
    ("override", "needle"),
    [
        ("optim.betas=[2,2]", r"optim\.betas\.0: .*less than 1"),
        ("optim.betas=[0.9,.nan]", r"optim\.betas\.1"),
        ("optim.eps=.inf", r"optim\.eps"),
        ("optim.learning_rate=.nan", r"optim\.learning_rate"),
        ("data.mix.0.repeat=1e12", r"data\.mix\.0\.repeat: .*10000"),
        ("data.mix.0.path=", r"data\.mix\.0\.path"),
        ("data.mix.0.path=~nobody-here/x.json", "no user 'nobody-here'"),
        ("batch.global_size=1e9", r"batch\.global_size: .*1000000"),
        ("batch.micro_tokens=10000000000", r"batch\.micro_tokens"),
        ("run.seed=18446744073709551616", r"run\.seed"),
        ("run.workers=100000", r"run\.workers"),
        ("run.timeout_minutes=1e300", r"run\.timeout_minutes"),
        ("run.max_steps=" + "9" * 4000, r"run\.max_steps"),
        ("run.max_steps=" + "9" * 5000, r"not valid YAML: .*4300"),
        ("run.feature_cache=", r"run\.feature_cache"),
        ('run.feature_cache=""', r"run\.feature_cache: .*no name of a file"),
        ('data.index=" "', r"data\.index"),
        ("lora.lora_alpha=NaN", r"lora\.lora_alpha"),
        ("lora.lora_alpha=.nan", r"lora\.lora_alpha"),
        ("output_dir=/", "output_dir: .*one of its own"),
        ("output_dir=..", "output_dir: .*one of its own"),
        ('output_dir="~"', "output_dir: .*one of its own"),
        ("output_dir=/tmp/../", "output_dir: .*one of its own"),
        ("name=a/../../b", "name: .*without slashes"),
        ('name="a\\nb"', "name: .*without slashes"),
        ("data.mix=2024-13-45", "not valid YAML"),
    ],
)
def test_a_value_out_of_range_names_its_key(plain: dict[str, Any], tmp_path: Path, override: str, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle) as error:
        load_recipe(write(tmp_path, plain), [override])
    assert "\n" not in str(error.value)


def test_home_stands_for_the_home_folder(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("data.mix.0.path", "data.mix.0.image_root", "data.index", "run.feature_cache", "output_dir")
    recipe = load_recipe(write(tmp_path, plain), [f"{key}=~/{key}" for key in keys])
    found = recipe.data.mix[0].path, recipe.data.mix[0].image_root, recipe.data.index, recipe.run.feature_cache
    assert [*found, recipe.output_dir] == [f"{tmp_path}/{key}" for key in keys]
    plain["init"]["model"]["vision"]["vision_tower"] = "~/tower"
    plain["init"]["model"]["llm"]["model_name_or_path"] = "~/llm"
    model = load_recipe(write(tmp_path, plain)).init.model
    assert model is not None and model.vision is not None
    assert (model.vision.vision_tower, model.llm.model_name_or_path) == (f"{tmp_path}/tower", f"{tmp_path}/llm")
    plain["init"] = {"from": "~/model"}
    assert load_recipe(write(tmp_path, plain)).init.from_folder == f"{tmp_path}/model"


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("name: a\nrun: {seed: 1, seed: 2}", "'seed' stands twice, again in line 2"),
        ("name: a\noutput_dir: x\nname: b", "'name' stands twice, again in line 3"),
        ("a: &a [x]\n" + "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else '*a'] * 9)}]" for i in range(12)),
         "more than 100,000 values"),
        ("a: &a [1, *a]", "an alias stands inside what it names"),
        ("a: &a {b: *a}", "an alias stands inside what it names"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " + "7" * 5000, "not valid YAML: .*4300"),
        ("a: b\0c", "not valid YAML"),
        ("{[1]: 2}", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_is_a_slip_or_a_trap_is_one_line(tmp_path: Path, text: str, needle: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    for read in (load_recipe, load_pipeline):
        with pytest.raises(ConfigError, match=needle) as error:
            read(path)
        assert "\n" not in str(error.value) and "recipe.yaml" in str(error.value)


def test_aliases_and_merge_keys_stay_allowed(plain: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {key: value for key, value in plain.items() if key != "optim"})
    path.write_text(path.read_text() + "\noptim: {<<: &o {learning_rate: 1e-3, clip: 2}, clip: 3}\n")
    recipe = load_recipe(path)
    assert (recipe.optim.learning_rate, recipe.optim.clip) == (1e-3, 3)


def test_what_is_no_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            load_recipe(path)
    with pytest.raises(ConfigError, match="is a folder; a recipe is a YAML file"):
        load_recipe(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"#" * 10_000_001)
    with pytest.raises(ConfigError, match="10,000,000 bytes"):
        load_recipe(tmp_path / "big.yaml")
