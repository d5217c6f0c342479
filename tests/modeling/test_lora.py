"""Adapters beyond plain LoRA, on a real (tiny, random) causal LM, through saving, loading and folding in."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polymodal.checkpoints.model_folder import load_model, save_model, write_whole
from polymodal.config import LLMConfig, LoraRecipe, ModelConfig
from polymodal.errors import ConfigError
from polymodal.modeling.build import build_model
from polymodal.modeling.language_model import load_llm
from polymodal.modeling.lora import NF4_BYTES, add_adapters, fold_in, fuse_adapters, is_adapter, merge_adapter
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.optimizer import apply_policy, check_groups, policy_table, set_modes
from polymodal.training.recipes.sections import OptimConfig

OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.1)


def logits(model: MultimodalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def train_a_little(model: MultimodalLM, groups: list[Any], steps: int = 3) -> None:
    set_modes(model)
    parameters = [p for group in groups for _, p in group.parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids = torch.arange(3, 40)[None]
    for _ in range(steps):
        model(ids, labels=ids).loss_sum.div(30).backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"trainable_tokens": (5, "<|im_start|>")},
        {"match": "llm.*"},  # the head too, which may share its weights with the embeddings
        {"match": "llm.*", "use_dora": True},
    ],
    ids=str,
)
def test_an_adapter_survives_saving_and_folding_in(
    kind: dict[str, Any], tied: bool, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    config = tiny_model_config
    if tied:
        from transformers import AutoModelForCausalLM

        llm = AutoModelForCausalLM.from_pretrained(config.llm.model_name_or_path)
        llm.config.tie_word_embeddings = True
        llm.lm_head.weight = llm.model.embed_tokens.weight
        llm.lm_head.weight.data.normal_(0, 0.02)  # the padding row too
        llm.save_pretrained(tmp_path / "llm")
        for path in Path(config.llm.model_name_or_path).glob("*token*"):
            (tmp_path / "llm" / path.name).write_bytes(path.read_bytes())
        config = config.model_copy(
            update={"llm": config.llm.model_copy(update={"model_name_or_path": str(tmp_path / "llm")})}
        )
    torch.manual_seed(0)
    model, tokenizer = build_model(config)
    before = logits(model)
    lora = LoraRecipe(lora_r=4, lora_alpha=8, learning_rate=2e-4, **kind)
    groups = apply_policy(model, [], lora, OPTIM, tokenizer)
    check_groups(model, groups)
    assert all(is_adapter(name) for group in groups for name, _ in group.parameters)
    assert "llm (adapter)" in policy_table(model, groups)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    train_a_little(model, groups)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-3

    save_model(tmp_path / "saved", model, config, tokenizer)
    held = load_file(tmp_path / "saved" / "adapter" / "adapter_model.safetensors")
    assert not any(name.endswith(("base_layer.weight", "embed_tokens.weight")) for name in held)
    loaded = load_model(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded.model), trained, rtol=1e-4, atol=1e-5)
    for merged in (True, False, True):
        merge_adapter(loaded.model, merged)
        torch.testing.assert_close(logits(loaded.model), trained, rtol=1e-4, atol=1e-4)
    write_whole(loaded, tmp_path / "whole")
    torch.testing.assert_close(logits(load_model(tmp_path / "whole").model), trained, rtol=1e-4, atol=1e-4)
    again = load_model(tmp_path / "saved").model
    same = apply_policy(again, [], lora, OPTIM, tokenizer)
    assert sum(len(group.parameters) for group in same) == sum(len(group.parameters) for group in groups)

    fold_in(model.llm)
    assert not any(is_adapter(name) for name, _ in model.named_parameters()) and not hasattr(model.llm, "peft_config")
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-4)


def test_layers_that_an_adapter_cannot_be_put_on(tiny_model_config: ModelConfig) -> None:
    model, tokenizer = build_model(tiny_model_config)
    with pytest.raises(ConfigError, match=r"output head 'lm_head', whose rows lora\.trainable_tokens trains"):
        add_adapters(model, LoraRecipe(match="llm.*", trainable_tokens=(5,)), tokenizer)
    model.llm.lm_head.weight.data[7] = 0
    with pytest.raises(ConfigError, match=r"use_dora: a row of llm\.lm_head is zero"):
        add_adapters(model, LoraRecipe(match="llm.*", use_dora=True))


@pytest.mark.parametrize("match", ["llm.*", "llm.lm_head"])
@pytest.mark.parametrize("version", [{}, {"tie_word_embeddings": False}], ids=["t5", "t5_v1_1"])
def test_the_tied_head_of_a_t5_is_merged_alone(
    version: dict[str, Any], match: str, tiny_t5_folder: Path, tmp_path: Path
) -> None:
    """T5's head is its embeddings, and its `tie_word_embeddings` says whether logits are scaled."""
    from transformers import T5ForConditionalGeneration

    config = Path(shutil.copytree(tiny_t5_folder, tmp_path / "t5")) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | version))
    llm = load_llm(LLMConfig(model_name_or_path=str(tmp_path / "t5")))
    add_adapters(torch.nn.ModuleDict({"llm": llm}), LoraRecipe(lora_r=2, lora_alpha=8, match=match))
    ids = torch.arange(3, 40)[None]

    def answers(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids, labels=ids).logits
        return found

    before = answers(llm)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    trained = answers(llm)
    assert (trained - before).abs().max() > 0.1
    fold_in(llm)
    torch.testing.assert_close(answers(llm), trained, rtol=1e-4, atol=1e-3)
    llm.save_pretrained(tmp_path / "out")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answers(again), trained, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 24 / 4), (True, 24 / 4**0.5)])
def test_a_layer_gets_alpha_over_r_times_the_product(
    rslora: bool, scale: float, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    """LoRA: W + alpha / r * B A; rsLoRA: W + alpha / sqrt(r) * B A; in training, in a saved folder, and merged."""
    model, tokenizer = build_model(tiny_model_config)
    name = "model.layers.1.mlp.up_proj"
    plain = model.llm.get_submodule(name).weight.detach().clone()
    add_adapters(model, LoraRecipe(lora_r=4, lora_alpha=24, lora_dropout=0.3, use_rslora=rslora))
    layer: Any = model.llm.get_submodule(name)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    b.normal_()
    wanted = plain + scale * b @ a
    x = torch.randn(5, plain.shape[1])
    model.eval()
    torch.testing.assert_close(layer(x), x @ wanted.T, rtol=1e-4, atol=1e-4)
    save_model(tmp_path / "saved", model, tiny_model_config, tokenizer)
    for made in (model, load_model(tmp_path / "saved").model):
        fold_in(made.llm)
        torch.testing.assert_close(made.llm.get_submodule(name).weight, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_is_before_the_adapter_and_only_in_training(tiny_model_config: ModelConfig) -> None:
    model, _ = build_model(tiny_model_config)
    name = "model.layers.0.self_attn.q_proj"
    plain = model.llm.get_submodule(name)
    add_adapters(model, LoraRecipe(lora_r=4, lora_alpha=4, lora_dropout=0.5))
    layer: Any = model.llm.get_submodule(name)
    layer.lora_A["default"].weight.data.copy_(torch.eye(4, plain.in_features))
    layer.lora_B["default"].weight.data.copy_(torch.eye(plain.out_features, 4))
    x = torch.ones(1000, plain.in_features)
    with torch.no_grad():
        added = (layer.train()(x) - plain(x))[:, :4]
        # Each input is dropped or doubled by itself, half of them either way.
        assert set(added.round(decimals=3).unique().tolist()) == {0.0, 2.0} and 0.9 < float(added.mean()) < 1.1
        torch.testing.assert_close(layer.eval()(x)[:, :4], plain(x)[:, :4] + 1)


def test_fused_adapters_give_what_peft_gives(tiny_model_config: ModelConfig) -> None:
    model = build_model(tiny_model_config)[0]
    apply_policy(model, [], LoraRecipe(lora_r=4, lora_alpha=6), OptimConfig())
    layers = [part for part in model.llm.modules() if hasattr(part, "lora_B")]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight)

    def both() -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = model(torch.arange(3, 40)[None]).logits
        return out, list(torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad]))

    wanted, gradients = both()
    wanted = wanted.detach()
    fuse_adapters(model.llm)
    assert all("forward" in vars(layer) for layer in layers)
    found, fused = both()
    torch.testing.assert_close(found, wanted)
    for gradient, before in zip(fused, gradients, strict=True):
        torch.testing.assert_close(gradient, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(logits(model).float(), wanted, atol=0.1 * float(wanted.abs().max()))
    merge_adapter(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    dropped = build_model(tiny_model_config)[0]
    apply_policy(dropped, [], LoraRecipe(lora_r=4, lora_alpha=6, lora_dropout=0.5), OptimConfig())
    fuse_adapters(dropped.llm)
    assert not any("forward" in vars(part) for part in dropped.llm.modules())


def test_rows_are_trained_alone_and_never_decay(tiny_model_config: ModelConfig) -> None:
    model, tokenizer = build_model(tiny_model_config)
    table = model.llm.get_input_embeddings().weight.detach().clone()
    groups = apply_policy(model, [], LoraRecipe(lora_r=2, trainable_tokens=(5, 9)), OPTIM, tokenizer)
    rows = next(group for group in groups if group.name == "tokens")
    # The head has weights of its own here: its rows of these tokens are trained too, or they could not be said.
    assert [tuple(p.shape) for _, p in rows.parameters] == [(2, 32)] * 2 and rows.weight_decay == 0.0
    train_a_little(model, groups)
    fold_in(model.llm)
    changed = (model.llm.get_input_embeddings().weight - table).abs().sum(dim=1).nonzero().squeeze(1).tolist()
    assert changed == [5, 9]


def test_a_new_token_takes_a_spare_row(tiny_llm_folder: Path, tmp_path: Path, tiny_model_config: ModelConfig) -> None:
    model, tokenizer = build_model(tiny_model_config)
    with pytest.raises(ConfigError, match=r"0 spare rows \(259 rows, 259 tokens\)"):
        apply_policy(model, [], LoraRecipe(trainable_tokens=("<point>",)), OPTIM, tokenizer)
    model.llm.resize_token_embeddings(262)
    apply_policy(model, [], LoraRecipe(lora_r=2, trainable_tokens=("<point>", "<|im_end|>")), OPTIM, tokenizer)
    assert tokenizer.convert_tokens_to_ids("<point>") == 259
    assert len(tokenizer("a<point>b", add_special_tokens=False).input_ids) == 3
    with pytest.raises(ConfigError, match="id 300 is not in the vocabulary"):
        apply_policy(build_model(tiny_model_config)[0], [], LoraRecipe(trainable_tokens=(300,)), OPTIM, tokenizer)


def test_another_kind_of_adapter_is_refused(tiny_model_config: ModelConfig) -> None:
    model, tokenizer = build_model(tiny_model_config)
    apply_policy(model, [], LoraRecipe(lora_r=2), OPTIM, tokenizer)
    for other in ({"use_dora": True}, {"trainable_tokens": (4,)}, {"load_in_4bit": True}):
        with pytest.raises(ConfigError, match="merge it first"):
            apply_policy(model, [], LoraRecipe(lora_r=2, **other), OPTIM, tokenizer)


def test_four_bit_without_bitsandbytes_says_what_to_do(
    tiny_model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*pip install"):
        apply_policy(build_model(tiny_model_config)[0], [], LoraRecipe(load_in_4bit=True), OPTIM)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_four_bit_base_trains_an_adapter(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    # Blocks are of 64 weights: the usual 32 channels are too narrow.
    source = Path(tiny_model_config.llm.model_name_or_path)
    settings = AutoConfig.from_pretrained(source, hidden_size=64, intermediate_size=128, head_dim=16)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "llm")
    for path in source.glob("*token*"):
        (tmp_path / "llm" / path.name).write_bytes(path.read_bytes())
    llm = tiny_model_config.llm.model_copy(update={"model_name_or_path": str(tmp_path / "llm")})
    config = tiny_model_config.model_copy(update={"llm": llm})

    model, tokenizer = build_model(config)
    plain = sum(p.numel() for name, p in model.llm.named_parameters() if name.endswith("_proj.weight"))
    groups = apply_policy(model, [], LoraRecipe(lora_r=4, load_in_4bit=True), OPTIM, tokenizer)
    packed = {name: p for name, p in model.llm.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 14 and sum(p.numel() for p in packed.values()) <= plain * NF4_BYTES
    train_a_little(model, groups)
    save_model(tmp_path / "saved", model, config, tokenizer)
    loaded = load_model(tmp_path / "saved").model
    assert not any(p.dtype == torch.uint8 for p in loaded.parameters())
    # NF4 is coarse, but it is the same model.
    assert torch.nn.functional.cosine_similarity(logits(loaded).flatten(), logits(model).flatten(), dim=0) > 0.95
