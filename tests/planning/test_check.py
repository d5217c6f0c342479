"""A recipe is looked over whole: every mistake at once, none of them by reading a weight."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import polymodal
from polymodal.cli import main
from polymodal.planning import check as checks
from polymodal.planning.check import check
from recipes.tiny.make_parts import main as make_parts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    own = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
           "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": 56},
           "crop_size": {"height": 56, "width": 56}, "resample": 3}  # fmt: skip
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture
def recipe(parts: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe with nothing wrong in it."""
    rows = [{"id": "1", "image": "apple.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                               {"from": "gpt", "value": "An apple."}]}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found: dict[str, Any] = yaml.safe_load((ROOT / "recipes/tiny/stage1.yaml").read_text())
    found["init"]["model"]["vision"]["vision_tower"] = str(parts / "vision")
    found["init"]["model"]["llm"]["model_name_or_path"] = str(parts / "llm")
    found["data"]["mix"] = [{"path": str(tmp_path / "rows.json"), "image_root": str(ROOT / "examples/pictures")}]
    return {**found, "output_dir": str(tmp_path / "out")}


def written(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_nothing_is_wrong_with_a_whole_recipe(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safetensors.torch.load_file", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    path = written(recipe, tmp_path)
    found = check(path)
    assert (found.errors, found.remarks) == ([], [])
    assert main(["check", str(path)]) == 0 and "nothing is wrong" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_all_mistakes_are_told_at_once(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["run"]["trackers"] = ["tensorbord"]
    recipe["run"]["eval_every"] = 5
    recipe["data"]["mix"].append({"path": str(tmp_path / "none.json")})
    recipe["data"]["mix"][0]["image_root"] = str(tmp_path)
    recipe["init"]["model"]["image"]["image_mean"] = [0.5, 0.5, 0.5]
    recipe["init"]["model"]["template"] = {"chat_template": "llama3"}
    path = written(recipe, tmp_path)
    assert main(["train", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for told in (
        "data.mix.0: " + str(tmp_path / "rows.json") + ": row 0: no image " + str(tmp_path / "apple.png"),
        "data.mix.1: " + str(tmp_path / "none.json") + ": no such file",
        "run.trackers: unknown tracker 'tensorbord'; did you mean 'tensorboard'",
        "init.model.image.image_mean: [0.5, 0.5, 0.5] is not what the tower was trained with",
    ):
        assert [line for line in lines if told in line and line.startswith("polymodal: error: ")], told
    assert any("run.eval_every without files" in line for line in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key, value, told",
    [
        (
            "train",
            [{"match": "projectr.*", "train": True}],
            "train.0: unknown train rule: no name matches 'projectr.*'",
        ),
        ("train", [{"match": "llm.*", "train": True}], "projector begins with random values and no rule trains it"),
        ("train", [{"match": "*", "train": False}], "nothing is trained"),
        ("optim", {"learning_rte": 1}, "did you mean 'learning_rate'"),
    ],
)
def test_rules_that_forget_something(
    recipe: dict[str, Any], tmp_path: Path, key: str, value: object, told: str
) -> None:
    found = check(written({**recipe, key: value}, tmp_path))
    assert len(found.errors) == 1 and told in found.errors[0]


def test_values_are_all_told_before_anything_else_is_looked_at(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["optim"]["learning_rate"] = "fast"
    recipe["run"]["epoch"] = 2
    recipe["data"]["mix"][0]["path"] = str(tmp_path / "none.json")
    found = check(written(recipe, tmp_path))
    assert len(found.errors) == 2
    assert "optim.learning_rate" in found.errors[0] and "did you mean 'epochs'" in found.errors[1]


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda model, parts: model["vision"].update(vision_tower=f"{parts}/visoin"), "visoin: no such folder"),
        (lambda model, parts: model["llm"].update(model_name_or_path=f"{parts}/lm"), "lm: no such folder"),
        (lambda model, _: model.pop("image"), "`vision` and `image` come together, and 'image' is missing"),
        (lambda model, _: model.update(template={"chat_template": "chatml2"}), "did you mean 'chatml'"),
        (lambda model, _: model["vision"].update(type="siglip"), "siglip"),
    ],
)
def test_parts_that_do_not_fit(recipe: dict[str, Any], parts: Path, tmp_path: Path, change: Any, told: str) -> None:
    change(recipe["init"]["model"], parts)
    found = check(written(recipe, tmp_path))
    assert len(found.errors) == 1 and told in found.errors[0], found.errors


def test_a_tower_whose_shape_is_known_without_its_folder_is_looked_for_too(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["init"]["model"]["vision"] = {"vision_tower": "./nope", "type": "efficientnet_lite0", "pool": 4}
    found = check(written(recipe, tmp_path))
    assert [error for error in found.errors if "init.model.vision.vision_tower: ./nope: no such folder" in error]


def test_each_tower_side_by_side_is_looked_at(recipe: dict[str, Any], parts: Path, tmp_path: Path) -> None:
    own = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    vision = recipe["init"]["model"]["vision"]
    vision["fused"] = [{"vision_tower": f"{parts}/vision", "type": "clip"}]
    assert check(written(recipe, tmp_path)).errors == []
    vision["fused"][0] |= own
    told = [error.partition("init.model.")[2] for error in check(written(recipe, tmp_path)).errors]
    assert [line.partition(" is not what")[0] for line in told] == [
        f"vision.fused.0.{key}: {value}" for key, value in own.items()
    ]
    for change, said in (
        ({"vision_tower": f"{parts}/visoin"}, "init.model.vision.fused.0.vision_tower"),
        ({"mm_vision_select_feature": "cls"}, "init.model.vision: vision tower 2 of 2: mm_vision_select_feature 'cls'"),
        ({"type": "siglip"}, "'clip_vision_model' but vision.type is 'siglip'; set type to 'clip'"),
        ({"pol": 3}, "unknown key 'pol'; did you mean 'pool'?"),
    ):
        vision["fused"] = [{"vision_tower": f"{parts}/vision", "type": "clip", **change}]
        found = check(written(recipe, tmp_path))
        assert len(found.errors) == 1 and said in found.errors[0], found.errors


def test_other_image_rules_may_be_meant(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["init"]["model"]["image"]["image_mean"] = [0.5, 0.5, 0.5]
    recipe["init"]["other_image_rules"] = True
    found = check(written(recipe, tmp_path))
    assert found.errors == [] and "is not what the tower was trained with" in found.remarks[0]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_broken(
    recipe: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith((name, "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / f"broken/{name}").mkdir(parents=True)
    (tmp_path / f"broken/{name}/__init__.py").write_text("raise RuntimeError('made for another numpy')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    recipe["run"]["trackers"] = [name]
    (error,) = check(written(recipe, tmp_path)).errors
    assert f"run.trackers needs {name}, which is installed but cannot be imported: made for another numpy" in error


def test_a_stage_that_goes_on_has_its_folders_own_tokenizer(recipe: dict[str, Any], tmp_path: Path) -> None:
    model = polymodal.compose(
        recipe["init"]["model"]["vision"]["vision_tower"], llm=recipe["init"]["model"]["llm"]["model_name_or_path"]
    )
    model.config = model.config.model_copy(
        update={"llm": model.config.llm.model_copy(update={"model_name_or_path": "bundled"})}
    )
    model.save(tmp_path / "start")  # its language model lies in it without a tokenizer of its own
    found = check(written({**recipe, "init": {"from": str(tmp_path / "start")}}, tmp_path))
    assert found.errors == []


def test_a_disk_without_room_is_told(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    found = check(written(recipe, tmp_path))
    assert len(found.errors) == 1 and "lower run.keep" in found.errors[0]


def test_a_pipeline_is_looked_over_before_its_parts_are_made(tmp_path: Path) -> None:
    found = check(ROOT / "recipes/tiny/pipeline.yaml", [f"output_dir={tmp_path / 'out'}"])
    assert found.errors == []
    assert any("made by an earlier stage" in remark for remark in found.remarks)
    wrong = check(
        ROOT / "recipes/tiny/pipeline.yaml",
        [f"output_dir={tmp_path / 'out'}", "stages.stage1.optim.learning_rate=fast", "stages.stage2.run.epochs=-1"],
    )
    assert len(wrong.errors) == 2 and "stages.stage1" in wrong.errors[0] and "stages.stage2" in wrong.errors[1]
