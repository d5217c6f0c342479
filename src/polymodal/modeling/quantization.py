"""Language models with 8-bit weights on a CPU: quicker answers, and linear layers of a quarter of float32's size.

Making a token reads every weight once, so on a CPU it is as quick as the memory: one byte a weight in place of four.
Weights are rounded after the model was loaded, each output channel by itself and symmetrically, without looking at data
(what LLM.int8(), arXiv:2208.07339, calls vector-wise). Unlike there, activations are never quantised, and unlike
torchao nothing has to be compiled. Vision tower and projector keep their weights: they are read once an image, not
once a token. Experts that transformers keeps as one three-dimensional tensor are no linear layers and stay as they are.

On a GPU transformers quantises while it loads, with bitsandbytes or torchao; `language_model.gpu_settings` only asks
for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.modeling.lora import fold_in
from polymodal.modeling.onnx_llm import require
from polymodal.modeling.vlm import MultimodalLM
from polymodal.utils.devices import best_device
from polymodal.utils.extras import extra

INT8 = "int8"
"""On a CPU: a graph of ONNX Runtime where the extra `fast` is installed, else and inside other classes what is here."""

CPU_WAYS = (INT8, "int4", "float32")
"""What is made of weights on a CPU; all but the first are graphs alone (`modeling.onnx_llm`)."""

AUTO = "auto"
"""A graph with 8-bit weights on a CPU where the extra is installed; else nothing."""

GPU_WAYS = {"nf4": "bitsandbytes", "int8-gpu": "torchao"}
"""What transformers does on a GPU, and the package that it needs."""

LEVELS = 127
"""Weights become whole numbers from -127 to 127."""

FEW_ROWS = 8
"""Rows up to which `torch._weight_int8pack_mm` is the quickest way."""

STEP = 32
"""What the width must be a multiple of for `torch._weight_int8pack_mm`: in bfloat16 it reads 16 numbers at a time (8
with AVX2) without looking for the end, and takes the process down with it on other widths (torch 2.13)."""


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and a float32 scale a row; for use only, not for training."""

    # Few rows, as in decoding, go through `torch._weight_int8pack_mm` with activations in bfloat16: in float32 torch
    # has a plain loop for it, ten times slower than its ordinary product. Scales are applied afterwards, in float32.
    # Many rows, as in a prompt, and widths that are no multiple of `STEP` take an ordinary product with the whole
    # numbers turned into `prompt_dtype`, which holds them exactly. `FEW_ROWS` is where the two ways meet (one core,
    # shapes of SmolLM2-135M, milliseconds for 8 of its layers, the ordinary float32 layer first): 1 row 10.3, this
    # one 4.9; 8 rows 15.5, 9.9; 32 rows 29.5, and 18.0 by way of bfloat16 on a CPU with AVX512-BF16, 28.4 by way of
    # float32.

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,  # [out, in]
        scale: Tensor,  # [out]
        bias: Tensor | None = None,  # [out]
        prompt_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.prompt_dtype = prompt_dtype or fast_dtype()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        # The product would round its scales to bfloat16.
        self._ones = torch.ones(self.out_features, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """Multiply."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= FEW_ROWS and self.in_features % STEP == 0 and x.device.type == "cpu":
            packed = rows.to(torch.bfloat16).contiguous()
            y = torch._weight_int8pack_mm(packed, self.weight, self._ones) * self.scale
        else:
            dtype = self.prompt_dtype if x.device.type == "cpu" else x.dtype
            y = F.linear(rows.to(dtype), self.weight.to(dtype)) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantized(self) -> Tensor:
        """The weights that this layer stands for, [out, in] float32."""
        return self.weight.float() * self.scale.float()[:, None]

    def train(self, mode: bool = True) -> Int8Linear:
        """Refuse training; `eval` is always possible."""
        if mode:
            raise ConfigError("8-bit weights cannot be trained: load the model without quantize")
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def fast_dtype() -> torch.dtype:
    """What this CPU multiplies matrices quickest in: bfloat16 where it has instructions for it, else float32."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has = any(getattr(torch.cpu, name, bool)() for name in names)
    return torch.bfloat16 if has else torch.float32


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:  # [out, in] -> [out, in]
    """Round weights to 8 bits, each row by itself."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / LEVELS
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError("weights hold NaN or infinity; they cannot be quantised")
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def quantize_int8(model: MultimodalLM, skip: Sequence[str] = ()) -> list[str]:
    """Give a model's language model 8-bit weights, in place; vision tower and projector stay as they are."""
    # The output head is quantised too, as a copy of its own where it shares its weights with the input embeddings: it
    # is the largest layer of a small model, and every token reads all of it.
    from peft.tuners.tuners_utils import BaseTunerLayer

    if model.training:
        raise ConfigError("a model in training cannot be quantised: call model.eval() first, or load it with quantize")
    if any(isinstance(part, BaseTunerLayer) and not part.merged for part in model.llm.modules()):
        raise ConfigError("the adapter is not merged: call merge_adapter(model) before quantising")
    fold_in(model.llm)
    return quantize_layers(model.llm, skip)


def quantize_layers(module: nn.Module, skip: Sequence[str] = (), inside: Sequence[str] = ("*",)) -> list[str]:
    """Give a module's linear layers 8-bit weights, in place."""
    if is_quantized(module):
        raise ConfigError("the model was quantised already")
    linears = {name: part for name, part in module.named_modules() if type(part) in (nn.Linear, Conv1D)}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            first = next(iter(linears), "none at all")
            raise ConfigError(f"skip: no linear layer is called {pattern!r}; the first one is {first!r}")
    chosen = [
        name
        for name in linears
        if any(fnmatchcase(name, pattern) for pattern in inside)
        and not any(fnmatchcase(name, pattern) for pattern in skip)
    ]
    for name in chosen:
        old: Any = linears[name]
        weight = old.weight if isinstance(old, nn.Linear) else old.weight.T
        try:
            rounded = quantize_weight(weight)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        new = Int8Linear(*rounded, None if old.bias is None else old.bias.detach())
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new.eval())
    return chosen


def quantize_published(model: Any) -> list[str]:
    """Give the language model inside a vision-language model of transformers 8-bit weights, in place."""
    names = {id(part): name for name, part in model.named_modules()}
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if not names.get(id(decoder)):
        raise ConfigError(f"quantize: {type(model).__name__} does not say which part is its language model")
    inside = [f"{names[id(decoder)]}.*"]
    if head is not None:
        inside.append(names[id(head)])
    return quantize_layers(model, inside=inside)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds 8-bit layers of ours."""
    return any(isinstance(part, Int8Linear) for part in module.modules())


def check_quantize(how: str, device: str | None) -> str:
    """Make sure that a way to quantise is known and possible here, before anything is loaded; the device."""
    if how not in (AUTO, *CPU_WAYS, *GPU_WAYS):
        raise unknown_name("quantize", how, (AUTO, *CPU_WAYS, *GPU_WAYS))
    if how == AUTO:
        return device or best_device()
    if how in CPU_WAYS:
        if device not in (None, "cpu"):
            raise ConfigError(f"quantize {how} is for the CPU; on {device} use {' or '.join(GPU_WAYS)}, or device cpu")
        if how != INT8:
            require()
        return "cpu"
    if not torch.cuda.is_available() or not (device or "cuda").startswith("cuda"):
        raise ConfigError(f"quantize {how} needs a GPU; on a CPU use int8")
    extra(GPU_WAYS[how], f"quantize {how} needs", GPU_WAYS[how])
    return device or best_device()
