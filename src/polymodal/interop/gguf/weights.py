"""Weights as GGUF, the format of llama.cpp: a language model in one file, tower and projector in another ("mmproj").

Metadata keys and tensor names are llama.cpp's; the `gguf` package, which is kept beside it, knows most of them. What
llama.cpp computes with an mmproj of projector type "mlp" (tools/mtmd/models/llava.cpp) is LLaVA's: a CLIP or SigLIP
tower up to the layers that are asked for, then two linear layers with GELU between them. Two things are not the same
there: GELU is its tanh approximation, by a table of half precision, and both files may be quantised.

Rotary embeddings of the "llama" architecture turn neighbouring channels there and two halves in transformers, so the
rows of its queries and keys are put in another order, which changes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.export_class import plain_state, projector_state

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from polymodal.modeling.vlm import MultimodalLM

QUANTISED = 32
"""Values that share a scale in Q8_0; a row must hold a multiple of it."""


@dataclass(frozen=True)
class Architecture:
    """A language model as llama.cpp knows it."""

    name: str  # Its name there
    interleaved: bool = False  # Its rotary embeddings turn neighbouring channels there


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}
"""`model_type` of a language model to what llama.cpp calls it."""

ROPES = ("default", "linear", "llama3")
"""Kinds of rotary embeddings that are written; llama.cpp takes the last as a tensor of factors."""

KINDS = ("float32", "float16", "bfloat16", "q8_0")
"""Types of the weights on disk."""


def reasons_against_llm(llm: Any) -> list[str]:
    """List what a GGUF file cannot say of a language model."""
    config, found = llm.config, []
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"a language model of type {config.model_type!r} is not among those that can be written ({known})"]
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPES:
        found.append(f"rotary embeddings of type {kind!r} are not written; only {', '.join(ROPES)} are")
    if config.hidden_act != "silu":
        found.append(f"hidden_act {config.hidden_act!r}: llama.cpp always takes 'silu' there")
    if getattr(config, "use_sliding_window", False) or (
        config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None
    ):
        found.append("llama.cpp reads no sliding window for this language model: train without it")
    return found


def write_llm(
    path: Path,
    llm: Any,
    kind: str,
    name: str,
    describe: Callable[[GGUFWriter], None],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the language model's file."""
    import gguf

    config = llm.config
    arch = ARCHITECTURES[config.model_type]
    writer = _open(path, arch.name, kind, name)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10000.0}
    writer.add_vocab_size(llm.get_input_embeddings().weight.shape[0])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    describe(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.name.upper()), config.num_hidden_layers)
    return _write(writer, lambda: _llm_tensors(llm, arch, names, rope, size), kind, progress)


def write_mmproj(
    path: Path,
    model: MultimodalLM,
    kind: str,
    name: str,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the file of tower and projector."""
    import gguf

    encoder: Any = model.vision_encoder
    config = encoder.model.config
    depth = max(encoder.select_layers)
    writer = _open(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ], kind, name)
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.llm.get_input_embeddings().weight.shape[1])
    writer.add_vision_image_size(encoder.tile.height)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    # Layers behind the last that is asked for are left out; without the list, one more would be.
    writer.add_vision_block_count(depth)
    writer.add_array("clip.vision.feature_layer", list(encoder.select_layers))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(mean))
    writer.add_vision_image_std(list(deviation))
    if config.hidden_act != "quick_gelu":
        writer.add_vision_use_gelu(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.num_hidden_layers)
    return _write(writer, lambda: _mmproj_tensors(model, depth, names), kind, progress)


TOWER_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
"""What a tower may have between its feed-forward layers; llama.cpp approximates the second by the third."""


def _llm_tensors(
    llm: Any, arch: Architecture, names: Any, rope: Mapping[str, Any], size: int
) -> Iterator[tuple[str, Tensor]]:
    """The language model's tensors by their names in GGUF."""
    config = llm.config
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, size)
    for name, tensor in plain_state(llm).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if arch.interleaved and part in heads:
            tensor = _neighbours(tensor, heads[part])
        yield _named(names, name), tensor


def _mmproj_tensors(model: MultimodalLM, depth: int, names: Any) -> Iterator[tuple[str, Tensor]]:
    """Tower and projector by their names in GGUF."""
    encoder: Any = model.vision_encoder
    for name, tensor in encoder.model.state_dict().items():
        parts = name.split(".")
        behind = parts[:2] == ["encoder", "layers"] and int(parts[2]) >= depth
        # The final norm, SigLIP's pooling head and layers that are not asked for play no part.
        if behind or parts[0] in ("post_layernorm", "head") or parts[-1] == "position_ids":
            continue
        yield _named(names, f"vision_tower.vision_model.{name}"), tensor
    state = projector_state(model, "llava")
    for layer in (0, 2):
        weight = state[f"layers.{layer}.weight"]
        yield f"mm.{layer}.weight", weight
        yield f"mm.{layer}.bias", state.get(f"layers.{layer}.bias", weight.new_zeros(len(weight)))


def _neighbours(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys, whose halves are turned against each other, so that neighbours are."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _llama3_factors(rope: Mapping[str, Any], size: int) -> Tensor:
    """What Llama 3.1 divides its frequencies by, as transformers computes it ([size / 2])."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.configuration_llama import LlamaConfig

    settings = LlamaConfig(hidden_size=size, num_attention_heads=1, head_dim=size, rope_parameters=dict(rope))
    changed, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    plain = float(rope["rope_theta"]) ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / changed


def _named(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"llama.cpp has no name for the weight {name}")
    return found


def _open(path: Path, arch: str, kind: str, name: str) -> GGUFWriter:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(name)
    file_types = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(
    writer: GGUFWriter,
    tensors: Callable[[], Iterator[tuple[str, Tensor]]],
    kind: str,
    progress: Callable[[int], None] | None,
) -> int:
    """Write all tensors, one in memory at a time; returns their bytes."""
    import gguf
    import numpy as np

    total = 0
    for name, tensor in tensors():
        stored = _type_of(name, tensor, kind)
        _check(name, tensor, stored)
        width, size = gguf.GGML_QUANT_SIZES[stored]
        count = tensor.numel() // width * size
        total += count
        # The array's type plays no part beside `raw_dtype`, but for bytes, whose shape would be taken for packed.
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), count, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors():
        values = tensor.detach().float().cpu().contiguous().numpy()
        made = gguf.quantize(values, _type_of(name, tensor, kind))
        writer.write_tensor_data(made)
        if progress is not None:
            progress(made.nbytes)
    writer.close()
    return total


def _type_of(name: str, tensor: Tensor, kind: str) -> Any:
    """How a tensor is stored: norms, biases and positions stay exact, a convolution takes only two types."""
    from gguf import GGMLQuantizationType as Types

    if tensor.ndim == 1 or name in ("v.position_embd.weight", "v.class_embd"):
        return Types.F32
    if tensor.ndim > 2:
        return Types.F32 if kind == "float32" else Types.F16
    if kind == "q8_0" and tensor.shape[-1] % QUANTISED:
        return Types.F16
    return {"float32": Types.F32, "float16": Types.F16, "bfloat16": Types.BF16, "q8_0": Types.Q8_0}[kind]


def _check(name: str, tensor: Tensor, stored: Any) -> None:
    from gguf import GGMLQuantizationType as Types

    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")
    if stored == Types.F16 and tensor.numel() and float(tensor.abs().max()) > torch.finfo(torch.float16).max:
        raise CheckpointError(f"{name} holds values past half precision's 65504: write float32 or bfloat16")
