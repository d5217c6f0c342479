"""`polymodal convert`: an original LLaVA folder becomes a folder of ours that answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polymodal.backends import load
from polymodal.checkpoints.model_folder import read_config
from polymodal.cli import main


@pytest.fixture
def repo(tiny_llm_folder: Path, tiny_tower_folder: Path, tmp_path: Path) -> Path:
    """A LLaVA of the original repository around the tiny language model and tower, in a pickle."""
    tower = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    rules = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "resample": 3,
        "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    (tower / "preprocessor_config.json").write_text(json.dumps(rules))
    folder = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llava"))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": str(tower),
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24, "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    state = load_file(folder / "model.safetensors")
    for name, shape in (("0.weight", (32, 24)), ("0.bias", (32,)), ("2.weight", (32, 32)), ("2.bias", (32,))):
        state[f"model.mm_projector.{name}"] = torch.randn(shape)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_an_original_llava_becomes_ours(
    repo: Path, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "ours"
    assert main(["convert", str(repo), str(target)]) == 2
    assert "pytorch_model.bin: weights in a pickle" in capsys.readouterr().err and not target.exists()
    assert main(["convert", str(repo), str(target), "--allow-pickle", "--dtype", "bfloat16"]) == 0
    assert "is written" in capsys.readouterr().err
    config = read_config(target)
    assert config.llm.dtype == "bfloat16" and config.template.chat_template == "tokenizer"
    assert not list(target.rglob("*.bin"))
    answer = load(target, "cpu").ask("What is this?", next(image_folder.glob("*.jpg")))
    assert answer
    assert main(["convert", str(repo), str(target), "--allow-pickle"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["convert", str(repo), str(target), "--allow-pickle", "--force", "--template", "plain"]) == 0
    assert read_config(target).template.chat_template == "plain"


def test_a_safe_one_opens_directly(repo: Path, image_folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(torch.load(repo / "pytorch_model.bin"), repo / "model.safetensors", metadata={"format": "pt"})
    backend = load(repo, "cpu")
    assert backend.ask("Hi?", next(image_folder.glob("*.jpg")))
    assert load(repo, "cpu", quantize="int8").ask("Hi?", next(image_folder.glob("*.jpg")))


def test_flags_that_do_not_apply_are_refused(
    tiny_llm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(tiny_llm_folder), str(tmp_path / "x"), "--base", "y"]) == 2
    assert "--base is for folders of the LLaVA repository" in capsys.readouterr().err
    assert main(["convert", str(tiny_llm_folder), str(tmp_path / "x")]) == 2
    assert "`polymodal describe` says what it is" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
