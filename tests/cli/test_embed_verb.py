"""`polymodal embed`: the stock class's vectors and cosines, as JSON and as a table; mistakes are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from polymodal.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "red", "blue", "of", "picture"]
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TEXT = {**SMALL, "vocab_size": 12, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 11}
TOWER = {**SMALL, "image_size": 16, "patch_size": 8, "initializer_range": 0.02}
TEXTS = ["a cat", "a picture of a red dog", "blue"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLIP of the class for retrieval, with its processor's files, and images `0.png` ..."""
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("embed") / "blip"
    torch.manual_seed(0)
    text = {**TEXT, "sep_token_id": 3, "eos_token_id": 3, "encoder_hidden_size": 16}
    config = BlipConfig(text_config=text, vision_config=TOWER, image_text_hidden_size=8)
    model = BlipForImageTextRetrieval(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    noise = np.random.default_rng(0)
    for number in range(3):
        pixels = noise.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(folder.parent / f"{number}.png")
    return folder


def stock(folder: Path, shown: list[str], texts: list[str]) -> torch.Tensor:
    """The cosines of the stock class, [images, texts]."""
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForImageTextRetrieval

    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = images([PILImage.open(path) for path in shown], return_tensors="pt").pixel_values
    found = []
    with torch.no_grad():
        for text in texts:
            words = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", return_token_type_ids=False)
            found.append(model(pixel_values=pixels, **words, use_itm_head=False).itm_score[:, 0])
    return torch.stack(found, dim=1)


def test_blip_scores_as_the_stock_class_does(blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [str(blip.parent / f"{number}.png") for number in range(3)]
    said = [argument for text in TEXTS for argument in ("--text", text)]
    command = ["embed", *shown, *said, "--model", str(blip), "--device", "cpu"]
    wanted = stock(blip, shown, TEXTS)
    assert wanted.std() > 0.01
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.allclose(torch.tensor(found["cosines"]), wanted, atol=1e-5)
    vectors = [torch.tensor([entry["vector"] for entry in found[kind]]) for kind in ("images", "texts")]
    assert torch.allclose(vectors[0] @ vectors[1].T, wanted, atol=1e-5)
    assert [entry["image"] for entry in found["images"]] == found["rows"] == shown
    assert [entry["text"] for entry in found["texts"]] == found["columns"] == TEXTS
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | a cat | a picture of a red dog | blue |" and len(lines) == 5
    assert lines[2] == "| " + " | ".join([shown[0], *(f"{cosine:.3f}" for cosine in wanted[0].tolist())]) + " |"


def test_one_kind_is_compared_with_itself(blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [str(blip.parent / f"{number}.png") for number in range(3)]
    for given in (shown, [f"--text={text}" for text in TEXTS]):
        assert main(["embed", *given, "--model", str(blip), "--device", "cpu", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        cosines = torch.tensor(found["cosines"])
        assert torch.allclose(cosines.diagonal(), torch.ones(3)) and torch.allclose(cosines, cosines.T)


def test_a_hub_id_is_found_in_the_cache(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--blip"
    shutil.copytree(blip, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    record = {"id": "0", "image": "0.png", "captions": ["a cat"]}
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat"}]
    rows = [{**record, "conversations": turns}, {**record, "id": "1", "image": "1.png", "conversations": turns}]
    (blip.parent / "val.json").write_text(json.dumps(rows))
    ask = ["embed", str(blip.parent / "0.png"), "--device", "cpu"]
    assert main([*ask, "--text", "a cat", "--model", "some/blip"]) == 0
    assert "a cat" in capsys.readouterr().out
    data = ["--data", str(blip.parent / "val.json"), "--device", "cpu"]
    assert main(["eval", "some/blip", "--task", "retrieval", *data, "--output", str(tmp_path / "out")]) == 0
    assert "2 images, 2 texts" in capsys.readouterr().out
    assert main(["embed", "--text", "a", "--model", "some/other"]) == 2
    assert "not to be had from the hub" in capsys.readouterr().err


def test_mistakes_are_one_line(blip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "writes").mkdir()
    (tmp_path / "writes" / "config.json").write_text(
        json.dumps({"model_type": "blip", "architectures": ["BlipForConditionalGeneration"]})
    )
    (tmp_path / "writes" / "preprocessor_config.json").write_bytes((blip / "preprocessor_config.json").read_bytes())
    for command, said in [
        (["embed"], "nothing to embed: give images, or texts with --text"),
        (["embed", "absent.png", "--model", str(blip)], "absent.png"),
        (["embed", "--text", "a", "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["embed", "--text", "a", "--model", "default"], "a chat model has no text tower"),
        (["embed", "--text", "a", "--model", str(tmp_path / "none")], "no such model folder"),
        (["embed", "--text", "a", "--model", str(tmp_path / "writes")], "BlipForImageTextRetrieval does"),
    ]:
        assert main([*command, *(["--device", "cpu"])]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("polymodal: error: ") and error.count("\n") == 1


def test_the_model_that_ships_is_the_default(blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["embed", str(blip.parent / "0.png"), "--device", "cpu"]
    assert main([*ask, "--text", "a cat", "--text", "a dog"]) == 0
    assert capsys.readouterr().out.startswith("| | a cat | a dog |")


@pytest.mark.parametrize("text", ["[1]", "null", "3", "{", "[" * 100_000])
def test_a_config_that_is_no_object_is_one_line(
    blip: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(blip, tmp_path / "bad"))
    (folder / "config.json").write_text(text)
    assert main(["embed", "--model", str(folder), "--text", "a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder}/config.json: " in error
