"""`polymodal init`: from parts and rows to recipes that train, as a newcomer types it."""

import json
from pathlib import Path

import pytest
import yaml

import polymodal
from polymodal.cli import main
from recipes.tiny.make_parts import main as make_parts

PICTURES = Path(__file__).parents[2] / "examples/pictures"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    says = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    names = ("apple", "penguin", "strawberry")
    rows = [{"id": str(number), "image": f"{names[number % 3]}.png", "conversations": says} for number in range(30)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_from_parts_to_an_answer(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--vision", f"{parts}/vision", "--llm", f"{parts}/llm", "--data", f"{parts}/rows.json"]
    assert main(["init", "my_vlm", *given, "--image-root", str(PICTURES)]) == 0
    check, train, chat = [line.strip().split()[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    recipe = yaml.safe_load(Path("my_vlm/stage1.yaml").read_text())
    assert recipe["init"]["model"]["image"]["tile_size"] == [56, 56] and recipe["batch"]["global_size"] == 4
    assert Path("my_vlm/stage1.yaml").read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    assert main(check) == 0
    assert main([*train, "stages.stage1.run.max_steps=2", "stages.stage2.run.max_steps=2"]) == 0
    assert chat[0] == "chat"
    moved = tmp_path / "elsewhere"
    Path(chat[-1]).rename(moved)
    assert isinstance(polymodal.load(moved).ask("What?", PICTURES / "apple.png"), str)


def test_towers_side_by_side(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--vision", f"{parts}/vision", "--vision", "vit_small", "--vision", "efficientnet_lite0"]
    given += ["--llm", f"{parts}/llm", "--data", f"{parts}/rows.json", "--image-root", str(PICTURES)]
    assert main(["init", str(tmp_path / "mine"), *given]) == 0
    model = yaml.safe_load((tmp_path / "mine/stage1.yaml").read_text())["init"]["model"]
    second, third = model["vision"]["fused"]
    assert second == {"vision_tower": "vit_small", "type": "siglip"}  # it has CLIP's pixels, as the first
    assert third["type"] == "efficientnet_lite0" and third["image_mean"] == [127 / 255] * 3
    assert main(["check", str(tmp_path / "mine/pipeline.yaml")]) == 0
    assert main(["plan", str(tmp_path / "mine/stage1.yaml"), "--rows", "30"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resolution, rule", [("slices", "slice"), ("anyres", "anyres"), ("native", "native")])
def test_resolutions_and_full_tuning(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resolution: str, rule: str
) -> None:
    given = ["--vision", f"{parts}/vision", "--llm", f"{parts}/llm", "--data", f"{parts}/rows.json", "--tune", "full"]
    folder = tmp_path / "mine"
    assert main(["init", str(folder), *given, "--image-root", str(PICTURES), "--resolution", resolution]) == 0
    recipe = yaml.safe_load((folder / "stage2.yaml").read_text())
    assert "lora" not in recipe and {"match": "llm.*", "train": True} in recipe["train"]
    image = yaml.safe_load((folder / "stage1.yaml").read_text())["init"]["model"]["image"]
    assert image["image_aspect_ratio"] == rule
    assert main(["check", str(folder / "pipeline.yaml")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change, told",
    [
        (["--vision", "{parts}/visoin"], "visoin"),
        (["--llm", "{parts}/lm"], "lm"),
        (["--data", "{parts}/none.json"], "none.json"),
        (["--image-root", "{parts}/none"], "--image-root"),
        (["--projector", "mlp2x_gleu"], "mlp2x_gleu"),
        (["--template", "chatmll"], "did you mean 'chatml'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], told: str
) -> None:
    given = ["--vision", f"{parts}/vision", "--llm", f"{parts}/llm", "--data", f"{parts}/rows.json"]
    assert main(["init", str(tmp_path / "mine"), *given, *(part.format(parts=parts) for part in change)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "mine").exists()
