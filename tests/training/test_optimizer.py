from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from polymodal.config import LoraRecipe
from polymodal.errors import ConfigError
from polymodal.training.optimizer import apply_policy, cast_norms, check_groups, policy_table, set_modes
from polymodal.training.recipes.sections import OptimConfig, RuleConfig
from polymodal.utils.modules import expand_braces, match_names


class ToyLLM(nn.ModuleDict):
    """What adapters ask of a language model."""

    def get_output_embeddings(self) -> None: ...

    def get_input_embeddings(self) -> None: ...


class Toy(nn.Module):
    """The children of a multimodal model, small."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_encoder = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
        self.projector = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.llm = ToyLLM({"q_proj": nn.Linear(4, 4), "k_proj": nn.Linear(4, 4), "drop": nn.Dropout(0.5)})


OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.1)


def test_braces_and_globs() -> None:
    assert expand_braces("a.{q,k}.{x,y}") == ["a.q.x", "a.q.y", "a.k.x", "a.k.y"]
    names = ["llm.layers.0.q_proj", "llm.layers.11.k_proj", "vision.layers.0.q_proj"]
    assert match_names("llm.*.{q,k}_proj", names, "lora") == names[:2]
    with pytest.raises(ConfigError, match="projector"):
        match_names("projectr.*", ["projector.weight"], "train rule")


def test_the_last_match_wins_and_decay_spares_vectors() -> None:
    model = Toy()
    rules = [
        RuleConfig(match="*", train=True),
        RuleConfig(match="vision_encoder.*", train=False),
        RuleConfig(match="projector.*", train=True, learning_rate=5e-4, weight_decay=0.0),
    ]
    groups = apply_policy(model, rules, None, OPTIM)
    check_groups(model, groups)
    by_name = {name: group for group in groups for name, _ in group.parameters}
    assert not any(name.startswith("vision_encoder") for name in by_name)
    assert by_name["projector.0.weight"].learning_rate == 5e-4
    assert by_name["projector.0.weight"].weight_decay == 0.0
    assert by_name["llm.q_proj.weight"].weight_decay == 0.1
    assert by_name["llm.q_proj.bias"].weight_decay == 0.0
    assert "vision_encoder" in policy_table(model, groups)


def test_what_is_trained_is_float32() -> None:
    model = Toy().to(torch.bfloat16)
    apply_policy(model, [RuleConfig(match="projector.*", train=True)], None, OPTIM)
    assert model.projector[0].weight.dtype == torch.float32
    assert model.llm["q_proj"].weight.dtype == torch.bfloat16


def test_modes_follow_what_is_trained() -> None:
    model = Toy()
    apply_policy(model, [RuleConfig(match="projector.*", train=True)], LoraRecipe(match="llm.q_proj", lora_r=2), OPTIM)
    set_modes(model)
    assert model.projector[1].training
    assert not model.vision_encoder[1].training and not model.vision_encoder[2].training
    assert not model.llm["drop"].training
    assert model.llm["q_proj"].lora_dropout.training
    assert not model.llm["q_proj"].base_layer.training


def test_lora_touches_only_the_named_modules_and_a_second_time_the_same() -> None:
    model = Toy()
    recipe = LoraRecipe(match="llm.q_proj", lora_r=2, learning_rate=1e-4)
    groups = apply_policy(model, [RuleConfig(match="projector.*", train=True)], recipe, OPTIM)
    lora = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    assert lora and all(name.startswith("llm.q_proj.") for name in lora)
    assert {group.name: group.learning_rate for group in groups} == {"projector": 1e-3, "lora": 1e-4}
    again = apply_policy(model, [], recipe, OPTIM)
    assert {name for group in again for name, _ in group.parameters} == lora
    with pytest.raises(ConfigError, match="merge it first"):
        apply_policy(model, [], recipe.model_copy(update={"lora_r": 3}), OPTIM)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_an_adapter_is_scaled_and_dropped_out_as_the_recipe_says(rslora: bool, scale: float) -> None:
    model = Toy()
    recipe = LoraRecipe(match="llm.q_proj", lora_r=4, lora_alpha=12, lora_dropout=0.25, use_rslora=rslora)
    apply_policy(model, [], recipe, OPTIM)
    layer: Any = model.llm["q_proj"]
    assert layer.lora_dropout["default"].p == 0.25
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    model.eval()
    x = torch.randn(3, 4)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(layer(x), layer.base_layer(x) + scale * x @ update.T, atol=1e-5)


def test_norms_give_autocasts_dtype_once_and_the_same_result() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    seen: list[torch.dtype] = []
    llm.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].dtype))
    ids, found = torch.arange(8)[None], []
    for cast in (False, True):
        if cast:
            cast_norms(llm, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(llm(ids).logits)
    llm(ids)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(*found)
