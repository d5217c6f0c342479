"""What trains, and how fast: ordered rules over full parameter names, adapters, optimizer groups, learning rates.

Full dotted paths are matched, never leaf names: LLaVA collects leaf names such as `q_proj`, which peft then finds in
the vision tower as well. Frozen modules stay in eval mode, so that dropout and batch statistics of what is not
trained do not change (LAVIS's `disabled_train`). Trained parameters are float32 whatever the model's dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from polymodal.config import LoraRecipe
from polymodal.errors import ConfigError
from polymodal.modeling.lora import LORA_MARK, ROWS_MARK, add_adapters, is_adapter
from polymodal.training.recipes.sections import OptimConfig, RuleConfig
from polymodal.utils.modules import blocks, match_names


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    name: str  # For the log: the first part of the parameters' names, "lora", or "tokens" for vocabulary rows
    learning_rate: float  # Peak rate
    weight_decay: float  # Decay
    parameters: tuple[tuple[str, nn.Parameter], ...]  # Full names and parameters, in the model's order


def apply_policy(
    model: nn.Module,
    rules: Sequence[RuleConfig],
    lora: LoraRecipe | None,
    optim: OptimConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Group]:
    """Freeze, inject adapters and make the optimizer groups."""
    decided: dict[str, RuleConfig] = {}
    names = [name for name, _ in model.named_parameters()]
    for rule in rules:
        for name in match_names(rule.match, names, "train rule"):
            decided[name] = rule
    chosen = {name: rule for name, rule in decided.items() if rule.train}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    by_id = {id(parameter): chosen[name] for name, parameter in model.named_parameters() if name in chosen}
    if lora is not None:
        whole = [name for name in chosen if name.startswith("llm.") and not is_adapter(name)]
        if whole:
            raise ConfigError(f"`lora` and training {whole[0]} whole do not go together; use one of them")
        add_adapters(model, lora, tokenizer)
    buckets: dict[tuple[str, float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        rule_of = by_id.get(id(parameter))
        source: RuleConfig | LoraRecipe
        if lora is not None and LORA_MARK in name:
            parameter.requires_grad_(not lora.only_tokens)
            if lora.only_tokens:
                continue
            source, group = lora, "lora"
        elif lora is not None and f"{ROWS_MARK}trainable_tokens_delta." in name:
            source, group = lora, "tokens"
        elif rule_of is not None:
            source, group = rule_of, name.split(".")[0]
        else:
            continue
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
        decay = source.weight_decay if source.weight_decay is not None else optim.weight_decay
        # A vocabulary row would be drawn towards zero in every step, seldom as its token is seen.
        if parameter.ndim <= 1 or name.endswith("bias") or group == "tokens":
            decay = 0.0
        key = (group, source.learning_rate or optim.learning_rate, decay)
        buckets.setdefault(key, []).append((name, parameter))
    if not buckets:
        raise ConfigError("nothing is trained: add a `train` rule with `train: true`, or a `lora` section")
    return [Group(name, rate, decay, tuple(params)) for (name, rate, decay), params in buckets.items()]


def set_modes(model: nn.Module) -> None:
    """Put what is trained into train mode and everything else into eval mode."""
    # A module that holds both trained and frozen parameters is in eval mode itself (its own dropout stays off), and
    # its children are judged one by one; an adapter's dropout follows the adapter.
    from peft.tuners.lora import LoraLayer

    model.eval()

    def visit(module: nn.Module) -> None:
        flags = {parameter.requires_grad for parameter in module.parameters()}
        if flags == {True}:
            module.train()
        elif flags == {True, False}:
            if isinstance(module, LoraLayer):
                module.lora_dropout.train()
            for child in module.children():
                visit(child)

    visit(model)


def cast_frozen_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of frozen linear layers in autocast's dtype, so that it need not cast them in every forward."""
    # Embeddings, norms and tied heads stay as they are, so the residual stream keeps its precision; so do layers that
    # transformers keeps in float32.
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    kept = kept_in_float32(module, dtype)
    for name, part in module.named_modules():
        if type(part) is nn.Linear and id(part.weight) not in embeddings and not kept & set(name.split(".")):
            for parameter in part.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def cast_norms(module: nn.Module, dtype: torch.dtype) -> None:
    """Let each block's RMS norms give autocast's dtype: cast once, not again by every matrix and adapter behind."""
    # Where such a norm stands behind a branch instead, the branch is in that dtype already.

    def cast(_norm: nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor:
        return out.to(dtype) if torch.is_autocast_enabled(out.device.type) else out

    for part in (part for block in blocks(module) for part in block.children()):
        if "RMSNorm" in type(part).__name__:
            part.register_forward_hook(cast)


def kept_in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parts of module names that transformers leaves in float32 when it loads a model in a shorter type."""
    lists = ["_keep_in_fp32_modules_strict"] + (["_keep_in_fp32_modules"] if dtype is torch.float16 else [])
    return {name for kept in lists for name in getattr(module, kept, None) or ()}


def check_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Make sure the optimizer has exactly the parameters that require a gradient, each once."""
    held = [id(parameter) for group in groups for _, parameter in group.parameters]
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise ConfigError("the optimizer's parameters differ from those that require a gradient")


def policy_table(model: nn.Module, groups: Sequence[Group]) -> str:
    """Lay out who is trained, for the log."""
    rates = {id(p): group.learning_rate for group in groups for _, p in group.parameters}
    rows = [("module", "parameters", "trained", "learning rate", "dtype")]
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        modules.setdefault("llm (adapter)" if is_adapter(name) else name.split(".")[0], []).append(parameter)
    for module, members in modules.items():
        count, trained = _counts(members)
        lrs = sorted({rates[id(p)] for p in members if p.requires_grad})
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in members})
        rows.append((module, f"{count:,}", f"{trained:,}", ", ".join(f"{r:g}" for r in lrs) or "-", ", ".join(dtypes)))
    count, trained = _counts(list(model.parameters()))
    rows.append(("total", f"{count:,}", f"{trained:,}", f"{100 * trained / count:.2f} %", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) if i in (0, 4) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _counts(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """How many values there are, and how many of them are trained."""
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def make_optimizer(groups: Sequence[Group], optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """Build AdamW over the groups; fused on CUDA."""
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in group.parameters],
                "lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type == "cuda",
    )


def lr_factor(position: float, total: int, optim: OptimConfig) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine, linear or constant."""
    # Unlike `transformers.get_cosine_schedule_with_warmup`, the first step already has a rate above zero (the field's
    # version wastes it), and the position may be a fraction, for runs bounded by time.
    warm = math.ceil(optim.warmup * total)
    if position < warm:
        return min(1.0, (position + 1) / warm)
    if optim.schedule == "constant":
        return 1.0
    done = min(1.0, (position - warm) / max(1, total - warm))
    shape = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
