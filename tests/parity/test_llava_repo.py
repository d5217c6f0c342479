"""Folders in the layouts of the original LLaVA repository give what transformers' LLaVA gives with the same tensors.

The folders are written here, with the names and the configuration keys of the published ones (liuhaotian/llava-v1.5-7b,
llava-v1.6-mistral-7b, the LoRA and stage-1 folders of the training scripts), around tiny random weights.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import Loaded, load_model, save_model
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.interop.llava import load_llava_repo, read_repo
from polymodal.messages import Image, user
from polymodal.modeling.lora import merge_adapter
from polymodal.processing.collate import collate
from polymodal.safety.model_folder import check_folder

TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {
    "_name_or_path": "./checkpoints/somewhere", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
    "initializer_range": 0.02, "max_length": 512, "max_position_embeddings": 512, "mm_hidden_size": 24,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, **SIZES,
}  # fmt: skip
LLAVA15 = {
    **COMMON, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "image_aspect_ratio": "pad",
    "pretraining_tp": 1, "rope_scaling": None,
}  # fmt: skip
LLAVA16 = {
    **COMMON, "architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral",
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": 224, "mm_patch_merge_type": "spatial_unpad", "mm_vision_tower_lr": 2e-06,
    "rope_theta": 1000000.0, "sliding_window": None, "tokenizer_model_max_length": 512,
    "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True,
}  # fmt: skip


def load_repo(folder: Path, *, allow_pickle: bool = False, **options: Any) -> Loaded:
    """Look a folder over and load it."""
    return load_llava_repo(check_folder(folder, allow_pickle=allow_pickle), **options)


@pytest.fixture
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Bytes, with Llama's special tokens and no chat template, as Vicuna's is."""
    from tokenizers import Tokenizer

    data = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    data["added_tokens"] = []
    raw = Tokenizer.from_str(json.dumps(data))
    raw.add_special_tokens(["<s>", "</s>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A CLIP tower's folder, with its preprocessor."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=TILE,
        patch_size=7, projection_dim=16,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    write_preprocessor(tmp_path / "clip", "CLIPImageProcessor")
    return tmp_path / "clip"


def write_preprocessor(folder: Path, kind: str) -> None:
    size = {"shortest_edge": TILE} if kind.startswith("CLIP") else {"height": TILE, "width": TILE}
    crop = {"do_center_crop": True, "crop_size": {"height": TILE, "width": TILE}} if kind.startswith("CLIP") else {}
    values = {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
        "size": size, **crop, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def stock(tower: Path, vocabulary: int, family: str) -> Any:
    """A random LLaVA of transformers around the tower; some rows are left for the placeholder."""
    torch.manual_seed(0)
    vision = CLIPVisionModel.from_pretrained(tower)
    text = {
        "vocab_size": vocabulary + 8, "max_position_embeddings": 512, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        **SIZES,
    }  # fmt: skip
    common = {"vision_config": vision.config, "image_token_id": vocabulary, "vision_feature_layer": -2}
    if family == "llava":
        model: Any = LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(**text), **common))
    else:
        # transformers reads Mistral's window and rope from here; the folder says the same.
        llm = MistralConfig(**text, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
        config = LlavaNextConfig(text_config=llm, image_grid_pinpoints=PINPOINTS, **common)
        model = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    return model.eval()


def repo_state(model: Any, vocabulary: int, *, tower: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of transformers' model under the LLaVA repository's names."""
    state = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    state["lm_head.weight"] = model.lm_head.weight
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:vocabulary]
    state |= projector_state(model)
    if hasattr(model.model, "image_newline"):
        state["model.image_newline"] = model.model.image_newline
    if tower:
        for name, tensor in model.model.vision_tower.state_dict().items():
            state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def projector_state(model: Any) -> dict[str, torch.Tensor]:
    names = {"linear_1": "0", "linear_2": "2"}
    return {
        f"model.mm_projector.{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor.detach().clone()
        for name, tensor in model.model.multi_modal_projector.state_dict().items()
    }


def write_config(folder: Path, values: dict[str, Any], tower: Path, vocabulary: int, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    document = {**values, "vocab_size": vocabulary, "mm_vision_tower": str(tower), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in document.items() if v != "left out"}))


@pytest.fixture
def whole(tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """LLaVA-1.5, all weights in one safetensors file."""
    folder = tmp_path / "whole"
    write_config(folder, LLAVA15, tower, len(tokenizer))
    tokenizer.save_pretrained(folder)
    state = repo_state(stock(tower, len(tokenizer), "llava"), len(tokenizer))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def image(height: int, width: int) -> PILImage.Image:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    return PILImage.fromarray(noise.astype(np.uint8)).resize((width, height), PILImage.Resampling.BICUBIC)


def check_logits(loaded: Loaded, theirs: Any, *, tolerance: float = 1e-4) -> None:
    """The same prompts through both; ours makes ids and pixels, whose parity is tested elsewhere."""
    backend = LocalBackend(loaded.model, loaded.tokenizer, loaded.config)
    vocabulary = len(loaded.tokenizer)
    for shapes in ([(40, 70)], [(70, 40), (30, 30)], []):
        messages = [user(*(Image(image(*shape)) for shape in shapes), "What is this?")]
        batch = collate([backend.processor(messages, add_generation_prompt=True)], 0)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if batch.pixel_values is not None:
            inputs["pixel_values"] = batch.pixel_values
        if shapes and hasattr(theirs.model, "image_newline"):
            tiles = [plan.num_tiles for plan in batch.plans]
            rows = batch.pixel_values.split(tiles)
            padded = torch.zeros(len(rows), max(tiles), *batch.pixel_values.shape[1:])
            for row, pixels in zip(padded, rows, strict=True):
                row[: len(pixels)] = pixels
            inputs |= {"pixel_values": padded, "image_sizes": torch.tensor(shapes)}
        with torch.inference_mode():
            reference = theirs(**inputs).logits[..., :vocabulary]
            logits = loaded.model(
                batch.input_ids, None, None, batch.plans, batch.sample_of_image, batch.pixel_values
            ).logits
        assert (logits - reference).abs().max() < tolerance


def test_llava_1_5(whole: Path, tower: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert check_folder(whole).kind == "llava"
    loaded = load_repo(whole)
    assert loaded.config.image is not None and loaded.config.image.image_aspect_ratio == "pad"
    assert loaded.config.template.chat_template == "vicuna"
    assert loaded.config.vision is not None and loaded.config.vision.vision_tower == str(tower)
    theirs = stock(tower, len(tokenizer), "llava")
    check_logits(loaded, theirs)
    # What was read becomes a folder of ours that says the same.
    save_model(tmp_path / "ours", loaded.model, loaded.config, loaded.tokenizer, history=loaded.history)
    again = load_model(tmp_path / "ours")
    assert again.history[0]["kind"] == "whole"
    check_logits(again, theirs)


def test_pickled_shards_need_the_flag(whole: Path, tower: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        torch.save({name: tensors[name].half() for name in names}, whole / f"pytorch_model-0000{number}-of-00002.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model-00001-of-00002\.bin: weights in a pickle.*--allow-pickle"
    ):
        load_repo(whole)
    theirs = stock(tower, len(tokenizer), "llava").half().float()
    loaded = load_repo(whole, allow_pickle=True)
    theirs.model.vision_tower.load_state_dict(CLIPVisionModel.from_pretrained(tower).state_dict())
    check_logits(loaded, theirs)


def test_llava_1_6_with_a_tower_that_was_trained(
    tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "next"
    write_config(folder, LLAVA16, tower, len(tokenizer))
    tokenizer.save_pretrained(folder)
    theirs = stock(tower, len(tokenizer), "llava_next")
    for parameter in theirs.model.vision_tower.parameters():
        parameter.data.mul_(1.1)
    state = repo_state(theirs, len(tokenizer), tower=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_repo(folder)
    assert loaded.config.template.chat_template == "mistral"
    assert loaded.config.vision is not None and loaded.config.vision.vision_tower == "bundled"
    assert loaded.config.image is not None
    assert loaded.config.image.image_grid_pinpoints == tuple((height, width) for width, height in PINPOINTS)
    check_logits(loaded, theirs)
    save_model(tmp_path / "ours", loaded.model, loaded.config, loaded.tokenizer)
    check_logits(load_model(tmp_path / "ours"), theirs)


@pytest.fixture
def language_model(tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The language model alone, as a folder of transformers."""
    theirs = stock(tower, len(tokenizer), "llava")
    theirs.config.text_config.vocab_size = len(tokenizer)
    llm = LlamaForCausalLM(theirs.config.text_config)
    state = repo_state(theirs, len(tokenizer))
    llm.load_state_dict({name: tensor for name, tensor in state.items() if "mm_projector" not in name})
    llm.save_pretrained(tmp_path / "vicuna")
    tokenizer.save_pretrained(tmp_path / "vicuna")
    return tmp_path / "vicuna"


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_a_projector_alone(
    prefix: str, tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast, language_model: Path
) -> None:
    theirs = stock(tower, len(tokenizer), "llava")
    folder = tmp_path / "stage1"
    write_config(folder, LLAVA15, tower, len(tokenizer), model_type="llava_llama", tune_mm_mlp_adapter=True)
    state = {name.replace("model.", prefix, 1): tensor for name, tensor in projector_state(theirs).items()}
    torch.save(state, folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"mm_projector\.bin: weights in a pickle.*--allow-pickle"):
        load_repo(folder, base=str(language_model))
    with pytest.raises(CheckpointError, match=r"only a projector; name the language model with --base .*somewhere"):
        load_repo(folder, allow_pickle=True)
    loaded = load_repo(folder, base=str(language_model), allow_pickle=True)
    assert loaded.config.llm.model_name_or_path == str(language_model)
    check_logits(loaded, theirs)


def write_lora(folder: Path, theirs: Any, tower: Path, vocabulary: int, *, pickled: bool) -> None:
    """A LoRA folder as LLaVA's script leaves it; the same adapter is merged into `theirs`."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    llm = LlamaForCausalLM(theirs.config.text_config)
    llm.model.load_state_dict(theirs.model.language_model.state_dict())
    llm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    torch.manual_seed(5)
    model = get_peft_model(llm, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    write_config(folder, LLAVA15, tower, vocabulary, model_type="llava_llama")
    adapter = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    assert all(name.startswith("base_model.model.model.layers.") for name in adapter)
    if pickled:
        torch.save(adapter, folder / "adapter_model.bin")
    else:
        save_file(adapter, folder / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))
    for parameter in theirs.model.multi_modal_projector.parameters():
        parameter.data.add_(0.05)
    extra = {f"base_model.model.{name}": tensor for name, tensor in projector_state(theirs).items()}
    torch.save(extra, folder / "non_lora_trainables.bin")
    merged = model.merge_and_unload()
    theirs.model.language_model.load_state_dict(merged.model.state_dict())


@pytest.mark.parametrize("base", ["language model", "LLaVA"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_lora(
    base: str, pickled: bool, tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast, whole: Path,
    language_model: Path,
) -> None:  # fmt: skip
    theirs = stock(tower, len(tokenizer), "llava")
    folder = tmp_path / "lora"
    write_lora(folder, theirs, tower, len(tokenizer), pickled=pickled)
    first = "adapter_model" if pickled else "non_lora_trainables"
    with pytest.raises(CheckpointError, match=rf"{first}\.bin: weights in a pickle"):
        load_repo(folder, base=str(whole))
    with pytest.raises(CheckpointError, match="holds a LoRA; name the language model with --base"):
        load_repo(folder, allow_pickle=True)
    given = str(whole if base == "LLaVA" else language_model)
    loaded = load_repo(folder, base=given, allow_pickle=True)
    check_logits(loaded, theirs)
    save_model(tmp_path / "ours", loaded.model, loaded.config, loaded.tokenizer)
    again = load_model(tmp_path / "ours")
    merge_adapter(again.model)
    check_logits(again, theirs)


def test_one_linear_layer_and_no_layout(tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "first"
    changes = {
        "mm_projector_type": "left out",
        "image_aspect_ratio": "left out",
        "mm_vision_select_feature": "left out",
    }
    write_config(folder, LLAVA15, tower, len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    state = repo_state(stock(tower, len(tokenizer), "llava"), len(tokenizer))
    state = {name: tensor for name, tensor in state.items() if "mm_projector" not in name}
    state |= {"model.mm_projector.weight": torch.ones(32, 24), "model.mm_projector.bias": torch.zeros(32)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_repo(folder, template="plain")
    assert loaded.config.template.chat_template == "plain"
    assert loaded.config.projector.mm_projector_type == "linear"
    assert loaded.config.image is not None and loaded.config.image.image_aspect_ratio == "crop"
    projected = loaded.model.project(torch.ones(1, 16, 24))
    assert torch.equal(projected, torch.full((1, 16, 32), 24.0))


def test_a_siglip_tower_with_its_last_layer_cut_off(
    tmp_path: Path, tower: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As LLaVA-OneVision's own folders have it: a trained SigLIP without its last layer, tiles counted in a text."""
    torch.manual_seed(3)
    settings = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=TILE, patch_size=7
    )
    siglip = SiglipVisionModel(settings)
    siglip.save_pretrained(tmp_path / "siglip")
    write_preprocessor(tmp_path / "siglip", "SiglipImageProcessor")
    folder = tmp_path / "onevision"
    changes = {
        "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(2x3)", "model_type": "llava_llama",
        "mm_vision_select_layer": -1, "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "one_token",
    }  # fmt: skip
    write_config(folder, LLAVA16, tmp_path / "siglip", len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    state = repo_state(stock(tower, len(tokenizer), "llava"), len(tokenizer))
    state["model.image_newline"] = torch.ones(32)
    for name, tensor in siglip.state_dict().items():
        if "layers.2." not in name and not name.startswith("head."):
            state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor * 1.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_repo(folder)
    image, vision = loaded.config.image, loaded.config.vision
    assert image is not None and vision is not None
    assert (image.anyres_max, vision.type, vision.mm_vision_select_layer) == (9, "siglip", -2)
    assert image.image_grid_pinpoints == ((28, 28), (56, 28), (84, 28), (28, 56), (56, 56), (84, 56))
    siglip.load_state_dict({name: tensor * 1.5 for name, tensor in siglip.state_dict().items()})
    pixels = torch.randn(2, 3, TILE, TILE)
    with torch.inference_mode():
        expected = siglip.eval()(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.allclose(loaded.model.encode_images(pixels), expected, atol=1e-5)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def edit_state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


SPOILED = {
    "tokens around images": (edit_config(mm_use_im_start_end=True), "mm_use_im_start_end is True: tokens around"),
    "several scales": (edit_config(s2=True), "s2 is True"),
    "a resampler": (edit_config(mm_resampler_type="perceiver"), "mm_resampler_type is 'perceiver'"),
    "an unknown projector": (edit_config(mm_projector_type="ldp"), "mm_projector_type is 'ldp', which cannot"),
    "an unknown layout": (edit_config(image_aspect_ratio="highres"), "image_aspect_ratio is 'highres'"),
    "canvases of texts": (edit_config(image_aspect_ratio="anyres", image_grid_pinpoints="all"), "must be pairs of"),
    "an unknown merge": (
        edit_config(image_aspect_ratio="anyres", image_grid_pinpoints=PINPOINTS, mm_patch_merge_type="maxpool2x2"),
        "mm_patch_merge_type is 'maxpool2x2'",
    ),
    "an unknown feature": (edit_config(mm_vision_select_feature="four"), "mm_vision_select_feature is 'four'"),
    "layers by name": (edit_config(mm_vision_select_layer="last"), "a whole number is expected"),
    "foreign code": (edit_config(auto_map={"AutoConfig": "x.Config"}), "auto_map asks for code"),
    "another tower": (edit_config(mm_vision_tower="nobody/nothing"), "nobody/nothing.*--vision-tower"),
    "a missing tensor": (edit_state(lambda s: s.pop("model.norm.weight")), "1 missing: model.norm.weight"),
    "an extra tensor": (edit_state(lambda s: s.update(x=torch.ones(1))), "1 not expected: x"),
    "a missing projector": (edit_state(lambda s: s.pop("model.mm_projector.2.bias")), r"1 missing: layers\.2\.bias"),
    "a misshaped projector": (
        edit_state(lambda s: s.update({"model.mm_projector.2.bias": torch.ones(3)})),
        r"1 of another shape: layers\.2\.bias \(3,\) for \(32,\)",
    ),
    "NaN": (edit_state(lambda s: s["model.mm_projector.0.bias"].fill_(torch.nan)), r"NaN or infinity: layers\.0\.bias"),
    "NaN in the language model": (edit_state(lambda s: s["lm_head.weight"].fill_(torch.nan)), "infinity: lm_head"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights: neither a model"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), SPOILED.values(), ids=SPOILED)
def test_what_cannot_be_expressed_is_refused(spoil: Callable[[Path], object], reason: str, whole: Path) -> None:
    spoil(whole)
    with pytest.raises(PolymodalError, match=reason):
        load_repo(whole)


class Evil:
    """Would leave a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('code_was_run', 'w').close()",)


def test_the_flag_lets_tensors_through_and_nothing_else(
    tmp_path: Path,
    tower: Path,
    tokenizer: PreTrainedTokenizerFast,
    language_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stage1"
    write_config(folder, LLAVA15, tower, len(tokenizer))
    for content in (pickle.dumps({"model.mm_projector.0.weight": Evil()}), b"", b"\x80\x04."):
        (folder / "mm_projector.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a file of tensors"):
            load_repo(folder, base=str(language_model), allow_pickle=True)
    torch.save([torch.ones(1)], folder / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="not a file of tensors by name"):
        load_repo(folder, base=str(language_model), allow_pickle=True)
    assert not list(tmp_path.rglob("code_was_run"))


def test_other_folders_are_none_of_these(whole: Path, language_model: Path, tower: Path, tmp_path: Path) -> None:
    assert [check_folder(folder).kind for folder in (language_model, tower, tmp_path)] == ["transformers"] * 2 + [
        "unknown"
    ]
    with pytest.raises(CheckpointError, match="not a folder of the LLaVA repository"):
        read_repo(check_folder(language_model))
    with pytest.raises(ConfigError, match="holds a whole model; leave the base out"):
        load_repo(whole, base=str(language_model))
    shutil.rmtree(tower)
    with pytest.raises(CheckpointError, match="--vision-tower"):
        load_repo(whole)


def test_only_the_shards_of_the_index_are_read(
    whole: Path, tower: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    theirs = stock(tower, len(tokenizer), "llava")
    tensors = load_file(whole / "model.safetensors")
    half = {name: tensor * 0.5 for name, tensor in tensors.items()}
    # Beside one file: older shards with their index.
    older, index = "model-00001-of-00002.safetensors", whole / "model.safetensors.index.json"
    save_file(half, whole / older)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(half, older)}))
    check_logits(load_repo(whole), theirs)
    # Newer shards with their index: an older one that it does not name.
    save_file(tensors, whole / "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    (whole / "model.safetensors").unlink()
    check_logits(load_repo(whole), theirs)
    # Without an index nothing says which of two sets it is.
    index.unlink()
    with pytest.raises(CheckpointError, match="are no one set of shards; remove stale ones"):
        load_repo(whole)


def test_pickled_shards_are_those_of_their_index(whole: Path, tower: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    torch.save({name: tensor * 0.5 for name, tensor in tensors.items()}, whole / "pytorch_model-00002-of-00003.bin")
    torch.save(tensors, whole / "pytorch_model-00001-of-00001.bin")
    weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
    (whole / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_logits(load_repo(whole, allow_pickle=True), stock(tower, len(tokenizer), "llava"))


def test_an_adapter_beside_a_whole_model_is_refused(whole: Path) -> None:
    (whole / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(CheckpointError, match=r"a peft adapter, which lies beside model\.safetensors"):
        load_repo(whole)


def test_a_layer_that_is_not_named_is_the_one_before_the_last(
    whole: Path, tower: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    document = json.loads((whole / "config.json").read_text())
    del document["mm_vision_select_layer"]
    (whole / "config.json").write_text(json.dumps(document))
    assert read_repo(check_folder(whole)).select_layer == -2
    check_logits(load_repo(whole), stock(tower, len(tokenizer), "llava"))
