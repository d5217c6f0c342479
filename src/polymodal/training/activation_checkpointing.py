"""Trading time for memory and back: activation checkpointing, and compiled layers.

Both are applied to the repeated blocks of the network, found by structure, and change neither parameter names nor
results. transformers' own `gradient_checkpointing` is not used: it looks at each layer's train mode, and a frozen or
partly frozen layer, whose dropout must stay off, is in eval mode here, so it would silently keep everything.
Apply in this order: `checkpoint_layers` after `compile_layers`, and both before wrapping for data-parallel training.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from polymodal.modeling.language_model import layer_counts
from polymodal.modeling.packed_attention import SHORT
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.modules import blocks, frozen

MEMORY_SHARE = 0.6
"""Of the free memory, what activations may fill before "auto" checkpoints."""

COMPILE_STEPS = 500
"""Steps from which "auto" compiles on CUDA; a shorter run is over before the compilation has paid."""


def checkpoint_layers(layers: list[nn.Module]) -> None:
    """Keep only what goes into each layer; compute the rest again in the backward pass."""
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)


def compile_layers(layers: list[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each layer's forward, for sequences of any length."""
    # Layers of one class share the compiled code, so a deep network compiles as quickly as a shallow one.
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def save_memory(
    recipe: Recipe, model: nn.Module, device: torch.device, steps: int, longest: int, value_bytes: int = 4
) -> list[str]:
    """Checkpoint and compile as the recipe asks, or, for "auto", as device and sizes suggest."""
    run, batch = recipe.run, recipe.batch
    llm = model.get_submodule("llm")
    layers = blocks(llm)
    for encoder in (getattr(model, name, None) for name in ("vision_encoder", "audio_encoder")):
        if encoder is not None and not frozen(encoder):
            layers += blocks(encoder)
    done = []
    if run.compile == "on" or (run.compile == "auto" and device.type == "cuda" and steps >= COMPILE_STEPS):
        compile_layers(layers)
        done.append(f"{len(layers)} layers compiled")
    tokens = longest * batch.micro_size
    if batch.packing == "pack":
        tokens = max(longest, min(batch.micro_tokens, longest * batch.global_size))
    # A CPU keeps the attention's weights.
    seen = min(longest, SHORT) if device.type == "cpu" else 0
    needed = activation_bytes(llm.config, tokens, value_bytes, seen)
    short = run.checkpointing == "auto" and needed > MEMORY_SHARE * free_memory(device)
    if run.checkpointing == "on" or short:
        checkpoint_layers(layers)
        reason = f": activations may need {needed / 2**30:.1f} GiB" if short else ""
        done.append(f"{len(layers)} layers checkpointed{reason}")
    return done


def activation_bytes(config: Any, tokens: int, value_bytes: int = 4, seen: int = 0) -> int:
    """What a language model keeps for its backward pass, about."""
    # A layer keeps the inputs of its two norms, of its matrices and of attention, and three values of its gated unit;
    # a fused attention keeps no weights, another one those of up to `seen` tokens, half of them on average.
    config = config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    names = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim")
    inner = next((v for name in names if (v := getattr(config, name, None))), 4 * width)
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    encoder, decoder = layer_counts(config)
    # A token goes through the encoder or through the decoder, whose layers keep two values of each token they look at.
    looked_at = 2 * decoder * width if encoder else 0
    layer = (8 + 4 * shared) * width + 4 * inner + heads * seen / 2
    return int(tokens * value_bytes * (max(encoder, decoder) * layer + looked_at))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    # Other systems tell only how much there is; half of it is a careful guess at what is free.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
