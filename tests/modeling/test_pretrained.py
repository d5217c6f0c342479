"""What is loaded is the model that was trained: configurations and files that do not agree, before memory is taken."""

from __future__ import annotations

import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymodal.config import LLMConfig, VisionConfig
from polymodal.errors import CheckpointError
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.modeling.language_model import load_llm
from tests.conftest import write_tiny_llm, write_tiny_t5

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llm(tiny_llm_folder: Path, tmp_path: Path) -> Path:
    """A language model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))


def config(**values: Any) -> Callable[[Path], None]:
    """Set keys of `config.json`."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the weights."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        edit(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def only_embeddings(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "embed" not in name]:
        del found[name]


ANOTHER = {
    "a tensor gone": (tensors(lambda t: t.pop(UP)), rf"1 missing: {UP}"),
    "a layer renamed": (tensors(lambda t: t.update({f"old.{UP}": t.pop(UP)})), rf"1 missing: {UP}; 1 not expected"),
    "a tensor too many": (tensors(lambda t: t.update({"extra.weight": torch.ones(2)})), "1 not expected: extra.weight"),
    "a tensor of another shape": (tensors(lambda t: t.update({UP: torch.ones(3, 32)})), r"1 of another shape"),
    "embeddings only": (tensors(only_embeddings), r"20 missing"),
    "one layer for two": (config(num_hidden_layers=1), r"9 not expected: model\.layers\.1"),
    "three layers for two": (config(num_hidden_layers=3), r"9 missing: model\.layers\.2"),
    "another type": (config(model_type="gpt2"), "missing"),
    "a type that reads both ways": (config(model_type="bert"), "'bert' reads both ways"),
    "another width inside": (config(intermediate_size=2**21), r"6 of another shape.*2097152"),
    "an endless width inside": (config(intermediate_size=2**23), r"6 of another shape.*8388608"),
    "a giant vocabulary": (config(vocab_size=2**25), r"2 of another shape.*33554432"),
    "too many layers": (config(num_hidden_layers=16000), "many more layers or experts than the weights have"),
    "a billion experts": (
        config(model_type="mixtral", num_local_experts=10**9, architectures=["MixtralForCausalLM"]),
        r"num_local_experts is 1000000000, which is no model's",
    ),
    "half a million experts": (
        config(model_type="phimoe", num_local_experts=60000), "missing|not expected|of another shape|more layers"
    ),
    "no heads": (config(num_attention_heads=0), "cannot be loaded"),
    "heads that do not divide": (config(num_key_value_heads=3), "of another shape|cannot be loaded"),
    "a width in words": (config(hidden_size="wide"), r"hidden_size"),
    "a width as a list": (config(hidden_size=[32]), r"hidden_size"),
    "an unknown activation": (config(hidden_act="swoosh"), "cannot be loaded .*swoosh"),
    "an unknown rope": (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "spiral"),
    "a rope without a base": (config(rope_parameters={"rope_type": "linear"}), "cannot be loaded|NaN"),
    "a rope of NaN": (config(rope_parameters={"rope_type": "default", "rope_theta": float("nan")}), "theta is nan"),
    "a norm with NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, which is no number"),
    "a norm with infinity": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "a negative norm": (config(rms_norm_eps=-1.0), r"rms_norm_eps is -1\.0"),
    "an unknown dtype": (config(dtype="fp16"), "dtype is 'fp16', which is no type of torch; write float16"),
    "an old unknown dtype": (config(torch_dtype="half precision"), "torch_dtype is 'half precision', which is no type"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), ANOTHER.values(), ids=ANOTHER)
def test_another_language_model_than_its_files_is_refused(
    spoil: Callable[[Path], None], reason: str, llm: Path
) -> None:
    spoil(llm)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_llm(LLMConfig(model_name_or_path=str(llm)))
    assert "\n" not in str(caught.value) and "llm" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
    assert time.monotonic() - start < 10


def test_a_head_that_is_tied_may_be_left_out_or_there(tmp_path: Path) -> None:
    write_tiny_llm(tmp_path, tie_word_embeddings=True)
    found = load_file(tmp_path / WEIGHTS)
    ids = torch.arange(9)[None]
    without = load_llm(LLMConfig(model_name_or_path=str(tmp_path)))(ids).logits
    save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS)
    assert "lm_head.weight" not in found
    assert torch.equal(load_llm(LLMConfig(model_name_or_path=str(tmp_path)))(ids).logits, without)


def test_buffers_of_old_folders_are_no_news(llm: Path) -> None:
    tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(llm)
    load_llm(LLMConfig(model_name_or_path=str(llm)))


def test_an_encoder_decoder_is_compared_too(tmp_path: Path) -> None:
    write_tiny_t5(tmp_path)
    tensors(lambda t: t.pop("decoder.block.2.layer.2.DenseReluDense.wo.weight"))(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.block\.2"):
        load_llm(LLMConfig(model_name_or_path=str(tmp_path)))


def test_a_tower_with_layers_that_its_configuration_leaves_out_is_refused(
    tiny_tower_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    config(num_hidden_layers=2)(folder)
    with pytest.raises(CheckpointError, match=r"not expected: .*layers\.2"):
        build_vision_encoder(VisionConfig(vision_tower=str(folder), type="clip"))
    for changes, reason in (
        ({"num_hidden_layers": 10_000}, "many more layers"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_size": 60_000, "patch_size": 1}, "position"),
        ({"hidden_act": "swoosh", "num_hidden_layers": 3}, "swoosh"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
    ):
        shutil.copy(tiny_tower_folder / "config.json", folder)
        config(**changes)(folder)
        with pytest.raises(CheckpointError, match=reason):
            build_vision_encoder(VisionConfig(vision_tower=str(folder), type="clip"))


def test_the_tower_of_a_whole_model_leaves_the_rest_of_its_files(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "image_size": 28, "patch_size": 7}
    whole = transformers.CLIPConfig(text_config={**text, "vocab_size": 40}, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(whole).save_pretrained(tmp_path)
    build_vision_encoder(VisionConfig(vision_tower=str(tmp_path), type="clip"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may run here")
def test_flash_attention_without_a_gpu_falls_back_and_says_so(
    llm: Path, tiny_tower_folder: Path, tmp_path: Path
) -> None:
    config(_attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")(llm)
    ids = torch.arange(9)[None]
    expected = load_llm(LLMConfig(model_name_or_path=str(llm)))(ids).logits
    flash = LLMConfig(model_name_or_path=str(llm), attn_implementation="flash_attention_2")
    with pytest.warns(UserWarning, match="asks for flash_attention_2, which needs a GPU.*sdpa takes its place"):
        assert torch.equal(load_llm(flash)(ids).logits, expected)
    folder = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    config(attn_implementation="flash_attention_2")(folder)
    with pytest.warns(UserWarning, match="asks for flash_attention_2"):
        build_vision_encoder(VisionConfig(vision_tower=str(folder), type="clip"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_vision_encoder(VisionConfig(vision_tower=str(tiny_tower_folder), type="clip"))
