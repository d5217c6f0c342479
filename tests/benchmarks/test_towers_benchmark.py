"""The comparison of towers runs on drawn shapes and a random tower, and says what is wrong with its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.default.dataset.pairs import build_pairs


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are no package that is installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "pairs"
    build_pairs(folder, size="tiny", workers=1, progress=False)
    return folder


def test_two_towers_side_by_side(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    from benchmarks.towers.__main__ import main, read_images

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    size = {"height": 32, "width": 32}
    SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "vit")
    out = tmp_path / "rows.json"
    assert main([str(data), "efficientnet_lite0", str(tmp_path / "vit"), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    efficient, vit = json.loads(out.read_text())
    assert efficient["tower"] == "efficientnet_lite0" and efficient["parameters"] > 3e6 > vit["parameters"]
    for row in (efficient, vit):
        assert row["noun"]["classes"] == 8 and row["noun"]["images"] == len(read_images(data, 4)[1])
        for method in ("knn", "linear"):
            low, high = row["noun"][method]["interval"]
            assert 0 <= low <= row["noun"][method]["score"] <= high <= 1
    # Shapes in other colours are told apart by a trained tower.
    assert efficient["noun"]["linear"]["score"] > 0.5
    assert "| efficientnet_lite0 |" in printed and "noun" in printed


def test_training_and_held_out_images_show_different_things(data: Path) -> None:
    from benchmarks.towers.__main__ import read_images

    train, test = read_images(data, 1)
    assert train and test and not {s.thing for s in train} & {s.thing for s in test}


def test_what_is_wrong_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.towers.__main__ import main

    assert main([str(tmp_path), "efficientnet_lite0"]) == 1
    assert "no dataset of `python -m recipes.default.dataset pairs`" in capsys.readouterr().err
    assert main([str(data), "resnet"]) == 1
    assert "neither efficientnet_lite0 nor a model folder" in capsys.readouterr().err
