"""`polymodal describe`: what is in a folder, whoever wrote it, said without loading any of it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from polymodal.cli import main

LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
TOWER = {**LLM, "num_hidden_layers": 3, "image_size": 28, "patch_size": 7, "projection_dim": 16}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]


class HeaderOnly:
    """A safetensors file that gives names, types and shapes and nothing else."""

    def __init__(self, opener: Any, *args: Any, **kwargs: Any) -> None:
        self.file = opener(*args, **kwargs)

    def __enter__(self) -> HeaderOnly:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return list(self.file.keys())

    def get_slice(self, name: str) -> SimpleNamespace:
        found = self.file.get_slice(name)
        return SimpleNamespace(get_dtype=found.get_dtype, get_shape=found.get_shape)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights, no network."""
    import safetensors
    import safetensors.torch

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were loaded, or the network was asked")

    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    monkeypatch.setattr(safetensors, "safe_open", partial(HeaderOnly, safetensors.safe_open))
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def told(capsys: pytest.CaptureFixture[str], folder: Path | str) -> dict[str, Any]:
    assert main(["describe", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def page_of(capsys: pytest.CaptureFixture[str], folder: Path | str) -> str:
    assert main(["describe", str(folder)]) == 0
    return capsys.readouterr().out


def count(model: Any) -> int:
    return sum(tensor.numel() for tensor in model.state_dict().values())


def test_our_folder(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(capsys, tiny_model_folder)
    parts = {part["name"]: part for part in facts["parts"]}
    assert list(parts) == ["llm", "vision", "projector"]
    on_disk = sum(path.stat().st_size for path in tiny_model_folder.rglob("*.safetensors"))
    assert 0 < on_disk - facts["bytes"] < 20_000  # headers
    assert facts["parameters"] == sum(part["parameters"] for part in parts.values())
    assert parts["llm"]["kind"] == "LlamaForCausalLM, 2 layers, width 32, 4 heads"
    assert [child["name"] for child in parts["llm"]["children"]] == ["lm_head", "embed_tokens", "layers × 2", "norm"]
    assert parts["projector"]["kind"] == "mlp2x_gelu"
    assert facts["vocabulary"] == 259 and facts["context"] == 512
    assert facts["special_tokens"]["eos_token"] == {"text": "<|im_end|>", "id": 258}
    assert facts["visual_tokens"][0] == {"image": [336, 336], "tokens": 16, "tiles": 1}
    assert facts["images"]["image_aspect_ratio"] == "pad" and "max_tiles" not in facts["images"]
    assert facts["contract"]["broken"] is None and "<|im_start|>" in facts["template"]["text"]

    page = page_of(capsys, tiny_model_folder)
    for line in ("contract", "holds (sha256 ", "images", "pad to 28x28", "16 tokens in 1 tile", "layers × 2"):
        assert line in page
    assert main(["describe", str(tiny_model_folder), "--template"]) == 0
    assert capsys.readouterr().out.strip() == facts["template"]["text"].strip()


def test_a_broken_contract_is_said(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    document = json.loads((folder / "polymodal.json").read_text())
    document["config"]["image"]["image_aspect_ratio"] = "squash"
    document["history"] = [{"stage": "align", "trained": ["projector"], "steps": 1200, "loss": 0.123456}]
    (folder / "polymodal.json").write_text(json.dumps(document))
    page = page_of(capsys, folder)
    assert "BROKEN: " in page and "trained with image.image_aspect_ratio = 'pad'" in page
    assert "1. align: trained projector; steps 1,200; loss 0.1235" in page


def test_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(capsys, "default")
    assert {part["name"] for part in facts["parts"]} == {
        "llm", "vision", "projector", "temporal_encoder", "audio", "audio_projector", "adapter"
    }  # fmt: skip
    assert facts["parts"][-1]["kind"].startswith("LoRA, r ")
    assert facts["history"] and facts["contract"]["broken"] is None and facts["licence"] == "see MODEL_CARD.md"


def write_llava(folder: Path) -> int:
    text, vision = LlamaConfig(**LLM, num_key_value_heads=2), CLIPVisionConfig(**TOWER)
    config = LlavaNextConfig(text_config=text, vision_config=vision, image_token_id=99, image_grid_pinpoints=PINPOINTS)
    model = LlavaNextForConditionalGeneration(config).half()
    model.save_pretrained(folder, max_shard_size="60KB")
    rules = {
        "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28}, "image_grid_pinpoints": PINPOINTS, "resample": 3,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_pad": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(rules))
    return count(model)


def write_clip(folder: Path) -> int:
    model = CLIPModel(CLIPConfig(text_config=LLM, vision_config=TOWER))
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# CLIP\n")
    return count(model)


def write_whisper(folder: Path) -> int:
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        vocab_size=100, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("MIT License\n\nCopyright")
    return count(model) - model.proj_out.weight.numel()  # tied to the embeddings


Writer = Callable[[Path], int]


@pytest.mark.parametrize(
    ("write", "kind", "parts", "licence"),
    [
        (
            write_llava,
            "model that takes media (LlavaNextForConditionalGeneration)",
            {"image_newline", "language_model", "multi_modal_projector", "vision_tower"},
            None,
        ),
        (
            write_clip,
            "pair of towers for images and texts (CLIPModel)",
            {"logit_scale", "text_model", "vision_model", "text_projection", "visual_projection"},
            "apache-2.0 (README.md)",
        ),
        (
            write_whisper,
            "speech model (WhisperForConditionalGeneration, 2 layers, 2 decoder layers, width 32, 4 heads, "
            "80 mel bins)",
            {"encoder", "decoder"},
            "MIT License (LICENSE)",
        ),
    ],
    ids=["LLaVA-NeXT in shards", "CLIP", "Whisper"],
)
def test_folders_of_transformers(
    write: Writer, kind: str, parts: set[str], licence: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = write(tmp_path / "m")
    facts = told(capsys, tmp_path / "m")
    assert (facts["kind"], {part["name"] for part in facts["parts"]}, facts["licence"]) == (kind, parts, licence)
    assert facts["parameters"] == total
    assert facts["contract"] is None
    if write is write_llava:
        assert {part["dtypes"][0] for part in facts["parts"]} == {"F16"}
        tower = next(part for part in facts["parts"] if part["name"] == "vision_tower")
        assert tower["kind"].endswith("3 layers, width 32, 4 heads, images of 28, patches of 7")
        assert "encoder.layers × 3" in {child["name"] for child in tower["children"]}
        # 336x336 is cut as 56x56: 16 + 8 * 8 + 8 newlines.
        assert facts["visual_tokens"][0] == {"image": [336, 336], "tokens": 88, "tiles": 5}


def test_a_language_model_and_a_tower(
    tiny_llm_folder: Path, tiny_tower_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, tiny_llm_folder)["kind"].startswith("language model (LlamaForCausalLM, 2 layers, width 32")
    assert told(capsys, tiny_tower_folder)["kind"].startswith("vision tower (CLIPVisionModel, 3 layers, width 24")


def test_pickles_are_measured_and_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "x/y",
        "hidden_size": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 1000)
    facts = told(capsys, tmp_path)
    assert facts["bytes"] == 1000 and facts["parameters"] is None
    page = page_of(capsys, tmp_path)
    assert "folder of the LLaVA repository" in page and "not known" in page
    assert "weights in pickles (pytorch_model.bin) are not opened here" in page and "polymodal convert" in page


def test_a_stranger_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a\x1b[2J": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x\x1b]0;evil\x07"}))
    (tmp_path / "chat_template.jinja").write_text("hello \x1b[31m{{ messages[0].content }}")
    page = page_of(capsys, tmp_path)
    assert "\x1b" not in page and "\x07" not in page and "hello" in page


def test_of_a_repository_only_the_headers_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(options)
        if options.get("local_files_only"):
            raise FileNotFoundError("not in the cache")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLM}))
        return str(tmp_path)

    def get_safetensors_metadata(name: str) -> SafetensorsRepoMetadata:
        tensors = {
            "model.norm.weight": TensorInfo("BF16", [32], (0, 64)),
            "lm_head.weight": TensorInfo("F32", [2, 2], (64, 80)),
        }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        return SafetensorsRepoMetadata(None, False, weight_map, {"model.safetensors": file})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    facts = told(capsys, "owner/name")
    assert (facts["parameters"], facts["bytes"]) == (36, 80)
    assert [part["name"] for part in facts["parts"]] == ["lm_head", "norm"]
    assert not any("safetensors" in pattern for pattern in asked[-1]["allow_patterns"])


def test_bad_folders_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(tmp_path / "nothing")]) == 2
    assert "no such model folder" in capsys.readouterr().err
    assert main(["describe", "nobody/nothing"]) == 2
    assert "not to be had from the hub" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "x.Y"}}))
    assert main(["describe", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "auto_map asks for code" in error and error.count("\n") == 1
    (tmp_path / "config.json").write_text("{}")
    assert main(["describe", str(tmp_path), "--template"]) == 2
    assert "there is no chat template" in capsys.readouterr().err
